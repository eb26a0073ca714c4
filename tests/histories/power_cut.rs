//! The power is cut, at any moment. What the server wrote and synced is seen in its system calls, and from that the file is
//! made as a disk may have it then: what was synced, and of what was not, some, in pieces.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use data_queue_proto::v1::{
    AckRequest, GetQueueRequest, InsertRequest, Outcome, PopBatchRequest, Task, queue_admin_client::QueueAdminClient,
};
use tokio::task::JoinSet;

use super::random::Random;
use crate::support::{
    call::{
        ack_request, heartbeat_request, held_for_request, insert_request, json, outcomes, pop_batch, pop_batch_request,
        proto, putback_request, text,
    },
    embedded::{Embedded, FILES},
    rounds,
    server::{Client, Server},
    strace::Strace,
    unique_queue, wire_tests,
};

const CALLERS: usize = 4;
const TURNS: usize = 40;
const SECTOR: usize = 512;

/// What a call did to a file.
enum Change {
    Write { at: usize, bytes: Vec<u8> },
    Truncate(usize),
    Sync,
}

/// A change of one of the files, and where in the trace it was done.
struct Event {
    place: u64,
    file: usize,
    change: Change,
}

impl Event {
    fn of((place, call): (u64, String)) -> Option<Self> {
        let file = FILES.iter().rposition(|name| call.contains(&format!("/{name}>")))?;
        let (name, rest) = call.split_once('(')?;
        let (arguments, result) = rest.rsplit_once(") = ")?;
        assert!(!result.starts_with('-'), "nothing was made to fail: {call:.200}");
        let change = match name {
            "fsync" | "fdatasync" => Change::Sync,
            "ftruncate" => Change::Truncate(arguments.rsplit_once(", ")?.1.parse().unwrap()),
            "pwrite64" => {
                let (rest, at) = arguments.rsplit_once(", ")?;
                let (rest, length) = rest.rsplit_once(", ")?;
                let quoted = rest.split_once(">, \"")?.1;
                let bytes = unescaped(quoted.strip_suffix('"').expect("all of what is written"));
                assert_eq!((bytes.len().to_string().as_str(), length), (result, length), "{call:.200}");
                Change::Write { at: at.parse().unwrap(), bytes }
            }
            _ => panic!("a change that is not understood: {call:.200}"),
        };
        Some(Self { place, file, change })
    }
}

/// Bytes as strace writes them with `-x`: all of them in hexadecimal, or none but a few.
fn unescaped(text: &str) -> Vec<u8> {
    if let Some(hex) = text.strip_prefix("\\x") {
        return hex.split("\\x").map(|byte| u8::from_str_radix(byte, 16).expect("a byte")).collect();
    }
    assert!(!text.contains('\\'), "neither: {text:.100}");
    text.as_bytes().to_vec()
}

/// What the callers were promised. Places are of the trace.
#[derive(Default)]
struct Promises {
    inserts: Vec<(u64, InsertRequest, Vec<String>)>,
    /// By id: the token, the place before the ack was sent, and that behind its answer.
    acks: BTreeMap<String, (String, u64, u64)>,
}

async fn caller(
    mut client: Client,
    strace: Arc<Strace>,
    promises: Arc<Mutex<Promises>>,
    queue: String,
    mut random: Random,
) {
    let name = random.below(u64::MAX);
    for turn in 0..TURNS {
        let value = |number| format!("\"{name}-{turn}-{number}-{}\"", "x".repeat(number * 300));
        let tasks = (0..1 + usize::try_from(random.below(8)).unwrap()).map(|number| json(&value(number))).collect();
        let request = InsertRequest { request_id: format!("{name}-{turn}"), ..insert_request(&queue, tasks) };
        let answer = client.insert(request.clone()).await.expect("an insert").into_inner();
        let ids = answer.results.into_iter().map(|result| result.id).collect();
        promises.lock().unwrap().inserts.push((strace.place(), request, ids));

        let max_tasks = 1 + u32::try_from(random.below(10)).unwrap();
        let lease = Some(proto(Duration::from_secs(3_600)));
        let request = PopBatchRequest { max_tasks, lease, ..pop_batch_request(&queue) };
        let (mut done, mut back) = (Vec::new(), Vec::new());
        for task in pop_batch(&mut client, request).await.expect("a pop") {
            let pile = if random.chance(700) { &mut done } else { &mut back };
            pile.push((task.id, task.lease_token));
        }
        let tokens = |pile: &[(String, String)]| pile.iter().map(|(_, token)| token.clone()).collect::<Vec<_>>();
        if random.chance(300) && !done.is_empty() {
            client.heartbeat(heartbeat_request(&queue, &tokens(&done))).await.expect("a heartbeat");
        }
        if random.chance(700) && !back.is_empty() {
            client.putback(putback_request(&queue, &tokens(&back))).await.expect("a putback");
        }
        if !done.is_empty() {
            let sent = strace.place();
            let answer = client.ack(ack_request(&queue, &tokens(&done))).await.expect("an ack").into_inner();
            assert!(outcomes(&answer.outcomes).iter().all(|outcome| *outcome == Outcome::Applied));
            let answered = strace.place();
            let acked = done.into_iter().map(|(id, token)| (id, (token, sent, answered)));
            promises.lock().unwrap().acks.extend(acked);
        }
    }
}

