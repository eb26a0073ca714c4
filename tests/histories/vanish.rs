//! Callers that vanish while their pop waits: the socket is closed, and nothing else is said.

use std::{
    io::Read,
    net::{Shutdown, SocketAddr, TcpStream as StdStream},
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use data_queue_proto::v1::PopRequest;
use h2::client::{Builder, ResponseFuture, SendRequest};
use http::Request;
use prost::Message;
use tokio::{
    net::TcpStream,
    task::{JoinHandle, spawn_blocking},
    time::{sleep, timeout},
};

use super::random::Random;
use crate::support::{
    PATIENCE,
    call::{ack, insert_json, pop, pop_request, proto},
    poll_until, rounds,
    server::{Backend, Client},
    unique_queue, wire_tests,
};

/// Far more than it takes to give a task back.
const LEASE: Duration = Duration::from_secs(30);
/// Far less than the lease.
const AT_ONCE: Duration = Duration::from_secs(10);

/// A caller whose pop is under way.
struct Caller {
    driver: JoinHandle<Result<(), h2::Error>>,
    /// The same socket once more.
    socket: StdStream,
    _call: (SendRequest<Bytes>, ResponseFuture),
}

impl Caller {
    /// Sends a pop and does not wait for anything.
    async fn pop(address: SocketAddr, queue: &str, window: Option<u32>) -> Self {
        let socket = TcpStream::connect(address).await.unwrap().into_std().unwrap();
        let twin = socket.try_clone().unwrap();
        let mut builder = Builder::new();
        if let Some(window) = window {
            builder.initial_window_size(window);
        }
        let (requests, connection) = builder.handshake(TcpStream::from_std(socket).unwrap()).await.unwrap();
        let driver = tokio::spawn(connection);
        let uri = format!("http://{address}/dataqueue.v1.DataQueue/Pop");
        let head = Request::post(uri).header("content-type", "application/grpc").header("te", "trailers");
        let mut requests = requests.ready().await.unwrap();
        let (answer, mut body) = requests.send_request(head.body(()).unwrap(), false).unwrap();
        let (lease, wait) = (Some(proto(LEASE)), Some(proto(PATIENCE)));
        let message = PopRequest { lease, wait, ..pop_request(queue) }.encode_to_vec();
        let mut frame = BytesMut::new();
        frame.put_u8(0);
        frame.put_u32(u32::try_from(message.len()).unwrap());
        frame.put_slice(&message);
        body.send_data(frame.freeze(), true).unwrap();
        Self { driver, socket: twin, _call: (requests, answer) }
    }

    /// Closes the socket.
    async fn vanish(self) {
        self.driver.abort();
        let _ = self.driver.await;
    }

    /// Says that nothing more will come, and waits until the server has closed the connection, too.
    async fn leave(self) {
        self.driver.abort();
        let _ = self.driver.await;
        let mut socket = self.socket;
        socket.shutdown(Shutdown::Write).unwrap();
        socket.set_nonblocking(false).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        spawn_blocking(move || socket.read_to_end(&mut Vec::new()).expect("an end of the connection")).await.unwrap();
    }
}

/// Pops once a task is there, and says how it was delivered before: deliveries and expiries, this one not counted.
async fn delivered_before(client: &mut Client, queue: &str, id: &str) -> (u32, u32) {
    let task = poll_until("the task", LEASE * 2, async || pop(client, queue).await).await;
    assert_eq!(task.id, id);
    ack(client, queue, &task.lease_token).await;
    assert_eq!(pop(client, queue).await, None, "there were two");
    (task.deliveries - 1, task.expiries)
}

wire_tests! {
    /// G8, G11: who vanished before the insert, and whose leaving the server has seen, takes nothing.
    async fn a_caller_that_vanished_before_the_insert() {
        let server = Backend::Redis.start(&[]).await;
        let mut client = server.client().await;
        let mut random = Random::new("before the insert");
        for round in 0..rounds(40, 400) {
            let queue = unique_queue("vanish");
            let caller = Caller::pop(server.address(), &queue, None).await;
            sleep(random.up_to(Duration::from_millis(5))).await;
            caller.leave().await;
            let ids = insert_json(&mut client, &queue, &["1", "2"]).await;
            for id in ids {
                let task = pop(&mut client, &queue).await.expect("a task that nobody took");
                assert_eq!((task.id, task.deliveries, task.expiries), (id, 1, 0), "round {round}");
            }
        }
    }

    /// G8, G11: a task that was leased for a caller who then vanished, and who had no room for the answer, is back at the
    /// head at once, uncounted.
    async fn a_caller_that_vanishes_with_its_answer_on_the_way() {
        let server = Backend::Redis.start(&[]).await;
        let mut client = server.client().await;
        let mut random = Random::new("with its answer on the way");
        for round in 0..rounds(40, 400) {
            let queue = unique_queue("vanish");
            let caller = Caller::pop(server.address(), &queue, Some(0)).await;
            sleep(random.up_to(Duration::from_millis(5))).await;
            let ids = insert_json(&mut client, &queue, &["1", "2"]).await;
            sleep(random.up_to(Duration::from_millis(5))).await;
            if random.chance(500) { caller.vanish().await } else { caller.leave().await }
            // The first to come may be the second, while the first is on its way back: then the first is next.
            let mut seen = Vec::new();
            for _ in 0..2 {
                let task = timeout(AT_ONCE, poll_until("a task", LEASE, async || pop(&mut client, &queue).await)).await;
                let task = task.unwrap_or_else(|_| panic!("round {round}: not back after {AT_ONCE:?}"));
                assert_eq!((task.deliveries, task.expiries), (1, 0), "round {round}");
                seen.push(task.id);
            }
            seen.sort();
            let mut ids = ids;
            ids.sort();
            assert_eq!(seen, ids, "round {round}");
        }
    }

    /// G1, G8, G14: the insert and the end of the caller race. The task is ready again at once and uncounted, or it was
    /// handed over and comes back when its lease has run out, counted; never neither, and never both.
    async fn a_caller_that_vanishes_while_the_insert_comes() {
        let server = Backend::Redis.start(&[]).await;
        let mut client = server.client().await;
        let mut random = Random::new("while the insert comes");
        let (mut late, all) = (Vec::new(), rounds(80, 800));
        for round in 0..all {
            let queue = unique_queue("vanish");
            let caller = Caller::pop(server.address(), &queue, None).await;
            sleep(random.up_to(Duration::from_millis(3))).await;
            let mut inserting = client.clone();
            let (insert_after, vanish_after) = (random.up_to(Duration::from_millis(3)), random.up_to(Duration::from_millis(3)));
            let insert = async {
                sleep(insert_after).await;
                insert_json(&mut inserting, &queue, &["1"]).await
            };
            let vanish = async {
                sleep(vanish_after).await;
                caller.vanish().await;
            };
            let (ids, ()) = tokio::join!(insert, vanish);
            // A pop that does not wait: if nothing is there, the answer is on its way, or was handed over.
            match pop(&mut client, &queue).await {
                Some(task) => {
                    assert_eq!((&task.id, task.deliveries, task.expiries), (&ids[0], 1, 0), "round {round}");
                    assert_eq!(pop(&mut client, &queue).await, None, "round {round}: there were two");
                }
                None => late.push((round, queue, ids[0].clone())),
            }
        }
        let (mut handed_over, mut given_back) = (0, 0);
        for (round, queue, id) in &late {
            match delivered_before(&mut client, queue, id).await {
                (0, 0) => given_back += 1,
                (1, 1) => handed_over += 1,
                other => panic!("round {round}: {other:?}"),
            }
        }
        println!("of {all}: {given_back} given back, {handed_over} handed over, the others never taken");
    }
}
