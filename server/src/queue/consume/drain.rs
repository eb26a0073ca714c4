//! How a stream comes to its end.

use tokio::time::Instant;

/// From its beginning to its end a stream delivers, is told that it will end, and lets its client finish.
#[derive(Clone, Copy)]
pub(super) enum Drain {
    /// It delivers, until it is old.
    From(Instant),
    /// It is to be told.
    Due(Instant),
    /// It was told, and ends then at the latest.
    Until(Instant),
}

impl Drain {
    /// The same, ended by this time.
    pub(super) fn by(self, end: Instant) -> Self {
        match self {
            Self::From(_) => Self::Due(end),
            Self::Due(at) => Self::Due(at.min(end)),
            Self::Until(at) => Self::Until(at.min(end)),
        }
    }
}
