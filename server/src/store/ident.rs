//! Names and random identifiers: queue names, task ids, lease tokens, attempts.

use std::{cell::RefCell, collections::HashMap, fmt, sync::Arc};

/// The longest queue name, in bytes.
pub(super) const MAX_QUEUE_NAME: usize = 128;

/// The most shards that a queue can have.
pub const MAX_SHARDS: u8 = 64;

/// A queue's name, checked: 1 to 128 bytes, the first a letter or digit, the rest letters, digits, `.`, `_`, `:`, `/`, `-`.
///
/// Within a store that spreads queues it can name a part of one, a shard; everywhere else it names the whole.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueueName(Arc<str>, Shard);

/// A part of a queue that is spread, and the state of the queue's settings by which somebody thinks that it is one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(in crate::store) struct Shard {
    /// Below [`MAX_SHARDS`]. Of a queue that is not spread there is 0 alone, and of every queue 0 has the settings that hold.
    pub(in crate::store) number: u8,
    /// 0 while the queue was never spread, greater with each change of its settings after that.
    pub(in crate::store) generation: u64,
}

/// Why a name is not a queue's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueNameError {
    /// It has no characters.
    #[error("is empty; a queue name has 1 to {MAX_QUEUE_NAME} bytes")]
    Empty,
    /// It has this many bytes.
    #[error("has {0} bytes; a queue name has at most {MAX_QUEUE_NAME}")]
    TooLong(usize),
    /// This character, counted from 1, is not allowed there.
    #[error(
        "has a character that is not allowed there, number {0}; a queue name starts with a letter or digit and goes on with letters, digits, '.', '_', ':', '/' and '-'"
    )]
    Character(usize),
}

impl QueueName {
    /// Checks a name.
    pub fn parse(name: &str) -> Result<Self, QueueNameError> {
        if name.is_empty() {
            return Err(QueueNameError::Empty);
        }
        if name.len() > MAX_QUEUE_NAME {
            return Err(QueueNameError::TooLong(name.len()));
        }
        let allowed = |at: usize, b: u8| b.is_ascii_alphanumeric() || (at > 0 && b"._:/-".contains(&b));
        match name.bytes().enumerate().find(|&(at, b)| !allowed(at, b)) {
            // Whatever is before it is ASCII, so that bytes are characters.
            Some((at, _)) => Err(QueueNameError::Character(at + 1)),
            None => Ok(Self(name.into(), Shard::default())),
        }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What queues have in common that are kept together: the name up to its first `::`, or all of it.
    pub fn tag(&self) -> &str {
        self.0.split_once("::").map_or(&self.0, |(tag, _)| tag)
    }

    /// A part of this queue.
    pub(in crate::store) fn part(&self, shard: Shard) -> Self {
        Self(Arc::clone(&self.0), shard)
    }

    /// The queue that this is a part of.
    pub(in crate::store) fn whole(&self) -> Self {
        self.part(Shard::default())
    }

    pub(in crate::store) fn shard(&self) -> Shard {
        self.1
    }
}

impl fmt::Debug for QueueName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.as_str())
    }
}

/// Hashes what was made here, at random or in turn: tokens, stems, ids. What clients choose is for the standard library's hasher,
/// which costs several times as much and cannot be made to collide.
pub(crate) type MintedState = foldhash::fast::RandomState;

/// With tokens, stems or ids for keys.
pub(crate) type MintedMap<K, V> = HashMap<K, V, MintedState>;

/// The shard that ids and tokens are made for. Where a queue is spread, the store says which one it is.
const SHARD: u8 = 0;

/// Names a task for life: a byte for the shard, the rest random. On the wire, a UUID's text.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TaskId(pub [u8; 16]);

/// Random bytes of the system's generator, drawn for many ids at once: asking it for each would cost more than the rest of
/// making them. Each byte is given out once.
struct Drawn {
    bytes: [u8; 2_048],
    used: usize,
}

thread_local! {
    static DRAWN: RefCell<Drawn> = const { RefCell::new(Drawn { bytes: [0; 2_048], used: 2_048 }) };
}

