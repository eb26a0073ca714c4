//! The calls.
//!
//! `builder` is how a client is set up, and `answer` what calls answer.

mod answer;
mod builder;

use std::{future::Future, sync::Arc, time::Duration};

use data_queue_proto::v1::{
    self, data_queue_client::DataQueueClient, putback_request::Selection, queue_admin_client::QueueAdminClient,
};
use tokio::time::Instant;
use tonic::{
    Request, Response, Status,
    transport::{Channel, Endpoint},
};

use self::answer::first;
pub(crate) use self::answer::{applied, outcomes};
pub use self::{
    answer::{Durability, Heartbeat, Inserted, InsertedTask, Outcome, PutbackDone},
    builder::Builder,
};
use crate::{
    Admin, ConsumerBuilder, Error, ErrorKind, NewTask, Pop, PopBatch, Popped, ProducerBuilder, Putback, Result, Task,
    TaskStream,
    retry::{Budget, Repeat},
    task::hex,
};

/// The longest that a deadline or a wait is taken for.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);
/// The largest answer that is read: 64 MiB.
const MAX_ANSWER_BYTES: usize = 64 << 20;
/// The random bytes of a request id.
const REQUEST_ID_BYTES: usize = 16;

/// A client of one server. Clones are cheap; they share the connection and the retry budget.
///
/// Every call has a deadline (see [`Builder::deadline`]), sent to the server, which covers all its tries. A call that
/// failed on its way is repeated with growing pauses while the deadline and the budget allow, where that is safe:
/// inserts and pops carry a random request id, acks and heartbeats do the same thing twice as once.
#[derive(Clone, Debug)]
pub struct Client {
    grpc: DataQueueClient<Channel>,
    admin: QueueAdminClient<Channel>,
    endpoint: Endpoint,
    budget: Arc<Budget>,
    deadline: Duration,
    durability: Durability,
}

impl Client {
    /// A client with the defaults. It connects with the first call, so it may start before its server.
    ///
    /// # Errors
    /// As [`Builder::connect`].
    pub fn connect(address: &str) -> Result<Self> {
        Self::builder().connect(address)
    }

    /// Sets up a client.
    pub fn builder() -> Builder {
        Builder::new()
    }

    /// The calls of operators: queues with their settings, and tasks that nobody delivers. They share the connection, the retry
    /// budget and the deadline.
    pub fn admin(&self) -> Admin {
        Admin::new(self.admin.clone(), Arc::clone(&self.budget), self.deadline)
    }

    /// A copy whose inserts, and producers, wait until this is reached. Each [`InsertedTask`] tells whether it was: what is not reached within
    /// the server's --store-timeout is answered with less, and the task is in.
    ///
    /// What the store is not set up for is refused with [`ErrorKind::Refused`], and nothing is done. Default: [`Durability::Accepted`].
    pub fn durability(&self, durability: Durability) -> Self {
        Self { durability, ..self.clone() }
    }

    /// Inserts one task at the tail of a queue; answers its id, or that of the task that has its unique key
    /// ([`Client::insert_many`] tells which). Repeated where needed, without inserting twice.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`], [`ErrorKind::StoreFull`], [`ErrorKind::QueueFull`] and the kinds of any call.
    pub async fn insert(&self, queue: &str, task: NewTask) -> Result<String> {
        let mut tasks = self.insert_many(queue, [task]).await?.tasks;
        tasks.pop().map(|task| task.id).ok_or_else(|| Error::internal("the server answered no id"))
    }

    /// Inserts tasks in this order, all or none; at most 1,000. Repeated where needed, without inserting twice.
    ///
    /// # Errors
    /// As [`Client::insert`].
    pub async fn insert_many(&self, queue: &str, tasks: impl IntoIterator<Item = NewTask>) -> Result<Inserted> {
        self.insert_as(queue, tasks, fresh_id()?).await
    }

