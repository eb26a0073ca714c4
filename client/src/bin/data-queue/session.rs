//! What a verb works with: a client, and a place for its results.

use std::time::Duration;

use data_queue_client::{Admin, Client, Error, ErrorKind, Page, Paged};
use data_queue_proto::reason;

use crate::{Stop, args::Common, out::Out};

/// How long a call may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a call may take that goes through a whole queue.
const LONG_PATIENCE: Duration = Duration::from_secs(60 * 60);
/// A call is repeated so often: enough for a connection that breaks. A server that is away is told at once.
const REPEATS: u32 = 3;

pub(crate) struct Session {
    pub(crate) client: Client,
    pub(crate) out: Out,
    address: String,
}

impl Session {
    pub(crate) fn open(common: &Common) -> Result<Self, Stop> {
        Self::with(common, PATIENCE)
    }

    /// For calls that go through a whole queue.
    pub(crate) fn open_patient(common: &Common) -> Result<Self, Stop> {
        Self::with(common, LONG_PATIENCE)
    }

    /// For calls that may take so long.
    pub(crate) fn with(common: &Common, patience: Duration) -> Result<Self, Stop> {
        let client = Client::builder().retry_budget(REPEATS).deadline(patience).connect(&common.addr);
        let client = client.map_err(|error| Stop::usage(format!("--addr: {error}")))?;
        let address =
            common.addr.split_once("://").map_or(common.addr.as_str(), |(_, rest)| rest.trim_end_matches('/'));
        Ok(Self { client, out: Out::new(common.output), address: address.to_owned() })
    }

    pub(crate) fn admin(&self) -> Admin {
        self.client.admin()
    }

    /// The server's, without http://
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Why a call failed, and what helps.
    pub(crate) fn explain(&self, error: &Error) -> Stop {
        let address = &self.address;
        match error.kind() {
            ErrorKind::Unavailable if error.reason().is_none() => Stop::failed(format!(
                "cannot reach a server at {address}: {error}; start data-queue-server there, or name another one with --addr or \
                 DATA_QUEUE_ADDR"
            )),
            ErrorKind::DeadlineExceeded => Stop::failed(format!(
                "the server at {address} did not answer in time, and may do it nevertheless: {error}"
            )),
            _ if error.reason() == Some(reason::JSON_INVALID) => {
                Stop::failed(format!("{error}; with --data it is taken as it is"))
            }
            _ => Stop::failed(error.to_string()),
        }
    }

    /// Takes what a call answered.
    pub(crate) fn take<T>(&self, answer: Result<T, Error>) -> Result<T, Stop> {
        answer.map_err(|error| self.explain(&error))
    }
}

/// Reads a list page by page and shows each, up to so many items. Answers whether there are more.
pub(crate) async fn each_page<T>(
    session: &mut Session,
    limit: Option<u64>,
    largest: u32,
    list: impl AsyncFn(&Page) -> Result<Paged<T>, Error>,
    mut show: impl FnMut(&mut Session, Vec<T>) -> Result<(), Stop>,
) -> Result<bool, Stop> {
    let (mut left, mut next) = (limit.unwrap_or(u64::MAX), Some(Page::first()));
    while let Some(page) = next {
        if left == 0 {
            return Ok(true);
        }
        let size = u32::try_from(left).unwrap_or(u32::MAX).min(largest);
        let found = session.take(list(&page.size(size)).await)?;
        left = left.saturating_sub(found.items.len() as u64);
        show(session, found.items)?;
        next = found.next;
    }
    Ok(false)
}
