//! `data-queue queues`: what is in queues.

use std::{
    process::ExitCode,
    time::{Duration, SystemTime},
};

use clap::Args as ClapArgs;
use data_queue_client::{QueueActivity, QueueCounts, QueueInfo, Watch};

use crate::{
    Stop,
    args::{Common, span},
    out::{Cell, Row},
    session::{Session, each_page},
    settings,
};

/// The most queues of a page.
const PAGE: u32 = 1_000;

/// Lists queues with their counts; or shows one, with its settings
#[derive(Debug, ClapArgs)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Queues {
    /// Only this one, with its settings
    queue: Option<String>,

    /// Go on, until Ctrl-C; at most the first 1000 queues
    #[arg(long)]
    watch: bool,

    /// With --watch: how often, 100ms to 1m
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = span, requires = "watch")]
    interval: Duration,
}

const AFTER_HELP: &str = "\
Columns: queue, ready, scheduled, leased, dead, inserted, acked, oldest (how long the task at the head has been there), paused.
JSON: these, and expired, deleted, purged; oldest_seconds.
With --watch: at, queue, ready, scheduled, leased, dead, inserted_s, acked_s (tasks a second), oldest, paused.
Of one queue: a line for each of its counts and settings; - is not set, so as the server says.";

impl Queues {
    pub(crate) async fn run(self, common: &Common) -> Result<ExitCode, Stop> {
        let mut session = Session::open(common)?;
        match &self.queue {
            _ if self.watch => self.watch(session).await?,
            Some(queue) => {
                let found = session.admin().get_queue(queue).await;
                let QueueInfo { name, counts, settings, .. } = session.take(found)?;
                let row = counted(Row::new().with("queue", name), &counts, true);
                session.out.record(&settings::shown(row, &settings.unwrap_or_default()))?;
            }
            None => {
                let admin = session.admin();
                let list = async |page: &_| admin.list_queues(page).await;
                each_page(&mut session, None, PAGE, list, |session, queues| {
                    let row = |queue: QueueInfo| {
                        let row = counted(Row::new().with("queue", queue.name), &queue.counts, false);
                        row.with("paused", queue.counts.paused)
                    };
                    session.out.rows(&queues.into_iter().map(row).collect::<Vec<_>>())
                })
                .await?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }

    async fn watch(&self, mut session: Session) -> Result<(), Stop> {
        let watch = Watch::queues(self.queue.as_deref()).interval(self.interval);
        let told = session.admin().watch_queues(watch).await;
        let mut told = session.take(told)?;
        while let Some(activities) = told.next().await {
            let activities = session.take(activities)?;
            let now = SystemTime::now();
            session.out.again(&activities.into_iter().map(|activity| active(now, activity)).collect::<Vec<_>>())?;
        }
        Err(Stop::failed("the server ended the watch, since it stops: start it again"))
    }
}

fn counted(row: Row, counts: &QueueCounts, is_record: bool) -> Row {
    let row = row
        .with("ready", counts.ready)
        .with("scheduled", counts.scheduled)
        .with("leased", counts.leased)
        .with("dead", counts.dead)
        .with("inserted", counts.inserted)
        .with("acked", counts.acked);
    let gone = [("expired", counts.expired), ("deleted", counts.deleted), ("purged", counts.purged)];
    let add = |row: Row, (name, count)| if is_record { row.with(name, count) } else { row.with_json(name, count) };
    gone.into_iter().fold(row, add).with("oldest", Cell::Age(counts.oldest_ready_age))
}

/// What goes on in a queue.
pub(crate) fn active(now: SystemTime, activity: QueueActivity) -> Row {
    let QueueActivity { queue, counts, inserted_per_second, acked_per_second, .. } = activity;
    Row::new()
        .with("at", now)
        .with("queue", queue)
        .with("ready", counts.ready)
        .with("scheduled", counts.scheduled)
        .with("leased", counts.leased)
        .with("dead", counts.dead)
        .with("inserted_s", Cell::Rate(inserted_per_second))
        .with("acked_s", Cell::Rate(acked_per_second))
        .with("oldest", Cell::Age(counts.oldest_ready_age))
        .with("paused", counts.paused)
}
