//! Random histories: of one store, whether its books balance; of two, whether they answer alike.
//!
//! `DATA_QUEUE_TEST_SEED` repeats a history, `DATA_QUEUE_TEST_LONG=1` runs twenty times as many.

use std::{
    collections::{HashMap, HashSet},
    env,
};

use super::*;
use crate::store::{Beaten, Popped, Sight};

const HISTORIES: u64 = 4;
const STEPS: usize = 600;

/// splitmix64: small, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn one_of<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())].clone()
    }

    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        std::array::from_fn(|_| self.next() as u8)
    }
}

fn seeds() -> Vec<u64> {
    if let Ok(seed) = env::var("DATA_QUEUE_TEST_SEED") {
        return vec![seed.parse().expect("DATA_QUEUE_TEST_SEED is a number")];
    }
    let mut first = [0; 8];
    getrandom::fill(&mut first).unwrap();
    let factor = if env::var("DATA_QUEUE_TEST_LONG").is_ok_and(|long| long == "1") { 20 } else { 1 };
    (0..HISTORIES * factor).map(|number| u64::from_ne_bytes(first).wrapping_add(number)).collect()
}

#[derive(Clone, Debug)]
enum Step {
    Insert(QueueName, Insert),
    Pop(QueueName, Pop),
    Ack(QueueName, Vec<Token>),
    Heartbeat(QueueName, Vec<Token>, Millis),
    Release(QueueName, Release),
    ReleaseHeld(QueueName, Millis),
    Look(Vec<QueueName>),
    Counts(QueueName),
    ReapAll,
    Pass(Millis),
}

#[derive(Debug, PartialEq)]
enum Answer {
    Inserted(Result<Inserted, String>),
    Popped(Result<Popped, String>),
    Outcomes(Vec<Outcome>),
    Beaten(Beaten),
    Released(Released),
    Seen(Vec<Sight>),
    Counted(Option<Counts>),
    Reaped(Vec<(QueueName, u64)>),
    Passed,
}

/// Makes up steps from what it saw of the answers.
struct Author {
    random: Random,
    queues: Vec<QueueName>,
    /// Of late, with their queues; those of other queues and of ended leases too.
    tokens: Vec<(QueueName, Token)>,
    /// Some are run again.
    past: Vec<Step>,
    numbered: usize,
}

impl Author {
    fn new(seed: u64) -> Self {
        let queues = ["q", "q::a", "Q"].map(queue).to_vec();
        Self { random: Random(seed), queues, tokens: Vec::new(), past: Vec::new(), numbered: 0 }
    }

    fn step(&mut self) -> Step {
        if self.random.below(3) > 0 {
            let q = self.random.one_of(&self.queues);
            return self.step_on(q);
        }
        Step::Pass(match self.random.below(20) {
            0 => 2_000 + self.random.next() % 3_000,
            _ => self.random.next() % 120,
        })
    }

    fn step_on(&mut self, q: QueueName) -> Step {
        let lease = self.random.one_of(&[1, 60, 300, 2_000, 20_000]);
        match self.random.below(100) {
            0..20 => self.remembered(Step::Insert, q, Self::insert),
            20..50 => self.remembered(Step::Pop, q, |author| author.pop(lease)),
            50..62 => {
                let tokens = self.some_tokens(&q);
                Step::Ack(q, tokens)
            }
            62..72 => {
                let tokens = self.some_tokens(&q);
                Step::Heartbeat(q, tokens, lease)
            }
            72..79 => {
                let tokens = self.some_tokens(&q);
                Step::Release(q, Release::PutBack(tokens))
            }
            79..85 => {
                let (tokens, attempt) = (self.some_tokens(&q), self.attempt());
                Step::Release(q, Release::Unsent(tokens, attempt.filter(|_| lease > 1)))
            }
            85..88 => Step::ReleaseHeld(q, self.random.one_of(&[0, 50, 200, 1_000])),
            88..92 => Step::Look(self.queues.clone()),
            92..96 => Step::Counts(q),
            96..98 => Step::ReapAll,
            _ if self.past.is_empty() => Step::ReapAll,
            _ => self.random.one_of(&self.past),
        }
    }

    fn remembered<T>(
        &mut self,
        step: fn(QueueName, T) -> Step,
        q: QueueName,
        make: impl FnOnce(&mut Self) -> T,
    ) -> Step {
        let step = step(q, make(self));
        self.past.push(step.clone());
        if self.past.len() > 12 {
            self.past.remove(0);
        }
        step
    }

    fn insert(&mut self) -> Insert {
        let mut tasks = Vec::new();
        for _ in 0..=self.random.below(5) {
            let mut envelope = format!("{}:", self.numbered).into_bytes();
            let length = self.random.below(40);
            envelope.resize(envelope.len() + length, self.random.next() as u8);
            tasks.push(NewTask { id: TaskId(self.random.bytes()), envelope: envelope.into() });
            self.numbered += 1;
        }
        Insert { tasks, request: self.request(), waiting_here: self.random.below(2) }
    }

