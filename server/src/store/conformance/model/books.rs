//! What a history did to a queue's tasks, as its callers saw it.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::{
    super::*,
    Trial,
    author::Plot,
    step::{self, Answer, Batch, Delivery, How, MAX_HOLD, PopStep, Queue, Step, TaskNumber, Ticket},
};

/// The one queue that is booked.
const QUEUE: Queue = Queue(0);

pub(super) struct Books {
    pub(super) rig: Rig,
    queue: Known,
    /// Each delivery, and the id of the request that it answered.
    held: HashMap<Ticket, (TaskNumber, Option<u8>)>,
    /// Nothing is to be delivered.
    paused: bool,
    /// Settings were changed, so that the rules are not known.
    changed: bool,
}

/// What is known of the queue, until it is dropped.
#[derive(Default)]
struct Known {
    inserted: HashMap<TaskNumber, Task>,
    holder: HashMap<TaskNumber, (Ticket, Millis)>,
    /// Failures and expiries, as the last delivery of each told them.
    told: HashMap<TaskNumber, (u32, u32)>,
    acked: HashSet<TaskNumber>,
    /// What is known to be dead, or gone: it is not delivered, and has no key.
    ended: HashSet<TaskNumber>,
}

struct Task {
    envelope: Bytes,
    due: Millis,
    ends_at: Option<Millis>,
    priority: u8,
    key: Option<String>,
    /// Its counters began elsewhere.
    is_imported: bool,
}

fn require(condition: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if condition { Ok(()) } else { Err(what()) }
}

impl Books {
    pub(super) fn new(rig: Rig) -> Self {
        Self { rig, queue: Known::default(), held: HashMap::new(), paused: false, changed: false }
    }

    /// `answered` are the tasks that were inserted, and of duplicates those that have their keys.
    fn enter_tasks(
        &mut self,
        batch: Batch,
        answered: &[TaskNumber],
        duplicates: &[usize],
        now: Millis,
    ) -> Result<(), String> {
        let Known { inserted, acked, ended, .. } = &mut self.queue;
        for (at, ((number, task), first)) in batch.tasks().zip(answered).enumerate() {
            let Plan { priority, ttl, unique_key: key } = task.plan.map(|plan| *plan).unwrap_or_default();
            if duplicates.contains(&at) {
                let has_key = key.is_some() && inserted.get(first).is_some_and(|first| first.key == key);
                let lives = !acked.contains(first) && !ended.contains(first);
                require(has_key && lives, || format!("{number:?} is no duplicate of {first:?}: {key:?}"))?;
                continue;
            }
            let due = task.due.map_or(now, |due| due.at(now + START) - START);
            let ends_at = ttl.map(|ttl| now + ttl);
            let is_imported = false;
            inserted.insert(number, Task { envelope: task.envelope, due, ends_at, priority, key, is_imported });
        }
        Ok(())
    }

    fn enter_imported(&mut self, number: TaskNumber, task: NewTask, now: Millis) {
        let is_dead = task.is_dead();
        let Plan { priority, ttl, unique_key: key } = task.plan.map(|plan| *plan).unwrap_or_default();
        let inserted_at = task.past.map_or(START, |past| past.inserted_at);
        let due = task.due.map_or(now, |due| due.at(now + START) - START);
        let ends_at = ttl.map(|ttl| (inserted_at + ttl).saturating_sub(START));
        let new = Task { envelope: task.envelope, due, ends_at, priority, key, is_imported: true };
        self.queue.inserted.insert(number, new);
        if is_dead {
            self.queue.ended.insert(number);
        }
    }

