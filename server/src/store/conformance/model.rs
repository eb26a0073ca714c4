//! Random histories, on a store and on the store in memory: whatever is done, both answer alike, and its books balance.
//!
//! A failing history is made as small as it gets, and printed with its seed. `DATA_QUEUE_TEST_SEED` repeats the history of
//! that seed and no other, `DATA_QUEUE_TEST_HISTORIES` says how many are tried, `DATA_QUEUE_TEST_LONG=1` tries very many.

mod answer;
mod author;
mod books;
mod name;
mod step;

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use proptest::{
    strategy::{Strategy, ValueTree},
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};

use self::{
    author::{Plot, Wanted, histories},
    books::Books,
    step::{Answer, Batch, PopStep, QUEUES, Queue, Step, Stream, TaskNumber, Ticket, Which},
};
use super::*;

const HISTORIES: u64 = 150;
const HISTORIES_LONG: u64 = 10_000;

/// For how long a failing history is made smaller, at most.
const SHRINKING: Duration = Duration::from_secs(60);

fn number_of(variable: &str) -> Option<u64> {
    let text = env::var(variable).ok().filter(|text| !text.is_empty())?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is not a number: {text}")))
}

/// How many histories, unless it is said.
fn histories_wanted() -> u64 {
    let long = number_of("DATA_QUEUE_TEST_LONG") == Some(1);
    number_of("DATA_QUEUE_TEST_HISTORIES").unwrap_or(if long { HISTORIES_LONG } else { HISTORIES })
}

fn seeds(count: u64) -> Vec<u64> {
    if let Some(seed) = number_of("DATA_QUEUE_TEST_SEED") {
        return vec![seed];
    }
    let mut first = [0; 8];
    getrandom::fill(&mut first).unwrap();
    // Short enough to be typed.
    let first = u64::from_ne_bytes(first) >> 16;
    (first..first + count).collect()
}

/// What a test does with a history: an error says at which step what was wrong.
trait Trial {
    async fn run(&mut self, plot: &Plot, steps: &[Step]) -> Result<(), String>;
}

/// Tries all histories. The first that fails is made smaller, and fails the test.
async fn try_histories(seeds: Vec<u64>, wanted: Wanted, trial: &mut impl Trial) {
    let started = Instant::now();
    println!("DATA_QUEUE_TEST_SEED={} and on, {} histories", seeds[0], seeds.len());
    for seed in &seeds {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        let config = Config { failure_persistence: None, ..Config::default() };
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
        let mut tree = histories(wanted.clone()).new_tree(&mut TestRunner::new_with_rng(config, rng)).unwrap();
        let (plot, steps, seen) = tree.current();
        let Err(first) = trial.run(&plot, &steps).await else { continue };
        if let Some(seen) = seen {
            // All of them are needed until they were left out once.
            seen.store(steps.len(), Ordering::SeqCst);
        }
        let (plot, steps, failure) = smallest(&mut tree, trial, (plot, steps, first)).await;
        let listed: Vec<String> = steps.iter().enumerate().map(|(at, step)| format!("{at:3} {step:?}")).collect();
        panic!("DATA_QUEUE_TEST_SEED={seed}\n{:?}\n{}\n{failure}", plot.rules, listed.join("\n"));
    }
    println!("{} histories in {:?}", seeds.len(), started.elapsed());
}

type Failing = (Plot, Vec<Step>, String);

async fn smallest(
    tree: &mut impl ValueTree<Value = (Plot, Vec<Step>, Option<Arc<std::sync::atomic::AtomicUsize>>)>,
    trial: &mut impl Trial,
    mut failing: Failing,
) -> Failing {
    let until = Instant::now() + SHRINKING;
    let mut more = tree.simplify();
    while more && Instant::now() < until {
        let (plot, steps, _) = tree.current();
        more = match trial.run(&plot, &steps).await {
            Err(failure) => {
                failing = (plot, steps, failure);
                tree.simplify()
            }
            Ok(()) => tree.complicate(),
        };
    }
    without_more(trial, failing, until + SHRINKING).await
}

