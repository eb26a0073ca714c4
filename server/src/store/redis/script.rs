//! The scripts, and one call of one of them.

use std::sync::LazyLock;

use bb8_redis::redis::{
    Arg, Cmd, ErrorKind, Pipeline, RedisError, Script, ServerErrorKind, ToRedisArgs, Value, aio::MultiplexedConnection,
    cmd,
};

use super::{ANNOUNCED_FOR, gather::PopCall, keys::Keys, link::Ask};
use crate::store::{
    Attempt, Cause, Due, Durability, Insert, MAX_PRIORITY, Millis, NewTask, NumberedInsert, Past, PopRequest,
    RECLAIM_STEP, Rules, Shard, TaskId, Token, hex,
};

const COMMON: &str = include_str!("../../../lua/common.lua");

/// What only some queues have: functions that make what is needed when it is.
const RARE: [&str; 3] = [
    include_str!("../../../lua/lines.lua"),
    include_str!("../../../lua/sizes.lua"),
    include_str!("../../../lua/rare.lua"),
];

// Only the tests can be built with a clock that is not Redis' own.
#[cfg(not(test))]
const PRELUDE: &str = include_str!("../../../lua/prelude.lua");
#[cfg(test)]
const PRELUDE: &str = include_str!("../../../lua/prelude_test.lua");

/// In a cluster, what comes next.
const GUARD: &str = include_str!("../../../lua/guard.lua");

/// A script is what all share, what it needs beside, and its own file. What it does not need would cost it time.
macro_rules! scripts {
    ($($name:ident = $($file:literal)+;)*) => {$(
        pub(super) static $name: LazyLock<Sources> = LazyLock::new(|| {
            let [lines, sizes, rare] = RARE;
            Sources::new(&[COMMON, lines, sizes, rare, $(include_str!(concat!("../../../lua/", $file))),+])
        });
    )*};
}

scripts! {
    INSERT = "gate.lua" "insert.lua";
    PRODUCE = "gate.lua" "produce.lua";
    POP = "leases.lua" "heads.lua" "sessions.lua" "calls.lua" "pop.lua";
    ACK = "leases.lua" "ack.lua";
    HEARTBEAT = "leases.lua" "parts.lua" "heartbeat.lua";
    RELEASE = "leases.lua" "parts.lua" "heads.lua" "calls.lua" "release.lua";
    WITHDRAW = "leases.lua" "parts.lua" "heads.lua" "calls.lua" "withdraw.lua";
    HELD = "leases.lua" "held.lua";
    SESSION = "leases.lua" "parts.lua" "sessions.lua" "calls.lua" "session.lua";
    LOOK = "leases.lua" "heads.lua" "look.lua";
    COUNTS = "leases.lua" "heads.lua" "counts.lua";
    CHANGE = "change.lua";
    LIST = "leases.lua" "heads.lua" "seen.lua" "list.lua";
    TASKS = "leases.lua" "calls.lua" "where.lua" "seen.lua" "tasks.lua";
    DELETE = "leases.lua" "calls.lua" "where.lua" "delete.lua";
    REDRIVE = "leases.lua" "heads.lua" "calls.lua" "redrive.lua";
    PURGE = "leases.lua" "heads.lua" "calls.lua" "purge.lua";
    DROP = "sessions.lua" "calls.lua" "drop.lua";
}

/// How many spent stems a pop may name.
pub(super) const SPENT_MAX: usize = 1_000;

/// What nearly every call has room in, so that its keys and numbers are not moved again and again while it is put together.
const ARGS: usize = 32;
const ARGS_BYTES: usize = 1_024;

/// Of the 16 bytes of a token.
pub(super) const STEM_BYTES: usize = 14;

/// As `insert.lua` has it.
pub(super) fn insert<'a>(mut call: Call, shard: Shard, inserts: impl Iterator<Item = &'a Insert> + Clone) -> Call {
    // They are the same pops, whichever insert tells of them.
    let waiting = inserts.clone().map(|insert| insert.waiting_here).max().unwrap_or(0);
    call = call.arg(waiting_and_generation(waiting, shard));
    call = call.arg(inserts.clone().flat_map(|insert| count(&insert.tasks)).collect::<Vec<u8>>());
    let requests = inserts.clone().zip(1_usize..).filter_map(|(insert, at)| Some((at, insert.request.as_ref()?)));
    call = call.arg(requests.clone().count());
    call = requests.fold(call, |call, (at, request)| call.arg(at).arg(&request.id).arg(&request.fingerprint.0));
    call.tasks(inserts.flat_map(|insert| &insert.tasks))
}

