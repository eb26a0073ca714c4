//! A producer's stream of inserts: many under way, done and answered in their order.
//!
//! What waits on the stream is gathered for one step of the store, and nothing is lingered for. The next step begins when
//! the answers of the one before were taken: so inserts keep their order, and a producer that does not read is not read.

use std::{
    future::Future,
    pin::{Pin, pin},
    task::Poll,
    time::Duration,
};

use data_queue_proto::reason;
use futures_util::{Stream, StreamExt, future::poll_fn, stream};
use md5::{Digest, Md5};
use tokio::time::{Instant, Sleep, sleep_until, timeout};
use tokio_util::sync::WaitForCancellationFutureOwned;

use super::{Error, Invalid, NewTask, Queues, first_due, limits, uncancelled::in_background};
use crate::store::{
    Due, Durability, Fingerprint, Inserted, NewTask as StoredTask, NumberedInsert, Plan, Produce, QueueName,
    RECLAIM_STEP,
};

/// How long the first message may take.
const OPEN_WITHIN: Duration = Duration::from_secs(10);
/// The longest id of a producer, in bytes.
const MAX_PRODUCER_ID: usize = 128;
/// When the envelopes of a step have so many bytes, no further insert is gathered.
const STEP_BYTES: usize = 1 << 20;

/// A message of a producer.
#[derive(Debug)]
pub enum ProduceMessage {
    /// The first one.
    Open {
        /// The queue's name, unchecked like the rest.
        queue: String,
        /// Names the producer.
        producer: String,
        /// What each insert is to have reached, by its number in the contract.
        durability: i32,
    },
    /// Every further one.
    Insert {
        /// Given by the producer.
        number: u64,
        /// What to insert.
        tasks: Vec<NewTask>,
    },
    /// Neither.
    Nothing,
}

/// The answer to an insert.
#[derive(Debug)]
pub struct ProduceAnswer {
    /// The insert's number.
    pub number: u64,
    /// What became of it.
    pub inserted: Inserted,
}

/// Why a producer's stream ends before the producer has ended it.
#[derive(Debug)]
pub enum ProduceEnd<E> {
    /// It broke, or a message cannot be read.
    Broken(E),
    /// A message was refused.
    Refused(Error),
    /// The server stops.
    Stopping,
    /// The caller's deadline passed.
    DeadlinePassed,
}

impl<E> From<Error> for ProduceEnd<E> {
    fn from(refused: Error) -> Self {
        Self::Refused(refused)
    }
}

impl<E> From<Box<Invalid>> for ProduceEnd<E> {
    fn from(refused: Box<Invalid>) -> Self {
        Self::Refused(refused.into())
    }
}

impl Queues {
    /// Does the inserts of a stream. Each item has the answers of one step; after an error there is nothing.
    pub fn produce<S, E>(
        &self,
        messages: S,
        deadline: Option<Instant>,
    ) -> impl Stream<Item = Result<Vec<ProduceAnswer>, ProduceEnd<E>>> + Send + use<S, E>
    where
        S: Stream<Item = Result<ProduceMessage, E>> + Send + Unpin,
        E: Send,
    {
        let producing = Producing {
            queues: self.clone(),
            messages,
            stopping: Box::pin(self.stopping.clone().cancelled_owned()),
            deadline: deadline.map(|deadline| Box::pin(sleep_until(deadline))),
            opened: None,
            last: 0,
            held: None,
            end: None,
        };
        stream::unfold(Some(producing), async |producing| {
            let mut producing = producing?;
            match producing.step().await {
                Ok(Some(answers)) => Some((Ok(answers), Some(producing))),
                Ok(None) => None,
                Err(end) => Some((Err(end), None)),
            }
        })
    }
}

#[derive(Clone)]
struct Opened {
    queue: QueueName,
    producer: String,
    durability: Durability,
}

/// An insert that was checked.
struct Checked {
    number: u64,
    tasks: Vec<StoredTask>,
}

impl Checked {
    fn bytes(&self) -> usize {
        self.tasks.iter().map(|task| task.envelope.len()).sum()
    }