    fn enter(&mut self, step: &Step, answer: &Answer, rules: &Rules) -> Result<(), String> {
        let now = self.rig.now() - START;
        match (step, answer) {
            (Step::Insert(_, batch, _), Answer::Inserted { tasks, duplicates, replayed: false }) => {
                self.enter_tasks(*batch, tasks, duplicates, now)?;
            }
            (Step::Import(_, batch), Answer::Imported(answers)) => {
                for ((number, task), answer) in batch.imported().zip(answers) {
                    if let Ok((tasks, duplicates, false)) = answer
                        && duplicates.is_empty()
                    {
                        require(tasks == &[number], || format!("{number:?} is answered as {tasks:?}"))?;
                        self.enter_imported(number, task, now);
                    }
                }
            }
            (Step::Produce(_, produce), Answer::Produced(answers, _)) => {
                for ((_, batch, _), (tasks, duplicates, replayed)) in produce.inserts.iter().zip(answers) {
                    if !replayed {
                        self.enter_tasks(*batch, tasks, duplicates, now)?;
                    }
                }
            }
            (Step::Pop(_, pop), Answer::Popped { acks, tasks, taken_over, .. }) => {
                self.ack(&pop.acks, acks)?;
                require(!taken_over || tasks.is_empty(), || {
                    "G4: delivered to a stream without its session".to_owned()
                })?;
                for task in tasks {
                    let alive = task.expiries < rules.max_expiries && task.failures < rules.max_failures;
                    let is_imported = self.queue.inserted.get(&task.task).is_some_and(|task| task.is_imported);
                    require(alive || self.changed || is_imported, || format!("a dead letter is delivered: {task:?}"))?;
                    self.deliver(task, pop, now)?;
                }
                let priority = |task: &Delivery| self.queue.inserted[&task.task].priority;
                let is_sorted = tasks.is_sorted_by(|one, next| priority(one) >= priority(next));
                require(is_sorted, || "delivered behind a lower priority".to_owned())?;
            }
            (Step::Ack(_, tickets), Answer::Outcomes(outcomes)) => self.ack(tickets, outcomes)?,
            (Step::Heartbeat(_, tickets, lease), Answer::Beaten(outcomes, ..)) => {
                // Where it is not said for how long, at least not for less than it was.
                self.extend(tickets, outcomes, now + lease.unwrap_or(0))?;
            }
            (Step::Keep(_, _, tickets, lease), Answer::Kept(Some((outcomes, _)))) => {
                self.extend(tickets, outcomes, now + lease)?;
            }
            (Step::Resume(_, _, lease), Answer::Resumed(tickets, ages)) => {
                let young = tickets.iter().zip(ages).filter(|(_, age)| **age < MAX_HOLD);
                let young: Vec<Ticket> = young.map(|(ticket, _)| *ticket).collect();
                self.extend(&young, &vec![Outcome::Applied; young.len()], now + lease)?;
            }
            // Of a stream that has its session: whether it does is compared, not booked.
            (Step::Abandon(_, _, tickets, grace), Answer::Done) => {
                for (_, deadline) in self.queue.holder.values_mut().filter(|(holder, _)| tickets.contains(holder)) {
                    *deadline = (*deadline).min(now + grace);
                }
            }
            (Step::PutBack(_, tickets, how), Answer::GivenBack(outcomes, _)) => {
                self.give_back(tickets, outcomes, *how, now)?;
            }
            (Step::Unsent(_, tickets, _), Answer::GivenBack(outcomes, _)) => {
                for (_, number) in self.applied(tickets, outcomes)? {
                    self.queue.holder.remove(&number);
                }
            }
            // Takes back from any try of the request.
            (Step::Withdraw(_, pop), Answer::Withdrawn(1..)) => {
                let request = pop.request.map(|one| one.request.id);
                let held = &self.held;
                let of_request = |ticket: &Ticket| request.is_some() && held[ticket].1 == request;
                self.queue.holder.retain(|_, (ticket, _)| ticket.pop != pop.number && !of_request(ticket));
            }
            // Takes back what may be held by anybody.
            (Step::ReleaseHeld(..), Answer::Released(_)) | (Step::Purge(_, State::Leased), _) => {
                self.queue.holder.clear()
            }
            (Step::Change(_, changes), Answer::Set(Some(settings))) => {
                self.paused = settings.paused();
                self.changed |= !changes.is_empty();
            }
            (_, Answer::Deleted(deleted)) => {
                let gone = deleted.iter().filter(|(_, deleted)| *deleted == Deleted::Gone);
                self.queue.ended.extend(gone.map(|(number, _)| *number));
            }
            (_, Answer::Redriven(redriven)) => {
                for (number, _) in redriven.iter().filter(|(_, redriven)| *redriven == Redriven::Ready) {
                    self.queue.ended.remove(number);
                    self.queue.holder.remove(number);
                    self.queue.inserted.entry(*number).and_modify(|task| task.due = now);
                }
            }
            (Step::DropQueue(..), Answer::Dropped(true)) => {
                (self.queue, self.paused) = (Known::default(), false);
            }
            _ => {}
        }
        Ok(())
    }

    fn applied(&self, tickets: &[Ticket], outcomes: &[Outcome]) -> Result<Vec<(Ticket, TaskNumber)>, String> {
        let applied = tickets.iter().zip(outcomes).filter(|(_, outcome)| **outcome == Outcome::Applied);
        let number = |ticket| self.held.get(ticket).ok_or_else(|| format!("G5: {ticket:?} was given to nobody"));
        applied.map(|(ticket, _)| Ok((*ticket, number(ticket)?.0))).collect()
    }

