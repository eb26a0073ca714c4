//! Makes histories up, before any store has seen them: what a step names is derived from what was generated, never from
//! an answer, so that a failing history can be made smaller.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use proptest::{
    collection::vec,
    option,
    prelude::{Just, Strategy, any, prop},
    prop_oneof,
    sample::select,
    strategy::BoxedStrategy,
};
use proptest_state_machine::strategy::Sequential;

use super::{
    super::*,
    step::{
        Batch, How, Life, PopStep, ProduceStep, QUEUES, Queue, Request, Step, Stream, TaskNumber, Ticket, Try, Which,
    },
};

/// For how long requests and acks are remembered in histories.
const WINDOW: Millis = 3_000;

/// A withdrawn pop leases nothing when it arrives within a minute. After that, it may or may not.
const MAY_STILL_ARRIVE: Millis = 60_000;

/// Steps, pops and tokens that later steps refer to are those of late.
const RECENT: usize = 24;

const STEPS: usize = 80;

/// So few that their streams often take them over.
pub(super) const SESSIONS: [u8; 2] = [1, 2];

/// What kinds of histories are wanted.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) disturbances: &'static [Disturbance],
    /// Of [`QUEUES`], the first so many.
    pub(super) queues: usize,
    /// Whether steps run a second time that nobody saw the answer of.
    pub(super) again: bool,
}

/// What was made up so far.
#[derive(Clone, Debug)]
pub(super) struct Plot {
    pub(super) rules: Rules,
    wanted: Wanted,
    /// Often there are more tasks than one step takes.
    crowded: bool,
    /// All of it happens to one queue, and much of it is administration.
    administered: bool,
    next_task: u32,
    next_pop: u32,
    now: Millis,
    /// The last number of each producer that has one.
    numbers: HashMap<(Queue, u8), u64>,
    pops: Vec<(Queue, Arc<PopStep>)>,
    past: Vec<Arc<Step>>,
    /// What went in of late.
    batches: Vec<(Queue, Batch)>,
    /// A pop runs twice before anybody saw its tokens, so never after one of them was acked.
    acked: HashSet<u32>,
    /// Pops of which every token was acked: they have no leases any more.
    spent: Vec<u32>,
    withdrawn: HashMap<u32, Millis>,
    /// No pop from before is under way when a store was opened again.
    opened_before: u32,
}

type Opening = BoxedStrategy<Plot>;
type Next = BoxedStrategy<Step>;

pub(super) fn histories(wanted: Wanted) -> Sequential<Plot, Step, Opening, Next> {
    Sequential::new(STEPS.into(), move || opening(wanted.clone()), Plot::allows, Plot::next_step, Plot::after)
}

fn opening(wanted: Wanted) -> Opening {
    let entries = prop_oneof![3 => Just(RULES.remember.entries), 1 => 4_u64..12];
    let max_expiries = prop_oneof![2 => Just(RULES.max_expiries), 3 => 1_u32..4];
    let max_failures = prop_oneof![1 => Just(RULES.max_failures), 3 => 1_u32..4];
    let plot = move |(entries, max_expiries, max_failures, crowded, administered)| Plot {
        rules: Rules {
            remember: Remember { window: WINDOW, entries },
            max_expiries,
            max_failures,
            backoff: Backoff { min: 60, max: 300 },
            ..RULES
        },
        wanted: wanted.clone(),
        crowded,
        administered,
        next_task: 0,
        next_pop: 0,
        now: 0,
        numbers: HashMap::new(),
        pops: Vec::new(),
        past: Vec::new(),
        batches: Vec::new(),
        acked: HashSet::new(),
        spent: Vec::new(),
        withdrawn: HashMap::new(),
        opened_before: 0,
    };
    (entries, max_expiries, max_failures, prop::bool::weighted(0.15), prop::bool::weighted(0.5))
        .prop_map(plot)
        .no_shrink()
        .boxed()
}

