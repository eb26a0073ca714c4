//! What a request may ask for. Every limit has a name, a unit and one place where it is checked.

use std::{collections::BTreeMap, time::Duration};

use data_queue_proto::{reason, v1};
use serde::de::IgnoredAny;

use super::{
    error::Invalid,
    task::{Timing, Value},
};
use crate::store::{Clock, Due, Durability, MAX_PRIORITY, Millis, QueueName, SystemClock, TaskId, Token};

/// The most tasks of an insert, and the most tokens of a call.
pub const MAX_BATCH: usize = 1_000;
/// The most tasks of a PopBatch.
pub const MAX_POP_BATCH: u32 = 10_000;
/// The shortest lease.
pub const MIN_LEASE: Duration = Duration::from_millis(100);
/// The longest lease.
pub const MAX_LEASE: Duration = Duration::from_secs(12 * 60 * 60);
/// The longest wait of a pop.
pub const MAX_WAIT: Duration = Duration::from_secs(60);
/// The longest request id, in bytes.
pub(super) const MAX_REQUEST_ID: usize = 128;
/// The most headers of a task.
pub(super) const MAX_HEADERS: usize = 64;
/// The longest key and the longest value of a header, in bytes.
pub(super) const MAX_HEADER_BYTES: usize = 1_024;
/// The longest delay, and the longest time to live.
pub const MAX_DELAY: Duration = Duration::from_secs(366 * 24 * 60 * 60);
/// The longest unique key, in bytes.
pub(super) const MAX_UNIQUE_KEY: usize = 128;
/// The longest text that says why a task is given back, in bytes.
pub(super) const MAX_REASON: usize = 1_024;
/// How deep JSON may be nested.
pub(super) const MAX_JSON_DEPTH: usize = 128;

/// The limits that are settings.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The largest value, in bytes.
    pub max_value: usize,
    /// The lease where neither a request nor the queue's settings say.
    pub default_lease: Duration,
    /// When a stream of deliveries is old, more or less.
    pub max_stream_age: Duration,
    /// How long the server may take to stop.
    pub grace: Duration,
}

type Checked<T> = Result<T, Box<Invalid>>;

/// A span as a request gives it: nanoseconds of any sign, or nothing if its parts contradict each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span(pub Option<i128>);

impl std::fmt::Display for Span {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Some(nanos) = self.0 else { return f.write_str("no duration") };
        let sign = if nanos < 0 { "-" } else { "" };
        let (seconds, nanos) = (nanos.unsigned_abs() / 1_000_000_000, nanos.unsigned_abs() % 1_000_000_000);
        let fraction = format!("{nanos:09}");
        match fraction.trim_end_matches('0') {
            "" => write!(f, "{sign}{seconds}s"),
            fraction => write!(f, "{sign}{seconds}.{fraction}s"),
        }
    }
}

impl Span {
    /// Milliseconds within bounds; parts of one count as a whole one.
    pub(super) fn millis(self, min: Duration, max: Option<Duration>) -> Option<Millis> {
        let nanos = u128::try_from(self.0?).ok()?;
        if nanos < min.as_nanos() || max.is_some_and(|max| nanos > max.as_nanos()) {
            return None;
        }
        // The largest span that a request can write is 2^63 seconds; more than a century is as good as a century.
        Some(nanos.div_ceil(1_000_000).min(100 * 366 * 86_400_000) as Millis)
    }
}

pub(super) fn queue(name: &str) -> Checked<QueueName> {
    QueueName::parse(name).map_err(|error| Invalid::new("queue", reason::QUEUE_NAME_INVALID, error.to_string()))
}

/// By its number in the contract.
pub(super) fn durability(field: &str, number: i32) -> Result<Durability, Box<Invalid>> {
    match v1::Durability::try_from(number) {
        Ok(v1::Durability::Unspecified | v1::Durability::Accepted) => Ok(Durability::Accepted),
        Ok(v1::Durability::Fsynced) => Ok(Durability::Fsynced),
        Ok(v1::Durability::Replicated) => Ok(Durability::Replicated),
        Err(_) => {
            let message = format!("is {number}, which is none; ACCEPTED, FSYNCED and REPLICATED are allowed");
            Err(Invalid::new(field, reason::DURABILITY_INVALID, message))
        }
    }
}

pub(super) fn request_id(id: &str) -> Checked<()> {
    if id.len() <= MAX_REQUEST_ID {
        return Ok(());
    }
    let message = format!("has {} bytes; at most {MAX_REQUEST_ID} are allowed", id.len());
    Err(Invalid::new("request_id", reason::REQUEST_ID_INVALID, message).with_limit(MAX_REQUEST_ID))
}

