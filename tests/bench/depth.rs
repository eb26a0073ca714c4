//! Whether rates hold with millions waiting, a million leased, and a thousand queues: goal P8.

use std::time::Instant;

use data_queue_proto::v1;
use tokio::task::JoinSet;

use crate::{
    contender::Running,
    dataqueue::{self, Client},
    fault::Result,
    flow,
    ledger::Ledger,
    options::Options,
    ours::{self, CALLERS, Shared, Shares, Store, Used, Way, all, pop_batch},
    report::{Figure, Goal, Report, count, number},
    scratch::Scratch,
};

const NAME: &str = "p8";
const SIZE: usize = 12;
/// What the others are compared with, and tasks of a round.
const SHALLOW: u64 = 100_000;
const LEASED: u64 = 1_000_000;
const QUEUES: u64 = 1_000;
const QUEUE_TASKS: u64 = 20_000;
const BATCH: u64 = 1_000;
const DEEP_GOAL: Goal = Goal::AtLeast(0.95);
const QUEUES_GOAL: Goal = Goal::AtLeast(0.9);

/// A server in a state that is kept.
struct Kept {
    what: String,
    used: Used,
    ledger: Ledger,
    next: u64,
    /// Tasks that stay ready.
    depth: u64,
    held: Vec<Vec<String>>,
    /// Tasks a second in and out, a round.
    rates: [Vec<f64>; 2],
    // It goes when the server has gone.
    _scratch: Scratch,
}

pub(crate) async fn run(options: &Options, report: &mut Report) -> Result<()> {
    let served = flow::served(options, report, NAME).await?.consume;
    let way = if served { Way::Consume } else { Way::Batch };
    for (name, store) in ours::stores(report, NAME) {
        depths(options, report, name, store, way).await?;
        queues(options, report, name, store).await?;
    }
    let call = if served { "Insert of 100 and Consume" } else { "Insert of 100, PopBatch of 100 and Ack" };
    report.note(format!(
        "{NAME}: {SIZE} B; {call}, {} tasks a round on top of what is there, the servers in turn; of queues: Insert, Pop and Ack of \
         {CALLERS} callers, {} tasks a round, as they come over all queues",
        count(options.many(SHALLOW)),
        count(options.many(QUEUE_TASKS))
    ));
    Ok(())
}

async fn depths(options: &Options, report: &mut Report, name: &str, store: Store, way: Way) -> Result<()> {
    let shallow = options.many(SHALLOW);
    let mut states = Vec::new();
    for (waiting, leased) in [(shallow, 0), (options.deep(), 0), (shallow, options.many(LEASED))] {
        states.push(Kept::new(options, store, way, waiting, leased).await?);
    }
    for round in 0..=options.rounds() {
        for state in &mut states {
            let rates = state.work(shallow).await?;
            eprintln!(
                "round {round}: {name}, {}: {} in, {} out a second",
                state.what,
                number(rates[0]),
                number(rates[1])
            );
            // The first is to warm up.
            if round > 0 {
                state.rates.iter_mut().zip(rates).for_each(|(rates, rate)| rates.push(rate));
            }
        }
    }
    let mut figures = Vec::new();
    for state in states {
        figures.push(state.end(name).await?);
    }
    for leg in [0, 1] {
        for state in &figures[1..] {
            let what = format!("{} ÷ {}", state[leg].what, figures[0][leg].what);
            report.ratio(what, &state[leg], &figures[0][leg], (store == Store::Redis).then_some(DEEP_GOAL));
        }
    }
    figures.into_iter().flatten().for_each(|figure| report.figure(figure));
    Ok(())
}

impl Kept {
    async fn new(options: &Options, store: Store, way: Way, waiting: u64, leased: u64) -> Result<Self> {
        let scratch = Scratch::new(options)?;
        let mut used = Used::start(store, scratch.path()).await?;
        let mut ledger = Ledger::new(SIZE);
        let next = waiting + leased;
        used.server.fill(0..next, SIZE).await?;
        let shared = Shared::new(&mut ledger);
        let mut held = Vec::new();
        for start in (0..leased).step_by(BATCH as usize) {
            held.push(pop_batch(&mut used.client, BATCH.min(leased - start), &shared).await?);
        }
        shared.give_back(&mut ledger)?;
        used.way = way;
        let mut what = format!("{} waiting", count(waiting));
        if leased > 0 {
            what += &format!(" and {} leased", count(leased));
        }
        Ok(Self { what, used, ledger, next, depth: waiting, held, rates: Default::default(), _scratch: scratch })
    }

