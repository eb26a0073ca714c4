//! What the scripts answer, read.

use std::vec;

use bb8_redis::redis::{self, FromRedisValue, Value};
use bytes::Bytes;

use super::{gather::PopCall, script::STEM_BYTES};
use crate::store::{
    Beaten, Cause, Insert, Inserted, Leased, Millis, Outcome, Plan, Pop, Popped, Released, Seen, Setting, Settings,
    State, StoreError, TaskId, Token,
};

/// `insert.lua` puts the time of the insert behind the envelope: a protobuf tag and eight bytes, little-endian.
const INSERTED_AT_BYTES: usize = 9;

/// What an insert did, and whether it may have made the queue.
pub(super) struct InsertAnswer {
    pub(super) inserted: Inserted,
    pub(super) made: bool,
}

/// What a pop did, or that it did nothing but ack and take back, because more leases ran out.
pub(super) struct PopAnswer {
    pub(super) popped: Popped,
    pub(super) more: bool,
    /// Of the settings; of a pop that did nothing, none.
    pub(super) generation: u64,
}

/// What is set for a queue, and what a script did about it.
pub(super) struct Changed {
    pub(super) exists: bool,
    /// More is to be measured.
    pub(super) more: bool,
    pub(super) made: bool,
    pub(super) done: Done,
    pub(super) now: Millis,
    pub(super) generation: u64,
    pub(super) spread: u8,
    pub(super) settings: Settings,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Done {
    Changed,
    OtherGeneration,
    NotEmpty,
}

/// Of each call, in order.
type Answers<A> = Result<Vec<Result<A, StoreError>>, StoreError>;

pub(super) fn unreadable() -> StoreError {
    StoreError::Broken("a script's answer has another form than this server expects".to_owned())
}

pub(super) fn from_value<T: FromRedisValue>(value: &Value) -> Result<T, StoreError> {
    redis::from_redis_value_ref(value).map_err(|_| unreadable())
}

fn array(value: Value) -> Result<Vec<Value>, StoreError> {
    match value {
        Value::Array(values) => Ok(values),
        _ => Err(unreadable()),
    }
}

pub(super) fn bytes(value: &Value) -> Result<&[u8], StoreError> {
    match value {
        Value::BulkString(bytes) => Ok(bytes),
        _ => Err(unreadable()),
    }
}

pub(super) fn sixteen(value: &Value) -> Result<[u8; 16], StoreError> {
    bytes(value)?.try_into().map_err(|_| unreadable())
}

/// The tokens under a stem, which their positions follow.
pub(super) fn tokens_under_stem(run: &[u8]) -> impl Iterator<Item = Token> {
    let (stem, positions) = run.split_at(run.len().min(STEM_BYTES));
    positions.as_chunks::<2>().0.iter().map(|position| {
        let mut token = [0; 16];
        token[..stem.len()].copy_from_slice(stem);
        token[STEM_BYTES..].copy_from_slice(position);
        Token(token)
    })
}

/// An outcome: of a lease that was extended, and whose task goes when it would go back.
const DOOMED: u8 = b'4';

fn outcome(digit: u8) -> Result<Outcome, StoreError> {
    match digit {
        b'1' | DOOMED => Ok(Outcome::Applied),
        b'2' => Ok(Outcome::AlreadyAcked),
        b'3' => Ok(Outcome::LeaseLost),
        _ => Err(unreadable()),
    }
}

/// Of these tokens those whose outcome tells that their tasks are to be deleted, each once.
pub(super) fn cancelled(tokens: &[Token], digits: &[u8]) -> Vec<Token> {
    let mut cancelled: Vec<Token> = Vec::new();
    for (token, _) in tokens.iter().zip(digits).filter(|(_, digit)| **digit == DOOMED) {
        if !cancelled.contains(token) {
            cancelled.push(*token);
        }
    }
    cancelled
}

/// Of a script that gives tasks back: what became of the tokens, and of the tasks.
pub(super) fn released(value: &Value) -> Result<(Vec<Outcome>, Released), StoreError> {
    let mut parts = bytes(value)?.split(|byte| *byte == b' ');
    let outcomes = parts.next().ok_or_else(unreadable)?.iter().copied().map(outcome).collect::<Result<_, _>>()?;
    let mut number = || {
        let digits = parts.next().and_then(|digits| std::str::from_utf8(digits).ok());
        digits.and_then(|digits| digits.parse().ok()).ok_or_else(unreadable)
    };
    Ok((outcomes, Released { put_back: number()?, ready: number()?, dead_lettered: number()? }))
}

/// Ids, one behind the other, and which of them are marked as those of tasks that others would have been duplicates of.
pub(super) fn inserted_ids(value: &Value, replayed: bool) -> Result<Inserted, StoreError> {
    const MARK: u8 = 0x10;
    let mut inserted = Inserted { replayed, ..Inserted::default() };
    for (at, id) in bytes(value)?.as_chunks::<16>().0.iter().enumerate() {
        let mut id = *id;
        if id[6] & MARK != 0 {
            id[6] -= MARK;
            inserted.duplicates.push(at);
        }
        inserted.ids.push(TaskId(id));
    }
    Ok(inserted)
}

fn setting_named(name: &[u8]) -> Option<Setting> {
    Setting::ALL.into_iter().find(|setting| setting.name().as_bytes() == name)
}

/// That a queue is full: of which setting, and what that is.
pub(super) fn queue_full(setting: &Value, max: &Value) -> Result<StoreError, StoreError> {
    let setting = setting_named(bytes(setting)?).ok_or_else(unreadable)?;
    Ok(StoreError::QueueFull(setting, from_value(max)?))
}

pub(super) fn outcomes(value: &Value) -> Result<Vec<Outcome>, StoreError> {
    bytes(value)?.iter().copied().map(outcome).collect()
}

/// The outcomes of many calls, to be given to them in order.
struct Outcomes(vec::IntoIter<Outcome>);

impl Outcomes {
    fn read(value: &Value, calls: impl Iterator<Item = usize>) -> Result<Self, StoreError> {
        let all = outcomes(value)?;
        if all.len() == calls.sum::<usize>() { Ok(Self(all.into_iter())) } else { Err(unreadable()) }
    }

