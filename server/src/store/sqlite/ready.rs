//! The tasks of a queue that are ready, in their order. What stands where follows from a number: a task's place is its key, or
//! for one that came back or fell due, the position that it was given then. Places ascend from the head to the tail.

use std::collections::VecDeque;

use crate::store::{MAX_PRIORITY, MintedMap};

/// Lines are cleared of tasks that are gone when they are more than half of all, and more than so many.
const CLEARED_FROM: usize = 256;

type Line = VecDeque<i64>;

/// The lines.
#[derive(Default)]
pub(super) struct Ready {
    /// Of priority 0, as most tasks are.
    plain: Line,
    /// Of the others, from priority 1 on; made by the first one.
    higher: Option<Box<[Line; MAX_PRIORITY as usize]>>,
    /// Tasks that were taken out of the midst, with their places: they stay in their lines until they come to the head, which
    /// is never one of them.
    gone: MintedMap<i64, i64>,
}

impl Ready {
    pub(super) fn len(&self) -> usize {
        let higher = self.higher.as_ref().map_or(0, |lines| lines.iter().map(VecDeque::len).sum());
        self.plain.len() + higher - self.gone.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.front().is_none()
    }

    fn line(&mut self, priority: u8) -> &mut Line {
        match usize::from(priority).checked_sub(1) {
            None => &mut self.plain,
            Some(at) => {
                let lines = self.higher.get_or_insert_default();
                &mut lines[at.min(usize::from(MAX_PRIORITY) - 1)]
            }
        }
    }

    /// From the highest priority down.
    fn lines(&self) -> impl Iterator<Item = (u8, &Line)> {
        let higher = self.higher.iter().flat_map(|lines| (1..=MAX_PRIORITY).zip(lines.iter()).rev());
        higher.chain([(0, &self.plain)])
    }

    fn head(&self) -> &Line {
        let higher = self.higher.as_ref().and_then(|lines| lines.iter().rev().find(|line| !line.is_empty()));
        higher.unwrap_or(&self.plain)
    }

    pub(super) fn front(&self) -> Option<i64> {
        self.head().front().copied()
    }

    pub(super) fn push_back(&mut self, priority: u8, task: i64) {
        self.line(priority).push_back(task);
    }

    pub(super) fn push_front(&mut self, priority: u8, task: i64) {
        self.line(priority).push_front(task);
    }

    pub(super) fn pop_front(&mut self) {
        let higher = self.higher.as_mut().and_then(|lines| lines.iter_mut().rev().find(|line| !line.is_empty()));
        let line = higher.unwrap_or(&mut self.plain);
        line.pop_front();
        if !self.gone.is_empty() {
            trim(line, &mut self.gone);
        }
    }

    /// The first and the last of the tasks at the head whose keys follow each other, at most so many.
    pub(super) fn run_at_head(&self, max_tasks: usize) -> Option<(i64, i64)> {
        let line = self.head();
        let first = *line.front()?;
        let follows =
            |(key, task): &(i64, &i64)| key == *task && (self.gone.is_empty() || !self.gone.contains_key(task));
        let run = (first..).zip(line).take(max_tasks).take_while(follows).count();
        Some((first, first + run as i64 - 1))
    }

    /// Takes a task out of its line.
    pub(super) fn remove(&mut self, priority: u8, task: i64, place: i64) {
        let mut gone = std::mem::take(&mut self.gone);
        gone.insert(task, place);
        trim(self.line(priority), &mut gone);
        self.gone = gone;
        if self.gone.len() > CLEARED_FROM && self.gone.len() > self.len() {
            let Self { plain, higher, gone } = self;
            for line in higher.iter_mut().flat_map(|lines| lines.iter_mut()).chain([plain]) {
                line.retain(|task| !gone.contains_key(task));
            }
            gone.clear();
        }
    }

    /// In their order, those behind a place in the line of a priority. `place` tells where a task stands.
    pub(super) fn behind(
        &self,
        after: Option<(u8, i64)>,
        place: impl Fn(i64) -> i64 + Copy,
    ) -> impl Iterator<Item = (u8, i64)> {
        let place = move |task: i64| self.gone.get(&task).copied().unwrap_or_else(|| place(task));
        let all = self.lines().flat_map(move |(priority, line)| {
            let from = match after {
                Some((of, last)) if of == priority => line.partition_point(|task| place(*task) <= last),
                Some((of, _)) if of < priority => line.len(),
                _ => 0,
            };
            line.range(from..).map(move |task| (priority, *task))
        });
        all.filter(|(_, task)| !self.gone.contains_key(task))
    }

    /// Puts the lines in order as they were read of a file, in which only a few stand elsewhere than at the tail.
    pub(super) fn sort(&mut self, place: impl Fn(i64) -> i64) {
        for line in self.higher.iter_mut().flat_map(|lines| lines.iter_mut()).chain([&mut self.plain]) {
            line.make_contiguous().sort_by_cached_key(|task| place(*task));
        }
    }
}

/// The head is never one that is gone.
fn trim(line: &mut Line, gone: &mut MintedMap<i64, i64>) {
    while line.front().is_some_and(|task| gone.remove(task).is_some()) {
        line.pop_front();
    }
}
