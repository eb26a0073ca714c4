//! DataQueue beside its peers, tasks in and tasks out: goals P3 and P4, and the part of P9 that is about both.
//!
//! A round of a contender is a fresh start, passes that find out how many tasks it does in the time, and one that counts. A pass
//! inserts tasks, all of them, and then takes and acks them, all of them.

use std::time::{Duration, Instant};

use tokio::time::timeout;

use crate::{
    beanstalkd,
    contender::{Contender, Running, cpu_between, cpu_times, verify_empty},
    fault::Result,
    flow,
    ledger::Ledger,
    nats,
    options::Options,
    ours::{CALLERS, Ours, Store, Way},
    program,
    rabbitmq::RabbitMq,
    report::{Figure, Goal, Report, count, number},
    scratch::Scratch,
    streams,
};

const TAKES: &str = "p3";
const INSERTS: &str = "p4";
const SYNCED: &str = "p9-compare";
const MEMORY: &str = "p7";

/// The payloads, in bytes.
const SIZES: [usize; 2] = [12, 200];
/// Of the first pass, whose rate says how many the next ones are of.
const FIRST: u64 = 300;
const MOST: u64 = 4_000_000;
/// Tasks that wait when memory is compared.
const WAITING: u64 = 100_000;

/// What DataQueue's best row is to be, beside another's.
struct Aim {
    peer: &'static str,
    way: &'static str,
    size: usize,
    goal: Goal,
}

const fn aim(peer: &'static str, way: &'static str, size: usize, times: f64) -> Aim {
    Aim { peer, way, size, goal: Goal::AtLeast(times) }
}

const TAKE_AIMS: [Aim; 5] = [
    aim("the seed", "pop_data and", 12, 60.0),
    aim("BullMQ", "", 12, 25.0),
    aim("NATS", "messages()", 200, 1.3),
    aim("Redis Streams", "XACK, XDEL and XREADGROUP COUNT 100", 200, 1.2),
    aim("beanstalkd", "", 200, 7.0),
];
/// Of Produce with a hundred tasks a message, and of a task a message.
const BULK_AIM: Aim = aim("BullMQ", "", 12, 12.0);
const SINGLE_AIM: Aim = aim("DataQueue", "Insert, ", 12, 5.0);
const SYNCED_AIM: Aim = aim("RabbitMQ", "", 12, 8.0);

/// The ways, the strongest first: that one's row is what the others are compared with.
const WAYS: [Way; 9] = [
    Way::Consume,
    Way::ProduceBatches,
    Way::Produce,
    Way::Consumer,
    Way::ProducerBatches,
    Way::Producer,
    Way::Batch,
    Way::Fused,
    Way::Unary(CALLERS),
];

/// Goals P3 and P4: what a crash may take the last second of, or so.
pub(crate) async fn run(options: &Options, report: &mut Report) -> Result<()> {
    let mut contenders = ours(options, report, TAKES, &[Store::Redis, Store::File("normal")]).await?;
    contenders.extend([
        Box::new(streams::BY_HUNDREDS) as Box<dyn Contender>,
        Box::new(streams::ONE_BY_ONE),
        Box::new(nats::MESSAGES),
        Box::new(nats::FETCH),
        Box::new(beanstalkd::EVERY_SECOND),
        Box::new(program::BULLMQ),
        Box::new(program::SEED),
        Box::new(program::SEED_BY_TENS),
    ]);
    report.missing(
        TAKES,
        "Faktory: there is no client here yet; go install github.com/contribsys/faktory/cmd/faktory".to_owned(),
    );
    Compared { measurements: [INSERTS, TAKES] }.run(options, report, &contenders).await
}

/// The rest of goal P9: what a crash takes nothing of.
pub(crate) async fn synced(options: &Options, report: &mut Report) -> Result<()> {
    let mut contenders = ours(options, report, SYNCED, &[Store::File("full")]).await?;
    contenders.extend([Box::new(RabbitMq) as Box<dyn Contender>, Box::new(beanstalkd::SYNCED)]);
    Compared { measurements: [SYNCED; 2] }.run(options, report, &contenders).await
}

/// DataQueue on these stores, in all ways that the server has.
async fn ours(
    options: &Options,
    report: &mut Report,
    measurement: &'static str,
    stores: &[Store],
) -> Result<Vec<Box<dyn Contender>>> {
    let served = flow::served(options, report, measurement).await?;
    let ways = WAYS.into_iter().filter(|way| match way {
        Way::Consume | Way::Consumer => served.consume,
        Way::Produce | Way::ProduceBatches | Way::Producer | Way::ProducerBatches => served.produce,
        Way::Batch | Way::Fused | Way::Unary(_) | Way::Spread(_) => true,
    });
    let pairs = stores.iter().flat_map(|store| ways.clone().map(|way| Ours { store: *store, way }));
    Ok(pairs.map(|ours| Box::new(ours) as Box<dyn Contender>).collect())
}