/// The library leaves each step out once, on its own; what another one needed may be left out now.
async fn without_more(trial: &mut impl Trial, mut failing: Failing, until: Instant) -> Failing {
    let mut at = failing.1.len();
    while at > 0 && Instant::now() < until {
        at = (at - 1).min(failing.1.len() - 1);
        let mut steps = failing.1.clone();
        steps.remove(at);
        if failing.0.allows_all(&steps)
            && let Err(failure) = trial.run(&failing.0, &steps).await
        {
            failing = (failing.0, steps, failure);
            at = failing.1.len();
        }
    }
    failing
}

/// How often each kind of step met each kind of answer.
type Tally = BTreeMap<String, u64>;

/// Compares a store with the store in memory.
struct Comparison {
    one: Rig,
    memory: Rig,
    /// Leases that were given out, and tasks that have a time to come or went to wait: what bounds how much can be due at once.
    timed: usize,
    /// All that were named in an insert.
    tasks: BTreeSet<(Queue, TaskNumber)>,
    tickets: BTreeSet<(Queue, Ticket)>,
    requests: Vec<Step>,
    tally: Tally,
}

impl Comparison {
    fn new(open: Open) -> Self {
        let (tasks, tickets, requests, tally) = Default::default();
        Self { one: open(RULES), memory: memory(RULES), timed: 0, tasks, tickets, requests, tally }
    }

    async fn same(&mut self, step: &Step) -> Result<Answer, String> {
        let rounds = 1 + self.timed / RECLAIM_STEP;
        let expected = step::take(&mut self.memory, step, rounds).await;
        let found = step::take(&mut self.one, step, rounds).await;
        if found != expected {
            return Err(format!("{step:?}\n  answered  {found:?}\n  in memory {expected:?}"));
        }
        Ok(found)
    }

    async fn step(&mut self, step: &Step) -> Result<(), String> {
        let answer = self.same(step).await?;
        let known = |ticket: Ticket| self.tickets.iter().any(|(_, known)| *known == ticket);
        for label in labels(step, &answer, known) {
            *self.tally.entry(label).or_default() += 1;
        }
        match step {
            Step::Insert(_, _, Some(_)) => self.requests.push(step.clone()),
            Step::Produce(..) | Step::Import(..) => self.requests.push(step.clone()),
            Step::Pop(_, pop) if pop.request.is_some() => self.requests.push(step.clone()),
            // Nothing runs out while a store is opened, so this takes nothing back.
            Step::Disturb(disturbance) if disturbance.reopens() => self.look_around().await?,
            _ => {}
        }
        match (step.once(), answer) {
            (Step::Pop(q, _), Answer::Popped { tasks, .. }) => {
                self.timed += tasks.len();
                self.tickets.extend(tasks.iter().map(|task| (*q, task.ticket)));
            }
            // Each may wait, or be dead and kept for some time.
            (_, Answer::GivenBack(outcomes, _)) => self.timed += outcomes.len(),
            (Step::Insert(q, batch, _), _) => self.note(*q, *batch),
            (Step::Import(q, batch), _) => {
                self.note(*q, *batch);
                // Some are dead.
                self.timed += batch.count as usize;
            }
            (Step::Produce(q, produce), _) => produce.inserts.iter().for_each(|(_, batch, _)| self.note(*q, *batch)),
            _ => {}
        }
        Ok(())
    }

    fn note(&mut self, q: Queue, batch: Batch) {
        self.tasks.extend(batch.numbers().map(|number| (q, number)));
        let times = usize::from(batch.life.due.is_some()) + usize::from(batch.life.ttl.is_some());
        self.timed += times * batch.count as usize;
    }

    async fn look_around(&mut self) -> Result<(), String> {
        self.same(&Step::Counts(Queue::all().collect())).await?;
        self.same(&Step::Queues { after: None, max: QUEUES.len() + 1 }).await.map(drop)
    }

