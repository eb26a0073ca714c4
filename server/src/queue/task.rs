//! A task's content, and the envelope in which it is stored.

use std::collections::BTreeMap;

use bytes::Bytes;
use md5::{Digest, Md5};
use prost::Message;

use super::error::Error;
use crate::store::{Leased, Millis, TaskId, Token};

/// A payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// One JSON text, kept byte for byte.
    Json(String),
    /// Bytes.
    Data(Bytes),
}

/// A task as a producer gives it.
#[derive(Clone, Debug)]
pub struct NewTask {
    /// Required; unset is refused.
    pub value: Option<Value>,
    /// Text that travels along.
    pub headers: BTreeMap<String, String>,
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
    /// This one included.
    pub deliveries: u32,
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
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum StoredValue {
    #[prost(string, tag = "2")]
    Json(String),
    #[prost(bytes = "bytes", tag = "3")]
    Data(Bytes),
}

/// Packs a task whose fields were checked.
pub(super) fn pack(value: Value, headers: BTreeMap<String, String>) -> Bytes {
    let (md5, value) = match value {
        Value::Json(text) => (Md5::digest(&text), StoredValue::Json(text)),
        Value::Data(data) => (Md5::digest(&data), StoredValue::Data(data)),
    };
    Envelope { value: Some(value), md5: Bytes::copy_from_slice(&md5), headers }.encode_to_vec().into()
}

/// Unpacks a delivery.
pub(super) fn unpack(leased: Leased) -> Result<Task, Error> {
    let unreadable = || Error::Bug(format!("the stored task {} cannot be read", leased.id));
    let envelope = Envelope::decode(leased.envelope.clone()).map_err(|_| unreadable())?;
    let value = match envelope.value.ok_or_else(unreadable)? {
        StoredValue::Json(text) => Value::Json(text),
        StoredValue::Data(data) => Value::Data(data),
    };
    Ok(Task {
        id: leased.id,
        token: leased.token,
        value,
        md5: envelope.md5.as_ref().try_into().map_err(|_| unreadable())?,
        headers: envelope.headers,
        deliveries: leased.deliveries,
        expiries: leased.expiries,
        inserted_at: leased.inserted_at,
        left: leased.left,
        expires_at: leased.expires_at,
    })
}