    fn next(&mut self, count: usize) -> Vec<Outcome> {
        self.0.by_ref().take(count).collect()
    }
}

pub(super) fn inserts(value: Value, calls: &[Insert]) -> Answers<InsertAnswer> {
    let values = array(value)?;
    let [made, statuses @ ..] = values.as_slice() else { return Err(unreadable()) };
    if *made == Value::Int(-1) {
        return Ok(calls.iter().map(|_| Err(StoreError::Moved)).collect());
    }
    let made = from_value(made)?;
    let one = |(status, call): (&Value, &Insert)| {
        let inserted = match status {
            Value::Int(0) => Inserted {
                ids: call.tasks.iter().map(|task| task.id).collect(),
                replayed: false,
                ..Inserted::default()
            },
            Value::Int(_) => return Err(StoreError::RequestIdReused),
            Value::Array(parts) => match parts.as_slice() {
                [ids] => inserted_ids(ids, false)?,
                [setting, max] => return Err(queue_full(setting, max)?),
                _ => return Err(unreadable()),
            },
            ids => inserted_ids(ids, true)?,
        };
        Ok(InsertAnswer { inserted, made })
    };
    Ok(statuses.iter().zip(calls).map(one).collect())
}

pub(super) fn acks(value: Value, calls: &[Vec<Token>]) -> Answers<Vec<Outcome>> {
    let mut outcomes = Outcomes::read(&value, calls.iter().map(Vec::len))?;
    Ok(calls.iter().map(|tokens| Ok(outcomes.next(tokens.len()))).collect())
}

pub(super) fn heartbeats(value: Value, calls: &[Vec<Token>]) -> Answers<Beaten> {
    let values = array(value)?;
    let [outcomes, now, deadlines @ ..] = values.as_slice() else { return Err(unreadable()) };
    let now: Millis = from_value(now)?;
    let mut digits = bytes(outcomes)?;
    let mut outcomes = Outcomes::read(outcomes, calls.iter().map(Vec::len))?;
    let mut deadlines = deadlines.iter();
    let mut one = |tokens: &Vec<Token>| -> Result<Beaten, StoreError> {
        let own = digits.split_off(..tokens.len()).unwrap_or_default();
        let (outcomes, cancelled) = (outcomes.next(tokens.len()), cancelled(tokens, own));
        let extended = outcomes.iter().filter(|outcome| **outcome == Outcome::Applied).count();
        let own = deadlines.by_ref().take(extended).map(from_value::<Millis>).collect::<Result<Vec<_>, _>>()?;
        let earliest = own.into_iter().min().map(|deadline| (deadline.saturating_sub(now), deadline));
        Ok(Beaten { outcomes, earliest, cancelled })
    };
    Ok(calls.iter().map(&mut one).collect())
}

pub(super) fn pops(value: Value, calls: &[PopCall]) -> Answers<PopAnswer> {
    let mut values = array(value)?.into_iter();
    let status = values.next().ok_or_else(unreadable)?;
    let of_acks = || calls.iter().map(|call| call.pop.acks.len());
    let head: Vec<Value> = values.by_ref().take(if status == Value::Int(0) { 8 } else { 3 }).collect();
    let nothing = Popped {
        acks: Vec::new(),
        tasks: Vec::new(),
        ready: 0,
        reclaimed: 0,
        due_in: None,
        taken_over: false,
        known: false,
    };
    let all_alike = |popped: Popped, acks: &Value, more| -> Answers<PopAnswer> {
        let mut acks = Outcomes::read(acks, of_acks())?;
        // What was taken back is told once.
        let of_first = |at| if at == 0 { popped.reclaimed } else { 0 };
        let one = |(at, call): (usize, &PopCall)| {
            let acks = acks.next(call.pop.acks.len());
            let popped = Popped { acks, reclaimed: of_first(at), ..popped.clone() };
            Ok(PopAnswer { popped, more, generation: 0 })
        };
        Ok(calls.iter().enumerate().map(one).collect())
    };
    match (status, head.as_slice()) {
        (Value::Int(0), [ready, reclaimed, due_in, acks, deadline, now, known, generation]) => {
            let generation = from_value(generation)?;
            let (ready, reclaimed) = (from_value(ready)?, from_value(reclaimed)?);
            let due_in = u64::try_from(from_value::<i64>(due_in)?).ok();
            let (deadline, now): (Millis, Millis) = (from_value(deadline)?, from_value(now)?);
            let answers = all_alike(Popped { ready, reclaimed, known: from_value(known)?, ..nothing }, acks, false)?;
            let with_tasks = |((answer, call), leased): ((Result<PopAnswer, StoreError>, &PopCall), Value)| {
                let mut answer = answer?;
                answer.generation = generation;
                answer.popped.tasks = deliveries(leased, &call.pop, deadline, now)?;
                answer.popped.due_in = if answer.popped.tasks.is_empty() { due_in } else { None };
                Ok(answer)
            };
            Ok(answers.into_iter().zip(calls).zip(values).map(with_tasks).collect())
        }
        (Value::Int(1), [reclaimed, acks]) => {
            all_alike(Popped { reclaimed: from_value(reclaimed)?, ..nothing }, acks, true)
        }
        (Value::Int(2), []) => Ok(calls.iter().map(|_| Err(StoreError::RequestIdReused)).collect()),
        (Value::Int(3), [ready, reclaimed, acks]) => {
            let (ready, reclaimed) = (from_value(ready)?, from_value(reclaimed)?);
            all_alike(Popped { ready, reclaimed, taken_over: true, ..nothing }, acks, false)
        }
        _ => Err(unreadable()),
    }
}

/// What a pop was given: leased now, under its own stem and until the deadline, unless there are tokens and deadlines.
fn deliveries(value: Value, pop: &Pop, deadline: Millis, now: Millis) -> Result<Vec<Leased>, StoreError> {
    let mut values = array(value)?.into_iter();
    let head = values.next().ok_or_else(unreadable)?;
    let [ids, tries, run, deadlines] = match &head {
        Value::Array(parts) => match parts.as_slice() {
            [ids, tries, run, deadlines] => [bytes(ids)?, bytes(tries)?, bytes(run)?, bytes(deadlines)?],
            _ => return Err(unreadable()),
        },
        ids => [bytes(ids)?, &[], &[], &[]],
    };
    let (ids, tries, deadlines) = (ids.as_chunks::<16>().0, tries.as_chunks::<12>().0, deadlines.as_chunks::<8>().0);
    let held: Vec<Token> = tokens_under_stem(run).collect();
    let one = |(at, (id, envelope)): (usize, (&[u8; 16], Value))| {
        let (envelope, inserted_at) = split_envelope(envelope)?;
        let tries = tries.get(at).map_or(&[][..], |tries| tries.as_chunks::<4>().0);
        let [deliveries, failures, expiries] =
            [0, 1, 2].map(|nth| tries.get(nth).copied().map_or(0, u32::from_be_bytes));
        let expires_at = deadlines.get(at).map_or(deadline, |deadline| u64::from_be_bytes(*deadline));
        Ok(Leased {
            token: held.get(at).copied().unwrap_or_else(|| pop.stem.token(at as u16)),
            id: TaskId(*id),
            envelope,
            inserted_at,
            deliveries: deliveries + 1,
            failures,
            expiries,
            left: expires_at.saturating_sub(now),
            expires_at,
        })
    };
    ids.iter().zip(values).enumerate().map(one).collect()
}

pub(super) fn split_envelope(value: Value) -> Result<(Bytes, Millis), StoreError> {
    let Value::BulkString(envelope) = value else { return Err(unreadable()) };
    let at = envelope.len().checked_sub(INSERTED_AT_BYTES).ok_or_else(unreadable)?;
    let inserted_at = envelope[at + 1..].try_into().map_err(|_| unreadable())?;
    Ok((Bytes::from(envelope).slice(..at), u64::from_le_bytes(inserted_at)))
}

/// Of a script on settings.
pub(super) fn changed(value: Value) -> Result<Changed, StoreError> {
    let values = array(value)?;
    let [exists, more, made, done, now, pairs @ ..] = values.as_slice() else { return Err(unreadable()) };
    let done = match done {
        Value::Int(0) => Done::Changed,
        Value::Int(1) => Done::OtherGeneration,
        Value::Int(2) => Done::NotEmpty,
        _ => return Err(unreadable()),
    };
    let (exists, more, made, now) = (from_value(exists)?, from_value(more)?, from_value(made)?, from_value(now)?);
    let (mut generation, mut spread, mut settings) = (0, 1, Settings::default());
    for [name, number] in pairs.as_chunks::<2>().0 {
        match bytes(name)? {
            b"generation" => generation = from_value(number)?,
            b"spread" => spread = from_value(number)?,
            // Those of a later version are kept, and not shown.
            name => {
                if let Some(setting) = setting_named(name) {
                    settings.set(setting, Some(from_value(number)?));
                }
            }
        }
    }
    Ok(Changed { exists, more, made, done, now, generation, spread, settings })
}

/// Of a list: whether the queue exists, where the page ended, and its tasks.
pub(super) fn page(value: Value) -> Result<(bool, Vec<u8>, Vec<Value>), StoreError> {
    let mut values = array(value)?.into_iter();
    let (Some(exists), Some(next)) = (values.next(), values.next()) else { return Err(unreadable()) };
    Ok((from_value(&exists)?, bytes(&next)?.to_vec(), values.collect()))
}

/// Of tasks by id; nothing if they have to be asked for again.
pub(super) fn seen_by_id(value: Value) -> Result<Option<Vec<Option<Seen>>>, StoreError> {
    let mut values = array(value)?.into_iter();
    if values.next() != Some(Value::Int(1)) {
        return Ok(None);
    }
    let one = |value| {
        let Value::Array(parts) = value else { return Ok(None) };
        let Ok([state, task]) = <[Value; 2]>::try_from(parts) else { return Err(unreadable()) };
        let state = match state {
            Value::Int(1) => State::Ready,
            Value::Int(2) => State::Scheduled,
            Value::Int(3) => State::Leased,
            Value::Int(4) => State::Dead,
            _ => return Err(unreadable()),
        };
        seen(task, state).map(Some)
    };
    values.map(one).collect::<Result<_, _>>().map(Some)
}

/// A task as `seen.lua` tells it.
pub(super) fn seen(value: Value, state: State) -> Result<Seen, StoreError> {
    let Ok([id, at, envelope, tries, plan, cancelled]) = <[Value; 6]>::try_from(array(value)?) else {
        return Err(unreadable());
    };
    let (envelope, inserted_at) = split_envelope(envelope)?;
    let Tries { deliveries, failures, expiries, cause, last_error } = Tries::read(bytes(&tries)?)?;
    let (ends_at, plan) = read_plan(bytes(&plan)?, inserted_at)?;
    let at: i64 = from_value(&at)?;
    Ok(Seen {
        id: TaskId(sixteen(&id)?),
        state,
        at: u64::try_from(at).ok(),
        envelope,
        inserted_at,
        ends_at,
        plan,
        deliveries: deliveries + u32::from(state == State::Leased),
        failures,
        expiries,
        last_error,
        // Who wrote no cause knew but one.
        cause: (state == State::Dead).then(|| cause.unwrap_or(Cause::Expiries)),
        cancelled: from_value(&cancelled)?,
    })
}

/// What `common.lua` says of a task's tries.
#[derive(Default)]
struct Tries {
    deliveries: u32,
    failures: u32,
    expiries: u32,
    cause: Option<Cause>,
    last_error: String,
}

impl Tries {
    fn read(record: &[u8]) -> Result<Self, StoreError> {
        if record.is_empty() {
            return Ok(Self::default());
        }
        let mut parts = record.splitn(6, |byte| *byte == b' ');
        let mut number = || std::str::from_utf8(parts.next()?).ok()?.parse::<u32>().ok();
        let (Some(deliveries), Some(failures), Some(expiries)) = (number(), number(), number()) else {
            return Err(unreadable());
        };
        let tries = Self { deliveries, failures, expiries, ..Self::default() };
        // What stands there instead may be a later version's.
        let (Some(cause), Some(length)) = (number(), number()) else { return Ok(tries) };
        let said = parts.next().and_then(|said| said.get(..length as usize)).unwrap_or_default();
        let cause = match cause {
            1 => Some(Cause::Failures),
            2 => Some(Cause::Expiries),
            3 => Some(Cause::Rejected),
            _ => None,
        };
        Ok(Self { cause, last_error: String::from_utf8_lossy(said).into_owned(), ..tries })
    }
}

/// What `common.lua` says of a plan: when the task's time is over, and the plan.
fn read_plan(record: &[u8], inserted_at: Millis) -> Result<(Option<Millis>, Plan), StoreError> {
    if record.is_empty() {
        return Ok((None, Plan::default()));
    }
    let (Some((priority, rest)), Some(key)) = (record.split_first(), record.get(11..)) else {
        return Err(unreadable());
    };
    let ends_at = rest.first_chunk().map(|ends| u64::from_be_bytes(*ends)).filter(|ends| *ends > 0);
    let length = usize::from(u16::from_be_bytes([record[9], record[10]]));
    let key = length.checked_sub(1).map(|length| key.get(..length).ok_or_else(unreadable)).transpose()?;
    let unique_key = key.map(|key| String::from_utf8_lossy(key).into_owned());
    let ttl = ends_at.map(|ends| ends.saturating_sub(inserted_at));
    Ok((ends_at, Plan { priority: *priority, ttl, unique_key }))
}
