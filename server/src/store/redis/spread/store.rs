//! The data path of queues that may have shards.

use std::sync::Arc;

use async_trait::async_trait;
use futures_util::future;
use tokio::time::Instant;

use super::{Attempts, Layout, OfShard, RedisStore, all_of, by_shard, is_first_shard, of_several};
use crate::store::{
    Beaten, Consumer, Insert, Inserted, Kept, MAX_SHARDS, Millis, NumberedInsert, OnWake, Outcome, Pop, Popped,
    Produce, Produced, PutBack, QueueName, ReapCursor, Reaped, Release, Released, Sight, Stem, Store, StoreError,
    Token, Withdrawal,
    redis::{ANNOUNCED_FOR, RECLAIM_ROUNDS, script::SPENT_MAX},
};

/// Nothing found so far.
const NOTHING: Popped = Popped {
    acks: Vec::new(),
    tasks: Vec::new(),
    ready: 0,
    reclaimed: 0,
    due_in: None,
    taken_over: false,
    known: false,
};

fn earlier(one: Option<Millis>, other: Option<Millis>) -> Option<Millis> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}

/// The call certainly did nothing, and another shard may be well.
fn did_nothing(error: &StoreError) -> bool {
    matches!(error, StoreError::Unavailable { did_not_run: true, .. })
}

impl RedisStore {
    /// Inserts where these tasks have to go; where they may go anywhere, into a shard that takes them.
    async fn insert_spread(
        &self,
        queue: &QueueName,
        layout: &Layout,
        insert: &Insert,
    ) -> (u8, Result<Inserted, StoreError>) {
        let home = match layout.home_of_insert(insert) {
            Ok(home) => home,
            Err(error) => return (0, Err(error)),
        };
        let order = home.map_or_else(|| layout.emptier(self.away(queue, layout)), |home| vec![home]);
        let first = order.first().copied().unwrap_or_default();
        let (mut refusal, until) = (None, Instant::now() + self.one.shared.timeout);
        for number in order {
            // Each shard that is away may take the time of a whole call.
            if refusal.is_some() && Instant::now() >= until {
                break;
            }
            let mut insert = insert.clone();
            insert.tasks.iter_mut().for_each(|task| task.id = task.id.in_shard(number));
            let count = insert.tasks.len() as u64;
            match self.one.insert(&layout.part(queue, number), insert).await {
                Ok(inserted) => {
                    layout.note_more(number, count);
                    return (number, Ok(inserted));
                }
                Err(error) if matches!(error, StoreError::QueueFull(..)) || did_nothing(&error) => {
                    refusal.get_or_insert(error);
                }
                Err(error) => return (number, Err(error)),
            }
        }
        (first, Err(refusal.unwrap_or(StoreError::Moved)))
    }

    /// Does the first of some inserts, as many as follow each other in one shard.
    async fn produce_run(
        &self,
        queue: &QueueName,
        produce: &Produce,
        rest: &[NumberedInsert],
    ) -> (u8, Result<Produced, StoreError>) {
        let Some(layout) = self.layout(queue) else {
            let produce = Produce { inserts: rest.to_vec(), producer: produce.producer.clone(), ..*produce };
            return (0, self.one.produce(queue, produce).await);
        };
        let home = |insert: &NumberedInsert| layout.home_of_numbered(&produce.producer, insert);
        let number = match rest.first().map(home) {
            Some(Ok(number)) => number,
            Some(Err(error)) => return (0, Err(error)),
            None => return (0, Ok(Produced::default())),
        };
        let run = rest.iter().take_while(|insert| matches!(home(insert), Ok(other) if other == number));
        let mut inserts: Vec<NumberedInsert> = run.cloned().collect();
        let tasks = inserts.iter_mut().flat_map(|insert| &mut insert.tasks);
        tasks.for_each(|task| task.id = task.id.in_shard(number));
        let count: usize = inserts.iter().map(|insert| insert.tasks.len()).sum();
        let produce = Produce { inserts, producer: produce.producer.clone(), ..*produce };
        let done = self.one.produce(&layout.part(queue, number), produce).await;
        if done.is_ok() {
            layout.note_more(number, count as u64);
        }
        (number, done)
    }