pub(super) fn waiting_and_generation(waiting: usize, shard: Shard) -> String {
    format!("{waiting} {}", shard.generation)
}

/// As `produce.lua` has it.
pub(super) fn produce<'a>(call: Call, inserts: impl Iterator<Item = &'a NumberedInsert> + Clone) -> Call {
    let mut heads = Vec::new();
    for NumberedInsert { number, fingerprint, tasks } in inserts.clone() {
        heads.extend(number.to_be_bytes());
        heads.extend(fingerprint.0);
        heads.extend(count(tasks));
    }
    call.arg(heads).tasks(inserts.flat_map(|insert| &insert.tasks))
}

/// What `gate.lua` reads of the tasks that have more than an envelope.
fn extras<'a>(tasks: impl Iterator<Item = &'a NewTask>) -> Vec<u8> {
    let mut packed = Vec::new();
    for (number, task) in (1_u32..).zip(tasks) {
        if task.due.is_none() && task.plan.is_none() && task.past.is_none() {
            continue;
        }
        let (bits, due) = match task.due {
            None => (0, 0),
            Some(Due::In(span)) => (1, span),
            Some(Due::At(time)) => (2, time),
        };
        let plan = task.plan.as_deref().cloned().unwrap_or_default();
        let key = plan.unique_key.as_deref().unwrap_or_default();
        packed.extend(number.to_be_bytes());
        let has_past = u8::from(task.past.is_some()) << 4;
        packed.push(bits | u8::from(plan.ttl.is_some()) << 2 | u8::from(plan.unique_key.is_some()) << 3 | has_past);
        packed.extend(due.to_be_bytes());
        packed.push(plan.priority.min(MAX_PRIORITY));
        packed.extend(plan.ttl.unwrap_or_default().to_be_bytes());
        packed.extend(u16::try_from(key.len()).unwrap_or(u16::MAX).to_be_bytes());
        packed.extend(key.as_bytes());
        if let Some(past) = &task.past {
            pack_past(past, &mut packed);
        }
    }
    packed
}

fn pack_past(past: &Past, packed: &mut Vec<u8>) {
    let Past { inserted_at, deliveries, failures, expiries, last_error, death } = past;
    let (died_at, cause) = match death {
        None => (0, 0),
        Some((died_at, Cause::Failures)) => (*died_at, 1),
        Some((died_at, Cause::Expiries)) => (*died_at, 2),
        Some((died_at, Cause::Rejected)) => (*died_at, 3),
    };
    packed.extend(inserted_at.to_be_bytes());
    [deliveries, failures, expiries].iter().for_each(|count| packed.extend(count.to_be_bytes()));
    packed.push(cause);
    packed.extend(died_at.to_be_bytes());
    packed.extend(u16::try_from(last_error.len()).unwrap_or(u16::MAX).to_be_bytes());
    packed.extend(last_error.as_bytes());
}

/// As scripts read it: the caller's lease, or the one that the queue's settings may change.
pub(super) fn lease(said: Option<Millis>, rules: &Rules) -> String {
    said.map_or_else(|| format!("?{}", rules.lease), |lease| lease.to_string())
}

/// How many there are; an insert has at most a thousand.
fn count(tasks: &[NewTask]) -> [u8; 2] {
    u16::try_from(tasks.len()).unwrap_or(u16::MAX).to_be_bytes()
}

/// As `pop.lua` has it. Of several pops, the first tells what they have in common.
pub(super) fn pop<'a>(mut call: Call, pops: impl Iterator<Item = &'a PopCall> + Clone, rules: &Rules) -> Call {
    if let Some(PopCall { pop, anyway }) = pops.clone().next() {
        call = call.arg(pop.max_bytes).arg(lease(pop.lease, rules)).arg(if pop.will_wait { ANNOUNCED_FOR } else { 0 });
        call = call.arg(u8::from(*anyway)).arg(pops.clone().count());
        call = match &pop.request {
            Some(PopRequest { key, attempt }) => call.arg(&key.id).arg(&key.fingerprint.0).arg(holder(Some(*attempt))),
            None => call.arg("").arg("").arg(holder(None)),
        };
        call = match &pop.consumer {
            Some(consumer) => {
                let spent = &pop.spent[..pop.spent.len().min(SPENT_MAX)];
                let call = call.arg(&consumer.session.0).arg(&consumer.stream.0).arg(spent.len());
                spent.iter().fold(call, |call, stem| call.arg(&stem.0))
            }
            None => call.arg("").arg("").arg(0),
        };
    }
    for PopCall { pop, .. } in pops.clone() {
        let mut wanted = pop.stem.0.to_vec();
        wanted.push(u8::try_from(pop.max_tasks.min(RECLAIM_STEP)).unwrap_or(u8::MAX));
        call = call.arg(wanted);
    }
    call.tokens(pops.flat_map(|call| &call.pop.acks))
}

