//! Ties leased tasks to the body that carries them.
//!
//! A [`Handover`] travels in the response's extensions; the edge takes it out and keeps it with the body. Tonic's encoder
//! hands out everything it was given so far with each frame, so once a frame was passed on to HTTP/2, all deliveries put in
//! before it are handed over. What is left when the body is dropped goes back to its queue.

use std::sync::{Arc, Mutex, PoisonError};

use crate::queue::Unsent;

#[derive(Clone, Default)]
pub(super) struct Handover(Arc<Mutex<Vec<Unsent>>>);

impl Handover {
    /// The encoder has got the tasks.
    pub(super) fn put(&self, unsent: Unsent) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(unsent);
    }

    /// All frames so far were passed on to HTTP/2.
    pub(super) fn taken(&self) {
        let taken = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        taken.into_iter().for_each(Unsent::handed_over);
    }
}