/// What is compared.
struct Compared {
    /// Of inserts, and of pops with acks.
    measurements: [&'static str; 2],
}

impl Compared {
    async fn run(&self, options: &Options, report: &mut Report, contenders: &[Box<dyn Contender>]) -> Result<()> {
        let mut found = Vec::new();
        for contender in contenders {
            match contender.version() {
                Ok((name, version)) => {
                    report.version(name, version);
                    found.push(&**contender);
                }
                Err(missing) => {
                    report.missing(self.measurements[1], format!("{}: {}", contender.name(), missing.install));
                }
            }
        }
        let sizes = if options.smoke { &SIZES[1..] } else { &SIZES[..] };
        for size in sizes {
            self.rates(options, report, &found, *size).await?;
        }
        let mut known = Vec::new();
        for contender in found {
            // The first of a name stands for it: what waits does not know who comes for it.
            if !known.contains(&contender.name()) {
                known.push(contender.name());
                self.memory(options, report, contender).await?;
            }
        }
        report.note(format!(
            "{}: each round: a fresh start, warm-up passes, then as many tasks as are inserted and taken in about {:.1} s; \
             the inserts are timed as a whole, then the pops with their acks. Void unless each task was delivered once and \
             unchanged, as many acks as tasks were confirmed, and nothing is left. Ratios are of the first row that there is of \
             DataQueue's, round by round",
            if self.measurements[0] == INSERTS { "p3, p4" } else { SYNCED },
            2.0 * options.span().as_secs_f64()
        ));
        Ok(())
    }

    async fn rates(&self, options: &Options, report: &mut Report, found: &[&dyn Contender], size: usize) -> Result<()> {
        let mut rounds = found.iter().map(|contender| (*contender, Vec::new())).collect::<Vec<_>>();
        for round in 1..=options.rounds() {
            let mut voids = Vec::new();
            for (index, (contender, passes)) in rounds.iter_mut().enumerate() {
                let what = format!("{size} B, {}, {}", contender.name(), contender.ways().name());
                match compare_round(options, *contender, size, 2 * options.span()).await {
                    Ok(pass) => {
                        let [insert, take] = pass.rates().map(number);
                        eprintln!("round {round}: {what}: {insert} in, {take} out a second");
                        passes.push(pass);
                    }
                    // The others' figures are good none the less.
                    Err(fault) => {
                        report.void(self.measurements[1], format!("{what}: {fault}"));
                        voids.push(index);
                    }
                }
            }
            voids.iter().rev().for_each(|index| drop(rounds.remove(*index)));
        }
        for (leg, measurement) in self.measurements.into_iter().enumerate() {
            let mut rows = Vec::new();
            for (contender, passes) in &rounds {
                let way = [contender.ways().insert, contender.ways().take][leg];
                if !way.is_empty() {
                    rows.push((contender.name(), way, self.figure(measurement, leg, size, *contender, way, passes)));
                }
            }
            self.ratios(report, leg, size, &rows);
            rows.into_iter().for_each(|(_, _, figure)| report.figure(figure));
        }
        Ok(())
    }

    fn figure(
        &self,
        measurement: &'static str,
        leg: usize,
        size: usize,
        contender: &dyn Contender,
        way: &str,
        passes: &[Pass],
    ) -> Figure {
        Figure {
            measurement,
            what: format!("{size} B: {}, {way}", contender.name()),
            unit: "tasks/s",
            values: passes.iter().map(|pass| pass.rates()[leg]).collect(),
            cpu: passes.iter().map(|pass| pass.cpu(leg)).collect(),
            durability: contender.durability(),
            ..Figure::default()
        }
    }