    /// Inserts so many, and takes and acks what is ready beyond the depth. Tasks a second of both.
    async fn work(&mut self, tasks: u64) -> Result<[f64; 2]> {
        let start = Instant::now();
        self.used.fill(self.next..self.next + tasks, SIZE).await?;
        let filled = Instant::now();
        self.next += tasks;
        let before = self.ledger.delivered();
        // A stream may have taken more than it was asked for the last time.
        self.used.drain((self.next - self.depth).saturating_sub(before), &mut self.ledger).await?;
        let took = [filled - start, filled.elapsed()].map(|took| took.as_secs_f64());
        Ok([tasks as f64 / took[0], (self.ledger.delivered() - before) as f64 / took[1]])
    }

    async fn end(mut self, name: &str) -> Result<[Figure; 2]> {
        for tokens in self.held {
            self.ledger.acked(dataqueue::ack(&mut self.used.client, tokens).await?);
        }
        self.used.server.drain(None, &mut self.ledger).await?;
        self.ledger.verify(self.next)?;
        self.used.server.is_empty_after(self.next).await?;
        let [inserts, takes] = self.rates;
        Ok([("in", inserts), ("out", takes)].map(|(way, values)| Figure {
            measurement: NAME,
            what: format!("on {name}: {way}, {}", self.what),
            unit: "tasks/s",
            values,
            ..Figure::default()
        }))
    }
}

/// One queue and many, on the same server.
async fn queues(options: &Options, report: &mut Report, name: &str, store: Store) -> Result<()> {
    let scratch = Scratch::new(options)?;
    let used = Used::start(store, scratch.path()).await?;
    let tasks = options.many(QUEUE_TASKS);
    let mut found = [1, QUEUES].map(|queues| (queues, Vec::new()));
    for round in 0..=options.rounds() {
        for (queues, rates) in &mut found {
            let start = Instant::now();
            over_queues(&used.client, *queues, tasks).await?;
            if round > 0 {
                rates.push(tasks as f64 / start.elapsed().as_secs_f64());
            }
        }
    }
    let [one, many] = found.map(|(queues, values)| Figure {
        measurement: NAME,
        what: format!("on {name}: Insert, Pop and Ack, queues: {}", count(queues)),
        unit: "tasks/s",
        values,
        ..Figure::default()
    });
    let what = format!("on {name}: {} queues ÷ one", count(QUEUES));
    report.ratio(what, &many, &one, (store == Store::Redis).then_some(QUEUES_GOAL));
    report.figure(one);
    report.figure(many);
    Ok(())
}

/// Each caller inserts a task, takes the one that is first in that queue, and acks it.
async fn over_queues(client: &Client, queues: u64, tasks: u64) -> Result<()> {
    let shares = Shares::new(0..tasks, 1);
    let mut ledger = Ledger::new(SIZE);
    let shared = Shared::new(&mut ledger);
    let mut callers = JoinSet::new();
    for _ in 0..CALLERS {
        let (mut client, shares, shared) = (client.clone(), shares.clone(), shared.clone());
        callers.spawn(async move {
            while let Some(part) = shares.take() {
                let queue = format!("queue-{queues}-{}", part.start % queues);
                let tasks = vec![dataqueue::new_task(part.start, SIZE)];
                let request = v1::InsertRequest { queue: queue.clone(), tasks, ..v1::InsertRequest::default() };
                client.insert(request).await?;
                let request =
                    v1::PopRequest { queue: queue.clone(), lease: dataqueue::lease(), ..v1::PopRequest::default() };
                let task = client.pop(request).await?.into_inner().task.ok_or("a pop found nothing")?;
                shared.deliver(dataqueue::data(&task))?;
                let lease_tokens = vec![task.lease_token];
                let answer = client.ack(v1::AckRequest { queue, lease_tokens }).await?.into_inner();
                if answer.outcomes != [v1::Outcome::Applied as i32] {
                    return Err("an ack was not applied".into());
                }
                shared.acked(1)?;
            }
            Ok(())
        });
    }
    all(callers).await?;
    shared.give_back(&mut ledger)?;
    ledger.verify(tasks)
}