fn random<const N: usize>() -> Result<[u8; N], getrandom::Error> {
    DRAWN.with_borrow_mut(|drawn| {
        if drawn.used + N > drawn.bytes.len() {
            getrandom::fill(&mut drawn.bytes)?;
            drawn.used = 0;
        }
        let mut taken = [0; N];
        let from = &mut drawn.bytes[drawn.used..drawn.used + N];
        taken.copy_from_slice(from);
        from.fill(0);
        drawn.used += N;
        Ok(taken)
    })
}

impl TaskId {
    /// Makes ids for a batch.
    pub fn mint(count: usize) -> Result<Vec<Self>, getrandom::Error> {
        (0..count).map(|_| random().map(Self::from_random)).collect()
    }

    /// The one that goes with a digest: whoever takes the same digest gets the same id.
    pub(crate) fn of_digest(digest: [u8; 16]) -> Self {
        Self::from_random(digest)
    }

    fn from_random(mut bytes: [u8; 16]) -> Self {
        bytes[0] = SHARD;
        // Variant 1 of RFC 9562, and its version 4, so that databases and tools take it for the UUID that it is.
        bytes[8] = (bytes[8] & 0x3f) | 0x80;
        Self(bytes).with_plan(false)
    }

    /// The same of a task in this shard.
    pub(in crate::store) fn in_shard(mut self, shard: u8) -> Self {
        self.0[0] = shard;
        self
    }

    /// Which shard its task is in.
    pub(in crate::store) fn shard(&self) -> u8 {
        self.0[0]
    }

    /// The id of a task that has a plan, or has none. It has version 8 of RFC 9562 then: a random UUID with a meaning of its own.
    pub(in crate::store) fn with_plan(mut self, has_plan: bool) -> Self {
        self.0[6] = (self.0[6] & 0x0f) | if has_plan { 0x80 } else { 0x40 };
        self
    }

    /// Whether its task has a plan.
    pub(in crate::store) fn has_plan(&self) -> bool {
        self.0[6] >> 4 == 8
    }
}

impl TaskId {
    /// Reads the text that an insert gave.
    pub fn parse(text: &str) -> Option<Self> {
        let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b'-').collect();
        let mut bytes = [0; 16];
        for (byte, [high, low]) in bytes.iter_mut().zip(digits.as_chunks::<2>().0) {
            *byte = nibble(*high).ok()? << 4 | nibble(*low).ok()?;
        }
        Some(Self(bytes)).filter(|id| id.text() == text)
    }

    /// As it goes over the wire.
    pub fn text(&self) -> String {
        let mut text = Vec::with_capacity(36);
        for (at, part) in [&self.0[..4], &self.0[4..6], &self.0[6..8], &self.0[8..10], &self.0[10..]].iter().enumerate()
        {
            if at > 0 {
                text.push(b'-');
            }
            push_hex(&mut text, part);
        }
        String::from_utf8(text).unwrap_or_default()
    }
}

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text())
    }
}

impl fmt::Debug for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What the tokens of one pop have in common: a byte for the shard and 104 fresh random bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stem(pub [u8; 14]);

impl Stem {
    /// Draws a new one.
    pub fn mint() -> Result<Self, getrandom::Error> {
        let mut bytes: [u8; 14] = random()?;
        bytes[0] = SHARD;
        Ok(Self(bytes))
    }

    /// The same for leases in this shard.
    pub(in crate::store) fn in_shard(mut self, shard: u8) -> Self {
        self.0[0] = shard;
        self
    }

    /// Which shard its leases are in.
    pub(in crate::store) fn shard(&self) -> u8 {
        self.0[0]
    }

    /// The token at a position of the batch.
    pub fn token(&self, position: u16) -> Token {
        let mut bytes = [0; 16];
        bytes[..14].copy_from_slice(&self.0);
        bytes[14..].copy_from_slice(&position.to_be_bytes());
        Token(bytes)
    }
}

impl fmt::Debug for Stem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Stem(..)")
    }
}

/// The proof of one delivery: a stem and a position. Compared whole.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(pub [u8; 16]);

/// A text is not 32 lower-case hex characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("is not a lease token: 32 lower-case hex characters, as a pop gave them")]
pub struct TokenError;

impl Token {
    /// Which shard its task is in, if it is one of ours.
    pub(in crate::store) fn shard(&self) -> u8 {
        self.0[0]
    }

