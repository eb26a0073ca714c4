//! The store on Redis. The server holds no state of its own then: any number of servers serve the same queues.
//!
//! Every step is one script of `server/lua`; `common.lua` there describes the keys. This module and those below are the
//! only ones that name the engine.

mod address;
mod admin;
mod answer;
mod fitness;
mod gather;
mod keys;
mod link;
mod look;
mod nodes;
mod probe;
mod registry;
mod route;
mod script;
mod shared;
mod spread;

use std::{sync::Arc, time::Duration};

use bb8_redis::redis::{FromRedisValue, RedisError, Value};
use futures_util::StreamExt;

pub use self::{
    address::{Access, FORMS},
    shared::{RedisConfig, RedisShared},
    spread::RedisStore,
};
use self::{
    answer::{
        PopAnswer, bytes, cancelled, from_value, inserted_ids, outcomes, queue_full, released, sixteen,
        tokens_under_stem, unreadable,
    },
    gather::{BATCH_WEIGHT, Gatherer, Job, PopCall},
    link::Links,
    look::unless_broken,
    nodes::Syncs,
    script::{Call, Sources, holder},
};
use super::{
    Attempt, Beaten, Consumer, Durability, Insert, Inserted, Kept, Millis, NumberedInsert, OnWake, Outcome,
    PRODUCER_ANSWERS, Pop, Popped, Produce, Produced, PutBack, QueueName, RECLAIM_STEP, Release, Released, Rules,
    StoreError, Token, Withdrawal,
    lanes::{Lane, Load},
};

/// For how long a server's word that it waits on a queue holds. When half of that is over it is renewed, by the next pop that
/// will wait, or by the next look, within 0.9 s.
const ANNOUNCED_FOR: Millis = 10_000;

/// Between two checks whether the connection that brings other servers' hints is alive.
const LISTENING_CHECK: Duration = Duration::from_secs(10);

/// How many steps of taking leases back a pop waits for, before it pops though more have run out.
const RECLAIM_ROUNDS: usize = 64;

/// How many names of queues a step reads.
const NAMES_PER_STEP: usize = 1_000;

/// One thread's store as it is without anything spread: each shard is a queue to it.
struct Unspread {
    shared: Arc<RedisShared>,
    links: Arc<Links>,
    gatherer: Arc<Gatherer>,
}

impl Unspread {
    /// Opens the connections of the thread whose runtime this is called in.
    fn new(shared: Arc<RedisShared>) -> Self {
        let links = Arc::new(Links::new(Arc::clone(&shared.nodes), shared.timeout));
        let gatherer = Arc::new(Gatherer::new(Arc::clone(&shared), Arc::clone(&links)));
        Self { shared, links, gatherer }
    }

    fn call(&self, script: &'static Sources, queue: &QueueName) -> Call {
        self.shared.call(script, queue)
    }

    async fn run<T: FromRedisValue>(&self, call: Call) -> Result<T, StoreError> {
        from_value(&self.links.run(&call).await?)
    }

    /// Bounds a call that may take several steps as one step is bounded.
    async fn within_timeout<T>(&self, call: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        let timeout = self.shared.timeout;
        let ended = tokio::time::timeout(timeout, call).await;
        ended.unwrap_or_else(|_| Err(self.shared.presence.timed_out(timeout, false)))
    }