/// A run that was seen: the files at its beginning, what was done to them, and what was promised.
struct Run {
    queue: String,
    base: [Vec<u8>; 2],
    events: Vec<Event>,
    promises: Promises,
}

impl Run {
    async fn new(durability: &str, random: &mut Random) -> Self {
        let server = Embedded::start(&["--durability", durability]).await;
        // Each write is one page at most.
        let calls = "trace=write,pwrite64,pwritev,ftruncate,fsync,fdatasync";
        let strace = Arc::new(server.strace(&["-y", "-x", "-s", "65536", "-e", calls]));
        let base = FILES.map(|name| server.read(name));
        assert_eq!(strace.place(), 0, "nothing happens by itself");
        let (queue, promises) = (unique_queue("power"), Arc::default());
        let mut callers = JoinSet::new();
        for _ in 0..CALLERS {
            let (strace, promises) = (Arc::clone(&strace), Arc::clone(&promises));
            callers.spawn(caller(server.client().await, strace, promises, queue.clone(), random.fork()));
        }
        while let Some(ended) = callers.join_next().await {
            ended.expect("a caller");
        }
        let events = strace.placed_calls().into_iter().filter_map(Event::of).collect::<Vec<_>>();
        let promises = std::mem::take(&mut *promises.lock().unwrap());
        println!(
            "{durability}: {} inserts, {} acks, {} changes of files, {} syncs",
            promises.inserts.len(),
            promises.acks.len(),
            events.len(),
            events.iter().filter(|event| matches!(event.change, Change::Sync)).count()
        );
        Self { queue, base, events, promises }
    }

    /// The files when the power was cut at this place, as they may be on the disk.
    fn files(&self, place: u64, random: &mut Random) -> [Vec<u8>; 2] {
        let happened = self.events.iter().take_while(|event| event.place <= place).collect::<Vec<_>>();
        let kept = [0, 500, 900, 1_000][usize::try_from(random.below(4)).unwrap()];
        let mut files = self.base.clone();
        for (number, file) in files.iter_mut().enumerate() {
            let mine = happened.iter().filter(|event| event.file == number).collect::<Vec<_>>();
            let synced = mine.iter().rposition(|event| matches!(event.change, Change::Sync));
            let synced = synced.map_or(0, |last| last + 1);
            for (position, event) in mine.iter().enumerate() {
                match &event.change {
                    Change::Sync => {}
                    _ if position >= synced && !random.chance(kept) => {}
                    Change::Truncate(length) => file.resize(*length, 0),
                    Change::Write { at, bytes } => {
                        let torn = position >= synced && random.chance(100);
                        let sectors = random.below(bytes.len().div_ceil(SECTOR) as u64 + 1);
                        let most = if torn { usize::try_from(sectors).unwrap() * SECTOR } else { bytes.len() };
                        let bytes = &bytes[..most.min(bytes.len())];
                        file.resize(file.len().max(at + bytes.len()), 0);
                        file[*at..at + bytes.len()].copy_from_slice(bytes);
                    }
                }
            }
        }
        files
    }

