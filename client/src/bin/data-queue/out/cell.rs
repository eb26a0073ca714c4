//! One thing that is told, as text in one line or as JSON.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    time::{Duration, SystemTime},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use data_queue_client::TaskValue;
use serde_json::json;

/// One thing that is told of a task or a queue.
#[derive(Clone, Debug)]
pub(crate) enum Cell {
    Nothing,
    Text(String),
    Number(u64),
    Rate(f64),
    Flag(bool),
    /// A word if it is so, and nothing otherwise, in lines not even a column: for the last one.
    Mark(&'static str, bool),
    Time(SystemTime),
    /// To be read back as it is written. Its name in JSON tells the unit, also when there is none.
    Span(Option<Duration>),
    /// For people to the second.
    Age(Option<Duration>),
    Map(BTreeMap<String, String>),
    Value(TaskValue),
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        if text.is_empty() { Self::Nothing } else { Self::Text(text) }
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

impl From<u64> for Cell {
    fn from(number: u64) -> Self {
        Self::Number(number)
    }
}

impl From<u32> for Cell {
    fn from(number: u32) -> Self {
        Self::Number(number.into())
    }
}

impl From<bool> for Cell {
    fn from(flag: bool) -> Self {
        Self::Flag(flag)
    }
}

impl From<SystemTime> for Cell {
    fn from(time: SystemTime) -> Self {
        Self::Time(time)
    }
}

impl From<BTreeMap<String, String>> for Cell {
    fn from(map: BTreeMap<String, String>) -> Self {
        Self::Map(map)
    }
}

impl<T: Into<Cell>> From<Option<T>> for Cell {
    fn from(cell: Option<T>) -> Self {
        cell.map_or(Self::Nothing, Into::into)
    }
}

impl Cell {
    /// In one line, without anything that a terminal would take for a command. Times are exact where programs read them.
    pub(super) fn text(&self, is_exact: bool) -> String {
        match self {
            Self::Nothing | Self::Span(None) | Self::Age(None) => "-".to_owned(),
            Self::Text(text) => escaped(text.as_bytes()),
            Self::Number(number) => number.to_string(),
            Self::Rate(rate) => format!("{rate:.1}"),
            Self::Mark(word, flag) => if *flag { *word } else { "" }.to_owned(),
            Self::Flag(flag) => if *flag { "yes" } else { "no" }.to_owned(),
            Self::Time(time) => rfc3339(*time, is_exact),
            Self::Age(Some(age)) if !is_exact && age.as_secs() > 0 => {
                humantime::format_duration(Duration::from_secs(age.as_secs())).to_string()
            }
            Self::Span(Some(span)) | Self::Age(Some(span)) => humantime::format_duration(*span).to_string(),
            Self::Map(map) if map.is_empty() => "-".to_owned(),
            Self::Map(map) => json_line(&json!(map).to_string()),
            Self::Value(TaskValue::Json(text)) => json_line(text),
            Self::Value(TaskValue::Bytes(data)) => escaped(data),
        }
    }

    pub(super) fn json(&self) -> String {
        match self {
            Self::Nothing => json!(null).to_string(),
            Self::Text(text) => json_line(&json!(text).to_string()),
            Self::Number(number) => number.to_string(),
            Self::Rate(rate) => json!(rate).to_string(),
            Self::Flag(flag) | Self::Mark(_, flag) => flag.to_string(),
            Self::Time(time) => json!(rfc3339(*time, true)).to_string(),
            Self::Span(span) | Self::Age(span) => json!(span.map(|span| span.as_secs_f64())).to_string(),
            Self::Map(map) => json_line(&json!(map).to_string()),
            // As it was inserted: numbers of any size, and keys in their order.
            Self::Value(TaskValue::Json(text)) => json_line(text),
            Self::Value(TaskValue::Bytes(data)) => format!("\"{}\"", BASE64_STANDARD.encode(data)),
        }
    }

    pub(super) fn is_number(&self) -> bool {
        matches!(self, Self::Number(_) | Self::Rate(_) | Self::Age(_))
    }
}

/// Text in one line: backslashes doubled, tabs, line ends and what is no text as escapes.
fn escaped(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            match character {
                '\\' => text.push_str("\\\\"),
                '\t' => text.push_str("\\t"),
                '\n' => text.push_str("\\n"),
                '\r' => text.push_str("\\r"),
                control if control.is_control() => {
                    let mut bytes = [0; 4];
                    control.encode_utf8(&mut bytes).bytes().for_each(|byte| push_byte(&mut text, byte));
                }
                other => text.push(other),
            }
        }
        chunk.invalid().iter().for_each(|byte| push_byte(&mut text, *byte));
    }
    text
}

fn push_byte(text: &mut String, byte: u8) {
    // Writing to a String does not fail.
    let _ = write!(text, "\\x{byte:02x}");
}

/// The same JSON in one line. Between its parts white space does not matter, and within strings there are no line ends.
fn json_line(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for character in json.chars() {
        match character {
            '\t' | '\n' | '\r' => text.push(' '),
            control if control.is_control() => {
                let _ = write!(text, "\\u{:04x}", u32::from(control));
            }
            other => text.push(other),
        }
    }
    text
}

fn rfc3339(time: SystemTime, is_exact: bool) -> String {
    let mut text = String::new();
    let written = if is_exact {
        write!(text, "{}", humantime::format_rfc3339_millis(time))
    } else {
        write!(text, "{}", humantime::format_rfc3339_seconds(time))
    };
    // It knows no years beyond 9999.
    if written.is_ok() { text } else { "-".to_owned() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn what_is_written_holds_no_tab_line_end_or_command_to_a_terminal() {
        assert_eq!(escaped(b"a\tb\nc\\d\x1b[2J\xff"), "a\\tb\\nc\\\\d\\x1b[2J\\xff");
        assert_eq!(escaped("\u{9b}é".as_bytes()), "\\xc2\\x9bé");
        assert_eq!(json_line("{\n\t\"a\": \"\u{9b}\u{7f}\"\r\n}"), "{  \"a\": \"\\u009b\\u007f\"  }");
    }

    #[test]
    fn a_time_that_cannot_be_written_is_no_panic() {
        let far = SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 40);
        assert_eq!(rfc3339(far, true), "-");
        assert_eq!(rfc3339(SystemTime::UNIX_EPOCH, true), "1970-01-01T00:00:00.000Z");
    }
}
