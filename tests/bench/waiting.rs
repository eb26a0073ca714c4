//! How fast a waiting pop gets what was inserted, and what waiting costs: goal P6.

use std::time::{Duration, Instant};

use data_queue_proto::v1;
use tokio::{sync::mpsc, task::JoinSet, time::timeout};
use tokio_stream::wrappers::ReceiverStream;

use crate::{
    contender::Running,
    dataqueue::{self, Client, QUEUE},
    fault::Result,
    flow,
    ledger::Ledger,
    machine::micros,
    options::Options,
    ours::{self, Store, Used},
    report::{Figure, Goal, Report, count, quantile},
    scratch::Scratch,
};

const NAME: &str = "p6";
const SIZE: usize = 12;
const WAKE_UPS: u64 = 2_000;
const WAKE: &str = "insert sent to waiting pop answered";
/// How long idle workers are watched; what they asked for lasts longer.
const WATCHED: Duration = Duration::from_secs(10);
const WAIT: prost_types::Duration = prost_types::Duration { seconds: 60, nanos: 0 };
/// Waiting calls a connection: a server has so many at the most, and some more.
const A_CONNECTION: usize = 1_000;

/// Workers with nothing to do.
struct Idle {
    workers: usize,
    queues: usize,
    streams: bool,
    goal: Option<Goal>,
}

const IDLE: [Idle; 4] = [
    Idle { workers: 1_000, queues: 1, streams: false, goal: Some(Goal::AtMost(1.0)) },
    Idle { workers: 1_000, queues: 1_000, streams: false, goal: Some(Goal::AtMost(1.0)) },
    Idle { workers: 10_000, queues: 1, streams: false, goal: None },
    Idle { workers: 1_000, queues: 1, streams: true, goal: None },
];

pub(crate) async fn run(options: &Options, report: &mut Report) -> Result<()> {
    let served = flow::served(options, report, NAME).await?.consume;
    for (name, store) in ours::stores(report, NAME) {
        let goal = |goal| (store == Store::Redis).then_some(goal);
        let mut wakes = Vec::new();
        for _ in 0..options.rounds() {
            wakes.push(wake_ups(options, store).await?);
        }
        for (index, what, goal) in [
            (1, "an insert's round trip", goal(Goal::AtMost(1.25))),
            (2, "the round trip of the insert that wakes", None),
        ] {
            let values = wakes.iter().map(|times| times[0][0] / times[index][0]).collect();
            let what = format!("on {name}: p50 of {WAKE} ÷ {what}");
            report.figure(figure(what, "×", values, goal));
        }
        let legs = [WAKE, "an insert's round trip, nobody waiting", "the round trip of the insert that wakes"];
        for (index, what) in legs.into_iter().enumerate() {
            let times = wakes.iter().map(|times| times[index]).collect::<Vec<_>>();
            let values = times.iter().map(|[p50, _]| *p50).collect();
            report
                .figure(Figure { latencies: times, ..figure(format!("on {name}: {what}, p50"), "µs", values, None) });
        }
        for idle in &IDLE {
            if idle.streams && !served {
                continue;
            }
            watch(options, report, name, store, idle).await?;
        }
    }
    report.note(format!(
        "{NAME}: the waiting pop and the insert are on connections of their own; idle workers are watched for {} s, with up to \
         {A_CONNECTION} on a connection",
        WATCHED.as_secs()
    ));
    Ok(())
}

fn figure(what: String, unit: &'static str, values: Vec<f64>, goal: Option<Goal>) -> Figure {
    Figure { measurement: NAME, what, unit, values, goal, ..Figure::default() }
}

/// Microseconds, p50 and p99: from an insert to the answer of the pop that waits for it; of an insert with nobody waiting and
/// nothing else under way, on the same connection, in turn with the others; and of the insert that wakes.
async fn wake_ups(options: &Options, store: Store) -> Result<[[f64; 2]; 3]> {
    let scratch = Scratch::new(options)?;
    let used = Used::start(store, scratch.path()).await?;
    let (mut worker, mut producer) = (used.client.clone(), used.server.client().await?);
    let mut ledger = Ledger::new(SIZE);
    let (mut wakes, mut inserts, mut waking) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..options.many(WAKE_UPS) {
        let mut popper = worker.clone();
        let pop = tokio::spawn(async move {
            let answer = popper.pop(waiting_pop(QUEUE.to_owned())).await?.into_inner();
            Result::Ok((Instant::now(), answer.task.ok_or("a waiting pop found nothing")?))
        });
        // It goes first, and another call behind it on its connection: once that is answered, the pop has looked and waits.
        tokio::task::yield_now().await;
        insert_elsewhere(&mut worker).await?;
        let start = Instant::now();
        dataqueue::insert(&mut producer, number..number + 1, SIZE).await?;
        waking.push(micros(start.elapsed()));
        let (answered, task) = pop.await??;
        wakes.push(micros(answered - start));
        ledger.deliver(dataqueue::data(&task))?;
        ledger.acked(dataqueue::ack(&mut worker, vec![task.lease_token]).await?);
        let start = Instant::now();
        insert_elsewhere(&mut producer).await?;
        inserts.push(micros(start.elapsed()));
    }
    ledger.verify(options.many(WAKE_UPS))?;
    Ok([wakes, inserts, waking].map(|times| [0.5, 0.99].map(|share| quantile(&times, share))))
}