    /// Starts a server on what is left, and gives what is wrong with it: the promises that it does not keep.
    async fn broken(&self, place: u64, files: &[Vec<u8>; 2], random: &mut Random) -> Vec<String> {
        let named = [(FILES[0], &files[0][..]), (FILES[1], &files[1][..])];
        let server = Embedded::start_on(&named, &[]).await;
        let mut client = server.client().await;
        let mut broken = Vec::new();
        let left = self.left(&server, &mut client).await;
        let mut known = BTreeSet::new();
        for (answered, request, ids) in &self.promises.inserts {
            known.extend(ids);
            for (id, task) in ids.iter().zip(&request.tasks) {
                let ack = self.promises.acks.get(id);
                match left.get(id) {
                    Some(found) if json(found) != *task => broken.push(format!("{id} was altered")),
                    Some(_) if ack.is_some_and(|(.., acked)| *acked <= place) => broken.push(format!("{id} is back")),
                    None if *answered <= place && ack.is_none_or(|(_, sent, _)| *sent > place) => {
                        broken.push(format!("{id} is lost"));
                    }
                    _ => {}
                }
            }
            let there = ids.iter().filter(|id| left.contains_key(*id)).count();
            let acks = ids.iter().filter(|id| self.promises.acks.get(*id).is_some_and(|(_, sent, _)| *sent <= place));
            // All of an insert or none: what is not there was acked.
            assert!(there == 0 || there + acks.count() >= ids.len(), "half an insert: {there} of {ids:?}");
            if *answered <= place && random.chance(50) {
                let again = client.insert(request.clone()).await.expect("an insert").into_inner();
                let again_ids = again.results.iter().map(|result| &result.id);
                if !again.replayed || !again_ids.eq(ids) {
                    broken.push(format!("{} was forgotten", request.request_id));
                }
            }
        }
        let strange = left.keys().find(|id| !known.contains(id));
        assert_eq!(strange, None, "never inserted");
        for (id, (token, _, acked)) in &self.promises.acks {
            if *acked <= place && random.chance(50) {
                let request = AckRequest { queue: self.queue.clone(), lease_tokens: vec![token.clone()] };
                let again = client.ack(request).await.expect("an ack").into_inner();
                if outcomes(&again.outcomes) != [Outcome::AlreadyAcked] {
                    broken.push(format!("the ack of {id} was forgotten"));
                }
            }
        }
        server.kill_and_check();
        broken
    }

    /// Every task that is there, by its id.
    async fn left(&self, server: &Server, client: &mut Client) -> BTreeMap<String, String> {
        let mut admin = QueueAdminClient::new(server.channel().await);
        let Ok(counted) = admin.get_queue(GetQueueRequest { queue: self.queue.clone() }).await else {
            return BTreeMap::new();
        };
        let counts = counted.into_inner().queue.expect("a queue").counts.expect("counts");
        assert_eq!(counts.inserted, counts.ready + counts.leased + counts.dead + counts.acked, "{counts:?}");
        client.putback(held_for_request(&self.queue, proto(Duration::ZERO))).await.expect("a putback");
        let all = PopBatchRequest { max_tasks: 10_000, ..pop_batch_request(&self.queue) };
        let all: Vec<Task> = pop_batch(client, all).await.expect("a pop");
        assert_eq!(all.len() as u64, counts.ready + counts.leased, "{counts:?}");
        all.iter().map(|task| (task.id.clone(), text(task).to_owned())).collect()
    }
}

/// Cuts the power so often; gives how often a promise was not kept, and the first ones.
async fn cuts(durability: &str, times: u64) -> (usize, Vec<String>) {
    let mut random = Random::new(&format!("power cuts with --durability {durability}"));
    let run = Run::new(durability, &mut random).await;
    let last = run.events.last().expect("changes").place;
    let (mut cuts, mut first) = (0, Vec::new());
    for _ in 0..times {
        let place = random.below(last + 1);
        let files = run.files(place, &mut random);
        let broken = run.broken(place, &files, &mut random).await;
        cuts += usize::from(!broken.is_empty());
        if first.is_empty() {
            first = broken;
        }
    }
    println!("{cuts} of {times} cuts broke a promise");
    (cuts, first)
}

wire_tests! {
    /// G1–G3, G7, G14: with --durability full, no insert and no ack that was answered OK is undone by a power cut, whatever
    /// the disk kept of what was not synced, and the file is sound.
    async fn full_keeps_what_was_answered_when_the_power_is_cut() {
        let (cuts, first) = cuts("full", rounds(25, 400)).await;
        assert_eq!(cuts, 0, "{first:?}");
    }

    /// With --durability normal the file is sound, too, and inserts are there as a whole or not at all; the last of them may
    /// be gone, which shows that this would be noticed above.
    async fn normal_keeps_a_sound_file_when_the_power_is_cut() {
        let (cuts, _) = cuts("normal", rounds(15, 100)).await;
        assert!(cuts > 0, "no cut took anything: these are no power cuts");
    }
}