impl Plot {
    /// Ever so few entries are remembered. A store may count those of one call as one or one by one, so that only calls
    /// that bring one are sure to drop the older half at the same moment.
    pub(super) fn forgets_early(&self) -> bool {
        self.rules.remember.entries < RULES.remember.entries
    }

    pub(super) fn queues(&self) -> impl Iterator<Item = Queue> + use<> {
        Queue::all().take(self.wanted.queues)
    }

    fn allows(&self, step: &Step) -> bool {
        match step {
            Step::Again(step) => self.may_run_again(step),
            Step::Pop(q, pop) => self.is_of(*q, pop) && pop.spent.iter().all(|number| self.spent.contains(number)),
            Step::Withdraw(q, pop) => self.is_of(*q, pop),
            _ => true,
        }
    }

    /// No two queues are asked for the same tokens.
    fn is_of(&self, q: Queue, pop: &PopStep) -> bool {
        self.pops.iter().all(|(of, known)| *of == q || known.number != pop.number)
    }

    /// What a second run of an insert finds of unique keys is up to the store, but for Redis, which a connection may be lost to: that
    /// has a case of its own.
    fn may_run_again(&self, step: &Step) -> bool {
        let (q, pop) = match step {
            Step::Pop(q, pop) => (q, pop),
            Step::Insert(_, batch, request) => return request.is_some() || batch.life.key.is_none(),
            _ => return true,
        };
        self.is_of(*q, pop)
            && pop.number >= self.opened_before
            && !self.acked.contains(&pop.number)
            && self.withdrawn.get(&pop.number).is_none_or(|at| self.now < at + MAY_STILL_ARRIVE)
    }

    /// Whether a history is one that can happen.
    pub(super) fn allows_all(&self, steps: &[Step]) -> bool {
        let mut plot = self.clone();
        for step in steps {
            if !plot.allows(step) {
                return false;
            }
            plot = plot.after(step);
        }
        true
    }

    fn after(mut self, step: &Step) -> Self {
        match step {
            Step::Pass(span) => self.now += span,
            Step::Insert(q, batch, _) => {
                self.batches.push((*q, *batch));
                self.next_task = self.next_task.max(batch.first + batch.count);
                self.past.push(Arc::new(step.clone()));
            }
            Step::Import(q, batch) => {
                self.batches.push((*q, *batch));
                self.next_task = self.next_task.max(batch.first + batch.count);
                self.past.push(Arc::new(step.clone()));
            }
            Step::Produce(q, produce) => {
                for (number, batch, _) in &produce.inserts {
                    self.batches.push((*q, *batch));
                    self.next_task = self.next_task.max(batch.first + batch.count);
                    let last = self.numbers.entry((*q, produce.producer)).or_default();
                    *last = (*last).max(*number);
                }
                self.past.push(Arc::new(step.clone()));
            }
            Step::Pop(q, pop) => {
                self.note_acks(*q, &pop.acks);
                self.met(*q, pop);
            }
            Step::Ack(q, tickets) => self.note_acks(*q, tickets),
            Step::Withdraw(q, pop) => {
                self.withdrawn.insert(pop.number, self.now);
                self.met(*q, pop);
            }
            Step::Disturb(Disturbance::CloseAndReopen | Disturbance::CrashAndReopen) => {
                self.opened_before = self.next_pop;
            }
            Step::Again(step) => return self.after(&Step::clone(step)),
            _ => {}
        }
        let surplus = self.past.len().saturating_sub(RECENT);
        self.past.drain(..surplus);
        let surplus = self.batches.len().saturating_sub(RECENT);
        self.batches.drain(..surplus);
        let surplus = self.pops.len().saturating_sub(RECENT);
        self.pops.drain(..surplus);
        self
    }

    fn note_acks(&mut self, q: Queue, tickets: &[Ticket]) {
        self.acked.extend(tickets.iter().map(|ticket| ticket.pop));
        let tickets: HashSet<Ticket> = tickets.iter().copied().collect();
        for (of, pop) in &self.pops {
            let mut all = (0..pop.max_tasks as u16).map(|position| Ticket { pop: pop.number, position });
            if *of == q && !self.spent.contains(&pop.number) && all.all(|ticket| tickets.contains(&ticket)) {
                self.spent.push(pop.number);
            }
        }
    }

