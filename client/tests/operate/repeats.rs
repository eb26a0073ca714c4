//! Which calls of operators are made again when nobody knows what became of them.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use data_queue_client::{Admin, Client, Error, ErrorKind, Page, SettingsUpdate, TaskState, Watch};
use data_queue_proto::v1::{
    self,
    queue_admin_server::{QueueAdmin, QueueAdminServer},
};
use tokio::net::TcpListener;
use tokio_stream::{Stream, wrappers::TcpListenerStream};
use tonic::{Request, Response, Status, transport::Server};

/// Every call fails on its way, and is counted.
#[derive(Clone, Default)]
struct Broken(Arc<AtomicU32>);

impl Broken {
    async fn serve(&self) -> Admin {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = Server::builder().add_service(QueueAdminServer::new(self.clone()));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        Client::builder().retry_budget(100).deadline(Duration::from_secs(30)).connect(&address).unwrap().admin()
    }

    /// The third time says that it is no use.
    fn fail(&self) -> Status {
        match self.0.fetch_add(1, Ordering::Relaxed) {
            0 | 1 => Status::unavailable("broken"),
            _ => Status::permission_denied("no more"),
        }
    }

    #[track_caller]
    fn tried<T: std::fmt::Debug>(&self, answer: Result<T, Error>, tries: u32) {
        let kind = if tries == 1 { ErrorKind::Unavailable } else { ErrorKind::Refused };
        assert_eq!((answer.unwrap_err().kind(), self.0.swap(0, Ordering::Relaxed)), (kind, tries));
    }
}

#[tokio::test]
async fn what_is_the_same_twice_as_once_is_repeated_and_nothing_else() {
    let broken = Broken::default();
    let admin = broken.serve().await;
    broken.tried(admin.get_queue("q").await, 3);
    broken.tried(admin.list_queues(&Page::first()).await, 3);
    broken.tried(admin.update_queue("q", SettingsUpdate::new().max_tasks(1)).await, 3);
    broken.tried(admin.pause("q").await, 3);
    broken.tried(admin.resume("q").await, 3);
    broken.tried(admin.list_tasks("q", TaskState::Ready, &Page::first()).await, 3);
    broken.tried(admin.get_task("q", "id").await, 3);
    broken.tried(admin.delete_tasks("q", ["id"]).await, 3);
    broken.tried(admin.redrive("q", ["id"]).await, 3);
    broken.tried(admin.import("q", []).await, 3);
    broken.tried(admin.watch_queues(Watch::all()).await, 3);
    // A second time these would meet what came after the first.
    broken.tried(admin.delete_queue("q", true).await, 1);
    broken.tried(admin.purge("q", [TaskState::Ready]).await, 1);
    broken.tried(admin.redrive_oldest("q", 1).await, 1);
    broken.tried(admin.redrive_all("q").await, 1);
}

#[tonic::async_trait]
impl QueueAdmin for Broken {
    async fn get_queue(&self, _: Request<v1::GetQueueRequest>) -> Result<Response<v1::GetQueueResponse>, Status> {
        Err(self.fail())
    }

    async fn list_queues(&self, _: Request<v1::ListQueuesRequest>) -> Result<Response<v1::ListQueuesResponse>, Status> {
        Err(self.fail())
    }

    async fn update_queue(
        &self,
        _: Request<v1::UpdateQueueRequest>,
    ) -> Result<Response<v1::UpdateQueueResponse>, Status> {
        Err(self.fail())
    }

    async fn delete_queue(
        &self,
        _: Request<v1::DeleteQueueRequest>,
    ) -> Result<Response<v1::DeleteQueueResponse>, Status> {
        Err(self.fail())
    }

    async fn purge_queue(&self, _: Request<v1::PurgeQueueRequest>) -> Result<Response<v1::PurgeQueueResponse>, Status> {
        Err(self.fail())
    }

    async fn pause_queue(&self, _: Request<v1::PauseQueueRequest>) -> Result<Response<v1::PauseQueueResponse>, Status> {
        Err(self.fail())
    }

    async fn resume_queue(
        &self,
        _: Request<v1::ResumeQueueRequest>,
    ) -> Result<Response<v1::ResumeQueueResponse>, Status> {
        Err(self.fail())
    }

    async fn list_tasks(&self, _: Request<v1::ListTasksRequest>) -> Result<Response<v1::ListTasksResponse>, Status> {
        Err(self.fail())
    }

    async fn get_task(&self, _: Request<v1::GetTaskRequest>) -> Result<Response<v1::GetTaskResponse>, Status> {
        Err(self.fail())
    }

    async fn delete_tasks(
        &self,
        _: Request<v1::DeleteTasksRequest>,
    ) -> Result<Response<v1::DeleteTasksResponse>, Status> {
        Err(self.fail())
    }

    async fn import_tasks(
        &self,
        _: Request<v1::ImportTasksRequest>,
    ) -> Result<Response<v1::ImportTasksResponse>, Status> {
        Err(self.fail())
    }

    async fn redrive_tasks(
        &self,
        _: Request<v1::RedriveTasksRequest>,
    ) -> Result<Response<v1::RedriveTasksResponse>, Status> {
        Err(self.fail())
    }

    async fn get_server_info(
        &self,
        _: Request<v1::GetServerInfoRequest>,
    ) -> Result<Response<v1::GetServerInfoResponse>, Status> {
        Err(self.fail())
    }

    type WatchQueuesStream = Pin<Box<dyn Stream<Item = Result<v1::WatchQueuesResponse, Status>> + Send>>;

    async fn watch_queues(
        &self,
        _: Request<v1::WatchQueuesRequest>,
    ) -> Result<Response<Self::WatchQueuesStream>, Status> {
        Err(self.fail())
    }
}
