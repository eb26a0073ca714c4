//! The names of all keys, born here, and those of a queue's parts in `common.lua`. The layout cannot change without a
//! migration.
//!
//! A queue's keys are `<prefix>:{<base64url of its tag><shard>}:<base64url of its name>:<part>`; of shard 0, and of a queue without shards,
//! `<shard>` is `.0`. The tag in braces makes Redis Cluster keep together what one script touches: the parts of a queue, and the queues
//! that share a tag.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use md5::{Digest, Md5};

use crate::store::QueueName;

/// The version of the layout, kept in `<prefix>:format`: it grows when a server that knows only the one before could count
/// wrongly, or lose, what is kept in the new one. 3 has plans of tasks and settings of queues, 4 has shards.
pub(super) const FORMAT: u64 = 4;
/// The oldest layout that is a part of the present one.
pub(super) const OLDEST_FORMAT: u64 = 2;

/// The registry of queues is split over so many sets.
pub(super) const REGISTRY_PARTS: u32 = 16;

/// What a tag ends with in each shard, two letters each. They are such that the slots of a queue's shards are as far apart as they can be,
/// whatever its name: of the first two one is in each half of all slots, of the first four in each quarter, and so on. For CRC16 is
/// linear: with ends of one length, the slots of two shards differ in the same bits under every name.
const SHARDS: &str = ".07yMGbsHzQ3YxUPnx39D7f3wwUsHYDq9q5YBWu2JZ97N9WplXCl9R5zuWWSJyFQ\
                      6iPeMOoKknIjzlXhMloh6JPFzOXKkMII4I8aOomkiNKJxLZHOLmH4j8BxoZkimKi";

/// Makes keys under one prefix.
#[derive(Clone, Debug)]
pub(super) struct Keys {
    prefix: String,
}

impl Keys {
    pub(super) fn new(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned() }
    }

    /// The key that a queue's scripts are given; they build those of its other parts from this one.
    pub(super) fn meta(&self, queue: &QueueName) -> String {
        self.part_of(queue, "meta")
    }

    /// A part of a queue, as `common.lua` names it.
    pub(super) fn part_of(&self, queue: &QueueName, part: &str) -> String {
        let (tag, name) = (Self::tag(queue), URL_SAFE_NO_PAD.encode(queue.as_str()));
        format!("{}:{{{tag}}}:{name}:{part}", self.prefix)
    }

    /// The slot of Redis Cluster that a key is in: that of what is in braces, if there is something.
    pub(super) fn slot(key: &str) -> u16 {
        const SLOTS: u16 = 16_384;
        let tag = key.split_once('{').and_then(|(_, rest)| rest.split_once('}')).map(|(tag, _)| tag);
        let hashed = tag.filter(|tag| !tag.is_empty()).unwrap_or(key);
        crc16::State::<crc16::XMODEM>::calculate(hashed.as_bytes()) % SLOTS
    }

    fn tag(queue: &QueueName) -> String {
        let at = 2 * usize::from(queue.shard().number);
        format!("{}{}", URL_SAFE_NO_PAD.encode(queue.tag()), SHARDS.get(at..at + 2).unwrap_or_default())
    }

    pub(super) fn format(&self) -> String {
        format!("{}:format", self.prefix)
    }

    /// The keys that tell which history the data are of: on a cluster so many that each master has some, most likely.
    pub(super) fn epochs(&self, is_cluster: bool) -> Vec<String> {
        const IN_CLUSTER: u32 = 64;
        match is_cluster {
            false => vec![format!("{}:epoch", self.prefix)],
            true => (0..IN_CLUSTER).map(|part| format!("{}:epoch.{part}", self.prefix)).collect(),
        }
    }

    /// The set that knows this queue.
    pub(super) fn registry_of(&self, queue: &QueueName) -> String {
        let hash = Md5::digest(queue.as_str());
        self.registry(u32::from(hash[0]) % REGISTRY_PARTS)
    }

    pub(super) fn registry(&self, part: u32) -> String {
        format!("{}:queues.{part}", self.prefix)
    }

    /// A server's channel is this and its name.
    pub(super) fn channels(&self) -> String {
        format!("{}:wake:", self.prefix)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::store::Shard;

    #[test]
    fn shards_are_spread_over_all_slots() {
        let keys = Keys::new("dq");
        for name in ["a", "mail", "a::b", "queue-4711", &"q".repeat(128)] {
            let slot = |number| {
                let part = QueueName::parse(name).unwrap().part(Shard { number, generation: 7 });
                u32::from(Keys::slot(&keys.meta(&part)))
            };
            for shards in [2, 4, 8, 16, 32, 64] {
                let blocks: std::collections::HashSet<u32> =
                    (0..shards).map(|number| slot(number) * u32::from(shards) / 16_384).collect();
                assert_eq!(blocks.len(), usize::from(shards), "{name}");
            }
        }
    }

    #[test]
    fn keys_of_a_queue_share_one_tag_and_no_two_queues_share_a_key() {
        let keys = Keys::new("dq");
        let names = ["a", "A", "a::b", "a::c", "a:b", "a/../b", "a.0", "a-", "a::b::c"];
        let mut all = std::collections::HashSet::new();
        for name in names {
            let queue = QueueName::parse(name).unwrap();
            let tag = |key: &str| key[key.find('{').unwrap()..=key.find('}').unwrap()].to_owned();
            for part in ["meta", "tasks", "ready:0"] {
                let key = keys.part_of(&queue, part);
                assert_eq!(tag(&key), tag(&keys.meta(&queue)));
                assert!(key.bytes().filter(|b| *b == b'{').count() == 1 && all.insert(key));
            }
        }
        let tag_of = |name| keys.meta(&QueueName::parse(name).unwrap()).split(':').nth(1).map(str::to_owned);
        assert_eq!(tag_of("a::b"), tag_of("a::c"));
        assert_eq!(tag_of("a::b"), tag_of("a"));
        assert_ne!(tag_of("a:b"), tag_of("a"));
        // What CLUSTER KEYSLOT says of `{YQ.0}`.
        assert_eq!(Keys::slot(&keys.meta(&QueueName::parse("a").unwrap())), 15368);
    }
}