    /// Pops from one shard.
    async fn pop_part(
        &self,
        queue: &QueueName,
        layout: &Layout,
        number: u8,
        mut pop: Pop,
    ) -> Result<Popped, StoreError> {
        pop.stem = pop.stem.in_shard(number);
        if let Some(consumer) = pop.consumer {
            pop.spent = self.spent_in(consumer.session, number, &pop.spent);
            pop.spent.truncate(SPENT_MAX);
        }
        let (popped, generation) = self.one.pop(&layout.part(queue, number), pop).await?;
        layout.note_ready(number, popped.ready);
        self.settle_if_other(queue, layout, number, generation).await;
        Ok(popped)
    }

    /// What earlier tries of a repeatable pop still hold, wherever.
    async fn held_by_request(&self, queue: &QueueName, layout: &Layout, pop: &Pop) -> Result<Popped, StoreError> {
        let recall =
            Pop { acks: Vec::new(), max_tasks: 0, will_wait: false, consumer: None, spent: Vec::new(), ..pop.clone() };
        let recalls = (0..layout.spread).map(|number| self.pop_part(queue, layout, number, recall.clone()));
        let mut all = NOTHING;
        for recalled in future::join_all(recalls).await {
            let recalled = recalled?;
            all.tasks.extend(recalled.tasks);
            all.known |= recalled.known;
            all.reclaimed += recalled.reclaimed;
        }
        all.ready = layout.all_ready();
        Ok(all)
    }

    /// Acks that do not ride with a pop.
    async fn ack_apart(
        &self,
        queue: &QueueName,
        tokens: &[Token],
        skip: Option<u8>,
    ) -> Result<Vec<(usize, Outcome)>, StoreError> {
        let groups = by_shard(queue, tokens).into_iter().filter(|group| Some(group.queue.shard().number) != skip);
        let acked = groups.map(async |OfShard { queue, tokens, at }| {
            self.one.ack(&queue, &tokens).await.map(|outcomes| at.into_iter().zip(outcomes).collect::<Vec<_>>())
        });
        Ok(all_of(future::join_all(acked).await)?.concat())
    }

    /// Acks first, wherever the tasks are. Then from the fuller one of two shards, and if there is too little, from all that have
    /// something.
    async fn pop_spread(&self, queue: &QueueName, layout: &Layout, pop: &Pop) -> Result<Popped, StoreError> {
        let mut all = NOTHING;
        if pop.request.is_some() {
            all = self.held_by_request(queue, layout, pop).await?;
        }
        let mut outcomes = vec![Outcome::LeaseLost; pop.acks.len()];
        let is_answered = !all.tasks.is_empty() || pop.max_tasks == 0;
        let of_acks = pop.acks.iter().map(|token| token.shard()).find(|number| *number < layout.shards);
        let first = layout.fuller(of_acks.unwrap_or_else(|| layout.any()), self.away(queue, layout));
        let apart = self.ack_apart(queue, &pop.acks, (!is_answered).then_some(first)).await?;
        let some_acked = !apart.is_empty();
        apart.into_iter().for_each(|(at, outcome)| outcomes[at] = outcome);
        if is_answered {
            return Ok(Popped { acks: outcomes, ..all });
        }
        let here: Vec<usize> = (0..pop.acks.len()).filter(|at| pop.acks[*at].shard() == first).collect();
        let acks: Vec<Token> = here.iter().map(|at| pop.acks[*at]).collect();
        let has_acks = !acks.is_empty();
        let spent = pop.spent.clone();
        let mut failure = None;
        let popped = match self.pop_part(queue, layout, first, Pop { acks, spent, ..pop.clone() }).await {
            Ok(popped) => popped,
            Err(error) if did_nothing(&error) && !has_acks => {
                failure = Some(error);
                NOTHING
            }
            Err(error) if some_acked => return Err(error.after_others()),
            Err(error) => return Err(error),
        };
        here.into_iter().zip(&popped.acks).for_each(|(at, outcome)| outcomes[at] = *outcome);
        let mut all = Popped { acks: outcomes, known: all.known || popped.known, ..popped };
        let has_answer = !all.taken_over && self.pop_from_others(queue, layout, pop, first, &mut all).await;
        if let Some(error) = failure.filter(|_| !has_answer) {
            return Err(of_several(error, !some_acked));
        }
        all.ready = layout.all_ready();
        all.due_in = all.due_in.filter(|_| all.tasks.is_empty());
        Ok(all)
    }

