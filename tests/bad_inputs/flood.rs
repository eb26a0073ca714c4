//! Frames in such numbers that they are meant to hurt. Others are served meanwhile, and the server's memory stays as it is.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use data_queue_proto::v1::Outcome;
use prost::Message;
use tokio::{io::AsyncWriteExt, time::timeout};

use crate::support::{
    PATIENCE,
    call::{Witness, ack, insert_json, pop_request, pop_waiting},
    http2::{
        CANCEL, CONTINUATION, DATA, END_HEADERS, END_STREAM, ENHANCE_YOUR_CALM, HEADERS, PING, PREFACE, REFUSED_STREAM,
        RST_STREAM, SETTINGS, Seen, Wire, call_headers, frame, literal,
    },
    memory, raw, rounds,
    server::{Backend, Client, Server},
    unique_queue, wire_tests,
};

const POP: &str = "/dataqueue.v1.DataQueue/Pop";
/// How much the server's memory may grow.
const ROOM: u64 = 64 << 20;
/// How many times at least, and how long at least.
type Extent = (usize, Duration);
const ONCE: Extent = (10_000, Duration::ZERO);
/// Sent with one write.
const AT_ONCE: usize = 500;

/// Another client's calls, one after the other, until it is told to stop. Each must succeed.
async fn other_calls(mut client: Client, stop: Arc<AtomicBool>) -> usize {
    let queue = unique_queue("other");
    let mut done = 0;
    loop {
        insert_json(&mut client, &queue, &["1"]).await;
        let task = pop_waiting(&mut client, &queue).await;
        assert_eq!(ack(&mut client, &queue, &task.lease_token).await, Outcome::Applied);
        done += 1;
        if stop.load(Ordering::Relaxed) {
            return done;
        }
    }
}

/// Sends what `make` makes of 0, 1, 2 and so on, on a new connection whenever the server has closed the last one, as fast as
/// it goes. Gives what the server said on each.
async fn flood(server: &Server, (times, time): Extent, opening: &[u8], make: impl Fn(usize) -> Vec<u8>) -> Vec<Seen> {
    let mut seen = Vec::new();
    let mut sent = 0;
    let end = Instant::now() + time;
    let enough = |sent| sent >= times && Instant::now() >= end;
    while !enough(sent) {
        let mut wire = Wire::open(server.address()).await;
        let mut open = wire.send(opening).await;
        let mut number = 0;
        while open && !enough(sent) {
            let bytes = (number..number + AT_ONCE).flat_map(&make).collect::<Vec<_>>();
            open = wire.send(&bytes).await;
            number += AT_ONCE;
            sent += AT_ONCE;
        }
        seen.push(wire.end().await);
    }
    seen
}

/// 10,000 a second at least, for a time.
fn sustained() -> Extent {
    let seconds = rounds(2, 10);
    (10_000 * seconds, Duration::from_secs(seconds as u64))
}

/// One flood, and what must hold whatever it is.
async fn harms_nobody(backend: Backend, extent: Extent, opening: &[u8], make: impl Fn(usize) -> Vec<u8>) -> Vec<Seen> {
    let server = backend.start(&[]).await;
    let mut client = server.client().await;
    let mut witness = Witness::new(&mut client).await;
    let lines = server.log().lines().count();
    let stop = Arc::new(AtomicBool::new(false));
    let others = tokio::spawn(other_calls(server.client().await, Arc::clone(&stop)));
    memory::forget_peak(server.pid());
    let before = memory::peak(server.pid());
    let seen = flood(&server, extent, opening, make).await;
    stop.store(true, Ordering::Relaxed);
    let done = others.await.expect("the calls of another client");
    let grown = memory::peak(server.pid()).saturating_sub(before);
    let last = seen.last().map(|last| (last.goaway, last.resets.len(), last.acks));
    println!("{} connections, {done} calls beside them, {} KiB more, the last: {last:?}", seen.len(), grown >> 10);
    assert!(grown < ROOM, "took {grown} bytes more");
    witness.unchanged(&mut client, "a flood").await;
    assert_eq!(server.log().lines().count(), lines, "{}", server.log());
    seen
}