    /// Inserts tasks under a request id of the caller's: the same call made again, even by another process, gives the
    /// first answer again and inserts nothing. The server remembers request ids for at
    /// least 5 minutes, unless the queue sees half a million newer ones.
    ///
    /// # Errors
    /// As [`Client::insert`]; [`ErrorKind::RequestIdReused`] if the id was used with other tasks.
    pub async fn insert_as(
        &self,
        queue: &str,
        tasks: impl IntoIterator<Item = NewTask>,
        request_id: impl Into<String>,
    ) -> Result<Inserted> {
        let tasks: Vec<_> = tasks.into_iter().map(NewTask::into_message).collect();
        let count = tasks.len();
        let durability = self.durability.into_message();
        let message = v1::InsertRequest { queue: queue.to_owned(), tasks, request_id: request_id.into(), durability };
        let answer = self
            .call(Repeat::Always, Duration::ZERO, |mut grpc, left| {
                let request = timed(message.clone(), left);
                async move { grpc.insert(request).await }
            })
            .await?;
        if answer.results.len() != count {
            return Err(Error::internal("the server answered another number of results than there were tasks"));
        }
        let reached = Durability::from_message(answer.durability);
        let tasks = answer.results.into_iter().map(|result| InsertedTask::new(result, reached)).collect();
        Ok(Inserted { tasks, replayed: answer.replayed })
    }

    /// Sets up a [`Producer`](crate::Producer): inserts into a queue over a stream, many under way at a time. It is not bound
    /// by the retry budget: it repeats until an insert's deadline.
    pub fn producer(&self, queue: &str) -> ProducerBuilder {
        ProducerBuilder::new(self.grpc.clone(), queue, fresh_id(), self.deadline).durability(self.durability)
    }

    /// Leases the task at the head of a queue, after acking what the caller has finished. An empty queue is no error.
    ///
    /// Repeated where needed with the same request id, lease and tokens: a repeat gets the task of the first try.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if the task arrived damaged; the acks were applied then. And the kinds of any call.
    pub async fn pop(&self, queue: &str, pop: Pop) -> Result<Popped> {
        let start = Instant::now();
        let wait = pop.wait;
        let tokens = pop.ack_lease_tokens.len();
        let message = v1::PopRequest {
            queue: queue.to_owned(),
            lease: pop.lease.map(duration),
            wait: None,
            request_id: pop.request_id.map_or_else(fresh_id, Ok)?,
            ack_lease_tokens: pop.ack_lease_tokens,
        };
        let answer = self
            .call(Repeat::Always, wait, |mut grpc, left| {
                // Only the wait may differ between tries: it shrinks by what has passed.
                let wait = Some(duration(wait.saturating_sub(start.elapsed())));
                let request = timed(v1::PopRequest { wait, ..message.clone() }, left);
                async move { grpc.pop(request).await }
            })
            .await?;
        let ack_outcomes = outcomes(&answer.ack_outcomes, tokens)?;
        let task = answer.task.map(Task::receive).transpose()?;
        Ok(Popped { task, ack_outcomes })
    }

    /// Leases many tasks, as a stream. The deadline holds for each message of the stream, while the reader waits for it.
    ///
    /// Not repeated once it was sent: after an error, open another one; what was on its way comes back by its lease.
    ///
    /// # Errors
    /// The kinds of any call.
    pub async fn pop_batch(&self, queue: &str, pop: PopBatch) -> Result<TaskStream> {
        let message = v1::PopBatchRequest {
            queue: queue.to_owned(),
            max_tasks: pop.max_tasks,
            lease: pop.lease.map(duration),
            wait: Some(duration(pop.wait)),
            request_id: String::new(),
        };
        let answer = self
            .call(Repeat::IfUnsent, pop.wait, |mut grpc, _| {
                // No grpc-timeout: it would end the whole stream, however long its reader works on each task.
                let request = Request::new(message.clone());
                async move { grpc.pop_batch(request).await }
            })
            .await?;
        Ok(TaskStream::new(answer, self.patience(pop.wait)))
    }

    /// Sets up a consumer of a queue, or of several: a stream of tasks that outlives its connection.
    pub fn consumer(&self, queue: impl Into<String>) -> ConsumerBuilder {
        ConsumerBuilder::new(self.grpc.clone(), self.endpoint.clone(), self.deadline, queue.into())
    }

    /// Ends a task: it is done and gone for good. Repeated where needed; a task that was acked by an earlier try is done.
    ///
    /// # Errors
    /// [`ErrorKind::LeaseLost`] if the lease ran out and was taken back: the task is delivered again. And the kinds of
    /// any call.
    pub async fn ack(&self, task: &Task) -> Result<()> {
        let outcomes = self.ack_tokens(task.queue(), [task.lease_token()]).await?;
        match first(&outcomes)? {
            Outcome::Applied | Outcome::AlreadyAcked => Ok(()),
            Outcome::LeaseLost => Err(Error::about_task(ErrorKind::LeaseLost, task.id())),
        }
    }