    /// What the first shard lacked. What was leased there is not to be lost because another one is away. Whether any of the others answered.
    async fn pop_from_others(
        &self,
        queue: &QueueName,
        layout: &Layout,
        pop: &Pop,
        first: u8,
        all: &mut Popped,
    ) -> bool {
        let bytes = |all: &Popped| all.tasks.iter().map(|task| task.envelope.len()).sum::<usize>();
        let has_room = |all: &Popped| all.tasks.len() < pop.max_tasks && bytes(all) < pop.max_bytes;
        if !has_room(all) || layout.shards == 1 {
            return false;
        }
        let is_away = self.away(queue, layout);
        let is_asked = |number: &u8| *number != first && !is_away(*number);
        let others: Vec<u8> = (0..layout.shards).filter(is_asked).collect();
        let parts: Vec<QueueName> = others.iter().map(|number| layout.part(queue, *number)).collect();
        let announce = if pop.will_wait && all.tasks.is_empty() { ANNOUNCED_FOR } else { 0 };
        let looks = match self.one.look_at_all(&parts, announce).await {
            Ok(looks) => looks,
            Err(error) => {
                tracing::debug!(%error, ?queue, "cannot look at the other shards");
                return false;
            }
        };
        let has_answer = looks.iter().any(Option::is_some);
        let mut with_tasks = Vec::new();
        for (number, look) in others.into_iter().zip(looks) {
            let Some(look) = look else { continue };
            layout.note_ready(number, look.sight.ready);
            all.due_in = earlier(all.due_in, look.sight.due_in);
            all.reclaimed += look.sight.reclaimed;
            self.settle_if_other(queue, layout, number, look.generation).await;
            if look.sight.ready > 0 {
                with_tasks.push((look.sight.ready, number));
            }
        }
        with_tasks.sort_unstable_by(|one, other| other.cmp(one));
        for (_, number) in with_tasks {
            if !has_room(all) {
                break;
            }
            let rest = Pop {
                acks: Vec::new(),
                spent: Vec::new(),
                max_tasks: pop.max_tasks - all.tasks.len(),
                max_bytes: pop.max_bytes - bytes(all),
                will_wait: false,
                ..pop.clone()
            };
            match self.pop_part(queue, layout, number, rest).await {
                Ok(popped) => {
                    all.reclaimed += popped.reclaimed;
                    all.taken_over |= popped.taken_over;
                    all.tasks.extend(popped.tasks);
                }
                Err(error) => {
                    tracing::debug!(%error, ?queue, number, "cannot pop from a shard");
                    if !did_nothing(&error) {
                        // It may have leased what nobody will be told of.
                        let withdrawal = self.of_part(pop, number);
                        let undone = self.one.withdraw(&layout.part(queue, number), withdrawal).await;
                        tracing::debug!(?undone, "withdrew the pop");
                    }
                }
            }
        }
        has_answer
    }

    fn of_part(&self, pop: &Pop, number: u8) -> Withdrawal {
        Withdrawal { stem: pop.stem.in_shard(number), max_tasks: pop.max_tasks, request: pop.request.clone() }
    }