    /// Does the first of some inserts: those that the producer has numbered before, or else all.
    async fn produce_once(
        &self,
        queue: &QueueName,
        produce: &Produce,
        inserts: &[NumberedInsert],
    ) -> Result<Produced, StoreError> {
        let mut call = self.call(&script::PRODUCE, queue);
        let waiting = script::waiting_and_generation(produce.waiting_here, queue.shard());
        call = call.arg(&produce.producer).arg(waiting).arg(PRODUCER_ANSWERS);
        call = script::produce(call, inserts.iter());
        let tasks = inserts.iter().flat_map(|insert| &insert.tasks);
        let load = Load::new(tasks.clone().count(), tasks.map(|task| task.envelope.len()).sum());
        let lane = Lane::Ordinary(Some(queue.clone()));
        let call = call.reaching(produce.durability);
        let (answer, reached) = self.gatherer.run(lane, queue, call, |asks| Job::Script(asks, load)).await?;
        let answer: Vec<Value> = from_value(&answer)?;
        let [status, made, new, known @ ..] = answer.as_slice() else { return Err(unreadable()) };
        if from_value(made)? {
            self.register_made(queue).await;
        }
        let refused = match status {
            Value::Int(0) => None,
            Value::Int(2) => Some(StoreError::RequestIdReused),
            Value::Int(4) => Some(StoreError::Moved),
            Value::Int(_) => Some(StoreError::NumberForgotten),
            Value::Array(full) if full.len() == 2 => Some(queue_full(&full[0], &full[1])?),
            _ => return Err(unreadable()),
        };
        let new: usize = from_value(new)?;
        let told = |(ids, insert): (&Value, &NumberedInsert)| {
            let mut inserted = inserted_ids(ids, false)?;
            // The tasks of this very call: it runs a second time.
            let is_own = inserted.ids.iter().zip(&insert.tasks).any(|(id, task)| *id == task.id);
            inserted.replayed = new == 0 && !is_own;
            Ok(inserted)
        };
        let mut inserted = known.iter().zip(inserts).map(told).collect::<Result<Vec<_>, _>>()?;
        for insert in inserts.iter().take(if known.is_empty() { new } else { 0 }) {
            inserted.push(Inserted { ids: insert.tasks.iter().map(|task| task.id).collect(), ..Inserted::default() });
        }
        inserted.iter_mut().for_each(|inserted| inserted.durability = reached);
        Ok(Produced { inserted, refused })
    }

    /// Refuses what the node of the queue can never reach.
    fn refuse_more(&self, queue: &QueueName, durability: Durability) -> Result<(), StoreError> {
        if durability == Durability::Accepted {
            return Ok(());
        }
        let node = self.shared.owner(queue);
        let at = self.shared.nodes.presence(&node);
        let unknown = |what: &str| {
            let message = format!("{what} of Redis at {}; try again in a moment", at.address());
            StoreError::Unavailable { message, did_not_run: true }
        };
        let Some(strength) = self.shared.nodes.strength(&node) else { return Err(unknown("nothing is known yet")) };
        let unsupported =
            |why: &str| Err(StoreError::DurabilityUnsupported(format!("Redis at {} {why}", at.address())));
        match durability {
            Durability::Replicated if strength.replicas > 0 => Ok(()),
            Durability::Replicated if self.shared.nodes.had_replicas() => Err(unknown("no replica is online now")),
            Durability::Replicated => {
                unsupported("lists no replica that is online: DURABILITY_REPLICATED wants one at least")
            }
            Durability::Fsynced if strength.syncs == Syncs::Unknown => unsupported(
                "is not known to sync: DURABILITY_FSYNCED wants `appendonly yes`, and `appendfsync always` or Redis 7.2 or later",
            ),
            Durability::Fsynced | Durability::Accepted => Ok(()),
        }
    }

    async fn pop_once(&self, queue: &QueueName, pop: Pop, anyway: bool) -> Result<PopAnswer, StoreError> {
        let lane = Lane::Ordinary(Some(queue.clone()));
        self.within_timeout(self.gatherer.run(lane, queue, PopCall { pop, anyway }, Job::Pop)).await
    }

    /// Runs a script in its turn among the calls that end or extend leases.
    async fn run_urgent(&self, queue: &QueueName, call: Call) -> Result<Value, StoreError> {
        let job = |asks| Job::Script(asks, Load::new(1, 0));
        Ok(self.within_timeout(self.gatherer.run(Lane::Urgent, queue, call, job)).await?.0)
    }