    /// Where each task is, in which order, and all that is known of it.
    async fn look_at_tasks(&mut self) -> Result<(), String> {
        for q in Queue::all() {
            self.step(&Step::Settings(q)).await?;
            for state in [State::Ready, State::Scheduled, State::Leased, State::Dead] {
                self.step(&Step::List(q, state, 70)).await?;
            }
            let own: Vec<TaskNumber> = self.tasks.iter().filter(|(of, _)| *of == q).map(|(_, task)| *task).collect();
            for tasks in own.chunks(RECLAIM_STEP) {
                self.step(&Step::Tasks(q, Which::Named(tasks.to_vec()))).await?;
            }
        }
        Ok(())
    }

    /// What a step answers for each token that anybody was given.
    async fn ask_for_tokens(&mut self, step: fn(Queue, Vec<Ticket>) -> Step) -> Result<(), String> {
        for q in Queue::all() {
            let own: Vec<Ticket> = self.tickets.iter().filter(|(of, _)| *of == q).map(|(_, ticket)| *ticket).collect();
            for tickets in own.chunks(150) {
                self.same(&step(q, tickets.to_vec())).await?;
            }
        }
        Ok(())
    }

    /// Everything that can be seen of the end of a history: where each task is and in which order, what its counters say,
    /// and what is remembered.
    async fn audit(&mut self, plot: &Plot) -> Result<(), String> {
        self.look_around().await?;
        self.look_at_tasks().await?;
        // Changes nothing but deadlines.
        self.ask_for_tokens(|q, tickets| Step::Heartbeat(q, tickets, Some(1))).await?;
        for (q, session) in Queue::all().flat_map(|q| author::SESSIONS.map(|session| (q, session))) {
            self.same(&Step::Resume(q, Stream { session, number: u8::MAX }, 1)).await?;
        }
        let mut fresh = (u32::MAX >> 1) - 10_000;
        let mut requests = std::mem::take(&mut self.requests);
        requests.dedup();
        for step in &mut requests {
            // Under tokens of its own, as a caller's repetition has it, and without what it acked then.
            if let Step::Pop(_, pop) = step {
                let stream = None;
                *pop = Arc::new(PopStep { number: fresh, acks: Vec::new(), stream, ..PopStep::clone(pop) });
                fresh += 1;
            }
            self.step(step).await?;
        }
        for q in Queue::all() {
            self.same(&Step::ReleaseHeld(q, 0)).await?;
            self.same(&Step::Change(q, vec![(Setting::Paused, None)])).await?;
        }
        // Most of what waits falls due now, and most of what ends is over.
        self.same(&Step::Pass(2_000)).await?;
        self.look_around().await?;
        self.look_at_tasks().await?;
        for q in Queue::all() {
            while let Answer::Popped { tasks, .. } = self.take_all(q, fresh).await?
                && let Some(last) = tasks.last()
            {
                self.tickets.extend(tasks.iter().map(|task| (q, task.ticket)));
                let tickets: Vec<Ticket> = tasks.iter().map(|task| task.ticket).collect();
                // Where few are remembered, only acks of one are sure to be counted alike.
                for tickets in tickets.chunks(if plot.forgets_early() { 1 } else { tickets.len() }) {
                    self.same(&Step::Ack(q, tickets.to_vec())).await?;
                }
                fresh = last.ticket.pop + 1;
            }
        }
        // Nothing is held any more: this changes nothing.
        self.ask_for_tokens(Step::Ack).await?;
        self.look_around().await
    }

    async fn take_all(&mut self, q: Queue, number: u32) -> Result<Answer, String> {
        let (max_tasks, max_bytes, lease) = (RECLAIM_STEP, 1 << 20, Some(LEASE));
        let (request, acks, will_wait, stream, spent) = Default::default();
        let pop = PopStep { number, max_tasks, max_bytes, lease, request, acks, will_wait, stream, spent };
        self.same(&Step::Pop(q, Arc::new(pop))).await
    }
}