    async fn release_part(
        &self,
        queue: &QueueName,
        release: &Release,
        tokens: Vec<Token>,
    ) -> Result<(Vec<Outcome>, Released), StoreError> {
        let release = match release {
            Release::PutBack(put_back) => Release::PutBack(PutBack { tokens, ..put_back.clone() }),
            Release::Unsent(_, attempt) => Release::Unsent(tokens, *attempt),
        };
        self.one.release(queue, release).await
    }
}

fn tokens_of(release: &Release) -> &[Token] {
    match release {
        Release::PutBack(put_back) => &put_back.tokens,
        Release::Unsent(tokens, _) => tokens,
    }
}

fn add(all: &mut Released, part: Released) {
    all.put_back += part.put_back;
    all.ready += part.ready;
    all.dead_lettered += part.dead_lettered;
}

#[async_trait]
impl Store for RedisStore {
    async fn insert(&self, queue: &QueueName, insert: Insert) -> Result<Inserted, StoreError> {
        let mut attempts = Attempts::new(self);
        loop {
            let (number, inserted) = match self.layout(queue) {
                None => (0, self.one.insert(queue, insert.clone()).await),
                Some(layout) => self.insert_spread(queue, &layout, &insert).await,
            };
            match inserted {
                Err(StoreError::Moved) => attempts.settle(self, queue, number).await?,
                inserted => return inserted,
            }
        }
    }

    async fn produce(&self, queue: &QueueName, produce: Produce) -> Result<Produced, StoreError> {
        let (mut attempts, mut all) = (Attempts::new(self), Produced::default());
        while all.refused.is_none() && all.inserted.len() < produce.inserts.len() {
            let (number, done) = self.produce_run(queue, &produce, &produce.inserts[all.inserted.len()..]).await;
            let mut failure = None;
            match done {
                Ok(step) => {
                    all.inserted.extend(step.inserted);
                    all.refused = step.refused;
                }
                Err(error) => failure = Some(error),
            }
            if matches!(all.refused.as_ref().or(failure.as_ref()), Some(StoreError::Moved)) {
                (all.refused, failure) = (None, attempts.settle(self, queue, number).await.err());
            }
            match failure {
                Some(error) if all.inserted.is_empty() => return Err(error),
                Some(error) => all.refused = Some(error),
                None => {}
            }
        }
        Ok(all)
    }

    async fn pop(&self, queue: &QueueName, pop: Pop) -> Result<Popped, StoreError> {
        let Some(mut layout) = self.layout(queue) else {
            let again = Pop { acks: Vec::new(), ..pop.clone() };
            let (popped, generation) = self.one.pop(queue, pop).await?;
            if generation == 0 || !popped.tasks.is_empty() || popped.taken_over {
                return Ok(popped);
            }
            // It is new that it is spread.
            let Some(layout) = self.refreshed(queue).await.map_err(StoreError::after_others)? else {
                return Ok(popped);
            };
            let rest = self.pop_spread(queue, &layout, &again).await.map_err(StoreError::after_others)?;
            return Ok(Popped { acks: popped.acks, reclaimed: popped.reclaimed + rest.reclaimed, ..rest });
        };
        let popped = self.pop_spread(queue, &layout, &pop).await?;
        match self.layout(queue) {
            Some(other) if popped.tasks.is_empty() && !popped.taken_over && !Arc::ptr_eq(&layout, &other) => {
                layout = other
            }
            _ => return Ok(popped),
        }
        // It has other shards by now, which were not asked.
        let again = Pop { acks: Vec::new(), spent: Vec::new(), ..pop };
        let rest = self.pop_spread(queue, &layout, &again).await.map_err(StoreError::after_others)?;
        Ok(Popped { acks: popped.acks, reclaimed: popped.reclaimed + rest.reclaimed, ..rest })
    }

    async fn ack(&self, queue: &QueueName, tokens: &[Token]) -> Result<Vec<Outcome>, StoreError> {
        if is_first_shard(tokens) {
            return self.one.ack(queue, tokens).await;
        }
        let mut outcomes = vec![Outcome::LeaseLost; tokens.len()];
        let acked = self.ack_apart(queue, tokens, None).await?;
        acked.into_iter().for_each(|(at, outcome)| outcomes[at] = outcome);
        Ok(outcomes)
    }