fn waiting_pop(queue: String) -> v1::PopRequest {
    v1::PopRequest { queue, lease: dataqueue::lease(), wait: Some(WAIT), ..v1::PopRequest::default() }
}

async fn insert_elsewhere(client: &mut Client) -> Result<()> {
    let tasks = vec![dataqueue::new_task(0, SIZE)];
    client.insert(v1::InsertRequest { queue: "elsewhere".to_owned(), tasks, ..v1::InsertRequest::default() }).await?;
    Ok(())
}

/// What these cost while nothing happens.
async fn watch(options: &Options, report: &mut Report, name: &str, store: Store, idle: &Idle) -> Result<()> {
    let scratch = Scratch::new(options)?;
    let used = Used::start(store, scratch.path()).await?;
    let before = used.server.process().resident()?;
    let workers = if options.smoke { idle.workers / 20 } else { idle.workers };
    let mut waiting = JoinSet::new();
    let mut held = Vec::new();
    let mut client = used.client.clone();
    for index in 0..workers {
        if index % A_CONNECTION == 0 {
            client = used.server.client().await?;
        }
        let queue = format!("{QUEUE}-{}", index % idle.queues);
        let mut client = client.clone();
        if idle.streams {
            let (requests, receiver) = mpsc::channel(1);
            requests.send(flow::open_consume(queue)).await?;
            held.push(requests);
            let mut answers = client.consume(ReceiverStream::new(receiver)).await?.into_inner();
            waiting.spawn(async move { answers.message().await.map(drop) });
        } else {
            waiting.spawn(async move { client.pop(waiting_pop(queue)).await.map(drop) });
        }
    }
    // Until then all have arrived, and the server has nothing more to do.
    let (settle, watched) = if options.smoke { (WATCHED / 100, WATCHED / 50) } else { (WATCHED / 3, WATCHED) };
    nothing_comes(&mut waiting, settle).await?;
    let memory = (used.server.process().resident()? - before) / workers as f64;
    let (start, cpu, commands) = (Instant::now(), used.server.process().cpu()?, commands_so_far(&used).await?);
    nothing_comes(&mut waiting, watched).await?;
    let took = start.elapsed().as_secs_f64();
    let share = (used.server.process().cpu()? - cpu).as_secs_f64() / took * 100.0;
    let kind = if idle.streams { "Consume streams" } else { "waiting pops" };
    let what = format!("on {name}: {} {kind}, queues: {}", count(workers as u64), count(idle.queues as u64));
    let goal = idle.goal.filter(|_| store == Store::Redis);
    report.figure(figure(format!("{what}: the server's core"), "%", vec![share], goal));
    report.figure(figure(format!("{what}: the server's memory for one"), "B", vec![memory], None));
    if store == Store::Redis {
        // The asking itself is one.
        let count = (commands_so_far(&used).await? - commands - 1.0) / took;
        report.figure(figure(
            format!("{what}: Redis commands, those inside scripts included"),
            "a second",
            vec![count],
            None,
        ));
    }
    drop(held);
    used.left().await.map(drop)
}

/// Lets the time pass, in which no call may be answered.
async fn nothing_comes<T: 'static>(waiting: &mut JoinSet<T>, time: Duration) -> Result<()> {
    match timeout(time, waiting.join_next()).await {
        Ok(_) => Err("a waiting call was answered, with nothing there".into()),
        Err(_) => Ok(()),
    }
}

/// How many commands Redis has had.
async fn commands_so_far(used: &Used) -> Result<f64> {
    let Some(redis) = &used.redis else { return Ok(0.0) };
    let mut calls = 0.0;
    for stats in redis.info("commandstats").await?.values() {
        let count = stats.strip_prefix("calls=").and_then(|stats| stats.split(',').next());
        calls += count.ok_or("Redis does not tell its commands")?.parse::<f64>()?;
    }
    Ok(calls)
}