/// A batch's length: `what` are tasks or tokens.
pub(super) fn batch(field: &str, length: usize, max: usize, what: &str) -> Checked<()> {
    if length == 0 {
        return Err(Invalid::new(
            field,
            reason::BATCH_EMPTY,
            format!("is empty; at least one of the {what} is needed"),
        ));
    }
    at_most(field, length, max, what)
}

/// The length of a PopBatch, which is a number and not a list.
pub(super) fn max_tasks(given: u32) -> Checked<()> {
    let allowed = format!("1 to {MAX_POP_BATCH} are allowed");
    match given {
        0 => Err(Invalid::new("max_tasks", reason::BATCH_EMPTY, format!("is 0 or unset; {allowed}"))),
        1..=MAX_POP_BATCH => Ok(()),
        _ => {
            let message = format!("is {given}; {allowed}");
            Err(Invalid::new("max_tasks", reason::BATCH_TOO_LARGE, message).with_limit(MAX_POP_BATCH))
        }
    }
}

pub(super) fn at_most(field: &str, length: usize, max: usize, what: &str) -> Checked<()> {
    if length > max {
        let message = format!("has {length} {what}; at most {max} are allowed");
        return Err(Invalid::new(field, reason::BATCH_TOO_LARGE, message).with_limit(max));
    }
    Ok(())
}

pub(super) fn tokens(field: &str, texts: &[String]) -> Checked<Vec<Token>> {
    let parse = |(at, text): (usize, &String)| {
        let refuse = |error: crate::store::TokenError| {
            Invalid::new(format!("{field}[{at}]"), reason::LEASE_TOKEN_INVALID, error.to_string())
        };
        Token::parse(text).map_err(refuse)
    };
    texts.iter().enumerate().map(parse).collect()
}

pub(super) fn wait(span: Option<Span>) -> Checked<Duration> {
    let Some(span) = span else { return Ok(Duration::ZERO) };
    let millis = span.millis(Duration::ZERO, Some(MAX_WAIT)).ok_or_else(|| {
        Invalid::new("wait", reason::WAIT_OUT_OF_RANGE, format!("is {span}; 0s to {}s are allowed", MAX_WAIT.as_secs()))
    })?;
    Ok(Duration::from_millis(millis))
}

pub(super) fn held_for(span: Span) -> Checked<Millis> {
    span.millis(Duration::ZERO, None).ok_or_else(|| {
        Invalid::new("held_for", reason::HELD_FOR_OUT_OF_RANGE, format!("is {span}; it must be 0s or more"))
    })
}

/// Nothing: as the queue's settings say.
pub(super) fn lease(span: Option<Span>) -> Checked<Option<Millis>> {
    let Some(span) = span else { return Ok(None) };
    let refuse = || {
        let (min, max) = (humantime::format_duration(MIN_LEASE), humantime::format_duration(MAX_LEASE));
        let message = format!("is {span}; {min} to {max} are allowed, and unset is the default");
        Invalid::new("lease", reason::LEASE_OUT_OF_RANGE, message)
    };
    Ok(Some(span.millis(MIN_LEASE, Some(MAX_LEASE)).ok_or_else(refuse)?))
}

/// In how long something is to be done, or what the field of that name says.
pub(super) fn delay(field: &str, span: Option<Span>) -> Checked<Option<Millis>> {
    let Some(span) = span else { return Ok(None) };
    let refuse = || {
        let message = format!("is {span}; 0s to 366 days are allowed");
        Invalid::new(field, reason::DELAY_OUT_OF_RANGE, message)
    };
    Ok(Some(span.millis(Duration::ZERO, Some(MAX_DELAY)).ok_or_else(refuse)?))
}

/// When the task at a position can be popped. Nothing: at once.
pub(super) fn due(at: usize, timing: &Timing) -> Checked<Option<Due>> {
    let field = |name: &str| format!("tasks[{at}].{name}");
    let Some(time) = timing.deliver_at else {
        return Ok(delay(&field("delay"), timing.delay)?.filter(|span| *span > 0).map(Due::In));
    };
    if timing.delay.is_some() {
        let message = "is set, and so is delay; one of them is allowed";
        return Err(Invalid::new(field("deliver_at"), reason::DELAY_OUT_OF_RANGE, message));
    }
    let at = moment(&field("deliver_at"), reason::DELAY_OUT_OF_RANGE, time)?;
    Ok((at > 0).then_some(Due::At(at)))
}