    async fn heartbeat(
        &self,
        queue: &QueueName,
        tokens: &[Token],
        lease: Option<Millis>,
    ) -> Result<Beaten, StoreError> {
        if is_first_shard(tokens) {
            return self.one.heartbeat(queue, tokens, lease).await;
        }
        let beats = by_shard(queue, tokens).into_iter().map(async |OfShard { queue, tokens, at }| {
            Ok::<_, StoreError>((at, self.one.heartbeat(&queue, &tokens, lease).await?))
        });
        let mut all = Beaten { outcomes: vec![Outcome::LeaseLost; tokens.len()], ..Beaten::default() };
        let mut cancelled = Vec::new();
        for (at, beaten) in all_of(future::join_all(beats).await)? {
            at.into_iter().zip(beaten.outcomes).for_each(|(at, outcome)| all.outcomes[at] = outcome);
            cancelled.extend(beaten.cancelled);
            let earliest = [all.earliest, beaten.earliest].into_iter().flatten();
            all.earliest = earliest.min_by_key(|(_, deadline)| *deadline);
        }
        all.cancelled = in_order(tokens, &cancelled);
        Ok(all)
    }

    async fn release(&self, queue: &QueueName, release: Release) -> Result<(Vec<Outcome>, Released), StoreError> {
        let tokens = tokens_of(&release);
        if is_first_shard(tokens) {
            return self.one.release(queue, release).await;
        }
        let (mut outcomes, mut all) = (vec![Outcome::LeaseLost; tokens.len()], Released::default());
        let parts = by_shard(queue, tokens)
            .into_iter()
            .map(async |OfShard { queue, tokens, at }| Ok((at, self.release_part(&queue, &release, tokens).await?)));
        for (at, (of_step, released)) in all_of(future::join_all(parts).await)? {
            at.into_iter().zip(of_step).for_each(|(at, outcome)| outcomes[at] = outcome);
            add(&mut all, released);
        }
        Ok((outcomes, all))
    }

    async fn resume(
        &self,
        queue: &QueueName,
        consumer: Consumer,
        lease: Millis,
        max_hold: Millis,
    ) -> Result<Vec<(Token, Millis)>, StoreError> {
        let Some(layout) = self.refreshed(queue).await? else {
            return self.one.resume(queue, consumer, lease, max_hold).await;
        };
        let parts = layout.all_parts(queue);
        let resumed = parts.iter().map(|part| self.one.resume(part, consumer, lease, max_hold));
        let mut held = future::try_join_all(resumed).await.map_err(StoreError::after_others)?.concat();
        held.sort_by_key(|(_, age)| std::cmp::Reverse(*age));
        Ok(held)
    }

    async fn keep(
        &self,
        queue: &QueueName,
        consumer: Consumer,
        tokens: &[Token],
        lease: Millis,
    ) -> Result<Option<Kept>, StoreError> {
        if is_first_shard(tokens) {
            return self.one.keep(queue, consumer, tokens, lease).await;
        }
        let mut all = Kept { outcomes: vec![Outcome::LeaseLost; tokens.len()], cancelled: Vec::new() };
        let mut cancelled = Vec::new();
        let parts = by_shard(queue, tokens).into_iter().map(async |OfShard { queue, tokens, at }| {
            Ok((at, self.one.keep(&queue, consumer, &tokens, lease).await?))
        });
        for (at, kept) in all_of(future::join_all(parts).await)? {
            let Some(kept) = kept else { return Ok(None) };
            at.into_iter().zip(kept.outcomes).for_each(|(at, outcome)| all.outcomes[at] = outcome);
            cancelled.extend(kept.cancelled);
        }
        all.cancelled = in_order(tokens, &cancelled);
        Ok(Some(all))
    }

