//! The store on Redis. The server holds no state of its own then: any number of servers serve the same queues.
//!
//! Every step is one script of `server/lua`; `common.lua` there describes the keys. This module and those below are the
//! only ones that name the engine.

mod fitness;
mod keys;
mod link;
mod script;

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bb8_redis::redis::{self, Client, FromRedisValue, IntoConnectionInfo, Value, cmd, io::tcp::TcpSettings};
use bytes::Bytes;
use futures_util::{StreamExt, future};

use self::{
    keys::{Keys, REGISTRY_PARTS},
    link::{Link, Presence, Probe, Standing},
    script::{Call, Source},
};
use super::{
    Admin, Attempt, Beaten, Counts, Description, Insert, Inserted, Leased, Millis, NumberedInsert, OnWake, Outcome,
    PRODUCER_ANSWERS, Pop, Popped, Produce, Produced, QueueName, RECLAIM_STEP, ReapCursor, Reaped, Release, Released,
    Rules, Sight, Store, StoreError, Survives, TaskId, Token, Withdrawal,
};

/// For how long a server's word that it waits on a queue holds. It is renewed by each look, at least every 0.9 s.
const ANNOUNCED_FOR: Millis = 3_000;

/// Between two checks whether the connection that brings other servers' hints is alive.
const LISTENING_CHECK: Duration = Duration::from_secs(10);

/// How many steps of taking leases back a pop waits for, before it pops though more have run out.
const RECLAIM_ROUNDS: usize = 64;

/// How many queues this process remembers to have registered.
const REGISTERED_MAX: usize = 100_000;

/// How many names of queues a step reads.
const NAMES_PER_STEP: usize = 1_000;

/// A name without keys leaves the registry when it was seen so for this long: a server that registered it may be just
/// about to insert. Should it insert later still, its insert finds that it made the queue and registers it again.
const FORGET_NAME_AFTER: Duration = Duration::from_secs(60);

/// What the stores of all threads of a process share.
pub struct RedisShared {
    client: Client,
    keys: Keys,
    server: String,
    rules: Rules,
    timeout: Duration,
    presence: Arc<Presence>,
    probe: tokio::sync::Mutex<Probe>,
    known: Mutex<Known>,
}

/// What this process knows about Redis' data.
#[derive(Default)]
struct Known {
    report: Option<fitness::Report>,
    registered: HashSet<QueueName>,
    without_keys: HashMap<QueueName, Instant>,
    /// Queues that a list left out, which the log was told.
    left_out: HashSet<QueueName>,
}

/// How to reach Redis.
#[derive(Clone, Debug)]
pub struct RedisConfig {
    /// `redis://[user:password@]host[:port][/db]`.
    pub url: String,
    /// In front of every key: letters, digits, `_` and `-`.
    pub key_prefix: String,
    /// Bounds a call, connecting included.
    pub timeout: Duration,
    /// The rules of its queues.
    pub rules: Rules,
}

impl RedisShared {
    /// Reads the address; connects to nothing.
    pub fn new(config: &RedisConfig) -> Result<Self, String> {
        // redis-rs' own message says what is wrong with the address without repeating it.
        let address = config.url.as_str().into_connection_info().map_err(|error| link::describe(&error))?;
        let address = address.set_tcp_settings(TcpSettings::default().set_nodelay(true));
        let client = Client::open(address).map_err(|error| link::describe(&error))?;
        let mut name = [0; 8];
        getrandom::fill(&mut name).map_err(|error| error.to_string())?;
        Ok(Self {
            keys: Keys::new(&config.key_prefix),
            server: super::hex(&name),
            rules: config.rules,
            timeout: config.timeout,
            presence: Arc::new(Presence::new(client.get_connection_info().addr().to_string())),
            probe: tokio::sync::Mutex::new(Probe::new(client.clone(), config.timeout)),
            known: Mutex::default(),
            client,
        })
    }

    /// The key that holds the time of the tests.
    #[cfg(test)]
    pub(super) fn test_clock(&self) -> String {
        self.keys.test_clock()
    }

