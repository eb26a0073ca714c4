//! How long inserts take at a given rate, which does not wait for the answers: an open loop. A picture comes of it.
//!
//! The rate is a share of what 64 callers reach that wait for each answer, measured on the same server just before. A call's time
//! begins when it was meant to begin: one that has to wait behind others, or for the client itself, is as late as its user sees it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::{sync::mpsc, task::JoinSet};

use crate::{
    contender::{Load, Running},
    dataqueue::{self, Server},
    echo,
    fault::Result,
    ledger::Ledger,
    machine::{self, micros},
    options::Options,
    ours::{self, CALLERS, Store, Used},
    picture::{Axis, Line, Panel, Picture},
    report::{Figure, Report, count, number, quantile},
    scratch::Scratch,
};

const NAME: &str = "load";
const SIZE: usize = 12;
const ROUNDS: u32 = 3;
/// Percent of the capacity.
const SHARES: [u32; 7] = [10, 25, 50, 70, 80, 90, 95];
/// Calls that are due and not begun yet, at the most: then the clock waits, and the calls after it are late.
const DUE: usize = 100_000;

/// What was found of one server: its capacity in each round, and p50 and p99 in microseconds at each share of it.
struct Found {
    name: String,
    store: Option<Store>,
    capacities: Vec<f64>,
    times: Vec<(u32, Vec<[f64; 2]>)>,
}

pub(crate) async fn run(options: &Options, report: &mut Report) -> Result<()> {
    let shares = if options.smoke { &SHARES[1..3] } else { &SHARES[..] };
    let of = |(name, store): (&str, Option<Store>)| Found {
        name: name.to_owned(),
        store,
        capacities: Vec::new(),
        times: shares.iter().map(|share| (*share, Vec::new())).collect(),
    };
    let stores = ours::stores(report, NAME);
    let ours = stores.into_iter().map(|(name, store)| of((&format!("DataQueue on {name}"), Some(store))));
    let mut found = ours.chain([of(("bare echo", None))]).collect::<Vec<_>>();
    for round in 1..=rounds(options) {
        for found in &mut found {
            found.round(options).await?;
            let last = found.times.iter().filter_map(|(share, times)| Some((*share, times.last()?.map(f64::round))));
            eprintln!(
                "round {round}: {}: {} a second; percent of it, p50 and p99 in µs: {:?}",
                found.name,
                number(found.capacities.last().copied().unwrap_or_default()),
                last.collect::<Vec<_>>()
            );
        }
    }
    let path = draw(options, report, &found).write(&options.pictures(), "latency-against-load.svg")?;
    for Found { name, capacities, times, .. } in found {
        let figure = |what, unit, values| Figure { measurement: NAME, what, unit, values, ..Figure::default() };
        report.figure(figure(format!("{name}: Insert, {CALLERS} callers: the capacity"), "tasks/s", capacities));
        for (share, times) in times {
            let values = times.iter().map(|[p50, _]| *p50).collect();
            let what = format!("{name}: Insert at {share} % of the capacity, p50");
            report.figure(Figure { latencies: times, ..figure(what, "µs", values) });
        }
    }
    report.note(format!(
        "{NAME}: {SIZE} B, the client on another core than the servers, if there is one, on one connection, at even intervals for {:.1} s, whether earlier calls are answered or not; timed from \
         when a call was meant to begin; drawn in {}",
        options.span().as_secs_f64(),
        path.display()
    ));
    Ok(())
}

impl Found {
    /// With the client on a core beside the servers': on theirs, the clock of so many calls a second would take from them what
    /// is measured.
    async fn round(&mut self, options: &Options) -> Result<()> {
        let round = self.round_beside(options).await;
        machine::pin(options)?;
        round
    }

    /// A fresh server: its capacity, then each share of it, and the proof that nothing was lost.
    async fn round_beside(&mut self, options: &Options) -> Result<()> {
        let scratch = Scratch::new(options)?;
        let Some(store) = self.store else {
            let server = echo::start(&scratch.path().join("echo"))?;
            machine::beside(options)?;
            return self.rates(options, &server).await.map(drop);
        };
        let used = Used::start(store, scratch.path()).await?;
        machine::beside(options)?;
        let inserted = self.rates(options, &used.server).await?;
        let mut ledger = Ledger::new(SIZE);
        used.drain(inserted, &mut ledger).await?;
        ledger.verify(inserted)?;
        used.server.is_empty_after(inserted).await
    }