/// A time not too far from now; 0 if it is long ago.
pub(super) fn moment(field: &str, why: &'static str, time: Span) -> Checked<Millis> {
    let invalid = |message: &str| Err(Invalid::new(field, why, message));
    match time.0 {
        None => invalid("is no time"),
        Some(nanos) if nanos <= 0 => Ok(0),
        // By this machine's clock, which the store's may differ from a little.
        Some(_) => {
            match time.millis(Duration::ZERO, Some(Duration::from_millis(SystemClock::default().now()) + MAX_DELAY)) {
                Some(millis) => Ok(millis),
                None => invalid("is more than 366 days from now"),
            }
        }
    }
}

/// A time that has passed: one that has not is now, and so is one that is not given.
pub(super) fn past_moment(field: &str, time: Option<Span>, now: Millis) -> Checked<Millis> {
    let Some(time) = time else { return Ok(now) };
    match time.millis(Duration::ZERO, None) {
        Some(millis) => Ok(millis.min(now)),
        None => Err(Invalid::new(field, reason::TIME_INVALID, "is no time, or before 1970")),
    }
}

/// How long after its insert the task at a position is gone. Nothing: never.
pub(super) fn ttl(at: usize, span: Option<Span>) -> Checked<Option<Millis>> {
    let Some(span) = span else { return Ok(None) };
    let refuse = || {
        let message = format!("is {span}; 0s, which is none, to 366 days are allowed");
        Invalid::new(format!("tasks[{at}].ttl"), reason::TTL_OUT_OF_RANGE, message)
    };
    Ok(Some(span.millis(Duration::ZERO, Some(MAX_DELAY)).ok_or_else(refuse)?).filter(|ttl| *ttl > 0))
}

/// The priority of the task at a position.
pub(super) fn priority(at: usize, given: u32) -> Checked<u8> {
    if given <= u32::from(MAX_PRIORITY) {
        return Ok(given as u8);
    }
    let message = format!("is {given}; 0 to {MAX_PRIORITY} are allowed");
    Err(Invalid::new(format!("tasks[{at}].priority"), reason::PRIORITY_OUT_OF_RANGE, message).with_limit(MAX_PRIORITY))
}

/// The unique key of the task at a position. Nothing: none.
pub(super) fn unique_key(at: usize, key: String) -> Checked<Option<String>> {
    if key.len() <= MAX_UNIQUE_KEY {
        return Ok(Some(key).filter(|key| !key.is_empty()));
    }
    let message = format!("has {} bytes; at most {MAX_UNIQUE_KEY} are allowed", key.len());
    let field = format!("tasks[{at}].unique_key");
    Err(Invalid::new(field, reason::UNIQUE_KEY_INVALID, message).with_limit(MAX_UNIQUE_KEY))
}

/// The task at a position has no value.
pub(super) fn value_missing(at: usize) -> Box<Invalid> {
    Invalid::new(format!("tasks[{at}].value"), reason::VALUE_MISSING, "neither json nor data is set")
}

/// An id that an insert gave.
pub(super) fn task_id(field: &str, text: &str) -> Checked<TaskId> {
    let refuse =
        || Invalid::new(field, reason::TASK_ID_INVALID, "is not a task's id: 36 characters, as an insert gave them");
    TaskId::parse(text).ok_or_else(refuse)
}

/// Why a task is given back.
pub(super) fn reason_text(field: &str, text: &str) -> Checked<()> {
    if text.len() <= MAX_REASON {
        return Ok(());
    }
    let message = format!("has {} bytes; at most {MAX_REASON} are allowed", text.len());
    Err(Invalid::new(field, reason::REASON_TOO_LONG, message).with_limit(MAX_REASON))
}

impl Limits {
    /// When a new stream will be old: a tenth more or less, so that those that were opened together do not end together.
    pub(super) fn stream_age(&self) -> Duration {
        let random = getrandom::u32().unwrap_or(u32::MAX / 2);
        self.max_stream_age.mul_f64(0.9 + 0.2 * f64::from(random) / f64::from(u32::MAX))
    }

    /// Checks the value of the task at a position.
    pub(super) fn value(&self, at: usize, value: Option<&Value>) -> Checked<()> {
        let Some(value) = value else { return Err(value_missing(at)) };
        let (kind, bytes) = match value {
            Value::Json(text) => ("json", text.as_bytes()),
            Value::Data(data) => ("data", data.as_ref()),
        };
        if bytes.len() > self.max_value {
            let message = format!("has {} bytes; at most {} are allowed", bytes.len(), self.max_value);
            let field = format!("tasks[{at}].{kind}");
            return Err(Invalid::new(field, reason::VALUE_TOO_LARGE, message).with_limit(self.max_value));
        }
        match value {
            Value::Json(text) => check_json(text)
                .map_err(|message| Invalid::new(format!("tasks[{at}].json"), reason::JSON_INVALID, message)),
            Value::Data(_) => Ok(()),
        }
    }
}