    fn pop(&mut self, lease: Millis) -> Pop {
        let request = self.request().map(|key| PopRequest { key, attempt: Attempt([self.random.below(3) as u8; 8]) });
        let acks = if self.random.below(3) == 0 {
            let q = self.random.one_of(&self.queues);
            self.some_tokens(&q)
        } else {
            Vec::new()
        };
        let mut stem = Stem(self.random.bytes());
        stem.0[0] = 0;
        let (max_tasks, max_bytes) = (1 + self.random.below(5), 1 + self.random.below(200));
        Pop { acks, max_tasks, max_bytes, lease, stem, request, will_wait: self.random.below(2) == 0 }
    }

    fn request(&mut self) -> Option<RequestKey> {
        let (id, fingerprint) = (self.random.below(12), u8::from(self.random.below(10) == 0));
        (id < 6).then(|| key(&id.to_string(), fingerprint))
    }

    fn attempt(&mut self) -> Option<Attempt> {
        (self.random.below(2) == 0).then(|| Attempt([self.random.below(3) as u8; 8]))
    }

    /// Mostly of this queue and of late.
    fn some_tokens(&mut self, q: &QueueName) -> Vec<Token> {
        let own: Vec<Token> = self.tokens.iter().filter(|(of, _)| of == q).map(|(_, token)| *token).collect();
        (0..self.random.below(5))
            .map(|_| match self.random.below(12) {
                0 => Token(self.random.bytes()),
                1 if !self.tokens.is_empty() => self.random.one_of(&self.tokens).1,
                _ if own.is_empty() => Token([0; 16]),
                2..5 => self.random.one_of(&own),
                _ => own[own.len() - 1 - self.random.below(own.len().min(6))],
            })
            .collect()
    }

    fn saw(&mut self, step: &Step, answer: &Answer) {
        // A pop runs twice before anybody saw its tokens, so never after one of them was acked.
        let acks = matches!(step, Step::Ack(..)) || matches!(step, Step::Pop(_, pop) if !pop.acks.is_empty());
        if acks {
            self.past.retain(|step| !matches!(step, Step::Pop(..)));
        }
        if let (Step::Pop(q, _), Answer::Popped(Ok(popped))) = (step, answer) {
            self.tokens.extend(popped.tasks.iter().map(|task| (q.clone(), task.token)));
            let surplus = self.tokens.len().saturating_sub(60);
            self.tokens.drain(..surplus);
        }
    }
}

async fn take_step(rig: &Rig, step: &Step) -> Answer {
    let text = |error: StoreError| error.to_string();
    match step.clone() {
        Step::Insert(q, insert) => Answer::Inserted(rig.insert(&q, insert).await.map_err(text)),
        Step::Pop(q, pop) => Answer::Popped(rig.pop(&q, pop).await.map_err(text)),
        Step::Ack(q, tokens) => Answer::Outcomes(rig.ack(&q, &tokens).await.unwrap()),
        Step::Heartbeat(q, tokens, lease) => Answer::Beaten(rig.heartbeat(&q, &tokens, lease).await.unwrap()),
        Step::Release(q, release) => Answer::Outcomes(rig.release(&q, release).await.unwrap()),
        Step::ReleaseHeld(q, held_for) => Answer::Released(rig.release_held(&q, held_for).await.unwrap()),
        Step::Look(queues) => Answer::Seen(rig.look(&queues).await.unwrap()),
        Step::Counts(q) => Answer::Counted(rig.count(&q).await),
        Step::ReapAll => {
            let mut reaped: Vec<_> = reap::round(rig, 10).await.1.into_iter().collect();
            reaped.sort();
            Answer::Reaped(reaped)
        }
        Step::Pass(span) => {
            rig.pass(span);
            Answer::Passed
        }
    }
}

/// What a history did to a queue's tasks, as its callers saw it.
#[derive(Default)]
struct Books {
    inserted: HashMap<TaskId, Bytes>,
    holder: HashMap<TaskId, (Token, Millis)>,
    held: HashMap<Token, TaskId>,
    acked: HashSet<TaskId>,
}