    /// DataQueue's strongest row beside each of the others'.
    fn ratios(&self, report: &mut Report, leg: usize, size: usize, rows: &[(String, &'static str, Figure)]) {
        let Some((our_name, our_way, named)) = rows.first() else { return };
        for (name, way, figure) in rows {
            let aims: &[Aim] = match (leg, self.measurements[1]) {
                (_, SYNCED) => &[SYNCED_AIM],
                (0, _) => &[BULK_AIM],
                _ => &TAKE_AIMS,
            };
            // The goals are about the streams.
            let strong = our_way.starts_with("Consume") || our_way.starts_with("Produce");
            let aims = if strong { aims } else { &[] };
            let goal = aims.iter().find(|aim| aim.is_about(name, way, size)).map(|aim| aim.goal);
            if !name.starts_with("DataQueue") {
                let what = format!("{size} B: {our_name}, {our_way} ÷ {name}, {way}");
                report.ratio(what, named, figure, goal);
            }
        }
        let single = rows.iter().find(|(_, way, _)| way.starts_with("Produce, a task"));
        let unary = rows
            .iter()
            .find(|(name, way, _)| SINGLE_AIM.is_about(name, way, SINGLE_AIM.size) && way.ends_with("64 callers"));
        if let (Some((_, single_way, single)), Some((_, unary_way, unary))) = (single, unary) {
            let goal = (size == SINGLE_AIM.size && self.measurements[0] == INSERTS).then_some(SINGLE_AIM.goal);
            report.ratio(format!("{size} B: {our_name}, {single_way} ÷ {unary_way}"), single, unary, goal);
        }
    }

    /// What a waiting task of 200 B takes in memory.
    async fn memory(&self, options: &Options, report: &mut Report, contender: &dyn Contender) -> Result<()> {
        let waiting = if options.smoke { 2_000 } else { WAITING };
        let mut values = Vec::new();
        for _ in 0..options.rounds().min(3) {
            values.push(limited(options, waiting_task(options, contender, waiting)).await?);
        }
        let what = format!("{}, {} tasks of 200 B wait: memory of one", contender.name(), count(waiting));
        report.figure(Figure { measurement: MEMORY, what, unit: "B", values, ..Figure::default() });
        Ok(())
    }
}

impl Aim {
    fn is_about(&self, name: &str, way: &str, size: usize) -> bool {
        name.starts_with(self.peer) && way.starts_with(self.way) && size == self.size
    }
}

pub(crate) async fn waiting_task(options: &Options, contender: &dyn Contender, waiting: u64) -> Result<f64> {
    const SIZE: usize = 200;
    let scratch = Scratch::new(options)?;
    let running = contender.start(scratch.path()).await?;
    let mut ledger = Ledger::new(SIZE);
    // What it needs once, it has after these.
    running.fill(0..FIRST, SIZE).await?;
    running.drain(FIRST, &mut ledger).await?;
    let before = running.memory().await?;
    running.fill(FIRST..FIRST + waiting, SIZE).await?;
    let after = running.memory().await?;
    running.drain(waiting, &mut ledger).await?;
    verify_empty(contender, &*running, &ledger, FIRST + waiting).await?;
    Ok((after - before) / waiting as f64)
}

/// What a pass took: the inserts, and the pops with their acks.
pub(crate) struct Pass {
    tasks: u64,
    took: [Duration; 2],
    cpu: [Vec<(&'static str, f64)>; 2],
}

impl Pass {
    pub(crate) fn rates(&self) -> [f64; 2] {
        self.took.map(|took| self.tasks as f64 / took.as_secs_f64())
    }

    /// Of the inserts, or of the others.
    pub(crate) fn cpu(&self, leg: usize) -> Vec<(&'static str, f64)> {
        self.cpu[leg].clone()
    }

    /// How many tasks both ways take about this long for.
    fn tasks_in(&self, span: Duration) -> u64 {
        let took = self.took[0] + self.took[1];
        let tasks = self.tasks as f64 * span.as_secs_f64() / took.as_secs_f64();
        (tasks as u64).clamp(FIRST, MOST)
    }
}

/// A contender under way, and which tasks it has had.
struct Passes<'c> {
    running: &'c dyn Running,
    ledger: Ledger,
    next: u64,
    size: usize,
}

impl Passes<'_> {
    async fn pass(&mut self, tasks: u64) -> Result<Pass> {
        let numbers = self.next..self.next + tasks;
        self.next = numbers.end;
        let (before, start) = (cpu_times(self.running)?, Instant::now());
        self.running.fill(numbers, self.size).await?;
        let (filled, between) = (cpu_times(self.running)?, Instant::now());
        self.running.drain(tasks, &mut self.ledger).await?;
        let (end, after) = (Instant::now(), cpu_times(self.running)?);
        let share = |before, after| cpu_between(before, after, tasks as f64);
        let cpu = [share(&before, &filled), share(&filled, &after)];
        Ok(Pass { tasks, took: [between - start, end - between], cpu })
    }
}

/// A fresh start, passes to warm up, the one that counts, which takes about this long, and the proof that nothing was lost.
pub(crate) async fn compare_round(
    options: &Options,
    contender: &dyn Contender,
    size: usize,
    span: Duration,
) -> Result<Pass> {
    limited(options, async {
        let scratch = Scratch::new(options)?;
        let running = contender.start(scratch.path()).await?;
        let mut passes = Passes { running: &*running, ledger: Ledger::new(size), next: 0, size };
        let first = passes.pass(FIRST).await?;
        let warm = passes.pass(first.tasks_in(span / 8)).await?;
        let pass = passes.pass(warm.tasks_in(span)).await?;
        verify_empty(contender, &*running, &passes.ledger, passes.next).await?;
        Ok(pass)
    })
    .await
}

/// A queue that lost a task would be waited for in vain.
async fn limited<T>(options: &Options, work: impl Future<Output = Result<T>>) -> Result<T> {
    let limit = Duration::from_secs(120) + 20 * options.span();
    timeout(limit, work).await.map_err(|_| format!("not done after {limit:?}"))?
}
