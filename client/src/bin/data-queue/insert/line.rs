//! A line of a file as a task, or what is wrong with it and where.
//!
//! What is told of a line never holds a part of a value: it ends in logs.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use data_queue_client::NewTask;
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, IgnoredAny},
};
use serde_json::value::RawValue;

use super::time;
use crate::args::span;

/// What is wrong with a line.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Wrong {
    /// In bytes, from 1 on.
    pub(super) column: usize,
    pub(super) why: String,
}

type Result<T> = std::result::Result<T, Wrong>;

/// A line that is a value, which is JSON.
pub(super) fn value(line: &[u8]) -> Result<&str> {
    let text = text(line)?;
    serde_json::from_str::<IgnoredAny>(text).map_err(|error| misread(&error))?;
    Ok(text)
}

/// A line that is a task: an object of its value and what else it has.
pub(super) fn task(line: &[u8]) -> Result<NewTask> {
    let text = text(line)?;
    let start = text.len() - text.trim_start().len();
    if !text[start..].starts_with('{') {
        let why = "a task is an object such as {\"json\": 1, \"priority\": 5}".to_owned();
        return Err(Wrong { column: start + 1, why });
    }
    let fields: Fields = serde_json::from_str(text).map_err(|error| misread(&error))?;
    fields.task(text)
}

fn text(line: &[u8]) -> Result<&str> {
    std::str::from_utf8(line)
        .map_err(|error| Wrong { column: error.valid_up_to() + 1, why: "it is not UTF-8, so it is no JSON".to_owned() })
}

fn misread(error: &serde_json::Error) -> Wrong {
    let text = error.to_string();
    let why = text.rsplit_once(" at line ").map_or(text.as_str(), |(why, _)| why);
    let why = if error.is_data() { why.to_owned() } else { format!("it is not JSON: {why}") };
    Wrong { column: error.column().max(1), why }
}

/// Each as it is written, so that what is wrong with one can be told with its name and place.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields<'a> {
    /// `null` is a value.
    #[serde(borrow, default, deserialize_with = "present")]
    json: Option<&'a RawValue>,
    #[serde(borrow)]
    text: Option<&'a RawValue>,
    #[serde(borrow)]
    data: Option<&'a RawValue>,
    #[serde(borrow)]
    headers: Option<&'a RawValue>,
    #[serde(borrow)]
    priority: Option<&'a RawValue>,
    #[serde(borrow)]
    delay: Option<&'a RawValue>,
    #[serde(borrow)]
    deliver_at: Option<&'a RawValue>,
    #[serde(borrow)]
    ttl: Option<&'a RawValue>,
    #[serde(borrow)]
    unique_key: Option<&'a RawValue>,
}

fn present<'de: 'a, 'a, D: Deserializer<'de>>(from: D) -> std::result::Result<Option<&'a RawValue>, D::Error> {
    <&RawValue>::deserialize(from).map(Some)
}

impl Fields<'_> {
    fn task(&self, line: &str) -> Result<NewTask> {
        let mut task = self.value(line)?;
        if let Some(headers) = self.headers {
            let headers: BTreeMap<String, String> = read(line, headers, "headers: it is an object of texts")?;
            task = headers.into_iter().fold(task, |task, (key, value)| task.header(key, value));
        }
        if let Some(priority) = self.priority {
            let wants = "priority: it is 0 to 9";
            match read(line, priority, wants)? {
                priority @ 0..=9 => task = task.priority(priority),
                _ => return Err(wrong(line, priority, wants)),
            }
        }
        match (self.delay, self.deliver_at) {
            (Some(_), Some(at)) => return Err(wrong(line, at, "deliver_at: there is a delay already")),
            (Some(delay), None) => task = task.delay(length(line, delay, "delay")?),
            (None, Some(at)) => task = task.deliver_at(point(line, at)?),
            (None, None) => {}
        }
        if let Some(ttl) = self.ttl {
            task = task.ttl(length(line, ttl, "ttl")?);
        }
        if let Some(key) = self.unique_key {
            task = task.unique_key(read::<String>(line, key, "unique_key: it is a text")?);
        }
        Ok(task)
    }

    fn value(&self, line: &str) -> Result<NewTask> {
        match (self.json, self.text, self.data) {
            (Some(json), None, None) => Ok(NewTask::json_text(json.get())),
            (None, Some(text), None) => Ok(NewTask::bytes(read::<String>(line, text, "text: it is a text")?)),
            (None, None, Some(data)) => {
                let wants = "data: it is base64, with its padding";
                let bytes = BASE64_STANDARD.decode(read::<String>(line, data, wants)?);
                Ok(NewTask::bytes(bytes.map_err(|_| wrong(line, data, wants))?))
            }
            _ => Err(Wrong { column: 1, why: "a task has one of json, text and data".to_owned() }),
        }
    }
}

