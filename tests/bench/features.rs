//! What a feature costs those who use it, and those who do not: a task's whole life, from its insert to its ack, beside a plain one's.

use std::{ops::Range, sync::Arc};

use data_queue_proto::v1;
use prost_types::Duration;
use tokio::task::JoinSet;

use crate::{
    contender::{Running, cpu_times},
    dataqueue::{self, Client, QUEUE},
    fault::Result,
    ledger::Ledger,
    options::Options,
    ours::{self, CALLERS, Shared, Shares, Store, Used, all},
    report::{Figure, Report, count, number},
    scratch::Scratch,
    unary::Leg,
};

const NAME: &str = "features";
const SIZE: usize = 12;
const HOUR: Duration = Duration { seconds: 3_600, nanos: 0 };
const MILLISECOND: Duration = Duration { seconds: 0, nanos: 1_000_000 };
/// Pops wait for what falls due; longer than it can take.
const WAIT: Duration = Duration { seconds: 30, nanos: 0 };
/// Tasks of the queue beside the one in question.
const NEIGHBOURS: u64 = 1_000;

/// How many calls are under way at once, how many tasks each has, and tasks of a round.
pub(crate) struct Mode {
    pub(crate) what: &'static str,
    pub(crate) callers: usize,
    pub(crate) part: u64,
    pub(crate) tasks: u64,
}

const MODES: [Mode; 2] = [
    Mode { what: "one by one", callers: CALLERS, part: 1, tasks: 20_000 },
    Mode { what: "by 100", callers: 4, part: 100, tasks: 100_000 },
];

/// What is there before the tasks are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Before {
    Nothing,
    /// Another queue, with tasks that have every feature.
    Neighbour,
    /// One task in the queue that has every feature, and does not fall due.
    Stranger,
}

/// A life of tasks: insert, once back if so, pop, ack.
pub(crate) struct Life {
    what: &'static str,
    /// What it is compared with.
    beside: &'static str,
    /// Gives a task what it has, by its number.
    add: fn(u64, &mut v1::NewTask),
    /// How all tasks are put back once, after all were popped.
    back: Option<fn() -> v1::PutbackTokens>,
    has_heartbeat: bool,
    before: Before,
}

pub(crate) const PLAIN: Life =
    Life { what: "plain", beside: "plain", add: |_, _| (), back: None, has_heartbeat: false, before: Before::Nothing };
const BACK: Life =
    Life { what: "put back once", beside: "put back once", back: Some(v1::PutbackTokens::default), ..PLAIN };

const LIVES: [Life; 12] = [
    PLAIN,
    Life { what: "priority 0 to 9", add: add_priority, ..PLAIN },
    Life { what: "ttl of an hour", add: |_, task| task.ttl = Some(HOUR), ..PLAIN },
    Life { what: "unique key", add: add_unique_key, ..PLAIN },
    Life { what: "delay of 1 ms", add: |_, task| task.delay = Some(MILLISECOND), ..PLAIN },
    Life { what: "priority, ttl and unique key", add: add_all, ..PLAIN },
    Life { what: "a heartbeat", has_heartbeat: true, ..PLAIN },
    Life { what: "plain, another queue has everything", before: Before::Neighbour, ..PLAIN },
    Life { what: "plain, one task of the queue has everything", before: Before::Stranger, ..PLAIN },
    BACK,
    Life { what: "failed once, due at once", back: Some(|| failed(0)), ..BACK },
    Life { what: "failed once, due in 1 ms", back: Some(|| failed(MILLISECOND.nanos)), ..BACK },
];

fn add_priority(number: u64, task: &mut v1::NewTask) {
    task.priority = (number % 10) as u32;
}

fn add_unique_key(number: u64, task: &mut v1::NewTask) {
    task.unique_key = format!("key-{number}");
}

fn add_all(number: u64, task: &mut v1::NewTask) {
    add_priority(number, task);
    add_unique_key(number, task);
    task.ttl = Some(HOUR);
}

fn failed(nanos: i32) -> v1::PutbackTokens {
    v1::PutbackTokens { failed: true, delay: Some(Duration { seconds: 0, nanos }), ..v1::PutbackTokens::default() }
}

