//! What calls of operators have in common with all others: deadlines, and a server that stops.

use std::time::Duration;

use data_queue_proto::reason;
use data_queue_proto::v1::{GetServerInfoRequest, ListQueuesRequest};
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use super::SERVICE;
use crate::support::{
    PATIENCE,
    call::{get_queue_request, insert_json},
    on_every_store, poll_until,
    raw::{Connection, grpc_timeout},
    status::{Details, Refusal},
    unique_queue,
};
on_every_store! {
    /// Row 37 for administration: a deadline that has passed, and one that cannot be read.
    async fn deadlines_of_admin_calls(backend) {
        let server = backend.start(&[]).await;
        let connection = Connection::open(server.address()).await;
        let soon = grpc_timeout(Duration::from_nanos(1));
        let queue = get_queue_request("any");
        for method in ["GetQueue", "ListQueues", "GetServerInfo"] {
            let path = format!("/{SERVICE}/{method}");
            let call = async |timeout: &str| connection.call(&path, &[("grpc-timeout", timeout)], &queue).await.status().await;
            let passed = call(&soon).await;
            assert_eq!((passed.code(), passed.reason()), (Code::DeadlineExceeded, None), "{method}: {passed:?}");
            let refusal = Refusal::of(Code::InvalidArgument, reason::TIMEOUT_INVALID);
            refusal.check(method, Err::<(), _>(call("abc").await));
        }
    }

    /// G16: when the server stops, calls of operators are refused as others are, and one that is under way is answered.
    async fn admin_calls_of_a_server_that_stops(backend) {
        let server = backend.start(&["--grace", "60s"]).await;
        let mut client = server.client().await;
        assert_eq!(server.health(SERVICE).await, ServingStatus::Serving);
        let queue = unique_queue("stopping");
        insert_json(&mut client, &queue, &["1"]).await;
        let connection = Connection::without_window(server.address()).await;
        let under_way = connection.call(&format!("/{SERVICE}/GetServerInfo"), &[], &GetServerInfoRequest {}).await;
        server.terminate();
        poll_until("the server to stop", PATIENCE, async || {
            (server.health(SERVICE).await == ServingStatus::NotServing).then_some(())
        })
        .await;
        let refusal = Refusal::of(Code::Unavailable, reason::SHUTTING_DOWN);
        for mut client in [client, server.client().await] {
            let admin = &mut client.admin;
            let answers = [
                ("GetQueue", admin.get_queue(get_queue_request(&queue)).await.map(drop)),
                ("ListQueues", admin.list_queues(ListQueuesRequest::default()).await.map(drop)),
                ("GetServerInfo", admin.get_server_info(GetServerInfoRequest {}).await.map(drop)),
            ];
            for (method, answer) in answers {
                let status = refusal.check(method, answer);
                assert!(status.retry_delay().is_some(), "{method}: no RetryInfo in {status:?}");
            }
        }
        under_way.cancel();
        assert_eq!(server.wait_exit(PATIENCE).code(), Some(0));
    }
}