    fn give_back(&mut self, tickets: &[Ticket], outcomes: &[Outcome], how: How, now: Millis) -> Result<(), String> {
        for (_, number) in self.applied(tickets, outcomes)? {
            self.queue.holder.remove(&number);
            if how.dead_letter {
                self.queue.ended.insert(number);
            }
            self.queue.inserted.entry(number).and_modify(|task| task.due = now + how.delay.unwrap_or(0));
        }
        Ok(())
    }

    fn extend(&mut self, tickets: &[Ticket], outcomes: &[Outcome], until: Millis) -> Result<(), String> {
        for (ticket, number) in self.applied(tickets, outcomes)? {
            let (holder, deadline) = self.queue.holder.entry(number).or_insert((ticket, 0));
            require(*holder == ticket, || format!("G5: {ticket:?} is extended, {holder:?} holds"))?;
            *deadline = (*deadline).max(until);
        }
        Ok(())
    }

    fn ack(&mut self, tickets: &[Ticket], outcomes: &[Outcome]) -> Result<(), String> {
        for (ticket, number) in self.applied(tickets, outcomes)? {
            let holder = self.queue.holder.remove(&number);
            require(holder.is_none_or(|(holder, _)| holder == ticket), || {
                format!("G5: {ticket:?} acks {number:?}, {holder:?} holds")
            })?;
            require(self.queue.acked.insert(number), || format!("G7: {number:?} is acked twice"))?;
        }
        Ok(())
    }

    fn deliver(&mut self, task: &Delivery, pop: &PopStep, now: Millis) -> Result<(), String> {
        let Delivery { ticket, task: number, .. } = *task;
        let inserted = self.queue.inserted.get(&number).filter(|inserted| inserted.envelope == task.envelope);
        let inserted = inserted.ok_or_else(|| format!("G2: a phantom: {task:?}"))?;
        require(!self.queue.acked.contains(&number), || format!("G7: delivered after its ack: {task:?}"))?;
        require(!self.queue.ended.contains(&number), || format!("G1: delivered after its end: {task:?}"))?;
        if !self.held.contains_key(&ticket) {
            require(inserted.due <= now, || format!("G10: due at {}, delivered at {now}: {task:?}", inserted.due))?;
            let over = inserted.ends_at.is_some_and(|at| at <= now);
            require(!over, || format!("its time was over at {:?}, delivered at {now}: {task:?}", inserted.ends_at))?;
            require(!self.paused, || format!("delivered though the queue is paused: {task:?}"))?;
        }
        if let Some((holder, deadline)) = self.queue.holder.get(&number) {
            require(*holder == ticket || *deadline <= now, || {
                format!("G4: {holder:?} holds until {deadline}: {task:?}")
            })?;
            // Nobody gave it back.
            let (failures, expiries) = self.queue.told[&number];
            let told = (failures, expiries + u32::from(*holder != ticket));
            require((task.failures, task.expiries) == told, || format!("G8: {holder:?} ran out: {task:?}"))?;
        }
        let before = self.held.insert(ticket, (number, pop.request.map(|one| one.request.id)));
        require(before.is_none_or(|(before, _)| before == number), || {
            format!("G4: {ticket:?} was another's: {task:?}")
        })?;
        self.queue.holder.insert(number, (ticket, task.expires_at));
        self.queue.told.insert(number, (task.failures, task.expiries));
        Ok(())
    }

    /// Each task is in one state, or is counted as one that is gone.
    async fn balance(&mut self) -> Result<(), String> {
        let Some(counts) = self.rig.count(&QUEUE.name()).await else { return Ok(()) };
        let Counts { ready, scheduled, leased, dead, inserted, acked, expired, deleted, purged, .. } = counts;
        let there = ready + scheduled + leased + dead;
        let all = there + acked + expired + deleted + purged;
        require(inserted == all, || format!("G14: {counts:?}"))?;
        let (own_inserted, own_acked) = (self.queue.inserted.len() as u64, self.queue.acked.len() as u64);
        let booked = || format!("{counts:?}, but {own_inserted} were inserted and {own_acked} acked");
        require((inserted, acked) == (own_inserted, own_acked), booked)?;
        let (mut seen, mut live, mut keys) = (BTreeMap::new(), HashSet::new(), HashSet::new());
        for task in self.rig.told(self.queue.inserted.keys()).await {
            *seen.entry(task.state).or_insert(0) += 1;
            let Seen { id, deliveries, failures, expiries, cause, state, .. } = task;
            require(deliveries >= failures + expiries, || format!("G8: {task:?}"))?;
            require(cause.is_some() == (state == State::Dead), || format!("G1: {task:?}"))?;
            if state != State::Dead {
                live.insert(TaskNumber::of(id));
                require(task.plan.unique_key.is_none_or(|key| keys.insert(key)), || format!("{id} has another's key"))?;
            }
        }
        let ended = self.queue.inserted.keys().filter(|number| !live.contains(*number));
        self.queue.ended.extend(ended);
        for (state, count) in
            [(State::Ready, ready), (State::Scheduled, scheduled), (State::Leased, leased), (State::Dead, dead)]
        {
            let found = seen.get(&state).copied().unwrap_or(0);
            require(found == count, || format!("G14: {found} tasks are {state:?}, {count} are counted"))?;
        }
        Ok(())
    }