    fn met(&mut self, q: Queue, pop: &Arc<PopStep>) {
        if pop.number >= self.next_pop {
            self.next_pop = pop.number + 1;
            self.pops.push((q, Arc::clone(pop)));
            self.past.push(Arc::new(Step::Pop(q, Arc::clone(pop))));
        }
    }

    /// The simplest steps come first, because a failing history is made smaller by going to an earlier one.
    fn next_step(&self) -> Next {
        let step = prop_oneof![
            30 => self.pass(),
            3 => self.some_queues().prop_map(Step::Counts),
            3 => self.some_queues().prop_map(Step::Look),
            1 => self.listing(),
            2 => (1_usize..6).prop_map(|budget| Step::Reap { budget }),
            16 => self.insert(),
            10 => self.produce(),
            5 => self.import(),
            20 => self.pop().prop_map(|(q, pop)| Step::Pop(q, Arc::new(pop))),
            7 => self.on_tickets(self.acks(), Step::Ack),
            8 => (self.on_tickets(self.tickets(), |q, tickets| (q, tickets)), option::weighted(0.8, lease()))
                .prop_map(|((q, tickets), lease)| Step::Heartbeat(q, tickets, lease)),
            10 => (self.on_tickets(self.tickets(), |q, tickets| (q, tickets)), how())
                .prop_map(|((q, tickets), how)| Step::PutBack(q, tickets, how)),
            5 => (self.on_tickets(self.tickets(), |q, tickets| (q, tickets)), option::of(attempt()))
                .prop_map(|((q, tickets), attempt)| Step::Unsent(q, tickets, attempt)),
            3 => self.withdraw(),
            2 => (self.queue(), select(vec![0, 50, 200, 1_000])).prop_map(|(q, span)| Step::ReleaseHeld(q, span)),
            4 => (self.queue(), stream(), lease()).prop_map(|(q, stream, lease)| Step::Resume(q, stream, lease)),
            4 => (self.of_a_stream(), prop_oneof![1 => Just(0), 6 => long_lease()])
                .prop_map(|((q, stream, tickets), lease)| Step::Keep(q, stream, tickets, lease)),
            4 => (self.of_a_stream(), select(vec![0, 50, 2_000]))
                .prop_map(|((q, stream, tickets), grace)| Step::Abandon(q, stream, tickets, grace)),
            if self.administered { 45 } else { 8 } => self.administer(),
            5 => self.again(),
            2 => self.disturb(),
        ];
        step.boxed()
    }

    fn administer(&self) -> Next {
        let state = select(vec![State::Ready, State::Scheduled, State::Leased, State::Dead]);
        let page = prop_oneof![2 => 1..5_usize, 1 => Just(100)];
        let step = prop_oneof![
            2 => (self.queue(), state.clone(), page).prop_map(|(q, state, page)| Step::List(q, state, page)),
            2 => self.on_tasks(|q, numbers| Step::Tasks(q, Which::Named(numbers))),
            2 => (self.known_queue(), state.clone(), 1..6_usize)
                .prop_map(|(q, state, count)| Step::Tasks(q, Which::First(state, count))),
            2 => self.on_tasks(|q, numbers| Step::Delete(q, Which::Named(numbers))),
            2 => self.on_tasks(|q, numbers| Step::Redrive(q, Which::Named(numbers))),
            4 => (self.known_queue(), prop_oneof![1 => state.clone(), 2 => Just(State::Leased)], 1..4_usize)
                .prop_map(|(q, state, count)| Step::Delete(q, Which::First(state, count))),
            4 => (self.known_queue(), 1..6_usize)
                .prop_map(|(q, count)| Step::Redrive(q, Which::First(State::Dead, count))),
            4 => (self.known_queue(), vec(change(), 0..3)).prop_map(|(q, changes)| Step::Change(q, changes)),
            1 => self.queue().prop_map(Step::Settings),
            1 => (self.queue(), state).prop_map(|(q, state)| Step::Purge(q, state)),
            1 => (self.queue(), prop::bool::weighted(0.3)).prop_map(|(q, force)| Step::DropQueue(q, force)),
        ];
        step.boxed()
    }