    /// Ends the tasks with these lease tokens, at most 1,000; answers one outcome for each, in order.
    ///
    /// # Errors
    /// The kinds of any call. A lost lease is an outcome.
    pub async fn ack_tokens(
        &self,
        queue: &str,
        tokens: impl IntoIterator<Item = impl Into<String>>,
    ) -> Result<Vec<Outcome>> {
        let message = v1::AckRequest { queue: queue.to_owned(), lease_tokens: collect(tokens) };
        let answer = self
            .call(Repeat::Always, Duration::ZERO, |mut grpc, left| {
                let request = timed(message.clone(), left);
                async move { grpc.ack(request).await }
            })
            .await?;
        outcomes(&answer.outcomes, message.lease_tokens.len())
    }

    /// Moves the deadline of a lease to now + `lease`, never to an earlier time; `None` is the queue's lease, or the server's
    /// default. Answers how much time is left. Repeated where needed. Whether the task was cancelled is told by
    /// [`Client::heartbeat_tokens`].
    ///
    /// # Errors
    /// [`ErrorKind::LeaseLost`] if another may hold the task now, [`ErrorKind::AlreadyAcked`] if it is done, and the
    /// kinds of any call.
    pub async fn heartbeat(&self, task: &Task, lease: impl Into<Option<Duration>>) -> Result<Duration> {
        let answer = self.heartbeat_tokens(task.queue(), [task.lease_token()], lease).await?;
        applied(first(&answer.outcomes)?, task)?;
        Ok(answer.lease.unwrap_or_default())
    }

    /// Moves the deadlines of the leases with these tokens, at most 1,000.
    ///
    /// # Errors
    /// The kinds of any call. A lost lease is an outcome.
    pub async fn heartbeat_tokens(
        &self,
        queue: &str,
        tokens: impl IntoIterator<Item = impl Into<String>>,
        lease: impl Into<Option<Duration>>,
    ) -> Result<Heartbeat> {
        let message = v1::HeartbeatRequest {
            queue: queue.to_owned(),
            lease_tokens: collect(tokens),
            lease: lease.into().map(duration),
        };
        let answer = self
            .call(Repeat::Always, Duration::ZERO, |mut grpc, left| {
                let request = timed(message.clone(), left);
                async move { grpc.heartbeat(request).await }
            })
            .await?;
        let outcomes = outcomes(&answer.outcomes, message.lease_tokens.len())?;
        let lease = answer.lease.and_then(|lease| Duration::try_from(lease).ok());
        Ok(Heartbeat { outcomes, lease, cancelled: answer.cancel_lease_tokens })
    }

    /// Gives a task back to the head of its queue. Repeated where needed: [`ErrorKind::LeaseLost`] may then also mean
    /// that an earlier try, whose answer was lost, gave it back.
    ///
    /// # Errors
    /// [`ErrorKind::LeaseLost`], [`ErrorKind::AlreadyAcked`] if the task is done, and the kinds of any call.
    pub async fn putback(&self, task: &Task) -> Result<()> {
        self.putback_with(task, Putback::new()).await
    }

    /// Says that a task failed, and why: it waits as long as the queue's backoff says, or becomes a dead letter if it failed too
    /// often. As [`Client::putback_with`].
    ///
    /// # Errors
    /// As [`Client::putback_with`].
    pub async fn fail(&self, task: &Task, reason: impl Into<String>) -> Result<()> {
        self.putback_with(task, Putback::new().failed(true).reason(reason)).await
    }

    /// Gives a task back, as the options say. Repeated as [`Client::putback`]; a repeat counts no second failure.
    ///
    /// # Errors
    /// As [`Client::putback`]; [`ErrorKind::InvalidArgument`] for a delay that is too long.
    pub async fn putback_with(&self, task: &Task, options: Putback) -> Result<()> {
        let done = self.putback_tokens_with(task.queue(), [task.lease_token()], options).await?;
        applied(first(&done.outcomes)?, task)
    }

    /// Gives back the tasks with these lease tokens, at most 1,000. Repeated where needed: a repeat answers
    /// [`Outcome::LeaseLost`] for what an earlier try, whose answer was lost, gave back.
    ///
    /// # Errors
    /// The kinds of any call. A lost lease is an outcome.
    pub async fn putback_tokens(
        &self,
        queue: &str,
        tokens: impl IntoIterator<Item = impl Into<String>>,
    ) -> Result<Vec<Outcome>> {
        Ok(self.putback_tokens_with(queue, tokens, Putback::new()).await?.outcomes)
    }