impl Trial for Comparison {
    async fn run(&mut self, plot: &Plot, steps: &[Step]) -> Result<(), String> {
        self.one.start_over(plot.rules);
        self.memory.start_over(plot.rules);
        self.timed = 0;
        self.tasks.clear();
        self.tickets.clear();
        self.requests.clear();
        for (at, step) in steps.iter().enumerate() {
            self.step(step).await.map_err(|error| format!("at step {at}: {error}"))?;
        }
        self.audit(plot).await.map_err(|error| format!("in the end: {error}"))
    }
}

/// In short, what a step did.
fn labels(step: &Step, answer: &Answer, known: impl Fn(Ticket) -> bool) -> Vec<String> {
    let name = |step: &Step| {
        let text = format!("{step:?}");
        text.split(|letter: char| !letter.is_alphanumeric()).next().unwrap_or_default().to_owned()
    };
    let kind = match step {
        Step::Again(step) => format!("Again {}", name(step)),
        Step::Disturb(disturbance) => format!("{disturbance:?}"),
        step => name(step),
    };
    let of_all =
        |outcomes: &[Outcome]| outcomes.iter().map(|outcome| format!("{kind}: {outcome:?}")).collect::<Vec<_>>();
    let mut labels = match answer {
        Answer::Refused(why) => vec![format!("{kind}: {}", without_number(why))],
        Answer::Inserted { replayed: true, duplicates, .. } if !duplicates.is_empty() => {
            vec![format!("{kind}: replayed"), format!("{kind}: replayed a duplicate")]
        }
        Answer::Inserted { replayed: true, .. } => vec![format!("{kind}: replayed")],
        Answer::Inserted { duplicates, .. } if !duplicates.is_empty() => vec![format!("{kind}: duplicate")],
        Answer::Imported(answers) => {
            let label = |answer: &Result<(_, Vec<usize>, bool), String>| match answer {
                Ok((_, _, true)) => Some(format!("{kind}: replayed")),
                Ok((_, duplicates, _)) => (!duplicates.is_empty()).then(|| format!("{kind}: duplicate")),
                Err(why) => Some(format!("{kind}: {}", without_number(why))),
            };
            answers.iter().filter_map(label).collect()
        }
        Answer::Produced(answers, refused) => {
            let mut labels: Vec<String> =
                refused.iter().map(|why| format!("{kind}: {}", without_number(why))).collect();
            let replayed = |wanted: bool| answers.iter().any(|(_, _, replayed)| *replayed == wanted);
            let duplicate = answers.iter().any(|(_, duplicates, _)| !duplicates.is_empty());
            labels.extend(duplicate.then(|| format!("{kind}: duplicate")));
            labels.extend(replayed(true).then(|| format!("{kind}: replayed")));
            labels.extend((replayed(true) && replayed(false)).then(|| format!("{kind}: known and new")));
            labels
        }
        Answer::Inserted { tasks, .. } if tasks.len() >= RECLAIM_STEP => vec![format!("{kind}: many")],
        Answer::Popped { acks, tasks, reclaimed, taken_over, .. } => {
            let mut labels = of_all(acks);
            labels.extend(taken_over.then(|| format!("{kind}: taken over")));
            let many = *reclaimed > RECLAIM_STEP as u64;
            labels.extend(tasks.iter().any(|task| known(task.ticket)).then(|| format!("{kind}: given the same again")));
            labels.extend((*reclaimed > 0).then(|| format!("{kind}: reclaimed")));
            labels.extend(many.then(|| format!("{kind}: reclaimed many")));
            labels.extend(
                tasks.iter().any(|task| task.deliveries > task.expiries + 1).then(|| format!("{kind}: came back")),
            );
            labels.extend(tasks.iter().any(|task| task.failures > 0).then(|| format!("{kind}: failed before")));
            labels.extend(tasks.is_empty().then(|| format!("{kind}: nothing")));
            labels
        }
        Answer::Outcomes(outcomes) => of_all(outcomes),
        Answer::Beaten(outcomes, _, cancelled) | Answer::Kept(Some((outcomes, cancelled))) => {
            let mut labels = of_all(outcomes);
            labels.extend((!cancelled.is_empty()).then(|| format!("{kind}: cancelled")));
            labels
        }
        Answer::GivenBack(outcomes, Released { put_back, ready, dead_lettered }) => {
            let mut labels = of_all(outcomes);
            let applied = outcomes.iter().filter(|outcome| **outcome == Outcome::Applied).count() as u64;
            labels.extend((ready < put_back).then(|| format!("{kind}: waits")));
            labels.extend((*dead_lettered > 0).then(|| format!("{kind}: dead")));
            labels.extend((put_back + dead_lettered < applied).then(|| format!("{kind}: gone")));
            labels
        }
        Answer::Listed(Some(listed)) => {
            let mut labels: Vec<String> = listed.iter().map(|view| format!("{kind}: {:?}", view.0.state)).collect();
            labels.extend(listed.iter().filter_map(|view| Some(format!("{kind}: {:?}", view.0.cause?))));
            labels.extend(listed.iter().any(|view| view.0.cancelled).then(|| format!("{kind}: cancelled")));
            labels
        }
        Answer::Told(told) => told.iter().flatten().map(|view| format!("{kind}: {:?}", view.0.state)).collect(),
        Answer::Deleted(deleted) => deleted.iter().map(|(_, deleted)| format!("{kind}: {deleted:?}")).collect(),
        Answer::Redriven(redriven) => redriven.iter().map(|(_, redriven)| format!("{kind}: {redriven:?}")).collect(),
        Answer::Purged(1..) => vec![format!("{kind}: some")],
        Answer::Dropped(true) => vec![format!("{kind}: done")],
        Answer::Kept(None) => vec![format!("{kind}: taken over")],
        Answer::Resumed(tickets, _) if !tickets.is_empty() => vec![format!("{kind}: holds some")],
        Answer::Withdrawn(1..) => vec![format!("{kind}: gave back")],
        Answer::Released(Released { dead_lettered: 1.., .. }) => vec![format!("{kind}: dead")],
        Answer::Released(Released { put_back: 1.., .. }) => vec![format!("{kind}: put back")],
        Answer::Seen(sights) if sights.iter().any(|sight| sight.reclaimed > 0) => vec![format!("{kind}: reclaimed")],
        Answer::Counted(counts) => {
            let some = |what, count: fn(&Counts) -> u64| {
                counts.iter().flatten().any(|counts| count(counts) > 0).then(|| format!("{kind}: {what}"))
            };
            let (dead, waits) = (some("dead", |counts| counts.dead), some("scheduled", |counts| counts.scheduled));
            let (over, deleted) = (some("expired", |counts| counts.expired), some("deleted", |counts| counts.deleted));
            [dead, waits, over, deleted, some("purged", |counts| counts.purged)].into_iter().flatten().collect()
        }
        Answer::Reaped(reaped) if !reaped.is_empty() => vec![format!("{kind}: reclaimed")],
        _ => Vec::new(),
    };
    labels.push(kind);
    labels
}