    /// Of all that was given: not of the ids, which each try has its own of.
    fn fingerprint(&self) -> Fingerprint {
        let mut md5 = Md5::new();
        for task in &self.tasks {
            md5.update((task.envelope.len() as u64).to_le_bytes());
            md5.update(&task.envelope);
            match task.due {
                None => {}
                Some(Due::In(span)) => md5.update([&b"in"[..], &span.to_le_bytes()].concat()),
                Some(Due::At(time)) => md5.update([&b"at"[..], &time.to_le_bytes()].concat()),
            }
            if let Some(Plan { priority, ttl, unique_key }) = task.plan.as_deref() {
                let key = unique_key.as_deref().unwrap_or_default();
                md5.update([&b"plan"[..], &[*priority], &ttl.unwrap_or(0).to_le_bytes()].concat());
                md5.update([&(key.len() as u64).to_le_bytes()[..], key.as_bytes()].concat());
            }
        }
        Fingerprint(md5.finalize().into())
    }
}

struct Producing<S, E> {
    queues: Queues,
    messages: S,
    stopping: Pin<Box<WaitForCancellationFutureOwned>>,
    deadline: Option<Pin<Box<Sleep>>>,
    opened: Option<Opened>,
    /// The last number that was read.
    last: u64,
    /// An insert that was read, and had no room in the step before.
    held: Option<Checked>,
    /// What comes when those that were read are answered: an error, or the end.
    end: Option<Option<ProduceEnd<E>>>,
}

impl<S, E> Producing<S, E>
where
    S: Stream<Item = Result<ProduceMessage, E>> + Send + Unpin,
    E: Send,
{
    /// The next answers, or the end.
    async fn step(&mut self) -> Result<Option<Vec<ProduceAnswer>>, ProduceEnd<E>> {
        if self.opened.is_none() {
            self.opened = Some(self.open().await?);
        }
        let gathered = self.gather().await;
        if let (false, Some(opened)) = (gathered.is_empty(), &self.opened) {
            let answers = self.queues.insert_numbered(opened.clone(), gathered);
            let (answers, refused) = answers.await?;
            if let Some(refused) = refused {
                // It was read before whatever else was, or is about to end the stream.
                self.held = None;
                self.end = Some(Some(ProduceEnd::Refused(refused)));
            }
            if !answers.is_empty() {
                return Ok(Some(answers));
            }
        }
        match self.end.take().flatten() {
            Some(end) => Err(end),
            None => Ok(None),
        }
    }

    async fn open(&mut self) -> Result<Opened, ProduceEnd<E>> {
        let invalid = |message: &str| Invalid::new("open", reason::PRODUCE_INVALID, message);
        let first = match timeout(OPEN_WITHIN, self.message()).await {
            Ok(first) => {
                first.map_err(|end| end.unwrap_or_else(|| invalid("is missing: the stream has ended").into()))?
            }
            Err(_) => return Err(invalid("did not come within 10 s; it must be the first message").into()),
        };
        let ProduceMessage::Open { queue, producer, durability } = first else {
            return Err(invalid("must be the first message").into());
        };
        let queue = limits::queue(&queue).map_err(|invalid| invalid.within("open"))?;
        if !(1..=MAX_PRODUCER_ID).contains(&producer.len()) {
            let message = format!("has {} bytes; 1 to {MAX_PRODUCER_ID} are allowed", producer.len());
            let invalid = Invalid::new("open.producer_id", reason::PRODUCE_INVALID, message);
            return Err(invalid.with_limit(MAX_PRODUCER_ID).into());
        }
        let durability = limits::durability("open.durability", durability)?;
        Ok(Opened { queue, producer, durability })
    }

    /// Waits for an insert, and takes those that are there behind it, as many as go into one step. None if the stream is to
    /// end.
    async fn gather(&mut self) -> Vec<Checked> {
        let (mut gathered, mut tasks, mut bytes) = (Vec::new(), 0, 0);
        while tasks < RECLAIM_STEP && bytes < STEP_BYTES {
            let next = match self.held.take() {
                Some(held) => held,
                None if self.end.is_some() => break,
                None => {
                    let read =
                        if gathered.is_empty() { Some(self.message().await) } else { self.message_at_once().await };
                    let Some(read) = read else { break };
                    match read.and_then(|message| self.check(message).map_err(Some)) {
                        Ok(insert) => insert,
                        Err(end) => {
                            self.end = Some(end);
                            break;
                        }
                    }
                }
            };
            if tasks > 0 && tasks + next.tasks.len() > RECLAIM_STEP {
                self.held = Some(next);
                break;
            }
            tasks += next.tasks.len();
            bytes += next.bytes();
            gathered.push(next);
        }
        gathered
    }

    /// The next message, or why there is none: nothing if the producer has ended the stream.
    async fn message(&mut self) -> Result<ProduceMessage, Option<ProduceEnd<E>>> {
        poll_fn(|context| {
            if self.stopping.as_mut().poll(context).is_ready() {
                return Poll::Ready(Err(Some(ProduceEnd::Stopping)));
            }
            if let Poll::Ready(message) = self.messages.poll_next_unpin(context) {
                return Poll::Ready(message.ok_or(None)?.map_err(|error| Some(ProduceEnd::Broken(error))));
            }
            match &mut self.deadline {
                Some(deadline) => deadline.as_mut().poll(context).map(|()| Err(Some(ProduceEnd::DeadlinePassed))),
                None => Poll::Pending,
            }
        })
        .await
    }

    /// Nothing if none is there.
    async fn message_at_once(&mut self) -> Option<Result<ProduceMessage, Option<ProduceEnd<E>>>> {
        let mut message = pin!(self.message());
        poll_fn(|context| match message.as_mut().poll(context) {
            Poll::Ready(message) => Poll::Ready(Some(message)),
            Poll::Pending => Poll::Ready(None),
        })
        .await
    }

    fn check(&mut self, message: ProduceMessage) -> Result<Checked, ProduceEnd<E>> {
        let invalid = |field, message: &str| Invalid::new(field, reason::PRODUCE_INVALID, message);
        let (number, tasks) = match message {
            ProduceMessage::Insert { number, tasks } => (number, tasks),
            ProduceMessage::Open { .. } => return Err(invalid("open", "is only for the first message").into()),
            ProduceMessage::Nothing => return Err(invalid("request", "is neither open nor insert").into()),
        };
        if number <= self.last {
            let message = match number {
                0 => "is 0 or unset; it must be 1 or more".to_owned(),
                _ => format!("is {number}; it must be greater than {}, that of the insert before it", self.last),
            };
            return Err(Error::from(invalid("insert.number", &message)).at(number).into());
        }
        self.last = number;
        let tasks = self.queues.stored(tasks).map_err(|error| error.within("insert").at(number))?;
        Ok(Checked { number, tasks })
    }
}

