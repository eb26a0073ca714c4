//! The calls of operators.
//!
//! `queues` is what they tell of queues, `settings` what is set for one, `tasks` tasks as nobody delivers them, and `watch` counts
//! that come again and again.

mod queues;
mod settings;
mod tasks;
mod watch;

use std::{future::Future, sync::Arc, time::Duration};

use data_queue_proto::v1::{self, queue_admin_client::QueueAdminClient, redrive_tasks_request::Selection};
use tokio::time::Instant;
use tonic::{Request, Response, Status, transport::Channel};

pub use self::{
    queues::{QueueActivity, QueueCounts, QueueInfo},
    settings::{QueueSettings, SettingsUpdate},
    tasks::{DeadLetterCause, DeleteOutcome, Imported, RedriveOutcome, Redriven, TaskInfo, TaskState, TaskValue},
    watch::{ActivityStream, Watch},
};
use crate::{
    Error, Result,
    client::{collect, timed},
    retry::{Budget, Repeat},
};

/// Where a list is read on. Lists come in pages; each tells where the next one begins.
///
/// ```no_run
/// # async fn example(admin: data_queue_client::Admin) -> data_queue_client::Result<()> {
/// use data_queue_client::Page;
///
/// let mut next = Some(Page::first());
/// while let Some(page) = next {
///     let found = admin.list_queues(&page).await?;
///     found.items.iter().for_each(|queue| println!("{}: {} ready", queue.name, queue.counts.ready));
///     next = found.next;
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Page {
    size: u32,
    token: String,
}

impl Page {
    /// The beginning of a list.
    pub fn first() -> Self {
        Self::default()
    }

    /// What follows a page, by its token: that of [`Page::token`] of [`Paged::next`].
    pub fn after(token: impl Into<String>) -> Self {
        Self { size: 0, token: token.into() }
    }

    /// How many items a page has at the most: of queues up to 1,000, of tasks up to 200; more counts as that. It may have fewer,
    /// even none, though more pages follow. Default, and for 0: 100.
    pub fn size(mut self, items: u32) -> Self {
        self.size = items;
        self
    }

    /// Where the page begins, to be kept. Empty: at the beginning of the list.
    #[must_use]
    pub fn token(&self) -> &str {
        &self.token
    }

    fn message_size(&self) -> i32 {
        i32::try_from(self.size).unwrap_or(i32::MAX)
    }

    fn next(&self, token: String) -> Option<Self> {
        (!token.is_empty()).then_some(Self { size: self.size, token })
    }
}

/// A page of a list.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Paged<T> {
    /// What is on it, in the order of the list.
    pub items: Vec<T>,
    /// The next page, of the same size. `None` on the last one.
    pub next: Option<Page>,
}

/// The calls of operators: queues with their counts and settings, and tasks that nobody delivers. Made by
/// [`Client::admin`](crate::Client::admin); clones share the connection, the retry budget and the deadline of that client.
///
/// What does the same thing twice as once is repeated where needed, as other calls are; each call says so. The others are repeated
/// only as long as they were not sent: after an error that [is retriable](Error::is_retriable) they may have taken effect.
///
/// Besides what is named at each call, its errors are the kinds of any call; [`ErrorKind::NotFound`](crate::ErrorKind::NotFound)
/// says that there is no such queue, or no such task in it.
#[derive(Clone, Debug)]
pub struct Admin {
    grpc: QueueAdminClient<Channel>,
    budget: Arc<Budget>,
    deadline: Duration,
}

impl Admin {
    pub(crate) fn new(grpc: QueueAdminClient<Channel>, budget: Arc<Budget>, deadline: Duration) -> Self {
        Self { grpc, budget, deadline }
    }

