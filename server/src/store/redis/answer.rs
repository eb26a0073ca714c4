//! What the scripts answer, read.

use std::vec;

use bb8_redis::redis::{self, FromRedisValue, Value};
use bytes::Bytes;

use super::{gather::PopCall, script::STEM_BYTES};
use crate::store::{
    Beaten, Insert, Inserted, Leased, Millis, Outcome, Pop, Popped, Released, Setting, StoreError, TaskId, Token,
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

/// That a queue is full: of which setting, and what that is.
pub(super) fn queue_full(setting: &Value, max: &Value) -> Result<StoreError, StoreError> {
    let name = bytes(setting)?;
    let setting = Setting::ALL.into_iter().find(|setting| setting.name().as_bytes() == name).ok_or_else(unreadable)?;
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
    let head: Vec<Value> = values.by_ref().take(if status == Value::Int(0) { 7 } else { 3 }).collect();
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
            Ok(PopAnswer { popped: Popped { acks, reclaimed: of_first(at), ..popped.clone() }, more })
        };
        Ok(calls.iter().enumerate().map(one).collect())
    };
    match (status, head.as_slice()) {
        (Value::Int(0), [ready, reclaimed, due_in, acks, deadline, now, known]) => {
            let (ready, reclaimed) = (from_value(ready)?, from_value(reclaimed)?);
            let due_in = u64::try_from(from_value::<i64>(due_in)?).ok();
            let (deadline, now): (Millis, Millis) = (from_value(deadline)?, from_value(now)?);
            let answers = all_alike(Popped { ready, reclaimed, known: from_value(known)?, ..nothing }, acks, false)?;
            let with_tasks = |((answer, call), leased): ((Result<PopAnswer, StoreError>, &PopCall), Value)| {
                let mut answer = answer?;
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