    /// What it has in common with the others of its pop.
    pub fn stem(&self) -> Stem {
        let [stem @ .., _, _] = self.0;
        Stem(stem)
    }

    /// Reads the text that a worker sent.
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        let text: &[u8; 32] = text.as_bytes().try_into().map_err(|_| TokenError)?;
        let mut bytes = [0; 16];
        for (byte, [high, low]) in bytes.iter_mut().zip(text.as_chunks::<2>().0) {
            *byte = nibble(*high)? << 4 | nibble(*low)?;
        }
        Ok(Self(bytes))
    }
}

fn nibble(character: u8) -> Result<u8, TokenError> {
    match character {
        b'0'..=b'9' => Ok(character - b'0'),
        b'a'..=b'f' => Ok(character - b'a' + 10),
        _ => Err(TokenError),
    }
}

impl Token {
    /// As it goes over the wire.
    pub fn text(&self) -> String {
        hex(&self.0)
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text())
    }
}

/// A token is a credential: it goes to its holder through `Display`, and never to a log.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// Names one try of a repeatable pop, or one stream of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt(pub [u8; 8]);

impl Attempt {
    /// Draws a new one.
    pub fn mint() -> Result<Self, getrandom::Error> {
        random().map(Self)
    }
}

/// Names the work of a consumer over its streams: 16 bytes of the client's, or drawn for it. Who knows it may take the
/// leases over, so it is not for logs.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SessionId(pub [u8; 16]);

impl SessionId {
    /// Draws a new one.
    pub fn mint() -> Result<Self, getrandom::Error> {
        random().map(Self)
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionId(..)")
    }
}

/// Of a request's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint(pub [u8; 16]);

/// Two lower-case hex digits of every byte.
const HEX: [[u8; 2]; 256] = {
    let digits = *b"0123456789abcdef";
    let mut table = [[0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = [digits[byte >> 4], digits[byte & 15]];
        byte += 1;
    }
    table
};

/// Lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let mut text = Vec::with_capacity(2 * bytes.len());
    push_hex(&mut text, bytes);
    String::from_utf8(text).unwrap_or_default()
}

fn push_hex(text: &mut Vec<u8>, bytes: &[u8]) {
    for byte in bytes {
        text.extend_from_slice(&HEX[usize::from(*byte)]);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn queue_names_are_checked_to_the_byte() {
        for good in ["a", "9", "A.b_c:d/e-f", "a/../b", "a::b", &"q".repeat(128)] {
            assert_eq!(QueueName::parse(good).unwrap().as_str(), good);
        }
        for bad in
            ["", ".a", "/a", ":a", "-a", "_a", "a b", "a}b", "{x}", "a\0", "a\n", "ä", "../../etc", &"q".repeat(129)]
        {
            assert!(QueueName::parse(bad).is_err(), "{bad:?}");
        }
        assert_eq!(QueueName::parse("a::b::c").unwrap().tag(), "a");
        assert_eq!(QueueName::parse("a:b").unwrap().tag(), "a:b");
    }

    #[test]
    fn tokens_come_back_from_their_text_and_hide_from_logs() {
        let token = Stem::mint().unwrap().token(258);
        assert_eq!(token.0[14..], [1, 2]);
        assert_eq!(Token::parse(&token.to_string()), Ok(token));
        assert!(!format!("{token:?}").contains(&token.to_string()));
        for bad in ["", "0", &"0".repeat(31), &"0".repeat(33), &"A".repeat(32), &"g".repeat(32), &"ä".repeat(16)] {
            assert_eq!(Token::parse(bad), Err(TokenError), "{bad:?}");
        }
    }

    #[test]
    fn ids_are_uuids() {
        let ids = TaskId::mint(3).unwrap();
        assert!(ids[0] != ids[1] && ids[1] != ids[2]);
        let text = ids[0].to_string();
        assert_eq!(text.len(), 36);
        assert_eq!(&text[14..15], "4");
        assert_eq!(TaskId::parse(&text), Some(ids[0]));
        for bad in ["", &text[1..], &text.replace('-', ""), &text.to_uppercase(), &format!("{text}0")] {
            assert_eq!(TaskId::parse(bad), None, "{bad:?}");
        }
    }
}