impl Queues {
    /// One step of the store. Answers those that are done, and why the one behind them is not.
    async fn insert_numbered(
        &self,
        Opened { queue, producer, durability }: Opened,
        checked: Vec<Checked>,
    ) -> Result<(Vec<ProduceAnswer>, Option<Error>), Error> {
        let due = checked.iter().filter_map(|insert| first_due(&insert.tasks)).min();
        let mut numbers = Vec::with_capacity(checked.len());
        let number = |insert: Checked| {
            numbers.push(insert.number);
            let fingerprint = insert.fingerprint();
            NumberedInsert { number: insert.number, fingerprint, tasks: insert.tasks }
        };
        let inserts = checked.into_iter().map(number).collect();
        let produce = Produce { producer, inserts, waiting_here: self.waits.waiting(&queue), durability };
        let this = self.clone();
        // A stream whose client does not read is not asked for what it has to say; those who wait are woken all the same.
        in_background(&self.background, async move {
            let (inserted, refused) = match this.store.produce(&queue, produce).await {
                Ok(produced) => (produced.inserted, produced.refused),
                Err(error) => (Vec::new(), Some(error)),
            };
            let new = inserted.iter().filter(|inserted| !inserted.replayed);
            let new = new.map(|inserted| inserted.ids.len() - inserted.duplicates.len());
            this.wake_for(&queue, new.sum(), due);
            let refused = refused.and_then(|error| Some(Error::from(error).at(*numbers.get(inserted.len())?)));
            let answers = numbers.into_iter().zip(inserted);
            Ok((answers.map(|(number, inserted)| ProduceAnswer { number, inserted }).collect(), refused))
        })
        .await
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    };

    use tokio_util::{sync::CancellationToken, task::TaskTracker};

    use super::*;
    use crate::{
        queue::{Limits, Value, Waits},
        store::{SystemClock, TEST_RULES, memory::MemoryStore},
    };

    type Read = Result<ProduceMessage, &'static str>;