    /// What `release.lua` is told of tasks that their holder puts back.
    fn told_of(&self, put_back: &PutBack, call: Call) -> Call {
        let Rules { max_failures, backoff, .. } = self.shared.rules;
        let delay = put_back.delay.map_or_else(String::new, |delay| delay.to_string());
        let call = call.arg(u8::from(put_back.failed)).arg(u8::from(put_back.dead_letter)).arg(delay);
        call.arg(&put_back.reason).arg(put_back.chance).arg(max_failures).arg(backoff.min).arg(backoff.max)
    }

    fn session(&self, queue: &QueueName, what: &str, consumer: Consumer, span: Millis) -> Call {
        self.call(&script::SESSION, queue).arg(what).arg(&consumer.session.0).arg(&consumer.stream.0).arg(span)
    }

    async fn held_since(&self, queue: &QueueName, held_for: Millis) -> Result<(i64, Vec<Token>), StoreError> {
        let (mut cursor, mut since) = ("0".to_owned(), None);
        let mut found: Vec<(u64, Token)> = Vec::new();
        loop {
            let call = self.call(&script::HELD, queue).arg(&cursor).arg(held_for).arg(since);
            let (next, at, part): (String, i64, Vec<Value>) = self.run(call).await?;
            for batch in part.chunks_exact(2) {
                let (first, run): (u64, Vec<u8>) = (from_value(&batch[0])?, from_value(&batch[1])?);
                let order = |token: &Token| first + u64::from(u16::from_be_bytes([token.0[14], token.0[15]]));
                found.extend(tokens_under_stem(&run).map(|token| (order(&token), token)));
            }
            since = Some(at);
            if next == "0" {
                break;
            }
            cursor = next;
        }
        // Those delivered last first: each step puts its tasks in front of those of the step before.
        found.sort_unstable_by(|a, b| b.cmp(a));
        found.dedup();
        Ok((since.unwrap_or(i64::MIN), found.into_iter().map(|(_, token)| token).collect()))
    }
}

/// What [`Store`] has, for a shard.
impl Unspread {
    pub(super) async fn insert(&self, queue: &QueueName, insert: Insert) -> Result<Inserted, StoreError> {
        self.refuse_more(queue, insert.durability)?;
        let inserting = self.within_timeout(async {
            self.register_before_insert(queue).await?;
            let lane = Lane::Ordinary(Some(queue.clone()));
            self.gatherer.run(lane, queue, insert, Job::Insert).await
        });
        let answer = self.doubt(queue, inserting.await)?;
        if answer.made {
            self.register_made(queue).await;
        }
        Ok(answer.inserted)
    }

    pub(super) async fn produce(&self, queue: &QueueName, produce: Produce) -> Result<Produced, StoreError> {
        self.refuse_more(queue, produce.durability)?;
        let producing = self.within_timeout(async {
            self.register_before_insert(queue).await?;
            let mut all = Produced::default();
            while all.refused.is_none() && all.inserted.len() < produce.inserts.len() {
                let rest = &produce.inserts[all.inserted.len()..];
                match self.produce_once(queue, &produce, rest).await {
                    Ok(step) if step.inserted.is_empty() && step.refused.is_none() => return Err(unreadable()),
                    Ok(step) => {
                        all.inserted.extend(step.inserted);
                        all.refused = step.refused;
                    }
                    Err(error) if all.inserted.is_empty() => return Err(error),
                    Err(error) => all.refused = Some(error),
                }
            }
            Ok(all)
        });
        self.doubt(queue, producing.await)
    }

