//! Queues as they are watched: counts, again and again.

use std::{collections::HashMap, time::Duration};

use data_queue_proto::reason;
use futures_util::{Stream, stream};
use tokio::time::{Instant, sleep_until};

use crate::{
    queue::{
        Queues,
        error::{Error, Invalid},
        limits::{self, Span},
    },
    store::{Counts, QueueName},
};

/// The most queues that may be named.
const MAX_NAMED: usize = 100;
/// The most queues that are watched where none is named.
const MAX_WATCHED: usize = 1_000;
/// Between two looks: at least, at most, and where a request does not say.
const INTERVAL: (Duration, Duration, Duration) =
    (Duration::from_millis(100), Duration::from_secs(60), Duration::from_secs(1));

/// What goes on in a queue.
#[derive(Clone, Debug, PartialEq)]
pub struct Activity {
    /// Which.
    pub queue: QueueName,
    /// Its tasks.
    pub counts: Counts,
    /// Since the look before.
    pub inserted_per_second: f64,
    /// Since the look before.
    pub acked_per_second: f64,
}

/// Watches queues.
#[derive(Debug)]
pub struct Watch {
    named: Vec<QueueName>,
    every: Duration,
    next: Instant,
    seen: HashMap<QueueName, (Instant, Counts)>,
}

impl Queues {
    /// Looks at queues, all if none is named, as often as the answers are asked for, at most once an interval.
    pub fn watch(
        &self,
        queues: &[String],
        interval: Option<Span>,
    ) -> Result<impl Stream<Item = Result<Vec<Activity>, Error>> + Send + use<>, Error> {
        limits::at_most("queues", queues.len(), MAX_NAMED, "queues")?;
        let (min, max, unset) = INTERVAL;
        let every = match interval {
            None => unset,
            Some(span) => span.millis(min, Some(max)).map(Duration::from_millis).ok_or_else(|| {
                let message = format!("is {span}; 100ms to 1min are allowed, and unset is 1s");
                Invalid::new("interval", reason::INTERVAL_OUT_OF_RANGE, message)
            })?,
        };
        let name = |(at, name): (usize, &String)| {
            limits::queue(name).map_err(|invalid| Box::new(Invalid { field: format!("queues[{at}]"), ..*invalid }))
        };
        let mut named = queues.iter().enumerate().map(name).collect::<Result<Vec<_>, _>>()?;
        named.sort_unstable();
        named.dedup();
        let watch = Watch { named, every, next: Instant::now(), seen: HashMap::new() };
        let state = (self.clone(), watch);
        Ok(stream::try_unfold(state, |(queues, mut watch)| async move {
            tokio::select! {
                () = sleep_until(watch.next) => {}
                () = queues.stopping.cancelled() => return Ok(None),
            }
            let activities = queues.look_at_all(&mut watch).await?;
            watch.next = Instant::now() + watch.every;
            Ok(Some((activities, (queues, watch))))
        }))
    }

    async fn look_at_all(&self, watch: &mut Watch) -> Result<Vec<Activity>, Error> {
        let names = match watch.named.is_empty() {
            true => self.store.queues(None, MAX_WATCHED).await?,
            false => watch.named.clone(),
        };
        let counts = self.store.counts_in_list(&names).await?;
        let now = Instant::now();
        let known = names.into_iter().zip(counts).filter_map(|(queue, counts)| Some((queue, counts?)));
        let mut seen = HashMap::new();
        let activity = |(queue, counts): (QueueName, Counts)| {
            let before = watch.seen.get(&queue);
            let rate = |of: fn(&Counts) -> u64| {
                before.map_or(0.0, |(then, before)| {
                    of(&counts).saturating_sub(of(before)) as f64 / (now - *then).as_secs_f64().max(1e-3)
                })
            };
            let (inserted_per_second, acked_per_second) = (rate(|counts| counts.inserted), rate(|counts| counts.acked));
            seen.insert(queue.clone(), (now, counts));
            Activity { queue, counts, inserted_per_second, acked_per_second }
        };
        let activities = known.map(activity).collect();
        watch.seen = seen;
        Ok(activities)
    }
}