/// A try, as the scripts keep it.
pub(super) fn holder(attempt: Option<Attempt>) -> String {
    attempt.map_or_else(|| "-".to_owned(), |attempt| hex(&attempt.0))
}

/// Whether a position is the next one behind a range.
fn follows(first: [u8; 2], length: u8, position: [u8; 2]) -> bool {
    let next = u16::from_be_bytes(first).checked_add(length.into());
    length < u8::MAX && next == Some(u16::from_be_bytes(position))
}

/// The script did not run.
pub(super) fn is_unknown_script(error: &RedisError) -> bool {
    error.kind() == ErrorKind::Server(ServerErrorKind::NoScript)
}

/// A script, and the hash under which Redis knows it once it has run.
pub(super) struct Source {
    code: String,
    hash: String,
}

/// A script in its two forms.
pub(super) struct Sources {
    one: Source,
    cluster: Source,
}

impl Sources {
    fn new(parts: &[&str]) -> Self {
        let code = parts.join("\n");
        Self {
            cluster: Source::new(format!("{PRELUDE}\n{GUARD}\n{code}")),
            one: Source::new(format!("{PRELUDE}\n{code}")),
        }
    }
}

impl Source {
    fn new(code: String) -> Self {
        let hash = Script::new(&code).get_hash().to_owned();
        Self { code, hash }
    }
}

/// A call of a script: its key is given, its arguments are added.
#[derive(Clone)]
pub(super) struct Call {
    source: &'static Source,
    slot: u16,
    command: Cmd,
    durability: Durability,
}

impl Call {
    pub(super) fn new(sources: &'static Sources, is_cluster: bool, meta: &str) -> Self {
        let (source, slot) = if is_cluster { (&sources.cluster, Keys::slot(meta)) } else { (&sources.one, 0) };
        let mut command = Cmd::with_capacity(ARGS, ARGS_BYTES);
        command.arg("EVALSHA").arg(&source.hash).arg(1).arg(meta);
        Self { source, slot, command, durability: Durability::Accepted }
    }

    /// It is an insert that is to reach this.
    pub(super) fn reaching(self, durability: Durability) -> Self {
        Self { durability, ..self }
    }

    pub(super) fn durability(&self) -> Durability {
        self.durability
    }

    pub(super) fn arg(mut self, arg: impl ToRedisArgs) -> Self {
        self.command.arg(arg);
        self
    }

    /// The ids of all, one behind the other, in one argument, then their envelopes; then what some have beside.
    fn tasks<'a>(self, tasks: impl Iterator<Item = &'a NewTask> + Clone) -> Self {
        let call = self.ids(tasks.clone().map(|task| &task.id));
        let call = tasks.clone().fold(call, |call, task| call.arg(task.envelope.as_ref()));
        let extras = extras(tasks);
        if extras.is_empty() { call } else { call.arg(extras) }
    }

    /// One behind the other, in one argument.
    pub(super) fn ids<'a>(self, ids: impl IntoIterator<Item = &'a TaskId>) -> Self {
        self.arg(ids.into_iter().flat_map(|id| id.0).collect::<Vec<u8>>())
    }

    /// In runs: a stem, and of the tokens under it that follow each other the ranges of positions, as `common.lua` has them.
    pub(super) fn tokens<'a>(mut self, tokens: impl IntoIterator<Item = &'a Token>) -> Self {
        let mut run: Vec<u8> = Vec::new();
        for Token([stem @ .., high, low]) in tokens {
            let position = [*high, *low];
            if run.get(..STEM_BYTES) != Some(stem.as_slice()) {
                if !run.is_empty() {
                    self.command.arg(&run);
                }
                run.clear();
                run.extend_from_slice(stem);
            }
            match run.get_mut(STEM_BYTES..) {
                Some([.., first, second, length]) if follows([*first, *second], *length, position) => *length += 1,
                _ => run.extend([*high, *low, 1]),
            }
        }
        if !run.is_empty() {
            self.command.arg(&run);
        }
        self
    }

    fn whole(&self) -> Cmd {
        let mut command = cmd("EVAL");
        command.arg(&self.source.code);
        for arg in self.command.args_iter().skip(2) {
            if let Arg::Simple(bytes) = arg {
                command.arg(bytes);
            }
        }
        command
    }
}

/// A script that Redis does not know did not run: it is sent whole then, in one step with its run, for Redis might forget it again
/// in between.
impl Ask for Call {
    type Answer = Value;

    fn slot(&self) -> u16 {
        self.slot
    }

