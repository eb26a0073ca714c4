//! The sessions of a queue, in the stores that live in this process: which stream has each of them, and which leases belong to it.

use std::collections::{BTreeSet, HashMap};

use super::{Attempt, Consumer, Millis, SESSION_KEPT, SessionId, Token};

/// The order of its delivery, and the token.
type SessionLease = (u64, Token);

#[derive(Default)]
pub(super) struct Sessions(HashMap<SessionId, Session>);

#[derive(Default)]
struct Session {
    /// The one that has it; nobody when the store was opened since.
    stream: Option<Attempt>,
    /// When it last took a step.
    used_at: Millis,
    leases: BTreeSet<SessionLease>,
}

impl Session {
    fn is_kept(&self, now: Millis) -> bool {
        now < self.used_at + SESSION_KEPT
    }
}

impl Sessions {
    /// True if another stream has the session.
    pub(super) fn has_another_stream(&self, consumer: Consumer, now: Millis) -> bool {
        let session = self.0.get(&consumer.session).filter(|session| session.is_kept(now));
        session.and_then(|session| session.stream).is_some_and(|stream| stream != consumer.stream)
    }

    /// Gives the session to this stream, whoever had it. Answers its leases.
    pub(super) fn take(&mut self, consumer: Consumer, now: Millis) -> &mut BTreeSet<SessionLease> {
        if self.0.get(&consumer.session).is_none_or(|session| !session.is_kept(now)) {
            self.0.retain(|_, session| session.is_kept(now));
        }
        let session = self.0.entry(consumer.session).or_default();
        (session.stream, session.used_at) = (Some(consumer.stream), now);
        &mut session.leases
    }

    /// Puts in a lease from before the store was opened. The session is known from then on.
    pub(super) fn load(&mut self, session: SessionId, lease: SessionLease, opened: Millis) {
        let session = self.0.entry(session).or_default();
        session.used_at = opened;
        session.leases.insert(lease);
    }

    /// Takes out a lease that has ended.
    pub(super) fn end(&mut self, session: SessionId, lease: SessionLease) {
        if let Some(session) = self.0.get_mut(&session) {
            session.leases.remove(&lease);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: SessionId = SessionId([1; 16]);

    fn consumer(stream: u8) -> Consumer {
        Consumer { session: NAME, stream: Attempt([stream; 8]) }
    }

    #[test]
    fn the_last_stream_has_a_session_until_it_was_quiet_for_long() {
        let mut sessions = Sessions::default();
        assert!(!sessions.has_another_stream(consumer(1), 0), "nobody has it");
        sessions.take(consumer(1), 0).insert((1, Token([1; 16])));
        assert!(sessions.has_another_stream(consumer(2), 1) && !sessions.has_another_stream(consumer(1), 1));
        assert_eq!(sessions.take(consumer(2), 1).len(), 1, "its leases stay");
        assert!(sessions.has_another_stream(consumer(1), SESSION_KEPT));
        assert!(!sessions.has_another_stream(consumer(1), 1 + SESSION_KEPT));
        assert!(sessions.take(consumer(1), 1 + SESSION_KEPT).is_empty(), "it was forgotten with its leases");
    }

    #[test]
    fn a_session_from_before_is_nobodys_and_has_its_leases_in_order() {
        let mut sessions = Sessions::default();
        let lease = |order| (order, Token([9 - order as u8; 16]));
        for order in [3, 1, 2] {
            sessions.load(NAME, lease(order), 5);
        }
        sessions.end(NAME, lease(2));
        assert!(!sessions.has_another_stream(consumer(1), 5));
        assert_eq!(Vec::from_iter(sessions.take(consumer(1), 5).iter().copied()), [lease(1), lease(3)]);
    }
}
