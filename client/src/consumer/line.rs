//! A stream, from this side.

use std::{collections::VecDeque, task::Waker};

use super::lane::{Ask, Wish};

pub(super) struct Line {
    pub(super) id: u64,
    pub(super) role: Role,
    pub(super) waker: Option<Waker>,
    /// The `max_outstanding` that the server knows.
    pub(super) told: u32,
    /// The server was asked for a sign that it has heard that no more tasks are wanted.
    pub(super) is_fenced: bool,
    /// Its first message has come.
    pub(super) is_heard: bool,
    pub(super) sent: VecDeque<Sent>,
}

impl Line {
    pub(super) fn new(id: u64, told: u32) -> Self {
        let (role, sent) = (Role::Opening, VecDeque::new());
        Self { id, role, waker: None, told, is_fenced: false, is_heard: false, sent }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Not known to be open yet.
    Opening,
    /// What waits is sent on it.
    Speaking,
    /// Its answers are waited for.
    Silent,
    /// All was said.
    Closed,
}

/// One request, as it was sent.
pub(super) struct Sent {
    pub(super) lane: usize,
    pub(super) wish: Wish,
    pub(super) asks: Vec<Ask>,
}