    /// Tasks of late, some or all that went in together; mostly on the queue that they are in.
    fn on_tasks(&self, step: fn(Queue, Vec<TaskNumber>) -> Step) -> Next {
        let life = Life { priority: 1, ..Life::default() };
        let nobody = Batch { first: (1 << 30) - 8, count: 4, padding: (0, 0), life };
        if self.batches.is_empty() {
            return self.queue().prop_map(move |q| step(q, nobody.numbers().collect())).boxed();
        }
        let last = self.batches.len() - 1;
        let batches = self.batches.clone();
        let recent = prop_oneof![4 => 0..=last.min(2), 4 => 0..=last.min(8), 1 => 0..=last];
        let batch = prop_oneof![30 => recent.prop_map(move |back| batches[last - back]), 1 => Just((Queue(0), nobody))];
        let strangers = prop_oneof![15 => Just(None), 1 => self.queue().prop_map(Some)];
        (batch, strangers, option::of(vec(prop_oneof![3 => 0..3_usize, 1 => 0..260_usize], 0..4)))
            .prop_map(move |((q, batch), stranger, some)| {
                let mut numbers: Vec<TaskNumber> = batch.numbers().collect();
                match some {
                    Some(some) => numbers = some.iter().map(|at| numbers[at % numbers.len()]).collect(),
                    None => numbers.truncate(RECLAIM_STEP),
                }
                step(stranger.unwrap_or(q), numbers)
            })
            .boxed()
    }

    fn pass(&self) -> Next {
        let span = prop_oneof![
            40 => 0..120_u64,
            6 => Just(300),
            4 => 2_000..5_000_u64,
            1 => Just(20_000),
            1 => Just(MAY_STILL_ARRIVE),
            1 => select(vec![SESSION_KEPT - 1, SESSION_KEPT]),
        ];
        span.prop_map(Step::Pass).boxed()
    }

    /// The last one is unknown to all stores, unless it is the only one.
    fn queue(&self) -> BoxedStrategy<Queue> {
        let count = self.wanted.queues as u8;
        if count < QUEUES.len() as u8 {
            return self.known_queue();
        }
        prop_oneof![30 => self.known_queue(), 1 => Just(Queue(count - 1))].boxed()
    }

    fn known_queue(&self) -> BoxedStrategy<Queue> {
        // A crowd gathers in one.
        let count = if self.crowded || self.administered { 1 } else { self.wanted.queues.min(QUEUES.len() - 1) };
        (0..count as u8).prop_map(Queue).boxed()
    }

    /// Each once: of a crowd, the first look at a queue takes back more in one store than in another.
    fn some_queues(&self) -> BoxedStrategy<Vec<Queue>> {
        let each_once = |mut queues: Vec<Queue>| {
            queues.sort_unstable();
            queues.dedup();
            queues
        };
        prop_oneof![1 => vec(self.queue(), 0..3).prop_map(each_once), 1 => Just(self.queues().collect())].boxed()
    }

    fn listing(&self) -> Next {
        (option::of(self.queue()), 0_usize..6).prop_map(|(after, max)| Step::Queues { after, max }).boxed()
    }

    fn insert(&self) -> Next {
        let first = self.next_task;
        let count = prop_oneof![60 => 1_u32..6, self.often() => 200_u32..260];
        let padding = (0_usize..40, any::<u8>());
        let step =
            move |(q, count, padding, life, request)| Step::Insert(q, Batch { first, count, padding, life }, request);
        (self.known_queue(), count, padding, self.life(), option::of(request())).prop_map(step).boxed()
    }