    /// A key of a queue, by the name of its part.
    #[cfg(test)]
    pub(super) fn key_of(&self, queue: &QueueName, part: &str) -> Option<String> {
        self.keys.of_queue(queue).into_iter().find(|key| key.rsplit(':').next() == Some(part))
    }

    fn known<T>(&self, with: impl FnOnce(&mut Known) -> T) -> T {
        with(&mut self.known.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Notes what a check found: logs changes, and forgets what was known about another run of Redis.
    fn note(&self, found: Result<fitness::Report, String>) -> Result<(), StoreError> {
        match found {
            Ok(report) => {
                let news = self.known(|known| {
                    let news = known.report.as_ref() != Some(&report);
                    if news {
                        *known = Known { report: Some(report.clone()), ..Known::default() };
                    }
                    news
                });
                if news {
                    self.presence.begin_epoch();
                }
                if self.presence.set(Standing::Fit) || news {
                    let (address, version, survives) = (self.presence.address(), report.version, report.note);
                    match report.durable {
                        true => tracing::info!(
                            address,
                            version,
                            "connected to Redis; what was answered OK survives {survives}"
                        ),
                        false => tracing::warn!(
                            address,
                            version,
                            "connected to Redis; what was answered OK survives {survives}"
                        ),
                    }
                }
                Ok(())
            }
            Err(message) => {
                if self.presence.set(Standing::Away(message.as_str().into())) {
                    self.presence.begin_epoch();
                }
                Err(StoreError::Unavailable { message, did_not_run: true })
            }
        }
    }
}

/// One thread's store.
pub struct RedisStore {
    shared: Arc<RedisShared>,
    link: Link,
}

impl RedisStore {
    /// Opens the connections of the thread whose runtime this is called in.
    pub fn new(shared: Arc<RedisShared>) -> Self {
        let link = Link::new(shared.client.clone(), &shared.presence, shared.timeout);
        Self { shared, link }
    }

    fn call(&self, script: &'static Source, queue: &QueueName) -> Call {
        let shared = &self.shared;
        Call::new(script, &shared.keys.of_queue(queue))
            .arg(shared.rules.remember.window)
            .arg((shared.rules.remember.entries / 2).max(1))
            .arg(&shared.server)
            .arg(queue.as_str())
            .arg(shared.keys.channels())
            .arg(shared.rules.max_expiries)
    }

    async fn run<T: FromRedisValue>(&self, call: Call) -> Result<T, StoreError> {
        self.link.run(async |connection| call.run(connection).await).await
    }

    /// Enters the queue in the registry, so that the reapers of all servers find it.
    async fn register(&self, queue: &QueueName) -> Result<(), StoreError> {
        let mut add = cmd("SADD");
        add.arg(self.shared.keys.registry_of(queue)).arg(queue.as_str());
        self.link.run(async |connection| add.query_async::<()>(connection).await).await?;
        self.shared.known(|known| {
            if known.registered.len() >= REGISTERED_MAX {
                known.registered.clear();
            }
            known.registered.insert(queue.clone());
        });
        Ok(())
    }

    async fn register_before_insert(&self, queue: &QueueName) -> Result<(), StoreError> {
        let is_registered = self.shared.known(|known| known.registered.contains(queue));
        if is_registered { Ok(()) } else { self.register(queue).await }
    }

    /// The tasks are in, so this must not fail the call that made the queue; whoever inserts next does it again.
    async fn register_made(&self, queue: &QueueName) {
        if let Err(error) = self.register(queue).await {
            self.shared.known(|known| known.registered.remove(queue));
            tracing::warn!(%error, ?queue, "could not register the queue again after its first insert");
        }
    }

    /// Bounds a call that may take several steps as one step is bounded.
    async fn within_timeout<T>(&self, call: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        let timeout = self.shared.timeout;
        tokio::time::timeout(timeout, call)
            .await
            .unwrap_or_else(|_| Err(self.shared.presence.timed_out(timeout, false)))
    }

    /// Does the first of some inserts: those that the producer has numbered before, or else all.
    async fn produce_once(
        &self,
        queue: &QueueName,
        produce: &Produce,
        inserts: &[NumberedInsert],
    ) -> Result<Produced, StoreError> {
        let mut call = self.call(&script::PRODUCE, queue);
        call = call.arg(&produce.producer).arg(produce.waiting_here).arg(PRODUCER_ANSWERS);
        for NumberedInsert { number, fingerprint, tasks } in inserts {
            call = call.arg(&number.to_be_bytes()).arg(&fingerprint.0).arg(tasks.len());
            for task in tasks {
                call = call.arg(&task.id.0).arg(task.envelope.as_ref());
            }
        }
        let answer: Vec<Value> = self.run(call).await?;
        let [status, made, new, known @ ..] = answer.as_slice() else { return Err(unreadable()) };
        if from_value(made)? {
            self.register_made(queue).await;
        }
        let refused = match from_value::<u64>(status)? {
            0 => None,
            2 => Some(StoreError::RequestIdReused),
            _ => Some(StoreError::NumberForgotten),
        };
        let again = |(ids, insert): (&Value, &NumberedInsert)| {
            let ids = task_ids(ids)?;
            // The tasks of this very call: it runs a second time.
            let replayed = ids.first() != insert.tasks.first().map(|task| &task.id);
            Ok(Inserted { ids, replayed })
        };
        let mut inserted = known.iter().zip(inserts).map(again).collect::<Result<Vec<_>, _>>()?;
        for insert in inserts.iter().take(from_value(new)?) {
            inserted.push(Inserted { ids: insert.tasks.iter().map(|task| task.id).collect(), replayed: false });
        }
        Ok(Produced { inserted, refused })
    }

    async fn pop_once(
        &self,
        queue: &QueueName,
        pop: &Pop,
        acks: &[Token],
        anyway: bool,
    ) -> Result<PopAnswer, StoreError> {
        let mut call = self
            .call(&script::POP, queue)
            .arg(pop.max_tasks.clamp(1, RECLAIM_STEP))
            .arg(pop.max_bytes)
            .arg(pop.lease)
            .arg(&pop.stem.0)
            .arg(if pop.will_wait { ANNOUNCED_FOR } else { 0 })
            .arg(u8::from(anyway));
        call = match &pop.request {
            Some(request) => {
                call.arg(&request.key.id).arg(&request.key.fingerprint.0).arg(holder(Some(request.attempt)))
            }
            None => call.arg("").arg("").arg(holder(None)),
        };
        PopAnswer::read(self.run(with_tokens(call, acks)).await?)
    }

    async fn look_once(&self, queue: &QueueName, announce: Millis) -> Result<Look, StoreError> {
        let (ready, due_in, reclaimed, more, exists) =
            self.run::<(u64, i64, u64, bool, bool)>(self.call(&script::LOOK, queue).arg(announce)).await?;
        Ok(Look { sight: Sight { ready, due_in: u64::try_from(due_in).ok(), reclaimed }, more, exists })
    }

    async fn registered_in(
        &self,
        cursor: ReapCursor,
        budget: usize,
    ) -> Result<(ReapCursor, Vec<QueueName>), StoreError> {
        let mut scan = cmd("SSCAN");
        scan.arg(self.shared.keys.registry(cursor.part)).arg(cursor.position).arg("COUNT").arg(budget);
        let (position, names): (u64, Vec<String>) =
            self.link.run(async |connection| scan.query_async(connection).await).await?;
        let next = match position {
            0 => ReapCursor { part: (cursor.part + 1) % REGISTRY_PARTS, position: 0 },
            position => ReapCursor { position, ..cursor },
        };
        Ok((next, names.iter().filter_map(|name| QueueName::parse(name).ok()).collect()))
    }

    /// Drops a name from the registry when it had no keys for long enough.
    async fn forget_unless_new(&self, queue: &QueueName) -> Result<(), StoreError> {
        let since = self.shared.known(|known| *known.without_keys.entry(queue.clone()).or_insert_with(Instant::now));
        if since.elapsed() < FORGET_NAME_AFTER {
            return Ok(());
        }
        self.shared.known(|known| {
            known.without_keys.remove(queue);
            known.registered.remove(queue);
        });
        let mut remove = cmd("SREM");
        remove.arg(self.shared.keys.registry_of(queue)).arg(queue.as_str());
        self.link.run(async |connection| remove.query_async::<()>(connection).await).await?;
        // Another server may have made the queue since, and registered it before the name went.
        if self.look_once(queue, 0).await?.exists { self.register(queue).await } else { Ok(()) }
    }

    async fn held_since(&self, queue: &QueueName, held_for: Millis) -> Result<(i64, Vec<Token>), StoreError> {
        let (mut cursor, mut since) = ("0".to_owned(), None);
        let mut found: Vec<(u64, Token)> = Vec::new();
        loop {
            let call = self.call(&script::HELD, queue).arg(&cursor).arg(held_for).arg(since);
            let (next, at, part): (String, i64, Vec<Value>) = self.run(call).await?;
            for pair in part.chunks_exact(2) {
                found.push((from_value(&pair[1])?, Token(sixteen(&pair[0])?)));
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

struct Look {
    sight: Sight,
    more: bool,
    exists: bool,
}

/// A queue whose data cannot be read must not keep others from being looked at. Who uses it hears of it, and the log does
/// then; nothing here.
fn unless_broken<T>(queue: &QueueName, seen: Result<T, StoreError>) -> Result<Option<T>, StoreError> {
    match seen {
        Err(StoreError::Broken(cause)) => {
            tracing::debug!(?queue, cause, "cannot look at a queue");
            Ok(None)
        }
        other => other.map(Some),
    }
}

struct PopAnswer {
    popped: Popped,
    more: bool,
}

impl PopAnswer {
    const FIELDS_PER_TASK: usize = 7;

    fn read(answer: Vec<Value>) -> Result<Self, StoreError> {
        let [status, rest @ ..] = answer.as_slice() else { return Err(unreadable()) };
        if from_value::<u64>(status)? == 2 {
            return Err(StoreError::RequestIdReused);
        }
        let [ready, reclaimed, due_in, more, acks, Value::Array(tasks)] = rest else { return Err(unreadable()) };
        let popped = Popped {
            acks: outcomes(from_value(acks)?)?,
            tasks: tasks.chunks(Self::FIELDS_PER_TASK).map(read_leased).collect::<Result<_, _>>()?,
            ready: from_value(ready)?,
            reclaimed: from_value(reclaimed)?,
            due_in: u64::try_from(from_value::<i64>(due_in)?).ok(),
        };
        Ok(Self { popped, more: from_value(more)? })
    }
}

/// `insert.lua` puts the time of the insert behind the envelope: a protobuf tag and eight bytes, little-endian.
const INSERTED_AT_BYTES: usize = 9;

fn read_leased(fields: &[Value]) -> Result<Leased, StoreError> {
    let [token, id, envelope, deliveries, expiries, left, expires_at] = fields else { return Err(unreadable()) };
    let Value::BulkString(envelope) = envelope else { return Err(unreadable()) };
    let envelope = Bytes::copy_from_slice(envelope);
    let at = envelope.len().checked_sub(INSERTED_AT_BYTES).ok_or_else(unreadable)?;
    let inserted_at = envelope[at + 1..].try_into().map_err(|_| unreadable())?;
    Ok(Leased {
        token: Token(sixteen(token)?),
        id: TaskId(sixteen(id)?),
        inserted_at: u64::from_le_bytes(inserted_at),
        envelope: envelope.slice(..at),
        deliveries: from_value(deliveries)?,
        expiries: from_value(expiries)?,
        left: from_value(left)?,
        expires_at: from_value(expires_at)?,
    })
}

/// Ids, one behind the other.
fn task_ids(value: &Value) -> Result<Vec<TaskId>, StoreError> {
    match value {
        Value::BulkString(bytes) => Ok(bytes.as_chunks::<16>().0.iter().copied().map(TaskId).collect()),
        _ => Err(unreadable()),
    }
}

fn with_tokens(call: Call, tokens: &[Token]) -> Call {
    tokens.iter().fold(call, |call, token| call.arg(&token.0))
}

fn holder(attempt: Option<Attempt>) -> String {
    attempt.map_or_else(|| "-".to_owned(), |attempt| super::hex(&attempt.0))
}

/// As `common.lua` has them.
const APPLIED: u8 = 1;
const ALREADY_ACKED: u8 = 2;
const LEASE_LOST: u8 = 3;
const DEAD_LETTERED: u8 = 4;

fn outcomes(numbers: Vec<u8>) -> Result<Vec<Outcome>, StoreError> {
    let outcome = |number| match number {
        APPLIED => Ok(Outcome::Applied),
        ALREADY_ACKED => Ok(Outcome::AlreadyAcked),
        LEASE_LOST => Ok(Outcome::LeaseLost),
        _ => Err(unreadable()),
    };
    numbers.into_iter().map(outcome).collect()
}

fn from_value<T: FromRedisValue>(value: &Value) -> Result<T, StoreError> {
    redis::from_redis_value_ref(value).map_err(|_| unreadable())
}

fn sixteen(value: &Value) -> Result<[u8; 16], StoreError> {
    match value {
        Value::BulkString(bytes) => bytes.as_slice().try_into().map_err(|_| unreadable()),
        _ => Err(unreadable()),
    }
}

fn unreadable() -> StoreError {
    StoreError::Broken("a script's answer has another form than this server expects".to_owned())
}

#[async_trait]
impl Store for RedisStore {
    async fn insert(&self, queue: &QueueName, insert: Insert) -> Result<Inserted, StoreError> {
        self.within_timeout(async {
            self.register_before_insert(queue).await?;
            let mut call = self.call(&script::INSERT, queue);
            call = match &insert.request {
                Some(request) => call.arg(&request.id).arg(&request.fingerprint.0),
                None => call.arg("").arg(""),
            };
            call = call.arg(insert.waiting_here);
            for task in &insert.tasks {
                call = call.arg(&task.id.0).arg(task.envelope.as_ref());
            }
            let answer: Vec<Value> = self.run(call).await?;
            let [status, made, ids @ ..] = answer.as_slice() else { return Err(unreadable()) };
            let replayed = match from_value::<u64>(status)? {
                0 => false,
                1 => true,
                _ => return Err(StoreError::RequestIdReused),
            };
            if from_value(made)? {
                self.register_made(queue).await;
            }
            let ids = ids.iter().map(|id| sixteen(id).map(TaskId)).collect::<Result<_, _>>()?;
            Ok(Inserted { ids, replayed })
        })
        .await
    }

    async fn produce(&self, queue: &QueueName, produce: Produce) -> Result<Produced, StoreError> {
        self.within_timeout(async {
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
        })
        .await
    }

    async fn pop(&self, queue: &QueueName, pop: Pop) -> Result<Popped, StoreError> {
        let first = self.pop_once(queue, &pop, &pop.acks, false).await?;
        if !first.more {
            return Ok(first.popped);
        }
        // Of many leases that ran out, those held longest belong at the head, and are taken back last.
        let mut reclaimed = first.popped.reclaimed;
        for _ in 0..RECLAIM_ROUNDS {
            let look = self.look_once(queue, 0).await?;
            reclaimed += look.sight.reclaimed;
            if !look.more {
                break;
            }
        }
        let last = self.pop_once(queue, &pop, &[], true).await?;
        Ok(Popped { acks: first.popped.acks, reclaimed: reclaimed + last.popped.reclaimed, ..last.popped })
    }

    async fn ack(&self, queue: &QueueName, tokens: &[Token]) -> Result<Vec<Outcome>, StoreError> {
        self.within_timeout(async {
            let mut all = Vec::with_capacity(tokens.len());
            for step in tokens.chunks(RECLAIM_STEP) {
                all.extend(outcomes(self.run(with_tokens(self.call(&script::ACK, queue), step)).await?)?);
            }
            Ok(all)
        })
        .await
    }

    async fn heartbeat(&self, queue: &QueueName, tokens: &[Token], lease: Millis) -> Result<Beaten, StoreError> {
        self.within_timeout(async {
            let mut all = Beaten { outcomes: Vec::with_capacity(tokens.len()), earliest: None };
            for step in tokens.chunks(RECLAIM_STEP) {
                let call = with_tokens(self.call(&script::HEARTBEAT, queue).arg(lease), step);
                let (left, deadline, numbers): (i64, u64, Vec<u8>) = self.run(call).await?;
                all.outcomes.extend(outcomes(numbers)?);
                if let Ok(left) = u64::try_from(left)
                    && all.earliest.is_none_or(|(_, earliest)| deadline < earliest)
                {
                    all.earliest = Some((left, deadline));
                }
            }
            Ok(all)
        })
        .await
    }

    async fn release(&self, queue: &QueueName, release: Release) -> Result<Vec<Outcome>, StoreError> {
        let call = self.call(&script::RELEASE, queue);
        // In one step, however many: tasks that are put back together keep their order.
        let call = match &release {
            Release::PutBack(tokens) => with_tokens(call.arg("put_back").arg("").arg(call_id()?), tokens),
            Release::Unsent(tokens, attempt) => with_tokens(call.arg("unsent").arg(holder(*attempt)).arg(""), tokens),
        };
        outcomes(self.run(call).await?)
    }

    async fn withdraw(&self, queue: &QueueName, withdrawal: Withdrawal) -> Result<u64, StoreError> {
        let request = withdrawal.request.as_ref();
        self.run(
            self.call(&script::WITHDRAW, queue)
                .arg(&withdrawal.stem.0)
                .arg(withdrawal.max_tasks)
                .arg(request.map_or("", |request| &request.key.id))
                .arg(holder(request.map(|request| request.attempt))),
        )
        .await
    }

    async fn release_held(&self, queue: &QueueName, held_for: Millis) -> Result<Released, StoreError> {
        let (since, tokens) = self.held_since(queue, held_for).await?;
        let mut released = Released::default();
        for step in tokens.chunks(RECLAIM_STEP) {
            let call = self.call(&script::RELEASE, queue).arg("held").arg(since).arg(call_id()?);
            let step: Vec<u8> = self.run(with_tokens(call, step)).await?;
            let count = |wanted| step.iter().filter(|outcome| **outcome == wanted).count() as u64;
            released.put_back += count(APPLIED);
            released.dead_lettered += count(DEAD_LETTERED);
        }
        Ok(released)
    }

    async fn look(&self, queues: &[QueueName]) -> Result<Vec<Sight>, StoreError> {
        let looks = future::join_all(queues.iter().map(|queue| self.look_once(queue, ANNOUNCED_FOR))).await;
        let sight = |(queue, look)| Ok(unless_broken(queue, look)?.map(|look: Look| look.sight).unwrap_or_default());
        queues.iter().zip(looks).map(sight).collect()
    }

    async fn reap(&self, cursor: ReapCursor, budget: usize) -> Result<Reaped, StoreError> {
        let (next, names) = self.registered_in(cursor, budget).await?;
        let looks = future::join_all(names.iter().map(|queue| self.look_once(queue, 0))).await;
        let mut reaped = Reaped { visited: names.len(), reclaimed: Vec::new(), next };
        for (queue, look) in names.into_iter().zip(looks) {
            let Some(look) = unless_broken(&queue, look)? else { continue };
            if look.exists {
                self.shared.known(|known| known.without_keys.remove(&queue));
            } else {
                self.forget_unless_new(&queue).await?;
            }
            if look.sight.reclaimed > 0 {
                reaped.reclaimed.push((queue, look.sight.reclaimed));
            }
        }
        Ok(reaped)
    }

    async fn listen(&self, on_wake: OnWake) -> Result<(), StoreError> {
        let lost = |error: redis::RedisError| self.shared.presence.store_error(&error);
        let silent = |_| self.shared.presence.timed_out(self.shared.timeout, true);
        let connecting = tokio::time::timeout(self.shared.timeout, self.shared.client.get_async_pubsub());
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
            if let Some((count, queue)) = hint.split_once(' ')
                && let (Ok(count), Ok(queue)) = (count.parse(), QueueName::parse(queue))
            {
                on_wake(&queue, count);
            }
        }
    }

    async fn check(&self) -> Result<(), StoreError> {
        let mut probe = self.shared.probe.lock().await;
        let found = probe.ask(&self.shared.keys.format(), &self.shared.presence).await;
        self.shared.note(found)
    }
}

/// Names a call whose second run could not be told from another call, for as long as Redis might run it again.
fn call_id() -> Result<String, StoreError> {
    let attempt = Attempt::mint().map_err(|error| StoreError::Broken(error.to_string()))?;
    Ok(holder(Some(attempt)))
}

impl RedisStore {
    async fn counts_of(&self, queue: &QueueName) -> Result<Option<Counts>, StoreError> {
        for round in 0..=RECLAIM_ROUNDS {
            let (more, exists, ready, leased, dead, inserted, acked, age): (bool, bool, u64, u64, u64, u64, u64, i64) =
                self.run(self.call(&script::COUNTS, queue)).await?;
            if !more || round == RECLAIM_ROUNDS {
                let oldest_ready = u64::try_from(age).ok();
                return Ok(exists.then_some(Counts { ready, leased, dead, inserted, acked, oldest_ready }));
            }
        }
        Ok(None)
    }

    /// A queue that has to be left out of a list is told to the log the first time.
    fn note_left_out(&self, queue: &QueueName, counts: &Result<Option<Counts>, StoreError>) {
        let news = self.shared.known(|known| match counts {
            Err(StoreError::Broken(_)) => known.left_out.insert(queue.clone()),
            Ok(_) => {
                known.left_out.remove(queue);
                false
            }
            Err(_) => false,
        });
        if let (true, Err(StoreError::Broken(cause))) = (news, counts) {
            tracing::warn!(?queue, cause, "lists of queues leave out one whose data cannot be read");
        }
    }
}

#[async_trait]
impl Admin for RedisStore {
    async fn counts(&self, queues: &[QueueName]) -> Result<Vec<Option<Counts>>, StoreError> {
        future::join_all(queues.iter().map(|queue| self.counts_of(queue))).await.into_iter().collect()
    }

    async fn counts_in_list(&self, queues: &[QueueName]) -> Result<Vec<Option<Counts>>, StoreError> {
        let all = future::join_all(queues.iter().map(|queue| self.counts_of(queue))).await;
        let readable = |(queue, counts)| {
            self.note_left_out(queue, &counts);
            Ok(unless_broken(queue, counts)?.flatten())
        };
        queues.iter().zip(all).map(readable).collect()
    }

    async fn queues(&self, after: Option<&QueueName>, max: usize) -> Result<Vec<QueueName>, StoreError> {
        self.within_timeout(async {
            let mut first = BTreeSet::new();
            let mut cursor = ReapCursor::default();
            loop {
                let (next, names) = self.registered_in(cursor, NAMES_PER_STEP).await?;
                first.extend(names.into_iter().filter(|name| after.is_none_or(|after| name > after)));
                while first.len() > max {
                    first.pop_last();
                }
                cursor = next;
                if cursor == ReapCursor::default() {
                    return Ok(first.into_iter().collect());
                }
            }
        })
        .await
    }

    fn describe(&self) -> Description {
        match self.shared.known(|known| known.report.clone()) {
            Some(report) => Description {
                engine: format!("Redis {}", report.version),
                survives: report.survives,
                note: report.note.to_owned(),
            },
            None => Description {
                engine: "Redis".to_owned(),
                survives: Survives::ServerKill,
                note: fitness::UNKNOWN.to_owned(),
            },
        }
    }
}