pub(crate) async fn run(options: &Options, report: &mut Report) -> Result<()> {
    for (name, store) in ours::stores(report, NAME) {
        for mode in &MODES {
            let mut found = LIVES.each_ref().map(|_| Vec::new());
            for round in 1..=options.rounds() {
                for (life, legs) in LIVES.iter().zip(&mut found) {
                    let parts = life.round(options, store, mode).await?;
                    let costs = parts.each_ref().map(|part| costs(&part.cpu));
                    let [inserts, takes] = &costs;
                    eprintln!(
                        "round {round}: {name}, {}, {}: insert: {inserts}; the rest: {takes}",
                        mode.what, life.what
                    );
                    legs.push(whole(&parts));
                }
            }
            let figures =
                LIVES.iter().zip(found).map(|(life, legs)| figure(name, mode, life, legs)).collect::<Vec<_>>();
            for (life, figure) in LIVES.iter().zip(&figures).filter(|(life, _)| life.what != life.beside) {
                let base = LIVES.iter().position(|other| other.what == life.beside).ok_or("nothing to compare with")?;
                ratios(
                    report,
                    &format!("on {name}, {}: {} ÷ {}", mode.what, life.what, life.beside),
                    figure,
                    &figures[base],
                );
            }
            figures.into_iter().for_each(|figure| report.figure(figure));
        }
    }
    let [single, batch] = MODES
        .each_ref()
        .map(|mode| format!("{}: {} callers, {} tasks", mode.what, mode.callers, count(options.many(mode.tasks))));
    report.note(format!(
        "{NAME}: {SIZE} B; {single}; {batch}. A life is Insert, Pop or PopBatch, and Ack; that of a task that goes back is Insert, Pop, \
         Putback, Pop, Ack. All are inserted, then all popped and put back, then all popped and acked"
    ));
    Ok(())
}

impl Life {
    /// What inserts cost, and what comes after them.
    async fn round(&self, options: &Options, store: Store, mode: &Mode) -> Result<[Leg; 2]> {
        let scratch = Scratch::new(options)?;
        let used = Used::start(store, scratch.path()).await?;
        self.prepare(options, &used).await?;
        let tasks = options.many(mode.tasks);
        let (warm, end) = (tasks / 4, tasks / 4 + tasks);
        let mut ledger = Ledger::new(SIZE);
        self.insert(&used.client, mode, 0..warm).await?;
        self.take(&used.client, mode, warm, &mut ledger).await?;
        let inserts = Leg::of(|| cpu_times(&used), self.insert(&used.client, mode, warm..end), |()| tasks).await?;
        let takes = Leg::of(|| cpu_times(&used), self.take(&used.client, mode, tasks, &mut ledger), |()| tasks).await?;
        ledger.verify(end)?;
        if used.left().await? > 0 {
            return Err(format!("{}: tasks are left", self.what).into());
        }
        Ok([inserts, takes])
    }

    async fn prepare(&self, options: &Options, used: &Used) -> Result<()> {
        let (queue, tasks) = match self.before {
            Before::Nothing => return Ok(()),
            Before::Neighbour => ("neighbour", options.many(NEIGHBOURS)),
            Before::Stranger => (QUEUE, 1),
        };
        let tasks = (0..tasks).map(|number| {
            let mut task = dataqueue::new_task(number, SIZE);
            add_all(number, &mut task);
            // Every second one is ready, unless that would be popped with the others.
            task.delay = (number % 2 == 0).then_some(HOUR);
            task.ttl = Some(Duration { seconds: 2 * HOUR.seconds, nanos: 0 });
            task.unique_key.insert_str(0, "other-");
            task
        });
        let request =
            v1::InsertRequest { queue: queue.to_owned(), tasks: tasks.collect(), ..v1::InsertRequest::default() };
        used.client.clone().insert(request).await?;
        Ok(())
    }

    pub(crate) async fn insert(&self, client: &Client, mode: &Mode, numbers: Range<u64>) -> Result<()> {
        let add = self.add;
        let insert = move |mut client: Client, numbers: Range<u64>| async move {
            let tasks = numbers.map(|number| {
                let mut task = dataqueue::new_task(number, SIZE);
                add(number, &mut task);
                task
            });
            let request =
                v1::InsertRequest { queue: QUEUE.to_owned(), tasks: tasks.collect(), ..v1::InsertRequest::default() };
            let answer = client.insert(request).await?.into_inner();
            let is_new = answer.results.iter().all(|result| !result.duplicate);
            if is_new { Ok(()) } else { Err("a task was a duplicate".into()) }
        };
        calls(client, mode.callers, mode.part, numbers, insert).await.map(drop)
    }

    /// Pops and acks so many, after they were put back if that is in this life.
    pub(crate) async fn take(&self, client: &Client, mode: &Mode, tasks: u64, ledger: &mut Ledger) -> Result<()> {
        if let Some(back) = self.back {
            put_back(client, mode, tasks, back).await?;
        }
        let (shared, has_heartbeat) = (Shared::new(ledger), self.has_heartbeat);
        let book = shared.clone();
        let take = move |mut client: Client, part: Range<u64>| {
            let book = book.clone();
            async move {
                let tasks = pop(&mut client, part.end - part.start).await?;
                for task in &tasks {
                    book.deliver(dataqueue::data(task))?;
                }
                let lease_tokens = tasks.into_iter().map(|task| task.lease_token).collect::<Vec<_>>();
                if has_heartbeat {
                    let lease_tokens = lease_tokens.clone();
                    let request =
                        v1::HeartbeatRequest { queue: QUEUE.to_owned(), lease_tokens, lease: dataqueue::lease() };
                    applied(&client.heartbeat(request).await?.into_inner().outcomes)?;
                }
                book.acked(dataqueue::ack(&mut client, lease_tokens).await?)
            }
        };
        calls(client, mode.callers, mode.part, 0..tasks, take).await?;
        shared.give_back(ledger)
    }
}