    /// Only one where it matters when the older half of the requests is dropped.
    fn import(&self) -> Next {
        let first = self.next_task;
        let count = prop_oneof![60 => 1_u32..6, self.often() => 150..=RECLAIM_STEP as u32];
        let count = if self.forgets_early() { Just(1).boxed() } else { count.boxed() };
        let padding = (0_usize..40, any::<u8>());
        let step = move |(q, count, padding, life)| Step::Import(q, Batch { first, count, padding, life });
        (self.known_queue(), count, padding, self.life()).prop_map(step).boxed()
    }

    /// Most go on where the producer is, and some begin with what it has done before.
    fn produce(&self) -> Next {
        let (next_task, numbers) = (self.next_task, self.numbers.clone());
        let back = prop_oneof![3 => Just(0), 2 => 1..6_u64, 1 => 0..40_u64];
        let count = prop_oneof![40 => 1_u32..4, 1 => Just(60)];
        let content = prop_oneof![12 => Just(0), 1 => Just(1)];
        let inserts = vec((1..3_u64, count, (0_usize..40, any::<u8>()), self.life(), content), 1..4);
        let step = move |(q, producer, back, inserts): (Queue, u8, u64, Vec<_>)| {
            let mut number = numbers.get(&(q, producer)).copied().unwrap_or(0).saturating_sub(back);
            let mut first = next_task;
            let insert = |(gap, count, padding, life, content)| {
                number += gap;
                first += count;
                (number, Batch { first: first - count, count, padding, life }, content)
            };
            let inserts = inserts.into_iter().map(insert).collect();
            Step::Produce(q, Arc::new(ProduceStep { producer, inserts }))
        };
        (self.known_queue(), 0..3_u8, back, inserts).prop_map(step).boxed()
    }

    /// Most tasks have nothing beside their envelopes.
    fn life(&self) -> BoxedStrategy<Life> {
        let delay = select(vec![0, 30, 100, 300, 3_000]);
        let at = (self.now.saturating_sub(50)..self.now + 400).prop_map(Due::At);
        let due = prop_oneof![5 => Just(None), 2 => delay.prop_map(Due::In).prop_map(Some), 1 => at.prop_map(Some)];
        let priority = prop_oneof![2 => Just(0), 1 => 0..=MAX_PRIORITY];
        let ttl = prop_oneof![2 => Just(None), 1 => select(vec![1, 60, 250, 400, 1_000, 30_000]).prop_map(Some)];
        let key = prop_oneof![1 => Just(None), 1 => (0..2_u8).prop_map(Some)];
        let some = (due, priority, ttl, key).prop_map(|(due, priority, ttl, key)| Life { due, priority, ttl, key });
        prop_oneof![1 => Just(Life::default()), 1 => some].boxed()
    }

    fn pop(&self) -> BoxedStrategy<(Queue, PopStep)> {
        let number = self.next_pop;
        let max_tasks = prop_oneof![60 => 1_usize..6, self.often() => Just(crate::store::RECLAIM_STEP)];
        let large = if self.crowded { 10 } else { 1 };
        let max_bytes = prop_oneof![large => Just(1 << 20), 1 => 1_usize..200];
        let acks = prop_oneof![2 => Just(Vec::new()), 1 => self.acks()];
        (
            self.queue(),
            max_tasks,
            max_bytes,
            option::weighted(0.8, long_lease()),
            option::of(a_try()),
            acks,
            any::<bool>(),
            self.for_a_stream(),
        )
            .prop_map(move |(q, max_tasks, max_bytes, lease, request, acks, will_wait, (stream, spent))| {
                (q, PopStep { number, max_tasks, max_bytes, lease, request, acks, will_wait, stream, spent })
            })
            .boxed()
    }

    /// Whether a pop is for a stream, and what it then names as spent.
    fn for_a_stream(&self) -> BoxedStrategy<(Option<Stream>, Vec<u32>)> {
        let spent = match self.spent.is_empty() {
            true => Just(Vec::new()).boxed(),
            false => vec(select(self.spent.clone()), 0..4).boxed(),
        };
        let for_one = (stream(), spent).prop_map(|(stream, spent)| (Some(stream), spent));
        prop_oneof![1 => Just((None, Vec::new())), 1 => for_one].boxed()
    }