    /// Whatever is left can be delivered, each task once, or waits, or is a dead letter, or is counted as gone.
    async fn close(&mut self) -> Result<(), String> {
        self.rig.release_held(&QUEUE.name(), 0).await.unwrap();
        self.rig.set(&QUEUE.name(), Setting::Paused, None).await;
        let mut left = HashSet::new();
        loop {
            let tasks = self.rig.take(&QUEUE.name(), 100).await;
            if tasks.is_empty() {
                break;
            }
            for task in tasks {
                require(left.insert(TaskNumber::of(task.id)), || format!("G4: delivered twice: {:?}", task.id))?;
            }
        }
        let Known { inserted, acked, .. } = &self.queue;
        let known = |number: &TaskNumber| inserted.contains_key(number) && !acked.contains(number);
        require(left.iter().all(known), || "G2, G7: what is left was acked, or never inserted".to_owned())?;
        let Counts { scheduled, dead, expired, deleted, purged, .. } = self.rig.counted(&QUEUE.name()).await;
        let missing = (inserted.len() - acked.len() - left.len()) as u64;
        let elsewhere = scheduled + dead + expired + deleted + purged;
        require(missing == elsewhere, || {
            format!("G1: {missing} tasks are missing, {elsewhere} are elsewhere or gone")
        })?;
        self.try_keys().await
    }

    /// A key that no living task has is free, and one that is not is answered with the task that has it.
    async fn try_keys(&self) -> Result<(), String> {
        for limit in [Setting::MaxTasks, Setting::MaxBytes] {
            self.rig.set(&QUEUE.name(), limit, None).await;
        }
        let Known { inserted, .. } = &self.queue;
        let mut holders: BTreeMap<String, Option<TaskId>> =
            inserted.values().filter_map(|task| Some((task.key.clone()?, None))).collect();
        for Seen { id, state, plan, .. } in self.rig.told(inserted.keys()).await {
            holders.extend(plan.unique_key.filter(|_| state != State::Dead).map(|key| (key, Some(id))));
        }
        for (key, holder) in holders {
            let new = with_key(0, &key);
            let expected = [holder.unwrap_or(new.id)];
            let Inserted { ids, .. } = self.rig.insert(&QUEUE.name(), insert(vec![new])).await.unwrap();
            require(ids == expected, || format!("{key} is of {holder:?}, and {ids:?} is answered"))?;
        }
        Ok(())
    }
}

impl Rig {
    /// Those of these tasks that are there.
    async fn told(&self, numbers: impl Iterator<Item = &TaskNumber>) -> Vec<Seen> {
        let ids: Vec<TaskId> = numbers.map(|number| number.id()).collect();
        let mut all = Vec::new();
        for ids in ids.chunks(RECLAIM_STEP) {
            all.extend(self.tasks(&QUEUE.name(), ids).await.unwrap().into_iter().flatten());
        }
        all
    }
}

impl Trial for Books {
    async fn run(&mut self, plot: &Plot, steps: &[Step]) -> Result<(), String> {
        self.rig.start_over(plot.rules);
        self.queue = Known::default();
        self.held.clear();
        (self.paused, self.changed) = (false, false);
        for (at, step) in steps.iter().enumerate() {
            let answer = step::take(&mut self.rig, step, 1).await;
            let context = |error| format!("at step {at}: {step:?}\n  answered {answer:?}\n  {error}");
            self.enter(step, &answer, &plot.rules).map_err(context)?;
            // Counting takes back, so it is not done each time: some leases have to stay beyond their deadlines.
            if at % 3 == 0 {
                self.balance().await.map_err(context)?;
            }
        }
        self.balance().await?;
        self.close().await
    }
}
