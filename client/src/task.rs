//! What goes into a queue and what comes out.

use std::{
    collections::BTreeMap,
    fmt,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use data_queue_proto::v1::{self, new_task, task};
use md5::{Digest, Md5};
use serde::{Serialize, de::DeserializeOwned};

use crate::{Error, ErrorKind, Result, client::duration};

/// A task to insert: a value, JSON or bytes, and headers.
#[derive(Clone, PartialEq)]
pub struct NewTask(v1::NewTask);

impl NewTask {
    /// A task whose value is `value` as JSON.
    ///
    /// # Errors
    /// [`ErrorKind::Json`] if `value` cannot be written as JSON.
    pub fn json<T: Serialize + ?Sized>(value: &T) -> Result<Self> {
        let text = serde_json::to_string(value).map_err(|cause| Error::json("the value of a new task", &cause))?;
        Ok(Self::json_text(text))
    }

    /// A task whose value is this JSON text. It is delivered byte for byte as given; the server refuses what is not JSON.
    #[must_use]
    pub fn json_text(text: impl Into<String>) -> Self {
        Self::of(new_task::Value::Json(text.into()))
    }

    /// A task whose value is these bytes.
    #[must_use]
    pub fn bytes(data: impl Into<Bytes>) -> Self {
        Self::of(new_task::Value::Data(data.into()))
    }

    /// Adds a header: text that travels with the task.
    #[must_use]
    pub fn header(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.0.headers.insert(key.into(), value.into());
        self
    }

    /// 0 to 9: a task of a higher priority is delivered before any of a lower one. 0 unless set.
    #[must_use]
    pub fn priority(mut self, priority: u32) -> Self {
        self.0.priority = priority;
        self
    }

    /// It can be popped so long after its insert, and joins the tail of the queue then. At most 366 days.
    #[must_use]
    pub fn delay(mut self, delay: Duration) -> Self {
        self.0.delay = Some(duration(delay));
        self
    }

    /// It can be popped from this time on, by the store's clock, and joins the tail of the queue then. Not together with a delay;
    /// at most 366 days from now, and a time in the past is now.
    #[must_use]
    pub fn deliver_at(mut self, time: SystemTime) -> Self {
        self.0.deliver_at = Some(time.into());
        self
    }

    /// So long after its insert it is gone, unless it is held then; at most 366 days. Zero: never.
    #[must_use]
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.0.ttl = Some(duration(ttl));
        self
    }

    /// While a task with this key is in the queue, ready, scheduled or held, this one is not inserted. At most 128 bytes.
    #[must_use]
    pub fn unique_key(mut self, key: impl Into<String>) -> Self {
        self.0.unique_key = key.into();
        self
    }

    fn of(value: new_task::Value) -> Self {
        Self(v1::NewTask { value: Some(value), ..v1::NewTask::default() })
    }

    pub(crate) fn into_message(self) -> v1::NewTask {
        self.0
    }
}

impl fmt::Debug for NewTask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewTask").finish_non_exhaustive()
    }
}

/// A task that was popped, held under its lease. Its value was checked against its md5.
#[derive(Clone, PartialEq)]
pub struct Task {
    message: v1::Task,
}

impl Task {
    /// Takes a task as it came, if its value is whole.
    pub(crate) fn receive(message: v1::Task) -> Result<Self> {
        if is_whole(&message) { Ok(Self { message }) } else { Err(Error::about_task(ErrorKind::Corrupt, &message.id)) }
    }