/// Pops so many, and then puts all of them back.
async fn put_back(client: &Client, mode: &Mode, tasks: u64, back: fn() -> v1::PutbackTokens) -> Result<()> {
    let hold = |mut client: Client, part: Range<u64>| async move {
        let tasks = pop(&mut client, part.end - part.start).await?;
        Ok(tasks.into_iter().map(|task| task.lease_token).collect::<Vec<_>>())
    };
    let held = calls(client, mode.callers, mode.part, 0..tasks, hold).await?;
    let held = Arc::new(held);
    let end = held.len() as u64;
    let put_back = move |mut client: Client, part: Range<u64>| {
        let lease_tokens = held[part.start as usize].clone();
        async move {
            let tokens = v1::PutbackTokens { lease_tokens, ..back() };
            let selection = Some(v1::putback_request::Selection::Tokens(tokens));
            let answer = client.putback(v1::PutbackRequest { queue: QUEUE.to_owned(), selection }).await?;
            applied(&answer.into_inner().outcomes)
        }
    };
    calls(client, mode.callers, 1, 0..end, put_back).await.map(drop)
}

/// One Pop, or one PopBatch of many.
async fn pop(client: &mut Client, tasks: u64) -> Result<Vec<v1::Task>> {
    let (queue, lease, wait) = (QUEUE.to_owned(), dataqueue::lease(), Some(WAIT));
    let mut popped = Vec::new();
    if tasks == 1 {
        let request = v1::PopRequest { queue, lease, wait, ..v1::PopRequest::default() };
        popped.extend(client.pop(request).await?.into_inner().task);
    } else {
        let max_tasks = u32::try_from(tasks)?;
        let request = v1::PopBatchRequest { queue, max_tasks, lease, wait, ..v1::PopBatchRequest::default() };
        let mut stream = client.pop_batch(request).await?.into_inner();
        while let Some(message) = stream.message().await? {
            popped.extend(message.tasks);
        }
    }
    if popped.len() as u64 == tasks { Ok(popped) } else { Err("a pop found too few tasks".into()) }
}

fn applied(outcomes: &[i32]) -> Result<()> {
    let all = outcomes.iter().all(|outcome| *outcome == v1::Outcome::Applied as i32);
    if all { Ok(()) } else { Err("a call was not applied".into()) }
}

/// Makes a call for each part of the work, so many at once. What they found, in no order.
async fn calls<T, F>(
    client: &Client,
    callers: usize,
    part: u64,
    work: Range<u64>,
    call: impl Fn(Client, Range<u64>) -> F + Clone + Send + 'static,
) -> Result<Vec<T>>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + Send,
{
    let shares = Shares::new(work, part);
    let mut set = JoinSet::new();
    for _ in 0..callers {
        let (client, shares, call) = (client.clone(), shares.clone(), call.clone());
        set.spawn(async move {
            let mut found = Vec::new();
            while let Some(part) = shares.take() {
                found.push(call(client.clone(), part).await?);
            }
            Ok(found)
        });
    }
    Ok(all(set).await?.into_iter().flatten().collect())
}

/// Two parts of a life as one.
fn whole([inserts, takes]: &[Leg; 2]) -> Leg {
    let both = inserts.cpu.iter().zip(&takes.cpu);
    Leg {
        rate: 1.0 / (1.0 / inserts.rate + 1.0 / takes.rate),
        cpu: both.map(|((name, inserts), (_, takes))| (*name, inserts + takes)).collect(),
    }
}

pub(crate) fn costs(cpu: &[(&'static str, f64)]) -> String {
    cpu.iter().map(|(name, micros)| format!("{name} {} µs", number(*micros))).collect::<Vec<_>>().join(", ")
}

fn figure(name: &str, mode: &Mode, life: &Life, legs: Vec<Leg>) -> Figure {
    Figure {
        measurement: NAME,
        what: format!("on {name}, {}: {}", mode.what, life.what),
        unit: "tasks/s",
        values: legs.iter().map(|leg| leg.rate).collect(),
        cpu: legs.into_iter().map(|leg| leg.cpu).collect(),
        ..Figure::default()
    }
}

/// Of the rates, and of what a task costs each process but the client.
fn ratios(report: &mut Report, what: &str, above: &Figure, below: &Figure) {
    report.ratio(format!("{what}: rate"), above, below, None);
    for (process, whose) in [("server", "the server's time"), ("store", "Redis' time")] {
        let of = |figure: &Figure| {
            let micros = figure.cpu.iter().flatten().filter(|(name, _)| *name == process).map(|(_, micros)| *micros);
            micros.collect::<Vec<_>>()
        };
        let values = of(above).into_iter().zip(of(below)).map(|(above, below)| above / below).collect::<Vec<_>>();
        if !values.is_empty() {
            let what = format!("{what}: {whose}");
            report.figure(Figure { measurement: NAME, what, unit: "×", values, ..Figure::default() });
        }
    }
}
