//! A task's content, and the envelope in which it is stored.

use std::collections::BTreeMap;

use bytes::Bytes;
use md5::{Digest, Md5};
use prost::Message;

use super::{
    error::{Error, Invalid},
    limits::{self, Span},
};
use crate::store::{Leased, Millis, NewTask as StoredTask, Plan, TaskId, Token};

/// A payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// One JSON text, kept byte for byte.
    Json(String),
    /// Bytes.
    Data(Bytes),
}

/// A task as a producer gives it.
#[derive(Clone, Debug, Default)]
pub struct NewTask {
    /// Required; unset is refused.
    pub value: Option<Value>,
    /// Text that travels along.
    pub headers: BTreeMap<String, String>,
    /// 0 to 9.
    pub priority: u32,
    /// When it can be popped, and for how long.
    pub timing: Timing,
    /// Empty: none.
    pub unique_key: String,
}

/// When a task can be popped, and for how long.
#[derive(Clone, Debug, Default)]
pub struct Timing {
    /// So long after its insert.
    pub delay: Option<Span>,
    /// At this time, counted from the Unix epoch.
    pub deliver_at: Option<Span>,
    /// So long after its insert it is gone.
    pub ttl: Option<Span>,
}

impl NewTask {
    /// Checks all but the value and the headers, and packs it. `at` is its position in the request.
    pub(super) fn stored(self, at: usize, id: TaskId) -> Result<StoredTask, Box<Invalid>> {
        let priority = limits::priority(at, self.priority)?;
        let due = limits::due(at, &self.timing)?;
        let ttl = limits::ttl(at, self.timing.ttl)?;
        let unique_key = limits::unique_key(at, self.unique_key)?;
        let value = self.value.ok_or_else(|| limits::value_missing(at))?;
        let envelope = pack(value, self.headers, priority);
        let task = StoredTask::new(id, envelope, Some(Plan { priority, ttl, unique_key }));
        Ok(StoredTask { due, ..task })
    }
}

/// A task as a worker gets it.
#[derive(Clone, Debug)]
pub struct Task {
    /// For life.
    pub id: TaskId,
    /// Of this delivery.
    pub token: Token,
    /// As inserted.
    pub value: Value,
    /// Of the value, taken at the insert.
    pub md5: [u8; 16],
    /// As inserted.
    pub headers: BTreeMap<String, String>,
    /// As inserted.
    pub priority: u8,
    /// This one included.
    pub deliveries: u32,
    /// How often its holders said that it failed.
    pub failures: u32,
    /// Leases that ran out.
    pub expiries: u32,
    /// By the store's clock.
    pub inserted_at: Millis,
    /// How much of the lease is left.
    pub left: Millis,
    /// By the store's clock.
    pub expires_at: Millis,
}

/// What is stored of a task and never changes. Field 1 belongs to the stores, which may put the time of the insert there.
#[derive(Clone, PartialEq, Message)]
struct Envelope {
    #[prost(oneof = "StoredValue", tags = "2, 3")]
    value: Option<StoredValue>,
    #[prost(bytes = "bytes", tag = "4")]
    md5: Bytes,
    #[prost(btree_map = "string, string", tag = "5")]
    headers: BTreeMap<String, String>,
    #[prost(uint32, tag = "6")]
    priority: u32,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum StoredValue {
    #[prost(string, tag = "2")]
    Json(String),
    #[prost(bytes = "bytes", tag = "3")]
    Data(Bytes),
}

/// Packs a task whose fields were checked.
pub(super) fn pack(value: Value, headers: BTreeMap<String, String>, priority: u8) -> Bytes {
    let md5 = Bytes::copy_from_slice(&md5_of(&value));
    let value = match value {
        Value::Json(text) => StoredValue::Json(text),
        Value::Data(data) => StoredValue::Data(data),
    };
    Envelope { value: Some(value), md5, headers, priority: priority.into() }.encode_to_vec().into()
}

/// Of a payload.
pub(super) fn md5_of(value: &Value) -> [u8; 16] {
    match value {
        Value::Json(text) => Md5::digest(text).into(),
        Value::Data(data) => Md5::digest(data).into(),
    }
}

/// What was inserted.
#[derive(Clone, Debug)]
pub struct Content {
    /// As inserted.
    pub value: Value,
    /// Of the value, taken at the insert.
    pub md5: [u8; 16],
    /// As inserted.
    pub headers: BTreeMap<String, String>,
    /// As inserted.
    pub priority: u8,
}

/// Reads an envelope.
pub(super) fn read(id: TaskId, envelope: &Bytes) -> Result<Content, Error> {
    let unreadable = || Error::Bug(format!("the stored task {id} cannot be read"));
    let envelope = Envelope::decode(envelope.clone()).map_err(|_| unreadable())?;
    let value = match envelope.value.ok_or_else(unreadable)? {
        StoredValue::Json(text) => Value::Json(text),
        StoredValue::Data(data) => Value::Data(data),
    };
    Ok(Content {
        value,
        md5: envelope.md5.as_ref().try_into().map_err(|_| unreadable())?,
        headers: envelope.headers,
        priority: envelope.priority.min(u8::MAX.into()) as u8,
    })
}

/// Unpacks a delivery.
pub(super) fn unpack(leased: Leased) -> Result<Task, Error> {
    let Content { value, md5, headers, priority } = read(leased.id, &leased.envelope)?;
    Ok(Task {
        id: leased.id,
        token: leased.token,
        value,
        md5,
        headers,
        priority,
        deliveries: leased.deliveries,
        failures: leased.failures,
        expiries: leased.expiries,
        inserted_at: leased.inserted_at,
        left: leased.left,
        expires_at: leased.expires_at,
    })
}