    /// Answers how many tasks were inserted.
    async fn rates(&mut self, options: &Options, server: &Server) -> Result<u64> {
        let numbers = Arc::new(AtomicU64::new(0));
        let load = Load { callers: CALLERS, size: SIZE, span: options.span(), numbers: Arc::clone(&numbers) };
        dataqueue::produce(server, 1, &Load { span: options.warm_up(), ..load.clone() }).await?;
        let start = Instant::now();
        let calls = dataqueue::produce(server, 1, &load).await?.len();
        let capacity = calls as f64 / start.elapsed().as_secs_f64();
        self.capacities.push(capacity);
        for (share, found) in &mut self.times {
            let times = offer(server, capacity * f64::from(*share) / 100.0, options.span(), &numbers).await?;
            found.push([0.5, 0.99].map(|share| quantile(&times, share)));
        }
        Ok(numbers.load(Ordering::Relaxed))
    }
}

/// Begins so many inserts a second. Microseconds from when each was meant to begin until it was answered.
async fn offer(server: &Server, rate: f64, span: Duration, numbers: &AtomicU64) -> Result<Vec<f64>> {
    let client = server.client().await?;
    let calls = ((rate * span.as_secs_f64()) as u64).max(1);
    let (clock, mut due) = mpsc::channel(DUE);
    // The runtime's own timer knows only milliseconds.
    let start = Instant::now();
    let clock = thread::spawn(move || {
        for call in 0..calls {
            let begin = start + Duration::from_secs_f64(call as f64 / rate);
            while let Some(left) = begin.checked_duration_since(Instant::now()) {
                thread::park_timeout(left);
            }
            if clock.blocking_send(begin).is_err() {
                break;
            }
        }
    });
    let mut under_way = JoinSet::new();
    let mut times = Vec::new();
    while let Some(begin) = due.recv().await {
        let (mut client, number) = (client.clone(), numbers.fetch_add(1, Ordering::Relaxed));
        under_way.spawn(async move {
            dataqueue::insert(&mut client, number..number + 1, SIZE).await?;
            Result::Ok(micros(begin.elapsed()))
        });
        while let Some(ended) = under_way.try_join_next() {
            times.push(ended??);
        }
    }
    clock.join().map_err(|_| "the clock panicked")?;
    while let Some(ended) = under_way.join_next().await {
        times.push(ended??);
    }
    Ok(times)
}

fn rounds(options: &Options) -> u32 {
    options.rounds().min(ROUNDS)
}

fn draw(options: &Options, report: &Report, found: &[Found]) -> Picture {
    let median = |times: &[[f64; 2]], index: usize| {
        let values = times.iter().map(|times| times[index]).collect::<Vec<_>>();
        quantile(&values, 0.5)
    };
    let all = found.iter().flat_map(|found| &found.times).flat_map(|(_, times)| [median(times, 0), median(times, 1)]);
    let all = all.collect::<Vec<_>>();
    let panel = |(index, title): (usize, &str)| Panel {
        title: title.to_owned(),
        x: Axis {
            label: "offered rate, percent of the capacity".to_owned(),
            ticks: (0..=5).map(|tick| f64::from(tick * 20)).collect(),
            unit: " %",
        },
        y: Axis::around("µs until answered, logarithmic".to_owned(), all.iter().copied()),
        lines: found
            .iter()
            .map(|found| {
                let points =
                    found.times.iter().map(|(share, times)| [f64::from(*share), median(times, index)]).collect();
                let capacity = count(quantile(&found.capacities, 0.5) as u64);
                Line { name: format!("{}: capacity {capacity}/s", found.name), points }
            })
            .collect(),
    };
    let mut foot = report.foot(&["data-queue-server", "redis-server"]);
    foot.push(format!(
        "Here the client is on the core beside that. Insert of one task of {SIZE} B, timed from when a call was meant to begin; the capacity is what {CALLERS} callers reach that wait \
         for each answer; the median of {} rounds.",
        rounds(options)
    ));
    let panels = ["p50", "p99"].into_iter().enumerate().map(panel).collect();
    Picture { title: "Latency against load".to_owned(), panels, foot }
}
