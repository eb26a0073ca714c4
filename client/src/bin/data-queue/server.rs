//! How a server is reached: the generated clients over connections of their own, and what went wrong, in one line.

use std::time::Duration;

use data_queue_client::{Client, Error};
use data_queue_proto::v1::{data_queue_client::DataQueueClient, queue_admin_client::QueueAdminClient};
use tonic::{
    Request, Status,
    transport::{Channel, Endpoint},
};

use crate::Stop;

/// How long opening a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a connection with running calls is probed, and how long an answer may take.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));
/// How long a call may take.
pub(crate) const CALL_DEADLINE: Duration = Duration::from_secs(30);
/// The largest answer that is read: 1,000 tasks of 1 MiB do not come in one.
const MAX_ANSWER_BYTES: usize = 64 << 20;

pub(crate) type Queues = DataQueueClient<Channel>;
pub(crate) type Admin = QueueAdminClient<Channel>;

/// A server, by its address.
pub(crate) struct Server {
    endpoint: Endpoint,
    address: String,
}

impl Server {
    /// Only the address is looked at, so far.
    pub(crate) fn new(address: &str) -> Result<Self, Stop> {
        // The library says what an address is. Its client is not used: it repeats calls, which must be seen here.
        Client::connect(address).map_err(|error| Stop::usage(format!("--addr: {error}")))?;
        let authority = address.split_once("://").map_or(address, |(_, rest)| rest.trim_end_matches('/'));
        let endpoint = Endpoint::from_shared(format!("http://{authority}"));
        let endpoint = endpoint.map_err(|error| Stop::usage(format!("--addr: {error}")))?;
        let endpoint = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEPALIVE.0)
            .keep_alive_timeout(KEEPALIVE.1);
        Ok(Self { endpoint, address: authority.to_owned() })
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// A connection, once it is open.
    pub(crate) async fn connect(&self) -> Result<Channel, Stop> {
        self.endpoint.connect().await.map_err(|error| {
            let root = root(&error);
            Stop::failed(format!("cannot reach a server at {}: {root}", self.address))
        })
    }
}

pub(crate) fn queues(channel: Channel) -> Queues {
    DataQueueClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES)
}

/// A call that ends in any case: a server that hangs is noticed.
pub(crate) fn timed<M>(message: M) -> Request<M> {
    let mut request = Request::new(message);
    request.set_timeout(CALL_DEADLINE);
    request
}

/// What a status means, in one line.
pub(crate) fn explain(status: Status) -> String {
    Error::from(status).to_string()
}

/// The cause at the bottom says most.
fn root(error: &dyn std::error::Error) -> String {
    let mut deepest = error;
    while let Some(next) = deepest.source() {
        deepest = next;
    }
    deepest.to_string()
}