    /// One token at least.
    fn of_a_stream(&self) -> BoxedStrategy<(Queue, Stream, Vec<Ticket>)> {
        (self.on_tickets(self.tickets(), |q, tickets| (q, tickets)), stream())
            .prop_map(|((q, mut tickets), stream)| {
                if tickets.is_empty() {
                    tickets.push(Ticket { pop: u32::MAX, position: 0 });
                }
                (q, stream, tickets)
            })
            .boxed()
    }

    /// Beside 60 small ones, so many large ones.
    fn often(&self) -> u32 {
        if self.crowded { 40 } else { 1 }
    }

    /// Of a pop that ran, or of one that will, or never will, run later.
    fn withdraw(&self) -> Next {
        let early = self.pop().prop_map(|(q, pop)| Step::Withdraw(q, Arc::new(PopStep { acks: Vec::new(), ..pop })));
        if self.pops.is_empty() {
            return early.boxed();
        }
        let late = select(self.pops.clone()).prop_map(|(q, pop)| Step::Withdraw(q, pop));
        prop_oneof![1 => early, 1 => late].boxed()
    }

    fn again(&self) -> Next {
        let past: Vec<Arc<Step>> = self.past.iter().filter(|step| self.may_run_again(step)).cloned().collect();
        if past.is_empty() || !self.wanted.again {
            return self.pass();
        }
        select(past).prop_map(Step::Again).boxed()
    }

    fn disturb(&self) -> Next {
        if self.wanted.disturbances.is_empty() {
            return self.pass();
        }
        select(self.wanted.disturbances).prop_map(Step::Disturb).boxed()
    }

    /// Mostly on the queue that the tickets are of.
    fn on_tickets<T: std::fmt::Debug + 'static>(
        &self,
        tickets: BoxedStrategy<Vec<Ticket>>,
        step: fn(Queue, Vec<Ticket>) -> T,
    ) -> BoxedStrategy<T> {
        let of: HashMap<u32, Queue> = self.pops.iter().map(|(q, pop)| (pop.number, *q)).collect();
        let strangers = prop_oneof![15 => Just(None), 1 => self.queue().prop_map(Some)];
        (tickets, strangers, self.queue())
            .prop_map(move |(tickets, stranger, any)| {
                let own = tickets.iter().find_map(|ticket| of.get(&ticket.pop));
                step(stranger.or(own.copied()).unwrap_or(any), tickets)
            })
            .boxed()
    }

    /// Tokens to ack: one at most where it matters when the older half is dropped.
    fn acks(&self) -> BoxedStrategy<Vec<Ticket>> {
        if self.forgets_early() {
            self.tickets().prop_map(|tickets| tickets[..tickets.len().min(1)].to_vec()).boxed()
        } else {
            self.tickets()
        }
    }

    /// Tokens of one queue mostly, and mostly of late.
    fn tickets(&self) -> BoxedStrategy<Vec<Ticket>> {
        let unknown = (any::<u32>(), any::<u16>()).prop_map(|(pop, position)| Ticket { pop: pop | 1 << 31, position });
        if self.pops.is_empty() {
            return vec(unknown, 0..3).boxed();
        }
        let last = self.pops.len() - 1;
        let pops = self.pops.clone();
        let back = prop_oneof![4 => 0..=last.min(2), 2 => 0..=last.min(6), 1 => 0..=last];
        let position = prop_oneof![6 => Just(0), 3 => 0..5_u16, 1 => 0..200_u16];
        let by_queue = pops.clone();
        // Of one pop; then of pops of the same queue.
        let of_one = (back.clone(), vec(position.clone(), 0..6)).prop_map(move |(back, positions)| {
            let (_, pop) = &pops[last - back];
            let ticket = |position: u16| Ticket { pop: pop.number, position: position % pop.max_tasks as u16 };
            positions.into_iter().map(ticket).collect::<Vec<_>>()
        });
        let of_many = (self.queue(), vec((back.clone(), position), 0..6)).prop_map(move |(q, picks)| {
            let own: Vec<&Arc<PopStep>> = by_queue.iter().filter(|(of, _)| *of == q).map(|(_, pop)| pop).collect();
            let pick = |(back, position): (usize, u16)| {
                let pop = own.get(own.len().checked_sub(1 + back)?)?;
                Some(Ticket { pop: pop.number, position: position % pop.max_tasks as u16 })
            };
            picks.into_iter().filter_map(pick).collect::<Vec<_>>()
        });
        let pops = self.pops.clone();
        let whole = back.prop_map(move |back| {
            let (_, pop) = &pops[last - back];
            (0..pop.max_tasks as u16).map(|position| Ticket { pop: pop.number, position }).collect::<Vec<_>>()
        });
        prop_oneof![8 => of_one, 4 => of_many, 6 => whole, 1 => vec(unknown, 0..3)].boxed()
    }
}