fn length(line: &str, field: &RawValue, name: &str) -> Result<Duration> {
    let wants = format!("{name}: it is a length of time such as \"90s\" or \"2h\"");
    span(&read::<String>(line, field, &wants)?).map_err(|_| wrong(line, field, &wants))
}

fn point(line: &str, field: &RawValue) -> Result<SystemTime> {
    let wants = "deliver_at: it is a time in UTC such as \"2030-01-31T08:00:00Z\"";
    time(&read::<String>(line, field, wants)?).map_err(|_| wrong(line, field, wants))
}

fn read<T: DeserializeOwned>(line: &str, field: &RawValue, wants: &str) -> Result<T> {
    serde_json::from_str(field.get()).map_err(|_| wrong(line, field, wants))
}

fn wrong(line: &str, field: &RawValue, why: &str) -> Wrong {
    // It is a part of the line.
    let column = (field.get().as_ptr() as usize).saturating_sub(line.as_ptr() as usize) + 1;
    Wrong { column, why: why.to_owned() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn a_value_that_is_wrong_has_its_column_and_is_not_repeated() {
        assert_eq!(
            value(b" {\"n\": 12345678901234567890123, \"n\": null} "),
            Ok(" {\"n\": 12345678901234567890123, \"n\": null} ")
        );
        for (line, column) in
            [(&b"secret"[..], 1), (b"{\"a\": secret}", 7), (b"{\"a\": 1", 7), (b"1 2", 3), (b"\"\xff\"", 2), (b"", 1)]
        {
            let wrong = value(line).unwrap_err();
            assert!(wrong.column == column && !wrong.why.contains("secret"), "{line:?}: {wrong:?}");
            assert!(!wrong.why.contains(" at line "), "{wrong:?}");
        }
    }

    #[test]
    fn a_task_has_all_that_its_line_says() {
        let line = br#"{"json": {"b": 1.0, "a": 12345678901234567890123}, "headers": {"k": "v"}, "priority": 9, "delay": "90s",
            "ttl": "2h", "unique_key": "x"}"#;
        let expected = NewTask::json_text("{\"b\": 1.0, \"a\": 12345678901234567890123}").header("k", "v").priority(9);
        let expected = expected.delay(Duration::from_secs(90)).ttl(Duration::from_secs(7_200)).unique_key("x");
        assert!(task(line).unwrap() == expected);
        assert!(task(br#"{"json":null,"ttl":null}"#).unwrap() == NewTask::json_text("null"));
        assert!(task(r#"{"text":"é\n"}"#.as_bytes()).unwrap() == NewTask::bytes("é\n"));
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1);
        let timed = task(br#"{"data":"/w==","deliver_at":"1970-01-01T00:00:01Z"}"#).unwrap();
        assert!(timed == NewTask::bytes(&b"\xff"[..]).deliver_at(at));
    }

    #[test]
    fn a_task_that_is_wrong_names_the_field_and_its_column() {
        for (line, column, word) in [
            ("1", 1, "object"),
            (" [1]", 2, "object"),
            ("{}", 1, "json, text and data"),
            (r#"{"json":1,"text":"secret"}"#, 1, "json, text and data"),
            (r#"{"json":1,"prio":1}"#, 16, "prio"),
            (r#"{"json":1,"json":1}"#, 16, "duplicate"),
            (r#"{"json":1,"priority":10}"#, 22, "priority"),
            (r#"{"json":1,"priority":-1}"#, 22, "priority"),
            (r#"{"json":1,"priority":"secret"}"#, 22, "priority"),
            (r#"{"json":1,"delay":90}"#, 19, "delay"),
            (r#"{"json":1,"delay":"secret"}"#, 19, "delay"),
            (r#"{"json":1,"delay":"1s","deliver_at":"2030-01-31T08:00:00Z"}"#, 37, "delay already"),
            (r#"{"json":1,"deliver_at":"secret"}"#, 24, "deliver_at"),
            (r#"{"json":1,"ttl":"secret"}"#, 17, "ttl"),
            (r#"{"json":1,"unique_key":1}"#, 24, "unique_key"),
            (r#"{"json":1,"headers":{"k":1}}"#, 21, "headers"),
            (r#"{"text":1}"#, 9, "text"),
            (r#"{"data":"secret"}"#, 9, "data"),
            (r#"{"data":"/w"}"#, 9, "data"),
        ] {
            let wrong = task(line.as_bytes()).unwrap_err();
            assert!(wrong.column == column && wrong.why.contains(word), "{line}: {wrong:?}");
            assert!(!wrong.why.contains("secret"), "{line}: {wrong:?}");
        }
    }
}