    async fn abandon(
        &self,
        queue: &QueueName,
        consumer: Consumer,
        tokens: &[Token],
        grace: Millis,
    ) -> Result<(), StoreError> {
        let abandoned = by_shard(queue, tokens)
            .into_iter()
            .map(async |OfShard { queue, tokens, .. }| self.one.abandon(&queue, consumer, &tokens, grace).await);
        // One that is away is no reason to leave the others.
        future::join_all(abandoned).await.into_iter().collect()
    }

    async fn withdraw(&self, queue: &QueueName, withdrawal: Withdrawal) -> Result<u64, StoreError> {
        let Some(layout) = self.layout(queue) else { return self.one.withdraw(queue, withdrawal).await };
        let withdrawn = (0..layout.spread).map(async |number| {
            let stem: Stem = withdrawal.stem.in_shard(number);
            self.one.withdraw(&layout.part(queue, number), Withdrawal { stem, ..withdrawal.clone() }).await
        });
        let counts = future::join_all(withdrawn).await.into_iter().collect::<Result<Vec<u64>, _>>()?;
        Ok(counts.iter().sum())
    }

    async fn release_held(&self, queue: &QueueName, held_for: Millis) -> Result<Released, StoreError> {
        let Some(layout) = self.refreshed(queue).await? else { return self.one.release_held(queue, held_for).await };
        let mut all = Released::default();
        for (step, part) in layout.all_parts(queue).iter().enumerate() {
            let released = self.one.release_held(part, held_for).await;
            add(&mut all, released.map_err(|error| of_several(error, step == 0))?);
        }
        Ok(all)
    }

    async fn look(&self, queues: &[QueueName]) -> Result<Vec<Sight>, StoreError> {
        let looks = self.look_at_parts(queues, ANNOUNCED_FOR).await?;
        let whole = |parts: Vec<_>| {
            parts.into_iter().flatten().fold(Sight::default(), |all, look: super::Look| Sight {
                ready: all.ready + look.sight.ready,
                due_in: earlier(all.due_in, look.sight.due_in),
                reclaimed: all.reclaimed + look.sight.reclaimed,
            })
        };
        Ok(looks.into_iter().map(whole).collect())
    }

    async fn reap(&self, cursor: ReapCursor, budget: usize) -> Result<Reaped, StoreError> {
        self.one.register_owed().await;
        let (next, names) = self.one.registered_in(cursor, budget).await?;
        let looks = self.look_at_parts(&names, 0).await?;
        let mut reaped = Reaped { visited: names.len(), reclaimed: Vec::new(), next };
        for (queue, looks) in names.into_iter().zip(looks) {
            let mut reclaimed = 0;
            for (number, look) in (0..MAX_SHARDS).zip(looks) {
                let Some(mut look) = look else { continue };
                reclaimed += look.sight.reclaimed;
                let part = self.layout(&queue).map_or_else(|| queue.clone(), |layout| layout.part(&queue, number));
                // Where nobody pops, much may have come together.
                for _ in 0..RECLAIM_ROUNDS {
                    if !look.more {
                        break;
                    }
                    look = self.one.look_once(&part, 0).await?;
                    reclaimed += look.sight.reclaimed;
                }
                if number > 0 {
                    continue;
                } else if look.exists {
                    self.one.shared.known(|known| known.without_keys.remove(&queue));
                } else {
                    self.one.forget_unless_new(&queue).await?;
                }
            }
            if reclaimed > 0 {
                reaped.reclaimed.push((queue, reclaimed));
            }
        }
        Ok(reaped)
    }

    async fn listen(&self, on_wake: OnWake) -> Result<(), StoreError> {
        self.one.listen(&on_wake).await
    }

    async fn check(&self) -> Result<(), StoreError> {
        self.one.check().await
    }
}

/// Those among the tokens, in their order, each once.
fn in_order(tokens: &[Token], some: &[Token]) -> Vec<Token> {
    let mut ordered = Vec::with_capacity(some.len());
    for token in tokens {
        if some.contains(token) && !ordered.contains(token) {
            ordered.push(*token);
        }
    }
    ordered
}