/// As it is, mostly; then in whichever way.
fn how() -> BoxedStrategy<How> {
    let delay = prop_oneof![2 => Just(None), 1 => select(vec![0, 1, 80, 1_000]).prop_map(Some)];
    let often = prop::bool::weighted(0.6);
    let some = (delay, often, prop::bool::weighted(0.3), any::<u16>());
    let some = some.prop_map(|(delay, failed, dead_letter, chance)| How { delay, failed, dead_letter, chance });
    prop_oneof![1 => Just(How::default()), 3 => some].boxed()
}

/// Of what stops others, a little less than of what lets them go on.
fn change() -> BoxedStrategy<(Setting, Option<u64>)> {
    let some = |setting| {
        let values = match setting {
            Setting::Lease => vec![1, 70, 5_000],
            Setting::MaxFailures | Setting::MaxExpiries => vec![1, 2, 5],
            Setting::BackoffMin => vec![0, 30, 500],
            Setting::BackoffMax => vec![0, 100, 1_000],
            Setting::MaxTasks => vec![1, 6, 20, 300],
            Setting::MaxBytes => vec![1, 60, 500],
            Setting::DeadLetterRetention => vec![1, 500, 5_000],
            Setting::Paused => vec![0, 1],
            Setting::Shards => vec![],
        };
        prop_oneof![4 => Just(None), 3 => select(values).prop_map(Some)].prop_map(move |value| (setting, value))
    };
    // Shards are what only one store has, and change the order: they have cases of their own.
    let all: Vec<Setting> = Setting::ALL.into_iter().filter(|setting| *setting != Setting::Shards).collect();
    select(all).prop_flat_map(some).boxed()
}

fn lease() -> BoxedStrategy<Millis> {
    prop_oneof![1 => Just(1), 2 => Just(60), 2 => Just(300), 3 => Just(2_000), 4 => Just(20_000)].boxed()
}

/// Or more than a session is known for.
fn long_lease() -> BoxedStrategy<Millis> {
    prop_oneof![12 => lease(), 1 => Just(2 * SESSION_KEPT)].boxed()
}

/// Mostly the same one, which then has the session.
fn stream() -> BoxedStrategy<Stream> {
    (select(SESSIONS.to_vec()), prop_oneof![6 => Just(0), 2 => Just(1), 1 => Just(2)])
        .prop_map(|(session, number)| Stream { session, number })
        .boxed()
}

fn request() -> BoxedStrategy<Request> {
    (0..6_u8, prop_oneof![9 => Just(0), 1 => Just(1)]).prop_map(|(id, content)| Request { id, content }).boxed()
}

fn attempt() -> BoxedStrategy<u8> {
    prop_oneof![20 => 0..3_u8, 1 => 0..12_u8].boxed()
}

fn a_try() -> BoxedStrategy<Try> {
    (request(), attempt()).prop_map(|(request, attempt)| Try { request, attempt }).boxed()
}