impl Books {
    fn enter(&mut self, step: &Step, answer: &Answer, now: Millis) {
        match (step, answer) {
            (Step::Insert(_, insert), Answer::Inserted(Ok(answer))) if !answer.replayed => {
                self.inserted.extend(insert.tasks.iter().map(|task| (task.id, task.envelope.clone())));
            }
            (Step::Pop(_, pop), Answer::Popped(Ok(popped))) => {
                self.ack(&pop.acks, &popped.acks);
                for task in &popped.tasks {
                    self.deliver(task, now);
                }
            }
            (Step::Ack(_, tokens), Answer::Outcomes(outcomes)) => self.ack(tokens, outcomes),
            (Step::Heartbeat(_, tokens, lease), Answer::Beaten(beaten)) => {
                for (token, outcome) in tokens.iter().zip(&beaten.outcomes) {
                    if let (Outcome::Applied, Some(id)) = (outcome, self.held.get(token)) {
                        let (holder, deadline) = self.holder.entry(*id).or_insert((*token, 0));
                        assert!(holder == token, "G5: only the holder extends");
                        *deadline = (*deadline).max(now + lease);
                    }
                }
            }
            (Step::Release(_, Release::PutBack(tokens) | Release::Unsent(tokens, _)), Answer::Outcomes(outcomes)) => {
                for id in self.applied(tokens, outcomes) {
                    self.holder.remove(&id);
                }
            }
            // Takes back what may be held by anybody.
            (Step::ReleaseHeld(..), Answer::Released(_)) => self.holder.clear(),
            _ => {}
        }
    }

    fn applied(&self, tokens: &[Token], outcomes: &[Outcome]) -> Vec<TaskId> {
        let applied = tokens.iter().zip(outcomes).filter(|(_, outcome)| **outcome == Outcome::Applied);
        applied.map(|(token, _)| self.held[token]).collect()
    }

    fn ack(&mut self, tokens: &[Token], outcomes: &[Outcome]) {
        for id in self.applied(tokens, outcomes) {
            self.holder.remove(&id);
            assert!(self.acked.insert(id), "G7: acked twice");
        }
    }

    fn deliver(&mut self, task: &Leased, now: Millis) {
        assert_eq!(self.inserted.get(&task.id), Some(&task.envelope), "G2: no phantom");
        assert!(!self.acked.contains(&task.id), "G7: delivered after its ack");
        if let Some((token, deadline)) = self.holder.get(&task.id) {
            assert!(*token == task.token || *deadline <= now, "G4: a second holder before the deadline");
        }
        let before = self.held.insert(task.token, task.id);
        assert!(before.is_none_or(|id| id == task.id), "G4: a token of two tasks");
        self.holder.insert(task.id, (task.token, task.expires_at));
    }
}

/// G14, and G1, G2, G4, G6, G7 as callers see them: at every step of a random history each task is in exactly one place.
pub(super) async fn every_task_is_in_exactly_one_place(open: Open) {
    for seed in seeds() {
        println!("DATA_QUEUE_TEST_SEED={seed}");
        let rig = open(Rules { max_expiries: 1_000, ..remembering(Remember { window: 3_000, ..RULES.remember }) });
        let mut author = Author::new(seed);
        let q = author.queues[0].clone();
        author.queues.truncate(1);
        let mut books = Books::default();
        for number in 0..STEPS {
            // A step that runs again is one that the caller did not see: that is compared below, not booked here.
            author.past.clear();
            let step = author.step();
            let answer = take_step(&rig, &step).await;
            author.saw(&step, &answer);
            books.enter(&step, &answer, rig.now());
            // Counting takes back, so it is not done each time: some leases have to stay beyond their deadlines.
            if number % 3 == 0 && rig.count(&q).await.is_some() {
                let counts = rig.counted(&q).await;
                assert_eq!(counts.inserted, books.inserted.len() as u64, "step {number}: {step:?}");
                assert_eq!(counts.acked, books.acked.len() as u64, "step {number}: {step:?}");
            }
        }
        // Whatever is left can be delivered, each task once.
        rig.release_held(&q, 0).await.unwrap();
        let mut left = HashSet::new();
        loop {
            let tasks = rig.take(&q, 100).await;
            if tasks.is_empty() {
                break;
            }
            assert!(tasks.iter().all(|task| left.insert(task.id)));
        }
        let expected: HashSet<TaskId> = books.inserted.keys().filter(|id| !books.acked.contains(id)).copied().collect();
        assert_eq!(left, expected);
    }
}

/// Maxim 7 of the house, taken at its word: at each step of a random history two stores give equal answers.
async fn alike(one: Open, other: Open) {
    for seed in seeds() {
        println!("DATA_QUEUE_TEST_SEED={seed}");
        let rules = remembering(Remember { window: 3_000, ..RULES.remember });
        let (one, other) = (one(rules), other(rules));
        let mut author = Author::new(seed);
        for number in 0..STEPS {
            let step = author.step();
            let (answer, others) = (take_step(&one, &step).await, take_step(&other, &step).await);
            if answer != others {
                panic!("seed {seed}, step {number}: {step:#?}\n{answer:#?}\nis not\n{others:#?}");
            }
            author.saw(&step, &answer);
        }
    }
}

#[tokio::test]
async fn redis_answers_as_memory_does() {
    alike(memory, redis).await;
}