    /// And the generation of the settings.
    pub(super) async fn pop(&self, queue: &QueueName, pop: Pop) -> Result<(Popped, u64), StoreError> {
        let again = Pop { acks: Vec::new(), ..pop.clone() };
        let first = self.pop_once(queue, pop, false).await?;
        if !first.more {
            return Ok((first.popped, first.generation));
        }
        // Of many leases that ran out, those held longest belong at the head, and are taken back last.
        let mut reclaimed = first.popped.reclaimed;
        for _ in 0..RECLAIM_ROUNDS {
            let look = self.look_once(queue, 0).await.map_err(StoreError::after_others)?;
            reclaimed += look.sight.reclaimed;
            if !look.more {
                break;
            }
        }
        let last = self.pop_once(queue, again, true).await.map_err(StoreError::after_others)?;
        let reclaimed = reclaimed + last.popped.reclaimed;
        Ok((Popped { acks: first.popped.acks, reclaimed, ..last.popped }, last.generation))
    }

    pub(super) async fn ack(&self, queue: &QueueName, tokens: &[Token]) -> Result<Vec<Outcome>, StoreError> {
        self.within_timeout(async {
            let mut all = Vec::with_capacity(tokens.len());
            for step in tokens.chunks(BATCH_WEIGHT) {
                let acked = self.gatherer.run(Lane::Urgent, queue, step.to_vec(), Job::Ack).await;
                all.extend(acked.map_err(|error| if all.is_empty() { error } else { error.after_others() })?);
            }
            Ok(all)
        })
        .await
    }

    pub(super) async fn heartbeat(
        &self,
        queue: &QueueName,
        tokens: &[Token],
        lease: Option<Millis>,
    ) -> Result<Beaten, StoreError> {
        self.within_timeout(async {
            let mut all = Beaten::default();
            for step in tokens.chunks(BATCH_WEIGHT) {
                let job = |asks| Job::Heartbeat(asks, lease);
                let beaten = self.gatherer.run(Lane::Urgent, queue, step.to_vec(), job).await;
                let Beaten { outcomes, earliest, cancelled } =
                    beaten.map_err(|error| if all.outcomes.is_empty() { error } else { error.after_others() })?;
                all.outcomes.extend(outcomes);
                all.cancelled.extend(cancelled);
                if let Some((_, deadline)) = earliest
                    && all.earliest.is_none_or(|(_, other)| deadline < other)
                {
                    all.earliest = earliest;
                }
            }
            Ok(all)
        })
        .await
    }

    pub(super) async fn release(
        &self,
        queue: &QueueName,
        release: Release,
    ) -> Result<(Vec<Outcome>, Released), StoreError> {
        let call = self.call(&script::RELEASE, queue);
        // In one step, however many: tasks that are put back together keep their order.
        let call = match &release {
            Release::PutBack(put_back) => {
                let call = call.arg("put_back").arg("").arg(call_id()?);
                self.told_of(put_back, call).tokens(&put_back.tokens)
            }
            Release::Unsent(tokens, attempt) => {
                let call = call.arg("unsent").arg(holder(*attempt)).arg("");
                self.told_of(&PutBack::default(), call).tokens(tokens)
            }
        };
        released(&self.run_urgent(queue, call).await?)
    }

    pub(super) async fn resume(
        &self,
        queue: &QueueName,
        consumer: Consumer,
        lease: Millis,
        max_hold: Millis,
    ) -> Result<Vec<(Token, Millis)>, StoreError> {
        let held = self.run_urgent(queue, self.session(queue, "resume", consumer, lease).arg(max_hold)).await?;
        let held: Vec<Value> = from_value(&held)?;
        held.as_chunks::<2>().0.iter().map(|[token, age]| Ok((Token(sixteen(token)?), from_value(age)?))).collect()
    }

    pub(super) async fn keep(
        &self,
        queue: &QueueName,
        consumer: Consumer,
        tokens: &[Token],
        lease: Millis,
    ) -> Result<Option<Kept>, StoreError> {
        let mut all = Kept::default();
        for step in tokens.chunks(RECLAIM_STEP) {
            let call = self.session(queue, "keep", consumer, lease).tokens(step);
            match self.run_urgent(queue, call).await? {
                Value::Array(answer) if answer.len() == 2 => {
                    all.outcomes.extend(outcomes(&answer[1])?);
                    all.cancelled.extend(cancelled(step, bytes(&answer[1])?));
                }
                _ => return Ok(None),
            }
        }
        Ok(Some(all))
    }