    fn queues(stopping: &CancellationToken) -> Queues {
        let store = MemoryStore::new(Arc::new(SystemClock::default()), TEST_RULES, 1 << 30);
        let limits = Limits {
            max_value: 1 << 20,
            default_lease: Duration::from_secs(30),
            max_stream_age: Duration::from_secs(1_800),
            grace: Duration::from_secs(10),
        };
        Queues::new(Arc::new(store), Arc::new(Waits::default()), limits, stopping.clone(), TaskTracker::new())
    }

    fn open() -> Read {
        Ok(ProduceMessage::Open { queue: "q".to_owned(), producer: "p".to_owned(), durability: 0 })
    }

    fn insert(number: u64, tasks: usize, bytes: usize) -> Read {
        let value = Some(Value::Data(vec![0; bytes].into()));
        let tasks = vec![NewTask { value, ..NewTask::default() }; tasks];
        Ok(ProduceMessage::Insert { number, tasks })
    }

    fn answered(step: Option<Result<Vec<ProduceAnswer>, ProduceEnd<&'static str>>>) -> Vec<u64> {
        step.unwrap().unwrap().iter().map(|answer| answer.number).collect()
    }

    #[tokio::test]
    async fn no_more_is_read_than_one_step_takes_before_its_answers_are_taken() {
        let read = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&read);
        let endless = stream::iter(1..).map(move |number| {
            counted.fetch_add(1, Ordering::Relaxed);
            insert(number, 1, 1)
        });
        let messages = stream::iter([open()]).chain(endless);
        let answers = queues(&CancellationToken::new()).produce(messages, None);
        let mut answers = pin!(answers);
        for step in 1..=3 {
            let numbers = answered(answers.next().await);
            assert_eq!(numbers.len(), RECLAIM_STEP);
            assert!(read.load(Ordering::Relaxed) <= step * RECLAIM_STEP as u64 + 1);
        }
    }

    #[tokio::test]
    async fn a_step_has_200_tasks_or_one_insert_and_few_bytes() {
        let sizes =
            [(150, 1), (50, 1), (1, 1), (200, 1), (1_000, 1), (199, 1), (2, 1), (1, 600_000), (1, 600_000), (1, 1)];
        let inserts = sizes.iter().zip(1..).map(|((tasks, bytes), number)| insert(number, *tasks, *bytes));
        let messages = stream::iter([open()].into_iter().chain(inserts).collect::<Vec<_>>());
        let answers = queues(&CancellationToken::new()).produce(messages, None);
        let mut answers = pin!(answers);
        for expected in [&[1, 2][..], &[3], &[4], &[5], &[6], &[7, 8, 9], &[10]] {
            assert_eq!(answered(answers.next().await), expected);
        }
        assert!(answers.next().await.is_none());
    }

    #[tokio::test]
    async fn what_was_read_before_the_end_is_answered_whatever_the_end_is() {
        let stopping = CancellationToken::new();
        let broken = queues(&stopping).produce(stream::iter([open(), insert(1, 1, 1), Err("broken")]), None);
        let mut broken = pin!(broken);
        assert_eq!(answered(broken.next().await), [1]);
        assert!(matches!(broken.next().await, Some(Err(ProduceEnd::Broken("broken")))));
        assert!(broken.next().await.is_none());

        let until_stopped = stream::iter([open(), insert(1, 1, 1)]).chain(stream::pending());
        let stopped = queues(&stopping).produce(until_stopped, None);
        let mut stopped = pin!(stopped);
        assert_eq!(answered(stopped.next().await), [1]);
        stopping.cancel();
        assert!(matches!(stopped.next().await, Some(Err(ProduceEnd::Stopping))));
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_message_must_come_within_10_s_and_the_others_before_the_deadline() {
        let began = Instant::now();
        let silent = queues(&CancellationToken::new()).produce(stream::pending::<Read>(), None);
        let end = pin!(silent).next().await.unwrap().unwrap_err();
        let ProduceEnd::Refused(Error::Invalid(invalid)) = end else { panic!("{end:?}") };
        assert_eq!((invalid.reason, invalid.field.as_str()), (reason::PRODUCE_INVALID, "open"));
        assert_eq!(began.elapsed().as_secs(), 10);

        let began = Instant::now();
        let messages = stream::iter([open()]).chain(stream::pending());
        let late = queues(&CancellationToken::new()).produce(messages, Some(began + Duration::from_secs(60)));
        assert!(matches!(pin!(late).next().await, Some(Err(ProduceEnd::DeadlinePassed))));
        assert_eq!(began.elapsed().as_secs(), 60);
    }
}