    /// Tells the settings of one queue, and counts its tasks, at one moment. Repeated where needed.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) if nothing was ever inserted or set under this name.
    pub async fn get_queue(&self, queue: &str) -> Result<QueueInfo> {
        let message = v1::GetQueueRequest { queue: queue.to_owned() };
        let get = |mut grpc: Grpc, request| async move { grpc.get_queue(request).await };
        let answer = self.call(Repeat::Always, message, get).await?;
        answer.queue.map(QueueInfo::from).ok_or_else(|| Error::internal("the server answered no queue"))
    }

    /// Lists all queues with their counts, in the order of their names' bytes. Their settings are told by [`Admin::get_queue`].
    /// Repeated where needed.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) for a page that no list gave.
    pub async fn list_queues(&self, page: &Page) -> Result<Paged<QueueInfo>> {
        let message = v1::ListQueuesRequest { page_size: page.message_size(), page_token: page.token.clone() };
        let list = |mut grpc: Grpc, request| async move { grpc.list_queues(request).await };
        let answer = self.call(Repeat::Always, message, list).await?;
        let items = answer.queues.into_iter().map(QueueInfo::from).collect();
        Ok(Paged { items, next: page.next(answer.next_page_token) })
    }

    /// Changes settings of a queue, all that the update names or none; answers all that is set then. Makes the queue if it is not
    /// there. Repeated where needed.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) if the update names nothing, or a value is out of range.
    pub async fn update_queue(&self, queue: &str, update: SettingsUpdate) -> Result<QueueSettings> {
        let (settings, mask) = update.into_message();
        let message =
            v1::UpdateQueueRequest { queue: queue.to_owned(), settings: Some(settings), update_mask: Some(mask) };
        let set = |mut grpc: Grpc, request| async move { grpc.update_queue(request).await };
        let answer = self.call(Repeat::Always, message, set).await?;
        Ok(answer.settings.unwrap_or_default().into())
    }