    pub(super) async fn abandon(
        &self,
        queue: &QueueName,
        consumer: Consumer,
        tokens: &[Token],
        grace: Millis,
    ) -> Result<(), StoreError> {
        for step in tokens.chunks(RECLAIM_STEP) {
            self.run_urgent(queue, self.session(queue, "abandon", consumer, grace).tokens(step)).await?;
        }
        Ok(())
    }

    pub(super) async fn withdraw(&self, queue: &QueueName, withdrawal: Withdrawal) -> Result<u64, StoreError> {
        let request = withdrawal.request.as_ref();
        let call = self
            .call(&script::WITHDRAW, queue)
            .arg(&withdrawal.stem.0)
            .arg(request.map_or("", |request| &request.key.id))
            .arg(holder(request.map(|request| request.attempt)));
        from_value(&self.run_urgent(queue, call).await?)
    }

    pub(super) async fn release_held(&self, queue: &QueueName, held_for: Millis) -> Result<Released, StoreError> {
        let (since, tokens) = self.held_since(queue, held_for).await?;
        let mut released = Released::default();
        for step in tokens.chunks(RECLAIM_STEP) {
            let call = self.call(&script::RELEASE, queue).arg("held").arg(since).arg(call_id()?);
            let call = self.told_of(&PutBack::default(), call).tokens(step);
            let (_, of_step) = answer::released(&self.run(call).await?)?;
            released.put_back += of_step.put_back;
            released.ready += of_step.ready;
            released.dead_lettered += of_step.dead_lettered;
        }
        Ok(released)
    }

    pub(super) async fn listen(&self, on_wake: &OnWake) -> Result<(), StoreError> {
        let lost = |error: RedisError| self.shared.presence.store_error(&error);
        let silent = |_| self.shared.presence.timed_out(self.shared.timeout, true);
        let connecting = tokio::time::timeout(self.shared.timeout, self.shared.nodes.route().listen());
        let mut pubsub = connecting.await.map_err(silent)?.map_err(lost)?;
        pubsub.subscribe(format!("{}{}", self.shared.keys.channels(), self.shared.server)).await.map_err(lost)?;
        let (mut commands, mut messages) = pubsub.split();
        let mut alive = tokio::time::interval(LISTENING_CHECK);
        loop {
            let message = tokio::select! {
                message = messages.next() => message,
                _ = alive.tick() => {
                    // A connection that was dropped on the way would be silent for ever.
                    let pong = tokio::time::timeout(self.shared.timeout, commands.ping::<Value>()).await;
                    pong.map_err(silent)?.map_err(lost)?;
                    continue;
                }
            };
            let Some(message) = message else { return Ok(()) };
            let Ok(hint) = message.get_payload::<String>() else { continue };
            let Some((count, queue)) = hint.split_once(' ') else { continue };
            let (queue, shard) = queue.split_once('#').unwrap_or((queue, "0"));
            if let (Ok(count), Ok(queue), Ok(shard)) = (count.parse(), QueueName::parse(queue), shard.parse()) {
                self.shared.spread.note_more(&queue, shard, count);
                on_wake(&queue, count);
            }
        }
    }

    pub(super) async fn check(&self) -> Result<(), StoreError> {
        let mut probe = self.shared.probe.lock().await;
        let found = probe.ask(&self.shared.keys, &self.shared.epochs()).await;
        self.shared.note(found)
    }
}

/// Names a call whose second run could not be told from another call, for as long as Redis might run it again.
fn call_id() -> Result<String, StoreError> {
    let attempt = Attempt::mint().map_err(|error| StoreError::Broken(error.to_string()))?;
    Ok(holder(Some(attempt)))
}