/// Checks the headers of the task at a position.
pub(super) fn headers(at: usize, headers: &BTreeMap<String, String>) -> Checked<()> {
    let invalid = |message| Err(Invalid::new(format!("tasks[{at}].headers"), reason::HEADERS_INVALID, message));
    if headers.len() > MAX_HEADERS {
        return invalid(format!("has {} entries; at most {MAX_HEADERS} are allowed", headers.len()));
    }
    if headers.contains_key("") {
        return invalid("has an empty key".to_owned());
    }
    if headers.iter().any(|(key, value)| key.len().max(value.len()) > MAX_HEADER_BYTES) {
        return invalid(format!("has a key or value of more than {MAX_HEADER_BYTES} bytes"));
    }
    Ok(())
}

/// Well-formed, and not nested too deep. The text itself is kept, so nothing is parsed into values that could lose some
/// of it: 1e400, repeated keys and lone surrogates pass.
fn check_json(text: &str) -> Result<(), String> {
    // serde_json skips over values without recursion, so the depth is no danger to the stack; it is counted here.
    serde_json::from_str::<IgnoredAny>(text).map_err(|error| format!("is not JSON: {error}"))?;
    let opens = |b: &&u8| matches!(b, b'[' | b'{');
    if text.as_bytes().iter().filter(opens).count() <= MAX_JSON_DEPTH {
        return Ok(());
    }
    match too_deep_at(text.as_bytes()) {
        Some((line, column)) => {
            Err(format!("is nested more than {MAX_JSON_DEPTH} deep at line {line} column {column}"))
        }
        None => Ok(()),
    }
}

/// Where well-formed JSON is nested too deep.
fn too_deep_at(text: &[u8]) -> Option<(usize, usize)> {
    let (mut depth, mut line, mut line_start) = (0_usize, 1, 0);
    let (mut in_string, mut escaped) = (false, false);
    for (at, byte) in text.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'\n' => (line, line_start) = (line + 1, at + 1),
            b'[' | b'{' if depth == MAX_JSON_DEPTH => return Some((line, at - line_start + 1)),
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth -= 1,
            _ => {}
        }
    }
    None
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn json_is_checked_but_never_changed_or_narrowed() {
        for good in
            ["null", "0", "\"\"", "[]", "{\"a\":1,\"a\":2}", "1e400", "9223372036854775808", "\"\\ud800\"", " \n1\t"]
        {
            check_json(good).unwrap();
        }
        for bad in ["", "{\"a\":", "nul", "{\"a\":1} x", "NaN", "'a'", "[1,]", "\"\u{1}\"", "01", "\u{feff}1"] {
            let message = check_json(bad).unwrap_err();
            assert!(message.contains("line 1 column"), "{bad:?}: {message}");
        }
    }

    #[test]
    fn json_may_be_nested_128_deep_and_no_deeper() {
        let nested = |depth| "[".repeat(depth) + &"]".repeat(depth);
        check_json(&nested(128)).unwrap();
        assert_eq!(check_json(&nested(129)).unwrap_err(), "is nested more than 128 deep at line 1 column 129");
        assert!(check_json(&nested(100_000)).is_err());
        check_json(&format!("[{}1]", "[],".repeat(1_000))).unwrap();
        check_json(&format!("\"{}\"", "[".repeat(1_000))).unwrap();
        check_json(&format!("[\"\\\"{}\", \"\\\\\"]", "{".repeat(1_000))).unwrap();
    }

    #[test]
    fn spans_have_bounds_and_never_overflow() {
        let span = |nanos: i128| Span(Some(nanos));
        assert_eq!(lease(None).unwrap(), None);
        assert_eq!(lease(Some(span(100_000_000))).unwrap(), Some(100));
        assert_eq!(lease(Some(span(100_000_001))).unwrap(), Some(101));
        assert_eq!(lease(Some(span(43_200_000_000_000))).unwrap(), Some(43_200_000));
        for bad in [span(99_999_999), span(43_200_000_000_001), span(-1), span(i128::MAX), Span(None)] {
            lease(Some(bad)).unwrap_err();
        }
        assert_eq!(
            [span(-1_500_000_000), span(60), Span(None)].map(|span| span.to_string()),
            ["-1.5s", "0.00000006s", "no duration"]
        );
        assert_eq!(wait(None).unwrap(), Duration::ZERO);
        wait(Some(span(60_000_000_001))).unwrap_err();
        held_for(span(-1)).unwrap_err();
        assert_eq!(held_for(span(i128::MAX)).unwrap(), 100 * 366 * 86_400_000);
    }
}
