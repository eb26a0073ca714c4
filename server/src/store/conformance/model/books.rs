//! What a history did to a queue's tasks, as its callers saw it.

use std::collections::{HashMap, HashSet};

use super::{
    super::*,
    Trial,
    author::Plot,
    step::{self, Answer, Delivery, MAX_HOLD, PopStep, Queue, Step, TaskNumber, Ticket},
};

/// The one queue that is booked.
const QUEUE: Queue = Queue(0);

pub(super) struct Books {
    pub(super) rig: Rig,
    inserted: HashMap<TaskNumber, Bytes>,
    holder: HashMap<TaskNumber, (Ticket, Millis)>,
    /// Each delivery, and the id of the request that it answered.
    held: HashMap<Ticket, (TaskNumber, Option<u8>)>,
    acked: HashSet<TaskNumber>,
}

fn require(condition: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if condition { Ok(()) } else { Err(what()) }
}

impl Books {
    pub(super) fn new(rig: Rig) -> Self {
        let (inserted, holder, held, acked) = Default::default();
        Self { rig, inserted, holder, held, acked }
    }

    fn enter(&mut self, step: &Step, answer: &Answer, max_expiries: u32) -> Result<(), String> {
        let now = self.rig.now() - START;
        match (step, answer) {
            (Step::Insert(_, batch, _), Answer::Inserted { replayed: false, .. }) => {
                self.inserted.extend(batch.tasks().map(|(number, task)| (number, task.envelope)));
            }
            (Step::Produce(_, produce), Answer::Produced(answers, _)) => {
                for ((_, batch, _), (_, replayed)) in produce.inserts.iter().zip(answers) {
                    let new = batch.tasks().filter(|_| !replayed);
                    self.inserted.extend(new.map(|(number, task)| (number, task.envelope)));
                }
            }
            (Step::Pop(_, pop), Answer::Popped { acks, tasks, taken_over, .. }) => {
                self.ack(&pop.acks, acks)?;
                require(!taken_over || tasks.is_empty(), || {
                    "G4: delivered to a stream without its session".to_owned()
                })?;
                for task in tasks {
                    require(task.expiries < max_expiries, || format!("a dead letter is delivered: {task:?}"))?;
                    self.deliver(task, pop, now)?;
                }
            }
            (Step::Ack(_, tickets), Answer::Outcomes(outcomes)) => self.ack(tickets, outcomes)?,
            (Step::Heartbeat(_, tickets, lease), Answer::Beaten(outcomes, _)) => {
                self.extend(tickets, outcomes, now + lease)?;
            }
            (Step::Keep(_, _, tickets, lease), Answer::Kept(Some(outcomes))) => {
                self.extend(tickets, outcomes, now + lease)?;
            }
            (Step::Resume(_, _, lease), Answer::Resumed(tickets, ages)) => {
                let young = tickets.iter().zip(ages).filter(|(_, age)| **age < MAX_HOLD);
                let young: Vec<Ticket> = young.map(|(ticket, _)| *ticket).collect();
                self.extend(&young, &vec![Outcome::Applied; young.len()], now + lease)?;
            }
            // Of a stream that has its session: whether it does is compared, not booked.
            (Step::Abandon(_, _, tickets, grace), Answer::Done) => {
                for (_, deadline) in self.holder.values_mut().filter(|(holder, _)| tickets.contains(holder)) {
                    *deadline = (*deadline).min(now + grace);
                }
            }
            (Step::PutBack(_, tickets) | Step::Unsent(_, tickets, _), Answer::Outcomes(outcomes)) => {
                for (_, number) in self.applied(tickets, outcomes)? {
                    self.holder.remove(&number);
                }
            }
            // Takes back from any try of the request.
            (Step::Withdraw(_, pop), Answer::Withdrawn(1..)) => {
                let request = pop.request.map(|one| one.request.id);
                let held = &self.held;
                let of_request = |ticket: &Ticket| request.is_some() && held[ticket].1 == request;
                self.holder.retain(|_, (ticket, _)| ticket.pop != pop.number && !of_request(ticket));
            }
            // Takes back what may be held by anybody.
            (Step::ReleaseHeld(..), Answer::Released(_)) => self.holder.clear(),
            _ => {}
        }
        Ok(())
    }

