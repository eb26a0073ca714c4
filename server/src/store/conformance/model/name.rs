//! What the steps of a history name, in short words: `t3.0` is the first token of pop 3, `#12` the twelfth task.

use std::fmt;

use super::super::*;

/// The queues of a history. Nothing is ever inserted in the last one.
pub(super) const QUEUES: [&str; 4] = ["q", "q::a", "Q", "nobody"];

/// One of [`QUEUES`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Queue(pub(super) u8);

impl Queue {
    pub(super) fn all() -> impl Iterator<Item = Self> {
        (0..QUEUES.len() as u8).map(Self)
    }

    pub(super) fn name(self) -> QueueName {
        queue(QUEUES[usize::from(self.0)])
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(QUEUES[usize::from(self.0)])
    }
}

/// Bytes that look random, and are the same each time: those of ids and stems, which stores must take whatever they are.
fn scatter<const N: usize>(number: u32) -> [u8; N] {
    let mut state = u64::from(number);
    std::array::from_fn(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    })
}

fn spelled<const N: usize>(number: u32) -> [u8; N] {
    let mut bytes = scatter(number);
    bytes[0] = 0;
    bytes[1..5].copy_from_slice(&number.to_be_bytes());
    bytes
}

fn read(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[1..5].try_into().unwrap())
}

/// Names a token: which pop, and the position in it. Known before any store ran the pop.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Ticket {
    pub(super) pop: u32,
    pub(super) position: u16,
}

impl Ticket {
    pub(super) fn stem(pop: u32) -> Stem {
        Stem(spelled(pop))
    }

    pub(super) fn token(self) -> Token {
        Self::stem(self.pop).token(self.position)
    }

    pub(super) fn of(token: Token) -> Self {
        let ticket = Self { pop: read(&token.0), position: u16::from_be_bytes(token.0[14..].try_into().unwrap()) };
        assert!(ticket.token() == token, "a token that nobody minted: {token}");
        ticket
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "t{}.{}", self.pop, self.position)
    }
}

pub(super) fn tickets_of(tokens: Vec<Token>) -> Vec<Ticket> {
    tokens.into_iter().map(Ticket::of).collect()
}

pub(super) fn tokens_of(tickets: &[Ticket]) -> Vec<Token> {
    tickets.iter().map(|ticket| ticket.token()).collect()
}

/// The numbers of tasks that have plans have this bit, so that their ids tell it wherever they are named.
pub(super) const PLANNED: u32 = 1 << 31;

/// Names a task: `#12`, and one that has a plan `#12p`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct TaskNumber(pub(super) u32);

impl TaskNumber {
    pub(super) fn of(id: TaskId) -> Self {
        let number = Self(read(&id.0));
        assert_eq!(number.id(), id, "an id that nobody minted");
        number
    }

    pub(super) fn id(self) -> TaskId {
        TaskId(spelled(self.0)).with_plan(self.0 & PLANNED > 0)
    }
}

impl fmt::Debug for TaskNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}{}", self.0 & !PLANNED, if self.0 & PLANNED > 0 { "p" } else { "" })
    }
}

pub(super) fn ids_of(numbers: &[TaskNumber]) -> Vec<TaskId> {
    numbers.iter().map(|number| number.id()).collect()
}

pub(super) fn numbers_of(ids: Vec<TaskId>) -> Vec<TaskNumber> {
    ids.into_iter().map(TaskNumber::of).collect()
}

/// A caller's request id, and a number for what the request is about.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Request {
    pub(super) id: u8,
    pub(super) content: u8,
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "request {}{}", self.id, if self.content == 0 { "" } else { " about something else" })
    }
}

impl Request {
    pub(super) fn key(self) -> RequestKey {
        key(&self.id.to_string(), self.content)
    }
}

/// A repeatable pop, and which try of it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Try {
    pub(super) request: Request,
    pub(super) attempt: u8,
}

impl fmt::Debug for Try {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "try {} of {:?}", self.attempt, self.request)
    }
}

impl Try {
    pub(super) fn pop_request(self) -> PopRequest {
        PopRequest { key: self.request.key(), attempt: name_of_attempt(self.attempt) }
    }
}

/// A stream of deliveries: which session it names, and which of the session's streams it is.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Stream {
    pub(super) session: u8,
    pub(super) number: u8,
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stream {} of session {}", self.number, self.session)
    }
}

impl Stream {
    pub(super) fn consumer(self) -> Consumer {
        consumer(self.session, self.number)
    }
}
