//! `data-queue pop` and `data-queue ack`: tasks by hand.

use std::{
    io::{IsTerminal, Write, stderr},
    process::ExitCode,
    time::Duration,
};

use clap::Args as ClapArgs;
use data_queue_client::{Error, ErrorKind, Outcome, Pop as PopOne, PopBatch, Task, TaskValue};
use futures_util::FutureExt;

use crate::{
    EXIT_FAILED, EXIT_NOTHING, Stop,
    args::{Common, span},
    out::{Cell, Row},
    session::Session,
};

/// So many are acked together at the most.
const MAX_ACKS: usize = 100;
/// The most tokens of a call.
const MAX_TOKENS: usize = 1_000;

/// Takes tasks from the head of a queue
///
/// What is taken is held until its lease runs out, and then goes back: end it before with ack and its lease token, or take it with
/// --ack. Exit code 3: there was nothing to take.
#[derive(Debug, ClapArgs)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Pop {
    /// The queue
    queue: String,

    /// How many tasks at the most, 1 to 10000
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    count: u32,

    /// How long they are held, 100ms to 12h [default: the queue's, or the server's]
    #[arg(long, value_name = "DURATION", value_parser = span)]
    lease: Option<Duration>,

    /// How long to wait for one, up to 60s
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = span)]
    wait: Duration,

    /// Each is done as soon as it is written
    #[arg(long)]
    ack: bool,
}

const AFTER_HELP: &str = "\
Columns: id, lease_token (- with --ack), deliveries, type (json or data), value.
JSON: these, and queue, priority, failures, expiries, inserted, lease_seconds, headers; data, in base64, in place of a value that \
is bytes.";

impl Pop {
    pub(crate) async fn run(self, common: &Common) -> Result<ExitCode, Stop> {
        let session = Session::open(common)?;
        let mut hand = Hand { queue: &self.queue, ack: self.ack, session, taken: 0, damaged: 0, written: Vec::new() };
        let ended = self.take(&mut hand).await;
        // What was written is done, whatever came after it.
        hand.ack_written().await?;
        ended?;
        if hand.damaged > 0 {
            return Ok(ExitCode::from(EXIT_FAILED));
        }
        if hand.taken == 0 {
            if stderr().is_terminal() {
                let _ = writeln!(stderr(), "nothing to take from {}", self.queue);
            }
            return Ok(ExitCode::from(EXIT_NOTHING));
        }
        Ok(ExitCode::SUCCESS)
    }

    async fn take(&self, hand: &mut Hand<'_>) -> Result<(), Stop> {
        if self.count == 1 {
            let pop = PopOne::new().wait(self.wait);
            let pop = if let Some(lease) = self.lease { pop.lease(lease) } else { pop };
            let popped = hand.session.client.pop(&self.queue, pop).await;
            return match hand.session.take(popped)?.task {
                Some(task) => hand.write(task).await,
                None => Ok(()),
            };
        }
        let pop = PopBatch::new(self.count).wait(self.wait);
        let pop = if let Some(lease) = self.lease { pop.lease(lease) } else { pop };
        let tasks = hand.session.client.pop_batch(&self.queue, pop).await;
        let mut tasks = hand.session.take(tasks)?;
        loop {
            let next = match tasks.next().now_or_never() {
                Some(next) => next,
                None => {
                    // The next one may be long in coming: what was written is done by now.
                    hand.ack_written().await?;
                    tasks.next().await
                }
            };
            match next {
                Some(Ok(task)) => hand.write(task).await?,
                Some(Err(error)) if error.kind() == ErrorKind::Corrupt => hand.tell_damaged(&error),
                Some(Err(error)) => return Err(hand.session.explain(&error)),
                None => return Ok(()),
            }
        }
    }
}

/// What was taken.
struct Hand<'a> {
    queue: &'a str,
    ack: bool,
    session: Session,
    taken: u64,
    damaged: u64,
    /// The tokens of what was written, and is not acked yet.
    written: Vec<String>,
}

impl Hand<'_> {
    async fn write(&mut self, task: Task) -> Result<(), Stop> {
        self.taken += 1;
        if let Err(unread) = self.session.out.item(&row(&task, self.ack)) {
            // Nobody has seen it. If it cannot be given back now, its lease does.
            let _ = self.session.client.putback(&task).await;
            return Err(unread);
        }
        if self.ack {
            self.written.push(task.lease_token().to_owned());
        }
        if self.written.len() >= MAX_ACKS { self.ack_written().await } else { Ok(()) }
    }

    async fn ack_written(&mut self) -> Result<(), Stop> {
        if self.written.is_empty() {
            return Ok(());
        }
        let tokens = std::mem::take(&mut self.written);
        let outcomes = self.session.client.ack_tokens(self.queue, tokens).await;
        late(&self.session.take(outcomes)?)
    }

    fn tell_damaged(&mut self, error: &Error) {
        self.damaged += 1;
        let _ = writeln!(stderr(), "data-queue: {error}");
    }
}

fn row(task: &Task, is_acked: bool) -> Row {
    let (kind, value) = match task.text() {
        Some(text) => ("json", TaskValue::Json(text.to_owned())),
        None => ("data", TaskValue::Bytes(task.bytes().to_vec().into())),
    };
    let token = (!is_acked).then(|| task.lease_token());
    Row::new()
        .with("id", task.id())
        .with("lease_token", token)
        .with("deliveries", task.deliveries())
        .with("type", kind)
        .with_json("queue", task.queue())
        .with_json("priority", task.priority())
        .with_json("failures", task.failures())
        .with_json("expiries", task.expiries())
        .with_json("inserted", task.inserted_at())
        .with_json("lease", Cell::Span(Some(task.lease())))
        .with_json("headers", task.headers().clone())
        .with("value", Cell::Value(value))
}

/// Ends tasks: they are done
///
/// Writes for each token, in order, applied, already_acked or lease_lost. Exit code 1 if a lease was lost: the task is delivered
/// again, or is gone.
#[derive(Debug, ClapArgs)]
pub(crate) struct Ack {
    /// The queue
    queue: String,

    /// The lease tokens, as pop wrote them
    #[arg(value_name = "TOKEN", required = true)]
    tokens: Vec<String>,
}

impl Ack {
    pub(crate) async fn run(self, common: &Common) -> Result<ExitCode, Stop> {
        let mut session = Session::open(common)?;
        let mut outcomes = Vec::new();
        for tokens in self.tokens.chunks(MAX_TOKENS) {
            let some = session.client.ack_tokens(&self.queue, tokens).await;
            outcomes.extend(session.take(some)?);
        }
        let name = |outcome: &Outcome| match outcome {
            Outcome::Applied => "applied",
            Outcome::AlreadyAcked => "already_acked",
            Outcome::LeaseLost => "lease_lost",
        };
        // A token is a secret of its holder's: it is not repeated.
        let rows: Vec<_> = outcomes.iter().map(|outcome| Row::new().with("outcome", name(outcome))).collect();
        session.out.rows(&rows)?;
        late(&outcomes).map(|()| ExitCode::SUCCESS)
    }
}

fn late(outcomes: &[Outcome]) -> Result<(), Stop> {
    match outcomes.iter().filter(|outcome| **outcome == Outcome::LeaseLost).count() {
        0 => Ok(()),
        lost => Err(Stop::failed(format!(
            "{lost} of {} came too late: the lease was lost, so the task may be delivered again",
            outcomes.len()
        ))),
    }
}