/// The limit that a refusal tells is not what it is about.
fn without_number(why: &str) -> &str {
    why.trim_end_matches(|letter: char| letter.is_ascii_digit())
}

/// Maxim 7 of the house, taken at its word: whatever is done, a store answers as the store in memory does, and ends as it
/// does.
pub(super) async fn it_answers_as_the_store_in_memory_does(open: Open) {
    let mut comparison = Comparison::new(open);
    let disturbances = comparison.one.engine.disturbances();
    let wanted = Wanted { disturbances, queues: QUEUES.len(), again: true };
    try_histories(seeds(histories_wanted()), wanted, &mut comparison).await;
}

/// G14, and G1, G2, G4, G6, G7 as callers see them: at every step of a random history each task is in exactly one place.
pub(super) async fn every_task_is_in_exactly_one_place(open: Open) {
    let mut books = Books::new(open(RULES));
    // A step that runs again is one that the caller did not see: that is compared above, not booked here.
    let wanted = Wanted { disturbances: books.rig.engine.disturbances(), queues: 1, again: false };
    try_histories(seeds((histories_wanted() / 3).max(1)), wanted, &mut books).await;
}

/// Histories that never meet what they should test would find nothing. Of the generator only: the store is the same twice.
#[tokio::test]
async fn histories_meet_everything_that_they_should() {
    let mut comparison = Comparison::new(memory);
    let wanted = Wanted { disturbances: &[], queues: QUEUES.len(), again: true };
    // Always the same ones: a rare one must not be missed by chance.
    try_histories((0..HISTORIES).collect(), wanted, &mut comparison).await;
    println!("{:#?}", comparison.tally);
    for wanted in MET {
        assert!(comparison.tally.contains_key(*wanted), "never met: {wanted}");
    }
}