fn stream(number: usize) -> u32 {
    u32::try_from(2 * number + 1).unwrap()
}

fn reset(number: usize) -> Vec<u8> {
    frame(RST_STREAM, 0, stream(number), &CANCEL.to_be_bytes())
}

fn calmed(seen: &[Seen]) -> bool {
    seen.iter().any(|seen| seen.goaway == Some(ENHANCE_YOUR_CALM))
}

wire_tests! {
    /// Row 43: so many streams at once, each a call that waits for its message: those over the limit are refused.
    async fn row_43_streams() {
        let headers = call_headers(POP);
        let seen = harms_nobody(Backend::Memory, ONCE, &[], |number| frame(HEADERS, END_HEADERS, stream(number), &headers)).await;
        let refused = |seen: &Seen| seen.resets.contains(&REFUSED_STREAM) || seen.goaway == Some(ENHANCE_YOUR_CALM);
        assert!(seen.iter().any(refused), "{seen:?}");
    }

    /// Row 43: streams that are begun and reset.
    async fn row_43_resets() {
        let headers = call_headers(POP);
        harms_nobody(Backend::Memory, sustained(), &[], |number| {
            [frame(HEADERS, END_HEADERS, stream(number), &headers), reset(number)].concat()
        })
        .await;
    }

    /// Row 43: a header that does not end.
    async fn row_43_continuations() {
        let opening = frame(HEADERS, 0, 1, &call_headers(POP));
        let more = frame(CONTINUATION, 0, 1, &literal("x-more", "and more"));
        let seen = harms_nobody(Backend::Memory, sustained(), &opening, |_| more.clone()).await;
        assert!(calmed(&seen), "{seen:?}");
    }

    /// Row 43: a body of nothing that does not end.
    async fn row_43_empty_data() {
        let opening = frame(HEADERS, END_HEADERS, 1, &call_headers(POP));
        let seen = harms_nobody(Backend::Memory, sustained(), &opening, |_| frame(DATA, 0, 1, &[])).await;
        assert!(calmed(&seen), "{seen:?}");
    }

    /// Row 43: pings.
    async fn row_43_pings() {
        harms_nobody(Backend::Memory, sustained(), &[], |_| frame(PING, 0, 0, b"a ping  ")).await;
    }

    /// Row 43: settings.
    async fn row_43_settings() {
        harms_nobody(Backend::Memory, sustained(), &[], |_| frame(SETTINGS, 0, 0, &[])).await;
    }
}

wire_tests! {
    /// Row 43: pings from a client that reads nothing: it is cut off, as one that is gone.
    async fn row_43_pings_whose_answers_are_not_read() {
        let server = Backend::Memory.start(&["--keepalive-interval", "1s", "--keepalive-timeout", "1s"]).await;
        let mut socket = tokio::net::TcpStream::connect(server.address()).await.unwrap();
        let pings = frame(PING, 0, 0, b"a ping  ").repeat(AT_ONCE);
        let cut_off = async {
            socket.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()).await.unwrap();
            while socket.write_all(&pings).await.is_ok() {}
        };
        timeout(PATIENCE, cut_off).await.expect("to be cut off");
    }
}

crate::support::on_every_store! {
    /// Row 43: pops that are made and cancelled at once.
    async fn row_43_cancelled_calls(backend) {
        let headers = call_headers(POP);
        let message = raw::frame(0, &pop_request(&unique_queue("flood")).encode_to_vec());
        harms_nobody(backend, sustained(), &[], |number| {
            let headers = frame(HEADERS, END_HEADERS, stream(number), &headers);
            [headers, frame(DATA, END_STREAM, stream(number), &message), reset(number)].concat()
        })
        .await;
    }
}