    /// Deletes a queue: its settings, its counters, what is remembered of it, and with `force` its tasks too. Not repeated once it
    /// was sent: a repeat would delete a queue that was made anew.
    ///
    /// # Errors
    /// [`ErrorKind::QueueNotEmpty`](crate::ErrorKind::QueueNotEmpty) without `force` if it has tasks, dead letters included;
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound).
    pub async fn delete_queue(&self, queue: &str, force: bool) -> Result<()> {
        let message = v1::DeleteQueueRequest { queue: queue.to_owned(), force };
        let delete = |mut grpc: Grpc, request| async move { grpc.delete_queue(request).await };
        self.call(Repeat::IfUnsent, message, delete).await.map(drop)
    }

    /// Removes the tasks of a queue that are in one of these states; answers how many. What comes while it runs may stay. Not
    /// repeated once it was sent: a repeat would remove what came later. It goes step by step: a call that failed may have
    /// removed some.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) without a state;
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound).
    pub async fn purge(&self, queue: &str, states: impl IntoIterator<Item = TaskState>) -> Result<u64> {
        let states = states.into_iter().map(TaskState::code).collect();
        let message = v1::PurgeQueueRequest { queue: queue.to_owned(), states };
        let purge = |mut grpc: Grpc, request| async move { grpc.purge_queue(request).await };
        Ok(self.call(Repeat::IfUnsent, message, purge).await?.purged)
    }

    /// Stops deliveries of a queue: pops find nothing. Inserts go on, and what is held may be finished. Makes the queue if it is
    /// not there. Repeated where needed.
    ///
    /// # Errors
    /// The kinds of any call.
    pub async fn pause(&self, queue: &str) -> Result<()> {
        let message = v1::PauseQueueRequest { queue: queue.to_owned() };
        let pause = |mut grpc: Grpc, request| async move { grpc.pause_queue(request).await };
        self.call(Repeat::Always, message, pause).await.map(drop)
    }

    /// Lets deliveries of a queue go on. Repeated where needed.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound).
    pub async fn resume(&self, queue: &str) -> Result<()> {
        let message = v1::ResumeQueueRequest { queue: queue.to_owned() };
        let resume = |mut grpc: Grpc, request| async move { grpc.resume_queue(request).await };
        self.call(Repeat::Always, message, resume).await.map(drop)
    }

    /// Lists the tasks of a queue in one state, without delivering them: ready ones in the order of their delivery, scheduled ones
    /// by when they fall due, held ones by the ends of their leases, dead letters from the oldest on. A task that stays in its
    /// place from the first page to the last is on exactly one. Repeated where needed.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound); [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) for a
    /// page that no such list gave.
    pub async fn list_tasks(&self, queue: &str, state: TaskState, page: &Page) -> Result<Paged<TaskInfo>> {
        let message = v1::ListTasksRequest {
            queue: queue.to_owned(),
            state: state.code(),
            page_size: page.message_size(),
            page_token: page.token.clone(),
        };
        let list = |mut grpc: Grpc, request| async move { grpc.list_tasks(request).await };
        let answer = self.call(Repeat::Always, message, list).await?;
        let items = answer.tasks.into_iter().map(TaskInfo::receive).collect::<Result<_>>()?;
        Ok(Paged { items, next: page.next(answer.next_page_token) })
    }

    /// Shows one task, without delivering it. Repeated where needed.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound); [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) for
    /// what is no id.
    pub async fn get_task(&self, queue: &str, id: &str) -> Result<TaskInfo> {
        let message = v1::GetTaskRequest { queue: queue.to_owned(), id: id.to_owned() };
        let get = |mut grpc: Grpc, request| async move { grpc.get_task(request).await };
        let answer = self.call(Repeat::Always, message, get).await?;
        TaskInfo::receive(answer.task.ok_or_else(|| Error::internal("the server answered no task"))?)
    }

    /// Deletes tasks by their ids, 1 to 1,000, whatever their state; answers one outcome for each, in order. One that is held is
    /// cancelled: its holder is told, may ack it still, and it is gone when it would go back. Repeated where needed: a repeat
    /// answers [`DeleteOutcome::NotFound`] for what an earlier try, whose answer was lost, deleted.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) for no id, too many, or what is none.
    pub async fn delete_tasks(
        &self,
        queue: &str,
        ids: impl IntoIterator<Item = impl Into<String>>,
    ) -> Result<Vec<DeleteOutcome>> {
        let message = v1::DeleteTasksRequest { queue: queue.to_owned(), ids: collect(ids) };
        let asked = message.ids.len();
        let delete = |mut grpc: Grpc, request| async move { grpc.delete_tasks(request).await };
        let answer = self.call(Repeat::Always, message, delete).await?;
        tasks::each(&answer.outcomes, asked, DeleteOutcome::of)
    }

    /// Makes these dead letters ready again, 1 to 1,000, at the tail and counted anew. Repeated where needed: a repeat answers
    /// [`RedriveOutcome::NotFound`] for what an earlier try, whose answer was lost, made ready.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) for no id, too many, or what is none.
    pub async fn redrive(&self, queue: &str, ids: impl IntoIterator<Item = impl Into<String>>) -> Result<Redriven> {
        let ids = collect(ids);
        let asked = ids.len();
        self.redrive_selected(queue, Selection::Ids(v1::RedriveIds { ids }), asked, Repeat::Always).await
    }

    /// Makes the oldest dead letters ready again, so many at the most, 1 or more. Not repeated once it was sent: a repeat would make
    /// others ready. It goes step by step: a call that failed may have made some ready.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound); [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) for 0.
    pub async fn redrive_oldest(&self, queue: &str, max_tasks: u64) -> Result<Redriven> {
        if max_tasks == 0 {
            return Err(Error::invalid_argument("it is 0: say how many, or take redrive_all", "max_tasks"));
        }
        self.redrive_selected(queue, Selection::MaxTasks(max_tasks), 0, Repeat::IfUnsent).await
    }

    /// Makes all dead letters ready again that are there when the call begins. Otherwise as [`Admin::redrive_oldest`].
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound).
    pub async fn redrive_all(&self, queue: &str) -> Result<Redriven> {
        self.redrive_selected(queue, Selection::MaxTasks(0), 0, Repeat::IfUnsent).await
    }

    async fn redrive_selected(
        &self,
        queue: &str,
        selection: Selection,
        asked: usize,
        repeat: Repeat,
    ) -> Result<Redriven> {
        let message = v1::RedriveTasksRequest { queue: queue.to_owned(), selection: Some(selection) };
        let redrive = |mut grpc: Grpc, request| async move { grpc.redrive_tasks(request).await };
        let v1::RedriveTasksResponse { outcomes, redriven, duplicates } = self.call(repeat, message, redrive).await?;
        Ok(Redriven { outcomes: tasks::each(&outcomes, asked, RedriveOutcome::of)?, redriven, duplicates })
    }

    /// Puts tasks into a queue, 1 to 1,000, as [`Admin::list_tasks`] and [`Admin::get_task`] showed those of another queue, be it another
    /// server's: with their headers, times, counters and errors, and dead letters as such. Answers one result for each, in order.
    /// Ready ones join the tail in the order given; each gets a new id. Tasks that are held cannot be imported: put them back, or wait.
    ///
    /// Repeated where needed, and safe to call again: the server knows a task again that was imported before, as long as it is
    /// there and for at least 5 minutes, and answers the same with [`Imported::replayed`]. Each task is imported on its own: a call that
    /// failed may have imported some.
    ///
    /// A request has at most 4 MiB, unless the server says otherwise: import large tasks in smaller parts.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) for no task, too many, one that is held or
    /// [damaged](TaskInfo::is_damaged), and whatever the server's limits refuse; [`ErrorKind::QueueFull`](crate::ErrorKind::QueueFull)
    /// and [`ErrorKind::StoreFull`](crate::ErrorKind::StoreFull); [`ErrorKind::RequestIdReused`](crate::ErrorKind::RequestIdReused) if
    /// another task of the same id was imported of late.
    pub async fn import(&self, queue: &str, tasks: impl IntoIterator<Item = TaskInfo>) -> Result<Vec<Imported>> {
        let tasks: Vec<v1::TaskInfo> = tasks.into_iter().map(TaskInfo::into_message).collect();
        let asked = tasks.len();
        let message = v1::ImportTasksRequest { queue: queue.to_owned(), tasks };
        let import = |mut grpc: Grpc, request| async move { grpc.import_tasks(request).await };
        let answer = self.call(Repeat::Always, message, import).await?;
        if answer.results.len() != asked {
            return Err(Error::internal("the server answered another number of results than there were tasks"));
        }
        Ok(answer.results.into_iter().map(Imported::of).collect())
    }

    /// The counts of queues again and again, with what became of them since the last time. Opening it is repeated where needed; a
    /// stream that breaks ends with its error, and another one can be opened.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) for more than 100 names, or an interval out of range.
    pub async fn watch_queues(&self, watch: Watch) -> Result<ActivityStream> {
        let message = watch.into_message();
        let deadline = Instant::now() + self.deadline;
        let opened = self.budget.run(deadline, Repeat::Always, |_| {
            let (mut grpc, message) = (self.grpc.clone(), message.clone());
            // No grpc-timeout: it would end the stream.
            async move { grpc.watch_queues(message).await }
        });
        Ok(ActivityStream::new(opened.await?))
    }

    async fn call<M, T, F, Fut>(&self, repeat: Repeat, message: M, attempt: F) -> Result<T>
    where
        M: Clone,
        F: Fn(Grpc, Request<M>) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let deadline = Instant::now() + self.deadline;
        self.budget.run(deadline, repeat, |left| attempt(self.grpc.clone(), timed(message.clone(), left))).await
    }
}

type Grpc = QueueAdminClient<Channel>;
