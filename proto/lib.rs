//! The `dataqueue.v1` gRPC contract: the messages, the generated client and server, the descriptor set that
//! reflection serves, and the reasons an error can carry. No logic lives here.
//!
//! The reference is `proto/dataqueue/v1/data_queue.proto` and `queue_admin.proto` beside it; their comments are repeated on the generated types.

mod codec;

pub use codec::Codec;

/// Package `dataqueue.v1`.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod v1 {
    tonic::include_proto!("dataqueue.v1");
}

/// The encoded `FileDescriptorSet` of the contract and what it imports.
pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("descriptor_set");

/// `ErrorInfo.domain` of every refusal.
pub const ERROR_DOMAIN: &str = "dataqueue";

/// `ErrorInfo.reason`: what was wrong, for programs.
pub mod reason {
    /// `INVALID_ARGUMENT`: no tasks, no tokens, or `max_tasks` 0.
    pub const BATCH_EMPTY: &str = "BATCH_EMPTY";
    /// `INVALID_ARGUMENT`: more tasks or tokens than a call may carry; the limit is in the metadata.
    pub const BATCH_TOO_LARGE: &str = "BATCH_TOO_LARGE";
    /// `INVALID_ARGUMENT`: a message of a Consume stream is out of place, or a field of its `open` out of range.
    pub const CONSUME_INVALID: &str = "CONSUME_INVALID";
    /// `INVALID_ARGUMENT`: a delay is negative, over 366 days or malformed, or both a delay and a time are given.
    pub const DELAY_OUT_OF_RANGE: &str = "DELAY_OUT_OF_RANGE";
    /// `INVALID_ARGUMENT`: too many headers, or a key or value of a length that is not allowed.
    pub const HEADERS_INVALID: &str = "HEADERS_INVALID";
    /// `INVALID_ARGUMENT`: `held_for` is negative or malformed.
    pub const HELD_FOR_OUT_OF_RANGE: &str = "HELD_FOR_OUT_OF_RANGE";
    /// `INTERNAL`: a bug in the server.
    pub const INTERNAL: &str = "INTERNAL";
    /// `INVALID_ARGUMENT`: an interval is under 100 ms, over 1 min or malformed.
    pub const INTERVAL_OUT_OF_RANGE: &str = "INTERVAL_OUT_OF_RANGE";
    /// `FAILED_PRECONDITION`: the store is not set up for the durability that an insert asks for; nothing was done.
    pub const DURABILITY_UNSUPPORTED: &str = "DURABILITY_UNSUPPORTED";
    /// `INVALID_ARGUMENT`: the durability of an insert is none that there is.
    pub const DURABILITY_INVALID: &str = "DURABILITY_INVALID";
    /// `INVALID_ARGUMENT`: the text is not JSON, or nested too deep; the message names line and column.
    pub const JSON_INVALID: &str = "JSON_INVALID";
    /// `INVALID_ARGUMENT`: the lease is under 100 ms, over 12 h or malformed.
    pub const LEASE_OUT_OF_RANGE: &str = "LEASE_OUT_OF_RANGE";
    /// `INVALID_ARGUMENT`: a token is not 32 lower-case hex characters.
    pub const LEASE_TOKEN_INVALID: &str = "LEASE_TOKEN_INVALID";
    /// `INVALID_ARGUMENT`: a value is not the one that the MD5 beside it was taken of.
    pub const MD5_MISMATCH: &str = "MD5_MISMATCH";
    /// `RESOURCE_EXHAUSTED`: the request is larger than the server reads.
    pub const MESSAGE_TOO_LARGE: &str = "MESSAGE_TOO_LARGE";
    /// `RESOURCE_EXHAUSTED`: more calls wait for the store than the server keeps; nothing was done, and a retry helps.
    pub const OVERLOADED: &str = "OVERLOADED";
    /// `INVALID_ARGUMENT`: the page's size is negative.
    pub const PAGE_SIZE_OUT_OF_RANGE: &str = "PAGE_SIZE_OUT_OF_RANGE";
    /// `INVALID_ARGUMENT`: the page's token is not one that a list gave.
    pub const PAGE_TOKEN_INVALID: &str = "PAGE_TOKEN_INVALID";
    /// `INVALID_ARGUMENT`: a priority is over 9.
    pub const PRIORITY_OUT_OF_RANGE: &str = "PRIORITY_OUT_OF_RANGE";
    /// `INVALID_ARGUMENT`: a message of a Produce stream is out of place, or its producer id or number not right.
    pub const PRODUCE_INVALID: &str = "PRODUCE_INVALID";
    /// `INVALID_ARGUMENT`: neither tokens nor `held_for`.
    pub const PUTBACK_SELECTION_MISSING: &str = "PUTBACK_SELECTION_MISSING";
    /// `RESOURCE_EXHAUSTED`: the queue is at its limit, which is in the metadata; what is in it can be popped and acked.
    pub const QUEUE_FULL: &str = "QUEUE_FULL";
    /// `FAILED_PRECONDITION`: the queue has tasks.
    pub const QUEUE_NOT_EMPTY: &str = "QUEUE_NOT_EMPTY";
    /// `INVALID_ARGUMENT`: the queue's name is empty, too long or has a character that is not allowed.
    pub const QUEUE_NAME_INVALID: &str = "QUEUE_NAME_INVALID";
    /// `NOT_FOUND`: there is no queue of this name.
    pub const QUEUE_NOT_FOUND: &str = "QUEUE_NOT_FOUND";
    /// `INVALID_ARGUMENT`: the text that says why a task is put back is longer than 1,024 bytes.
    pub const REASON_TOO_LONG: &str = "REASON_TOO_LONG";
    /// `INVALID_ARGUMENT`: neither ids nor `max_tasks`.
    pub const REDRIVE_SELECTION_MISSING: &str = "REDRIVE_SELECTION_MISSING";
    /// `INVALID_ARGUMENT`: the request id is longer than 128 bytes.
    pub const REQUEST_ID_INVALID: &str = "REQUEST_ID_INVALID";
    /// `ALREADY_EXISTS`: the request id was used before, with other content.
    pub const REQUEST_ID_REUSED: &str = "REQUEST_ID_REUSED";
    /// `ABORTED`: another Consume stream has taken over the session of this one.
    pub const SESSION_TAKEN_OVER: &str = "SESSION_TAKEN_OVER";
    /// `UNAVAILABLE`: the store has lost its data, or is another one, and nobody has said that this is right.
    pub const DATASET_RESET: &str = "DATASET_RESET";
    /// `INVALID_ARGUMENT`: a setting of a queue is out of its range.
    pub const SETTING_OUT_OF_RANGE: &str = "SETTING_OUT_OF_RANGE";
    /// `UNAVAILABLE`: the server is stopping; another one, or this one later, will serve.
    pub const SHUTTING_DOWN: &str = "SHUTTING_DOWN";
    /// `RESOURCE_EXHAUSTED`: the store has no room for more; what is in it can be popped and acked.
    pub const STORE_FULL: &str = "STORE_FULL";
    /// `UNAVAILABLE`: the store cannot be reached or is not fit to serve; the message says why.
    pub const STORE_UNAVAILABLE: &str = "STORE_UNAVAILABLE";
    /// `INVALID_ARGUMENT`: an id is not one that an insert gave.
    pub const TASK_ID_INVALID: &str = "TASK_ID_INVALID";
    /// `NOT_FOUND`: there is no such task in the queue.
    pub const TASK_NOT_FOUND: &str = "TASK_NOT_FOUND";
    /// `INVALID_ARGUMENT`: no state of tasks, or one that is unknown.
    pub const TASK_STATE_INVALID: &str = "TASK_STATE_INVALID";
    /// `INVALID_ARGUMENT`: a time is malformed or before 1970.
    pub const TIME_INVALID: &str = "TIME_INVALID";
    /// `INVALID_ARGUMENT`: the `grpc-timeout` header cannot be read.
    pub const TIMEOUT_INVALID: &str = "TIMEOUT_INVALID";
    /// `INVALID_ARGUMENT`: a time to live is negative, over 366 days or malformed.
    pub const TTL_OUT_OF_RANGE: &str = "TTL_OUT_OF_RANGE";
    /// `INVALID_ARGUMENT`: a unique key is longer than 128 bytes.
    pub const UNIQUE_KEY_INVALID: &str = "UNIQUE_KEY_INVALID";
    /// `INVALID_ARGUMENT`: the unique keys of an insert's tasks belong to different shards of the queue.
    pub const UNIQUE_KEYS_APART: &str = "UNIQUE_KEYS_APART";
    /// `INVALID_ARGUMENT`: the mask is empty, or names what is no setting.
    pub const UPDATE_MASK_INVALID: &str = "UPDATE_MASK_INVALID";
    /// `INVALID_ARGUMENT`: a task without a value.
    pub const VALUE_MISSING: &str = "VALUE_MISSING";
    /// `INVALID_ARGUMENT`: a value is larger than the limit, which is in the metadata.
    pub const VALUE_TOO_LARGE: &str = "VALUE_TOO_LARGE";
    /// `INVALID_ARGUMENT`: the wait is negative, over 60 s or malformed.
    pub const WAIT_OUT_OF_RANGE: &str = "WAIT_OUT_OF_RANGE";
}
