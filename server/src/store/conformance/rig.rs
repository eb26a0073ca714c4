//! A store under test, and what cases often do with it.

use std::{
    ops::{Deref, Range},
    sync::atomic::{AtomicU64, Ordering},
};

use super::*;

/// A store under test, reached through its traits, and its clock.
pub(super) struct Rig {
    pub(super) engine: Box<dyn Engine>,
    now: AtomicU64,
}

/// What a store adds to be tested.
#[async_trait]
pub(super) trait Engine: Send + Sync {
    fn store(&self) -> &dyn Admin;

    fn set_clock(&self, now: Millis);

    /// Until an insert of whatever size is refused.
    async fn fill(&self);

    /// Begins again with an empty store, on the same server if it has one.
    fn start_over(&mut self, rules: Rules);

    /// What may happen to it.
    fn disturbances(&self) -> &'static [Disturbance];

    /// Lets that happen.
    async fn disturb(&mut self, disturbance: Disturbance);
}

/// What happens to a store from outside, and must not be noticed but for what `open_again` of the store in memory says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Disturbance {
    /// Another store object, which knows nothing yet, on the same data.
    Reconnect,
    /// What the engine keeps only to be fast is lost.
    Forget,
    /// The process ends in good order, and another one opens the data.
    CloseAndReopen,
    /// The process is killed, and another one opens the data.
    CrashAndReopen,
}

impl Disturbance {
    pub(super) fn reopens(self) -> bool {
        matches!(self, Self::CloseAndReopen | Self::CrashAndReopen)
    }
}

impl Deref for Rig {
    type Target = dyn Admin;

    fn deref(&self) -> &Self::Target {
        self.engine.store()
    }
}

impl Rig {
    pub(super) fn new(engine: impl Engine + 'static) -> Self {
        let rig = Self { engine: Box::new(engine), now: AtomicU64::new(START) };
        rig.set_now(START);
        rig
    }

    pub(super) fn start_over(&mut self, rules: Rules) {
        self.engine.start_over(rules);
        self.set_now(START);
    }

    pub(super) fn now(&self) -> Millis {
        self.now.load(Ordering::Relaxed)
    }

    pub(super) fn set_now(&self, now: Millis) {
        self.now.store(now, Ordering::Relaxed);
        self.engine.set_clock(now);
    }

    pub(super) fn pass(&self, span: Millis) {
        self.set_now(self.now() + span);
    }

    /// Inserts tasks whose envelopes are numbers.
    pub(super) async fn insert_numbers(&self, queue: &QueueName, numbers: Range<usize>) -> Inserted {
        self.insert(queue, insert(tasks(numbers))).await.unwrap()
    }

    pub(super) async fn insert_repeatably(&self, queue: &QueueName, numbers: Range<usize>, request: &str) -> Inserted {
        let insert = Insert { request: Some(key(request, 1)), ..insert(tasks(numbers)) };
        self.insert(queue, insert).await.unwrap()
    }

    pub(super) async fn take(&self, queue: &QueueName, max_tasks: usize) -> Vec<Leased> {
        self.pop(queue, pop(max_tasks)).await.unwrap().tasks
    }

    pub(super) async fn take_one(&self, queue: &QueueName) -> Leased {
        self.take(queue, 1).await.pop().expect("a task is ready")
    }

    /// Pops until nothing comes, and answers the numbers.
    pub(super) async fn drain(&self, queue: &QueueName) -> Vec<usize> {
        let mut all = Vec::new();
        loop {
            match self.take(queue, 100).await {
                some if some.is_empty() => return all,
                some => all.extend(numbers(&some)),
            }
        }
    }

    pub(super) async fn ack_one(&self, queue: &QueueName, token: Token) -> Outcome {
        self.ack(queue, &[token]).await.unwrap()[0]
    }

    pub(super) async fn beat_one(&self, queue: &QueueName, token: Token, lease: Millis) -> Outcome {
        self.heartbeat(queue, &[token], Some(lease)).await.unwrap().outcomes[0]
    }

    pub(super) async fn put_back(&self, queue: &QueueName, tokens: &[Token]) -> Vec<Outcome> {
        self.release(queue, Release::PutBack(back(tokens))).await.unwrap().0
    }

    pub(super) async fn unsent(&self, queue: &QueueName, tokens: &[Token], attempt: Option<Attempt>) -> Vec<Outcome> {
        self.release(queue, Release::Unsent(tokens.to_vec(), attempt)).await.unwrap().0
    }

    /// All of these were held.
    pub(super) async fn give_back(&self, queue: &QueueName, put_back: PutBack) -> Released {
        let (outcomes, released) = self.release(queue, Release::PutBack(put_back)).await.unwrap();
        assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Applied), "{outcomes:?}");
        released
    }

    /// Inserts tasks, none of which is a duplicate.
    pub(super) async fn insert_new(&self, queue: &QueueName, tasks: Vec<NewTask>) -> Vec<TaskId> {
        let minted: Vec<TaskId> = tasks.iter().map(|task| task.id).collect();
        let new = Inserted { ids: minted.clone(), ..Inserted::default() };
        assert_eq!(self.insert(queue, insert(tasks)).await.unwrap(), new);
        minted
    }

    pub(super) async fn set(&self, queue: &QueueName, setting: Setting, value: impl Into<Option<u64>>) -> Settings {
        self.change(queue, &[(setting, value.into())]).await.unwrap()
    }

    pub(super) async fn look_one(&self, queue: &QueueName) -> Sight {
        self.look(std::slice::from_ref(queue)).await.unwrap()[0]
    }

    pub(super) async fn seen(&self, queue: &QueueName, id: TaskId) -> Option<Seen> {
        self.tasks(queue, &[id]).await.unwrap().pop().expect("one answer for one id")
    }

    /// All tasks in a state, of a queue that must be there, in pages of so many.
    pub(super) async fn listed(&self, queue: &QueueName, state: State, page: usize) -> Vec<Seen> {
        let (mut all, mut after) = (Vec::new(), None);
        loop {
            let page = self.list(queue, state, after.as_ref(), page).await.unwrap().expect("the queue is known");
            all.extend(page.tasks);
            after = page.next;
            if after.is_none() {
                return all;
            }
        }
    }

    /// The numbers of all tasks in a state.
    pub(super) async fn list_numbers(&self, queue: &QueueName, state: State) -> Vec<usize> {
        self.listed(queue, state, 100).await.iter().map(|seen| number(&seen.envelope)).collect()
    }

    /// How many tasks went back to the head, when none became a dead letter.
    pub(super) async fn held_released(&self, queue: &QueueName, held_for: Millis) -> u64 {
        let Released { put_back, dead_lettered, .. } = self.release_held(queue, held_for).await.unwrap();
        assert_eq!(dead_lettered, 0);
        put_back
    }

    pub(super) async fn count(&self, queue: &QueueName) -> Option<Counts> {
        self.counts(std::slice::from_ref(queue)).await.unwrap()[0]
    }

    /// Of a queue that must be there, and in which no task is nowhere or twice.
    pub(super) async fn counted(&self, queue: &QueueName) -> Counts {
        let counts = self.count(queue).await.expect("the queue is known");
        let Counts { ready, scheduled, leased, dead, acked, expired, deleted, purged, .. } = counts;
        let all = ready + scheduled + leased + dead + acked + expired + deleted + purged;
        assert_eq!(counts.inserted, all, "{counts:?}");
        assert_eq!(counts.oldest_ready.is_some(), counts.ready > 0, "{counts:?}");
        // Most cases do not care.
        Counts { oldest_ready: None, ..counts }
    }
}
