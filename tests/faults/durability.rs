//! What is on the disk when a call is answered, seen in the server's system calls.

use std::time::{Duration, Instant};

use data_queue_proto::v1::{InsertRequest, Outcome, PopRequest};

use crate::support::{
    call::{
        ack, heartbeat, held_for_request, insert_json, insert_request, json, pop, pop_for, pop_request, proto, putback,
    },
    embedded::Embedded,
    server::Client,
    strace::Strace,
    unique_queue, wire_tests,
};

/// Each sync begins so late, so that an answer that does not wait for it is there long before.
const DELAY: Duration = Duration::from_millis(50);
const CALLS: usize = 10;

/// What a lone call did to the log of changes before it was answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Seen {
    writes: usize,
    syncs: usize,
    /// Nothing was written behind the last sync.
    all_synced: bool,
}

/// A server whose system calls are watched, and the only caller that it has.
struct Watched {
    server: Embedded,
    client: Client,
    strace: Strace,
    seen: usize,
}

impl Watched {
    async fn start(durability: &str) -> Self {
        let server = Embedded::start(&["--durability", durability]).await;
        let mut client = server.client().await;
        // What the first change of all does besides is none of this.
        insert_json(&mut client, "first", &["1"]).await;
        let delay = format!("inject=fsync,fdatasync:delay_enter={}", DELAY.as_micros());
        let strace = server.strace(&["-y", "-e", "trace=write,pwrite64,fsync,fdatasync", "-e", &delay]);
        Self { server, client, strace, seen: 0 }
    }

    /// What the calls since the last time did.
    fn look(&mut self) -> Seen {
        let calls = self.strace.calls();
        let mut seen = Seen { all_synced: true, ..Seen::default() };
        for call in calls[self.seen..].iter().filter(|call| call.contains("-wal>")) {
            let done = !call.contains(") = -") && !call.contains(") = ?");
            if call.starts_with("write") || call.starts_with("pwrite64") {
                seen.writes += 1;
                seen.all_synced = false;
            } else if done {
                seen.syncs += 1;
                seen.all_synced = true;
            }
        }
        self.seen = calls.len();
        seen
    }

    /// What one call did.
    async fn seen(&mut self, call: impl AsyncFnOnce(&mut Client)) -> (Seen, Duration) {
        self.look();
        let began = Instant::now();
        call(&mut self.client).await;
        let took = began.elapsed();
        (self.look(), took)
    }
}

/// Runs every kind of call that changes something on its own, some times, and gives what each did.
async fn every_change(watched: &mut Watched) -> Vec<(&'static str, Seen, Duration)> {
    let queue = &unique_queue("synced");
    let lease = Duration::from_secs(3_600);
    let mut all = Vec::new();
    for number in 0..CALLS {
        let request_id = format!("insert-{number}");
        let request = InsertRequest { request_id, ..insert_request(queue, vec![json("1"), json("2"), json("3")]) };
        let insert = async |client: &mut Client| drop(client.insert(request).await.expect("an insert"));
        all.push(("insert", watched.seen(insert).await));
        let mut token = pop_for(&mut watched.client, queue, lease).await.lease_token;
        let back = async |client: &mut Client| assert_eq!(putback(client, queue, &token).await, Outcome::Applied);
        all.push(("putback", watched.seen(back).await));
        token = pop_for(&mut watched.client, queue, lease).await.lease_token;
        let done = async |client: &mut Client| assert_eq!(ack(client, queue, &token).await, Outcome::Applied);
        all.push(("ack", watched.seen(done).await));
        token = pop_for(&mut watched.client, queue, lease).await.lease_token;
        let request = PopRequest { ack_lease_tokens: vec![token], lease: Some(proto(lease)), ..pop_request(queue) };
        let next = async |client: &mut Client| drop(client.pop(request).await.expect("a pop"));
        all.push(("pop with an ack", watched.seen(next).await));
        let request = held_for_request(queue, proto(Duration::ZERO));
        let held = async |client: &mut Client| {
            assert_eq!(client.putback(request).await.expect("a putback").into_inner().put_back, 1);
        };
        all.push(("putback by held_for", watched.seen(held).await));
        let last = pop_for(&mut watched.client, queue, lease).await.lease_token;
        assert_eq!(ack(&mut watched.client, queue, &last).await, Outcome::Applied);
    }
    all.into_iter().map(|(name, (seen, took))| (name, seen, took)).collect()
}

wire_tests! {
    /// G1, G7: with --durability full, OK on an insert, an ack or a putback comes only when the log of changes has been
    /// written and then synced. So it survives a power cut, if the disk keeps what it says it synced.
    async fn full_syncs_the_log_before_each_ok() {
        let mut watched = Watched::start("full").await;
        for (name, seen, took) in every_change(&mut watched).await {
            assert!(seen.writes > 0 && seen.syncs > 0 && seen.all_synced, "{name}: {seen:?} after {took:?}");
            assert!(took >= DELAY, "{name}: answered after {took:?}, before the sync was done: {seen:?}");
        }
        // A lone pop, or a heartbeat, changes nothing that a power cut must not undo.
        let queue = &unique_queue("popped");
        insert_json(&mut watched.client, queue, &["1"; CALLS]).await;
        for _ in 0..CALLS {
            let (seen, took) = watched.seen(async |client| {
                let task = pop(client, queue).await.expect("a task");
                assert_eq!(heartbeat(client, queue, &task.lease_token).await, Outcome::Applied);
            }).await;
            println!("pop and heartbeat: {seen:?}, {took:?}");
            assert_eq!(seen.syncs, 0, "{seen:?}");
        }
        watched.strace.detach();
        watched.server.kill_and_check();
    }

    /// With less durability nothing is synced before an answer: what survives a power cut is not promised.
    async fn less_durability_does_not_sync_before_an_answer() {
        for durability in ["normal", "memory"] {
            let mut watched = Watched::start(durability).await;
            let all = every_change(&mut watched).await;
            let syncs = all.iter().map(|(_, seen, _)| seen.syncs).sum::<usize>();
            println!("{durability}: {syncs} syncs in {} calls", all.len());
            assert_eq!(syncs, 0, "{durability}: {all:?}");
            assert!(all.iter().all(|(_, seen, _)| seen.writes > 0), "{durability}: not seen: {all:?}");
            watched.strace.detach();
            watched.server.kill_and_check();
        }
    }
}