    /// Names the task for life.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.message.id
    }

    /// The queue it was popped from.
    #[must_use]
    pub fn queue(&self) -> &str {
        &self.message.queue
    }

    /// The proof of this delivery, for ack, heartbeat and putback.
    #[must_use]
    pub fn lease_token(&self) -> &str {
        &self.message.lease_token
    }

    /// The value as it was inserted, if it is JSON.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        match &self.message.value {
            Some(task::Value::Json(text)) => Some(text),
            _ => None,
        }
    }

    /// The value as it was inserted, JSON or bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.message.value.as_ref().map_or(&[], as_bytes)
    }

    /// The value, read from JSON.
    ///
    /// # Errors
    /// [`ErrorKind::Json`] if the value is bytes, or does not fit `T`.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T> {
        let text = self.text().ok_or_else(|| Error::not_json(self.id()))?;
        serde_json::from_str(text).map_err(|cause| Error::json(&format!("the value of task {}", self.id()), &cause))
    }

    /// The headers, as they were inserted.
    #[must_use]
    pub fn headers(&self) -> &BTreeMap<String, String> {
        &self.message.headers
    }

    /// How often the task was delivered, this time included.
    #[must_use]
    pub fn deliveries(&self) -> u32 {
        self.message.deliveries
    }

    /// How often its holders said that it failed.
    #[must_use]
    pub fn failures(&self) -> u32 {
        self.message.failures
    }

    /// Its priority, 0 to 9.
    #[must_use]
    pub fn priority(&self) -> u32 {
        self.message.priority
    }

    /// How often a lease of the task ran out.
    #[must_use]
    pub fn expiries(&self) -> u32 {
        self.message.expiries
    }

    /// When it was inserted, by the store's clock.
    #[must_use]
    pub fn inserted_at(&self) -> Option<SystemTime> {
        self.message.inserted_at.and_then(|at| SystemTime::try_from(at).ok())
    }

    /// How much of the lease was left as the answer left the store. Schedule heartbeats by this.
    #[must_use]
    pub fn lease(&self) -> Duration {
        self.message.lease.and_then(|lease| Duration::try_from(lease).ok()).unwrap_or_default()
    }
}

impl fmt::Debug for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { message } = self;
        f.debug_struct("Task").field("id", &message.id).field("queue", &message.queue).finish_non_exhaustive()
    }
}

/// Whether the value is the one that was inserted.
pub(crate) fn is_whole(message: &v1::Task) -> bool {
    message.value.as_ref().is_some_and(|value| md5_hex(as_bytes(value)) == message.md5)
}

fn as_bytes(value: &task::Value) -> &[u8] {
    match value {
        task::Value::Json(text) => text.as_bytes(),
        task::Value::Data(data) => data,
    }
}

fn md5_hex(bytes: &[u8]) -> String {
    hex(&Md5::digest(bytes))
}

/// Lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let digit = |nibble: u8| char::from(b"0123456789abcdef"[usize::from(nibble)]);
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        text.push(digit(byte >> 4));
        text.push(digit(byte & 15));
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn message(value: Option<task::Value>, md5: &str) -> v1::Task {
        v1::Task {
            id: "id-1".into(),
            queue: "q".into(),
            lease_token: "secret-token".into(),
            md5: md5.into(),
            value,
            ..v1::Task::default()
        }
    }

    fn json(text: &str) -> Task {
        Task::receive(message(Some(task::Value::Json(text.into())), &md5_hex(text.as_bytes()))).unwrap()
    }

    #[test]
    fn md5_is_lower_case_hex() {
        assert_eq!(md5_hex(b""), "d41d8cd98f00b204e9800998ecf8427e");
        assert_eq!(md5_hex(b"abc"), "900150983cd24fb0d6963f7d28e17f72");
    }

    #[test]
    fn a_damaged_task_is_refused_by_id_without_its_value() {
        let value = || Some(task::Value::Data(Bytes::from_static(b"abc")));
        assert_eq!(Task::receive(message(value(), "900150983cd24fb0d6963f7d28e17f72")).unwrap().bytes(), b"abc");
        for damaged in [
            message(value(), "900150983cd24fb0d6963f7d28e17f73"),
            message(value(), ""),
            message(None, "d41d8cd98f00b204e9800998ecf8427e"),
        ] {
            let error = Task::receive(damaged).unwrap_err();
            assert_eq!((error.kind(), error.task_id()), (ErrorKind::Corrupt, Some("id-1")));
            assert!(!error.to_string().contains("abc"));
        }
    }

    #[test]
    fn json_goes_in_and_out() {
        let text = NewTask::json(&(1, "a")).unwrap().header("k", "v").into_message();
        assert_eq!(text.value, Some(new_task::Value::Json("[1,\"a\"]".into())));
        assert_eq!(text.headers.get("k").map(String::as_str), Some("v"));

        let task = json("[1, \"a\"]");
        assert_eq!(task.json::<(u8, String)>().unwrap(), (1, "a".into()));
        assert_eq!((task.text(), task.bytes()), (Some("[1, \"a\"]"), b"[1, \"a\"]".as_slice()));
        assert_eq!(task.json::<u32>().unwrap_err().kind(), ErrorKind::Json);
    }

    #[test]
    fn neither_value_nor_token_is_printed() {
        let task = json("\"hush\"");
        let text = format!("{task:?} {:?} {}", NewTask::json_text("\"hush\""), task.json::<u32>().unwrap_err());
        assert!(text.contains("id-1") && !text.contains("hush") && !text.contains("secret"), "{text}");
    }
}