    fn applied(&self, tickets: &[Ticket], outcomes: &[Outcome]) -> Result<Vec<(Ticket, TaskNumber)>, String> {
        let applied = tickets.iter().zip(outcomes).filter(|(_, outcome)| **outcome == Outcome::Applied);
        let number = |ticket| self.held.get(ticket).ok_or_else(|| format!("G5: {ticket:?} was given to nobody"));
        applied.map(|(ticket, _)| Ok((*ticket, number(ticket)?.0))).collect()
    }

    fn extend(&mut self, tickets: &[Ticket], outcomes: &[Outcome], until: Millis) -> Result<(), String> {
        for (ticket, number) in self.applied(tickets, outcomes)? {
            let (holder, deadline) = self.holder.entry(number).or_insert((ticket, 0));
            require(*holder == ticket, || format!("G5: {ticket:?} is extended, {holder:?} holds"))?;
            *deadline = (*deadline).max(until);
        }
        Ok(())
    }

    fn ack(&mut self, tickets: &[Ticket], outcomes: &[Outcome]) -> Result<(), String> {
        for (ticket, number) in self.applied(tickets, outcomes)? {
            let holder = self.holder.remove(&number);
            require(holder.is_none_or(|(holder, _)| holder == ticket), || {
                format!("G5: {ticket:?} acks {number:?}, {holder:?} holds")
            })?;
            require(self.acked.insert(number), || format!("G7: {number:?} is acked twice"))?;
        }
        Ok(())
    }

    fn deliver(&mut self, task: &Delivery, pop: &PopStep, now: Millis) -> Result<(), String> {
        let Delivery { ticket, task: number, .. } = *task;
        require(self.inserted.get(&number) == Some(&task.envelope), || format!("G2: a phantom: {task:?}"))?;
        require(!self.acked.contains(&number), || format!("G7: delivered after its ack: {task:?}"))?;
        if let Some((holder, deadline)) = self.holder.get(&number) {
            require(*holder == ticket || *deadline <= now, || {
                format!("G4: {holder:?} holds until {deadline}: {task:?}")
            })?;
        }
        let before = self.held.insert(ticket, (number, pop.request.map(|one| one.request.id)));
        require(before.is_none_or(|(before, _)| before == number), || {
            format!("G4: {ticket:?} was another's: {task:?}")
        })?;
        self.holder.insert(number, (ticket, task.expires_at));
        Ok(())
    }

    async fn balance(&mut self) -> Result<(), String> {
        let Some(counts) = self.rig.count(&QUEUE.name()).await else { return Ok(()) };
        let Counts { ready, leased, dead, inserted, acked, .. } = counts;
        require(inserted == ready + leased + dead + acked, || format!("G14: {counts:?}"))?;
        let (own_inserted, own_acked) = (self.inserted.len() as u64, self.acked.len() as u64);
        let booked = || format!("{counts:?}, but {own_inserted} were inserted and {own_acked} acked");
        require((inserted, acked) == (own_inserted, own_acked), booked)
    }

    /// Whatever is left can be delivered, each task once, or is a dead letter.
    async fn close(&mut self) -> Result<(), String> {
        self.rig.release_held(&QUEUE.name(), 0).await.unwrap();
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
        let known = |number: &TaskNumber| self.inserted.contains_key(number) && !self.acked.contains(number);
        require(left.iter().all(known), || "G2, G7: what is left was acked, or never inserted".to_owned())?;
        let dead = self.rig.count(&QUEUE.name()).await.map_or(0, |counts| counts.dead);
        let missing = self.inserted.len() - self.acked.len() - left.len();
        require(missing as u64 == dead, || format!("G1: {missing} tasks are missing, {dead} are dead letters"))
    }
}

impl Trial for Books {
    async fn run(&mut self, plot: &Plot, steps: &[Step]) -> Result<(), String> {
        self.rig.start_over(plot.rules);
        self.inserted.clear();
        self.holder.clear();
        self.held.clear();
        self.acked.clear();
        for (at, step) in steps.iter().enumerate() {
            let answer = step::take(&mut self.rig, step, 1).await;
            let context = |error| format!("at step {at}: {step:?}\n  answered {answer:?}\n  {error}");
            self.enter(step, &answer, plot.rules.max_expiries).map_err(context)?;
            // Counting takes back, so it is not done each time: some leases have to stay beyond their deadlines.
            if at % 3 == 0 {
                self.balance().await.map_err(context)?;
            }
        }
        self.balance().await?;
        self.close().await
    }
}