    async fn send(&self, wire: &mut MultiplexedConnection) -> Result<Value, RedisError> {
        match self.command.query_async(wire).await {
            Err(error) if is_unknown_script(&error) => self.whole().query_async(wire).await,
            other => other,
        }
    }
}

/// Several that one node has, in one write, and all of their answers: when the connection breaks, none of them is known to have run. Nor
/// did those that answer that their script is not known.
pub(super) struct Together(pub(super) Vec<Call>);

impl Ask for Together {
    type Answer = Vec<Result<Value, RedisError>>;

    fn slot(&self) -> u16 {
        self.0.first().map_or(0, |call| call.slot)
    }

    async fn send(&self, wire: &mut MultiplexedConnection) -> Result<Self::Answer, RedisError> {
        let mut pipeline = Pipeline::with_capacity(self.0.len());
        for call in &self.0 {
            pipeline.add_command(call.command.clone());
        }
        pipeline.ignore_errors().query_async(wire).await
    }
}

/// Inserts that one node has, in one write with what waits for them to reach a durability. That is about all that was written on the same
/// connection before.
pub(super) struct Hardened {
    pub(super) calls: Vec<Call>,
    pub(super) durability: Durability,
    /// Replicas that are known to be online.
    pub(super) replicas: usize,
    /// For how long to wait, in ms.
    pub(super) patience: Millis,
    /// The node syncs before it answers.
    pub(super) is_synced: bool,
}

impl Hardened {
    async fn write(
        &self,
        commands: Vec<Cmd>,
        wire: &mut MultiplexedConnection,
    ) -> Result<(Vec<Result<Value, RedisError>>, Durability), RedisError> {
        let (mut pipeline, count) = (Pipeline::with_capacity(commands.len() + 2), commands.len());
        commands.into_iter().for_each(|command| {
            pipeline.add_command(command);
        });
        match self.durability {
            Durability::Replicated => {
                pipeline.cmd("WAIT").arg(self.replicas).arg(self.patience).cmd("ROLE");
            }
            Durability::Fsynced if !self.is_synced => {
                pipeline.cmd("WAITAOF").arg(1).arg(0).arg(self.patience);
            }
            Durability::Fsynced | Durability::Accepted => {}
        }
        let mut answers: Vec<Result<Value, RedisError>> = pipeline.ignore_errors().query_async(wire).await?;
        let told = answers.split_off(count.min(answers.len()));
        let told: Vec<Value> = told.into_iter().flatten().collect();
        let least = if self.is_synced { Durability::Fsynced } else { Durability::Accepted };
        let reached = match (self.durability, told.as_slice()) {
            (Durability::Replicated, [Value::Int(reached), role]) if is_all(*reached, role) => Durability::Replicated,
            (Durability::Fsynced, [Value::Array(reached)]) if matches!(reached.first(), Some(Value::Int(1..))) => {
                Durability::Fsynced
            }
            _ => least.min(self.durability),
        };
        Ok((answers, reached))
    }
}

/// Whether so many are all replicas that a master lists, and one at least.
fn is_all(reached: i64, role: &Value) -> bool {
    match role {
        Value::Array(role) => {
            matches!(role.get(2), Some(Value::Array(replicas)) if reached >= 1 && replicas.len() as i64 <= reached)
        }
        _ => false,
    }
}

impl Ask for Hardened {
    type Answer = (Vec<Result<Value, RedisError>>, Durability);

    fn slot(&self) -> u16 {
        self.calls.first().map_or(0, |call| call.slot)
    }

    fn blocks(&self) -> bool {
        true
    }

    async fn send(&self, wire: &mut MultiplexedConnection) -> Result<Self::Answer, RedisError> {
        let commands = self.calls.iter().map(|call| call.command.clone()).collect();
        let (mut answers, mut reached) = self.write(commands, wire).await?;
        let unknown = |answer: &Result<Value, RedisError>| matches!(answer, Err(error) if is_unknown_script(error));
        let again: Vec<usize> = (0..answers.len()).filter(|at| unknown(&answers[*at])).collect();
        if !again.is_empty() {
            let whole = again.iter().map(|at| self.calls[*at].whole()).collect();
            let (others, reached_then) = self.write(whole, wire).await?;
            again.into_iter().zip(others).for_each(|(at, answer)| answers[at] = answer);
            reached = reached.min(reached_then);
        }
        // One that is alone may belong elsewhere.
        match <[_; 1]>::try_from(answers) {
            Ok([Err(error)]) => Err(error),
            Ok(answer) => Ok((answer.into(), reached)),
            Err(answers) => Ok((answers, reached)),
        }
    }
}
