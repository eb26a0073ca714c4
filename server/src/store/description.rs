//! What a store is.

/// What a store is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Its engine and version, for people; without a version as long as that is not known.
    pub engine: String,
    /// What an answered change survives at least.
    pub survives: Survives,
    /// The same in words, with the settings that it follows from.
    pub note: String,
}

/// What an answered insert or ack survives at least. Each survives what those before it do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Survives {
    /// Nothing: it is gone when the server ends.
    Nothing,
    /// The end of the server, whatever ends it.
    ServerKill,
    /// A power cut of the machine that keeps it.
    PowerCut,
}