    /// Gives back the tasks with these lease tokens, at most 1,000, as the options say. Repeated as [`Client::putback_tokens`].
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a delay that is too long, and the kinds of any call. A lost lease is an outcome.
    pub async fn putback_tokens_with(
        &self,
        queue: &str,
        tokens: impl IntoIterator<Item = impl Into<String>>,
        options: Putback,
    ) -> Result<PutbackDone> {
        let lease_tokens = collect(tokens);
        let count = lease_tokens.len();
        let selection = Selection::Tokens(options.tokens(lease_tokens));
        let v1::PutbackResponse { outcomes: answered, put_back, dead_lettered } =
            self.put_back(queue, selection, Repeat::Always).await?;
        Ok(PutbackDone { outcomes: outcomes(&answered, count)?, put_back, dead_lettered })
    }

    /// Gives back every task of the queue, whoever holds it, whose delivery or last heartbeat is at least this old; zero
    /// is every leased task. Answers how many. Not repeated once it was sent: a repeat would take back later deliveries.
    ///
    /// # Errors
    /// The kinds of any call.
    pub async fn putback_held_for(&self, queue: &str, held_for: Duration) -> Result<u64> {
        let selection = Selection::HeldFor(duration(held_for));
        Ok(self.put_back(queue, selection, Repeat::IfUnsent).await?.put_back)
    }

    async fn put_back(&self, queue: &str, selection: Selection, repeat: Repeat) -> Result<v1::PutbackResponse> {
        let message = v1::PutbackRequest { queue: queue.to_owned(), selection: Some(selection) };
        self.call(repeat, Duration::ZERO, |mut grpc, left| {
            let request = timed(message.clone(), left);
            async move { grpc.putback(request).await }
        })
        .await
    }

    async fn call<T, F, Fut>(&self, repeat: Repeat, wait: Duration, mut attempt: F) -> Result<T>
    where
        F: FnMut(DataQueueClient<Channel>, Duration) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let deadline = Instant::now() + self.patience(wait);
        self.budget.run(deadline, repeat, |left| attempt(self.grpc.clone(), left)).await
    }

    /// How long a call that waits so long may take.
    fn patience(&self, wait: Duration) -> Duration {
        self.deadline + wait.min(LONGEST)
    }
}

/// A connection of its own, made with the first call.
pub(crate) fn dial(endpoint: &Endpoint) -> DataQueueClient<Channel> {
    queues(endpoint.connect_lazy())
}

fn queues(channel: Channel) -> DataQueueClient<Channel> {
    DataQueueClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES)
}

fn operators(channel: Channel) -> QueueAdminClient<Channel> {
    QueueAdminClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES)
}

/// 128 random bits in hex: a name for one call.
fn fresh_id() -> Result<String> {
    let mut bytes = [0; REQUEST_ID_BYTES];
    getrandom::fill(&mut bytes).map_err(|cause| Error::internal("the system gives no randomness").caused(cause))?;
    Ok(hex(&bytes))
}

pub(crate) fn timed<M>(message: M, left: Duration) -> Request<M> {
    let mut request = Request::new(message);
    request.set_timeout(left);
    request
}

/// What is too long for the wire is far out of the server's range too, which refuses it with the field's name.
pub(crate) fn duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration::try_from(duration).unwrap_or(prost_types::Duration { seconds: i64::MAX, nanos: 0 })
}

pub(crate) fn collect(tokens: impl IntoIterator<Item = impl Into<String>>) -> Vec<String> {
    tokens.into_iter().map(Into::into).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn request_ids_are_fresh_and_128_bits_of_hex() {
        let (one, other) = (fresh_id().unwrap(), fresh_id().unwrap());
        assert_ne!(one, other);
        assert!(one.len() == 32 && one.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')));
    }

    #[test]
    fn a_client_outside_a_runtime_is_an_error_not_a_panic() {
        assert_eq!(Client::connect("127.0.0.1:1").unwrap_err().kind(), ErrorKind::Internal);
    }

    #[test]
    fn the_longest_duration_is_sent_as_out_of_range() {
        assert_eq!(duration(Duration::MAX).seconds, i64::MAX);
    }
}
