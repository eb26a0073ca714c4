//! How a client is set up.

use std::{sync::Arc, time::Duration};

use tonic::transport::Endpoint;

use super::{Client, LONGEST, operators, queues};
#[cfg(doc)]
use crate::ErrorKind;
use crate::{Durability, Error, Result, address, retry::Budget};

/// How long a call may take in all, unless set.
const DEADLINE: Duration = Duration::from_secs(30);
/// How long opening a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a connection with running calls is probed, and how long an answer may take.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));
/// How many repeats all clones together may make before answers have to earn new ones, unless set.
const RETRY_BUDGET: u32 = 500;

/// How a client is set up.
#[derive(Clone, Debug)]
#[must_use]
pub struct Builder {
    deadline: Duration,
    connect_timeout: Duration,
    retry_budget: u32,
}

impl Builder {
    pub(super) fn new() -> Self {
        Self { deadline: DEADLINE, connect_timeout: CONNECT_TIMEOUT, retry_budget: RETRY_BUDGET }
    }

    /// How long a call may take in all, with its repeats; a pop may also take its wait. Default: 30 s.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline.min(LONGEST);
        self
    }

    /// How long opening a connection may take. Default: 5 s.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout.min(LONGEST);
        self
    }

    /// How many repeats the client and its clones may make together before they have to be earned, one by ten answers.
    /// 0: calls are never repeated. Default: 500.
    pub fn retry_budget(mut self, repeats: u32) -> Self {
        self.retry_budget = repeats;
        self
    }

    /// Makes the client, within a tokio runtime. It connects with the first call, and anew whenever a connection broke.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if the address is not `host:port` or `http://host:port`; [`ErrorKind::Internal`]
    /// outside a tokio runtime.
    pub fn connect(self, address: &str) -> Result<Client> {
        let uri = address::uri(address)?;
        tokio::runtime::Handle::try_current()
            .map_err(|cause| Error::internal("a client needs a tokio runtime").caused(cause))?;
        let endpoint = Endpoint::from_shared(uri)
            .map_err(|_| Error::invalid_argument("the host of the address is malformed", "address"))?
            .connect_timeout(self.connect_timeout)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEPALIVE.0)
            .keep_alive_timeout(KEEPALIVE.1);
        let channel = endpoint.connect_lazy();
        let (grpc, admin) = (queues(channel.clone()), operators(channel));
        let (budget, durability) = (Arc::new(Budget::new(self.retry_budget)), Durability::default());
        Ok(Client { grpc, admin, endpoint, budget, deadline: self.deadline, durability })
    }
}