const MET: &[&str] = &[
    "Insert: replayed",
    "Insert: many",
    "Insert: the request id was used before, with other content",
    "Insert: duplicate",
    "Insert: replayed a duplicate",
    "Insert: the queue is at its max_tasks of ",
    "Insert: the queue is at its max_bytes of ",
    "Again Insert: replayed",
    "Import",
    "Import: duplicate",
    "Import: the queue is at its max_tasks of ",
    "Again Import: replayed",
    "Produce",
    "Produce: replayed",
    "Produce: known and new",
    "Produce: the request id was used before, with other content",
    "Produce: the number is not greater than the producer's last one, and was not used, or is too old to be known",
    "Produce: duplicate",
    "Produce: the queue is at its max_tasks of ",
    "Again Produce",
    "Pop: Applied",
    "Pop: AlreadyAcked",
    "Pop: LeaseLost",
    "Pop: given the same again",
    "Pop: the request id was used before, with other content",
    "Pop: reclaimed",
    "Pop: reclaimed many",
    "Pop: nothing",
    "Pop: came back",
    "Pop: failed before",
    "Again Pop",
    "Again Pop: given the same again",
    "Again Pop: nothing",
    "Ack: Applied",
    "Ack: AlreadyAcked",
    "Ack: LeaseLost",
    "Heartbeat: Applied",
    "Heartbeat: AlreadyAcked",
    "Heartbeat: LeaseLost",
    "Heartbeat: cancelled",
    "PutBack: Applied",
    "PutBack: waits",
    "PutBack: dead",
    "PutBack: gone",
    "PutBack: AlreadyAcked",
    "PutBack: LeaseLost",
    "Unsent: Applied",
    "Unsent: AlreadyAcked",
    "Unsent: LeaseLost",
    "Withdraw",
    "Withdraw: gave back",
    "ReleaseHeld: put back",
    "ReleaseHeld: dead",
    "Pop: taken over",
    "Resume",
    "Resume: holds some",
    "Keep: Applied",
    "Keep: AlreadyAcked",
    "Keep: LeaseLost",
    "Keep: taken over",
    "Keep: cancelled",
    "Abandon",
    "Look: reclaimed",
    "Counts: dead",
    "Counts: scheduled",
    "Counts: expired",
    "Counts: deleted",
    "Counts: purged",
    "Change",
    "Settings",
    "List: Ready",
    "List: Scheduled",
    "List: Leased",
    "List: Dead",
    "List: Failures",
    "List: Expiries",
    "List: Rejected",
    "List: cancelled",
    "Tasks: Ready",
    "Tasks: Scheduled",
    "Tasks: Leased",
    "Tasks: Dead",
    "Delete: Gone",
    "Delete: Cancelled",
    "Delete: Unknown",
    "Redrive: Ready",
    "Redrive: Duplicate",
    "Redrive: Expired",
    "Redrive: Unknown",
    "Purge: some",
    "DropQueue: done",
    "DropQueue: the queue has tasks",
    "Queues",
    "Reap: reclaimed",
];
