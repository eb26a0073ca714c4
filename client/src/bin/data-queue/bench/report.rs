//! What is said of a run, to people or to programs.

use std::{
    fmt::{self, Write as _},
    io::Write as _,
    process::ExitCode,
    time::Duration,
};

use data_queue_proto::v1;
use hdrhistogram::Histogram;
use serde_json::{Value, json};

use super::{
    ledger::Counts,
    measure::{Op, Phase},
};
use crate::{
    EXIT_FAILED,
    args::{Bench, Output},
    out::Shade,
};

const BAR: u64 = 40;
/// The first bar of a histogram ends here, and each further one at the double of it: 1 µs.
const FIRST_STEP: u64 = 1_000;
const PERCENTILES: [(&str, f64); 4] = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999)];

/// Whether the server did what it should.
pub(crate) struct Verdict {
    inserted: u64,
    counts: Counts,
    /// What the queue has, less what it had counted before.
    after: v1::QueueCounts,
}

impl Verdict {
    pub(crate) fn new(inserted: u64, counts: Counts, before: &v1::QueueCounts, mut after: v1::QueueCounts) -> Self {
        after.inserted = after.inserted.saturating_sub(before.inserted);
        after.acked = after.acked.saturating_sub(before.acked);
        Self { inserted, counts, after }
    }

    fn missing(&self) -> u64 {
        self.inserted.saturating_sub(self.counts.acked)
    }

    fn is_empty_after(&self) -> bool {
        self.after.ready + self.after.leased + self.after.dead == 0
    }

    /// What is wrong, in words.
    fn faults(&self) -> Vec<String> {
        let Counts { doubled, unexpected, damaged, .. } = self.counts;
        let v1::QueueCounts { ready, leased, dead, inserted, acked, .. } = self.after;
        let named =
            [(self.missing(), "missing"), (doubled, "doubled"), (unexpected, "unexpected"), (damaged, "damaged")];
        let mut faults: Vec<_> = named.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")).collect();
        if !self.is_empty_after() {
            faults.push(format!("the queue has {ready} ready, {leased} leased, {dead} dead"));
        }
        if (inserted, acked) != (self.inserted, self.inserted) {
            let own = self.inserted;
            faults.push(format!("the queue counts {inserted} inserted and {acked} acked, not {own}"));
        }
        faults
    }
}

/// A run, and what came of it.
pub(crate) struct Report<'a> {
    pub(crate) options: &'a Bench,
    pub(crate) address: &'a str,
    pub(crate) queue: &'a str,
    pub(crate) info: Option<v1::GetServerInfoResponse>,
    pub(crate) interrupted: bool,
    /// Calls that an overloaded server refused, and that were made again.
    pub(crate) overloaded: u64,
    pub(crate) phases: Vec<Phase>,
    pub(crate) verdict: Verdict,
}

impl Report<'_> {
    /// Writes it; the exit code follows from the verdict.
    pub(crate) fn write(&self, output: Option<Output>) -> ExitCode {
        let faults = self.verdict.faults();
        let text = match output {
            Some(Output::Json) => format!("{}\n", self.json(&faults)),
            _ => self.table(&faults),
        };
        // Whether anyone reads it does not change the verdict.
        let _ = std::io::stdout().write_all(text.as_bytes());
        if faults.is_empty() {
            return ExitCode::SUCCESS;
        }
        let _ = writeln!(std::io::stderr(), "data-queue: void, its figures mean nothing: {}", faults.join("; "));
        ExitCode::from(EXIT_FAILED)
    }

    fn table(&self, faults: &[String]) -> String {
        let mut text = String::new();
        // Writing to a String does not fail.
        let _ = self.write_table(&mut text, faults);
        text
    }

    fn write_table(&self, text: &mut String, faults: &[String]) -> fmt::Result {
        let Bench { callers, connections, size, .. } = self.options;
        if let Some(info) = &self.info {
            writeln!(text, "server    {} {}, {}", self.address, info.version, info.store)?;
            writeln!(text, "          an OK survives: {}", info.survives_note)?;
        }
        let mode = name(&self.options.mode);
        let batch = self.options.batch();
        writeln!(
            text,
            "load      {mode}; tasks a call: {batch}; bytes a task: {size}; callers: {callers}; connections: {connections}"
        )?;
        if self.interrupted {
            writeln!(text, "ended early by Ctrl-C")?;
        }
        if self.overloaded > 0 {
            writeln!(text, "          {} calls made again, since the server was overloaded", self.overloaded)?;
        }
        if faults.is_empty() {
            let shade = Shade::of_stdout();
            for phase in &self.phases {
                write_phase(text, phase, &shade)?;
            }
        }
        let Verdict { inserted, counts, .. } = &self.verdict;
        writeln!(text, "\nchecked   {inserted} inserted, {} delivered, {} acked", counts.delivered, counts.acked)?;
        if counts.expired + counts.lease_lost > 0 {
            let Counts { expired, lease_lost, .. } = counts;
            writeln!(
                text,
                "          {expired} delivered again after their lease ran out, {lease_lost} acks too late"
            )?;
        }
        if faults.is_empty() {
            writeln!(text, "ok: every task was delivered and acked, once, as it was inserted, and the queue is empty")?;
        }
        Ok(())
    }

    fn json(&self, faults: &[String]) -> Value {
        let options = self.options;
        let phases = if faults.is_empty() { self.phases.iter().map(phase_json).collect() } else { Vec::new() };
        let server = self
            .info
            .as_ref()
            .map(|info| json!({ "version": info.version, "store": info.store, "survives_note": info.survives_note }));
        let Verdict { inserted, counts, .. } = &self.verdict;
        json!({
            "server": server,
            "address": self.address,
            "queue": self.queue,
            "what": name(&options.what),
            "mode": name(&options.mode),
            "callers": options.callers,
            "connections": options.connections,
            "threads": options.threads,
            "size_bytes": options.size,
            "batch": options.batch(),
            "window": options.window(),
            "lease_seconds": options.lease.as_secs_f64(),
            "valid": faults.is_empty(),
            "interrupted": self.interrupted,
            "overloaded": self.overloaded,
            "phases": phases,
            "verified": {
                "inserted": inserted,
                "delivered": counts.delivered,
                "acked": counts.acked,
                "missing": self.verdict.missing(),
                "doubled": counts.doubled,
                "unexpected": counts.unexpected,
                "damaged": counts.damaged,
                "expired": counts.expired,
                "lease_lost": counts.lease_lost,
                "empty_after": self.verdict.is_empty_after(),
            },
        })
    }
}

/// As on the command line.
fn name(value: &impl clap::ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

fn write_phase(text: &mut String, phase: &Phase, shade: &Shade) -> fmt::Result {
    let (tasks, seconds, rate) = (phase.tasks, phase.length.as_secs_f64(), phase.tasks_per_second());
    writeln!(
        text,
        "\n{}{:<10}{tasks} tasks in {seconds:.2} s: {rate:.0} a second{}",
        shade.bold, phase.name, shade.end
    )?;
    if let Some((intended, kept)) = &phase.schedule {
        if kept.is_kept() {
            writeln!(text, "          open loop: {intended} a second were asked for, and kept")?;
        } else {
            let late = kept.late as f64 * 100.0 / kept.begun.max(1) as f64;
            let (latest, never) = (short(kept.latest), kept.not_begun);
            writeln!(
                text,
                "          open loop: {intended} a second were asked for, and NOT KEPT: {late:.1} % of the calls"
            )?;
            writeln!(
                text,
                "          began late, up to {latest}, and {never} never; the server, --callers or this machine"
            )?;
            writeln!(text, "          is too small")?;
        }
    }
    for (op, times) in &phase.times {
        write!(text, "{:>8}  {:>9} times", op.name(), times.len())?;
        for (name, share) in PERCENTILES {
            write!(text, "  {name} {}", short(Duration::from_nanos(times.value_at_quantile(share))))?;
        }
        writeln!(text, "  max {}", short(Duration::from_nanos(times.max())))?;
    }
    for (op, times) in &phase.times {
        writeln!(text, "{:>8}", op.name())?;
        write_bars(text, times, shade)?;
    }
    Ok(())
}

fn write_bars(text: &mut String, times: &Histogram<u64>, shade: &Shade) -> fmt::Result {
    let steps = steps(times);
    let most = steps.iter().map(|(_, count)| *count).max().unwrap_or(1).max(1);
    for (up_to, count) in steps {
        let length = (u128::from(count) * u128::from(BAR)).div_ceil(u128::from(most)) as usize;
        let (bar, up_to) = ("#".repeat(length), short(Duration::from_nanos(up_to)));
        writeln!(text, "{:>10}{up_to:>8} |{}{bar:<40}{} {count}", "up to ", shade.bar, shade.end)?;
    }
    Ok(())
}

/// How many took up to how long, in steps that double, from the first that has any to the last.
fn steps(times: &Histogram<u64>) -> Vec<(u64, u64)> {
    let mut up_to = FIRST_STEP;
    let (mut steps, mut below) = (Vec::new(), 0);
    while below < times.len() {
        let count = times.iter_recorded().take_while(|step| step.value_iterated_to() <= up_to);
        let until: u64 = count.map(|step| step.count_at_value()).sum();
        if until > below || !steps.is_empty() {
            steps.push((up_to, until - below));
        }
        below = until;
        up_to = up_to.saturating_mul(2);
    }
    steps
}

fn phase_json(phase: &Phase) -> Value {
    let open_loop = phase.schedule.as_ref().map(|(intended, kept)| {
        json!({
            "intended_per_second": intended,
            "kept": kept.is_kept(),
            "calls_begun": kept.begun,
            "calls_late": kept.late,
            "calls_not_begun": kept.not_begun,
            "latest_start_us": kept.latest.as_secs_f64() * 1e6,
        })
    });
    let calls: Vec<_> = phase.times.iter().map(|(op, times)| call_json(*op, times)).collect();
    json!({
        "name": phase.name,
        "seconds": phase.length.as_secs_f64(),
        "tasks": phase.tasks,
        "tasks_per_second": phase.tasks_per_second(),
        "open_loop": open_loop,
        "calls": calls,
    })
}

fn call_json(op: Op, times: &Histogram<u64>) -> Value {
    let us = |nanos: u64| nanos as f64 / 1e3;
    let at = |share| us(times.value_at_quantile(share));
    let histogram: Vec<_> =
        steps(times).into_iter().map(|(up_to, count)| json!({ "up_to_us": us(up_to), "count": count })).collect();
    json!({
        "call": op.name(),
        "count": times.len(),
        "latency": {
            "mean_us": times.mean() / 1e3,
            "p50_us": at(0.5),
            "p90_us": at(0.9),
            "p99_us": at(0.99),
            "p99_9_us": at(0.999),
            "max_us": us(times.max()),
        },
        "histogram": histogram,
    })
}

/// Three digits and a unit.
fn short(time: Duration) -> String {
    let us = time.as_secs_f64() * 1e6;
    let (value, unit) = match us {
        ..1e3 => (us, "us"),
        1e3..1e6 => (us / 1e3, "ms"),
        _ => (us / 1e6, "s"),
    };
    let digits = if value < 10.0 {
        2
    } else if value < 100.0 {
        1
    } else {
        0
    };
    format!("{value:.digits$} {unit}")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn steps_double_and_count_everything_once() {
        let mut times = Histogram::<u64>::new_with_bounds(1, 3_600_000_000_000, 3).unwrap();
        for nanos in [500, 999, 3_000, 3_500, 100_000] {
            times.record(nanos).unwrap();
        }
        let steps = steps(&times);
        assert_eq!(steps.first(), Some(&(1_000, 2)));
        assert_eq!(steps.iter().find(|(up_to, _)| *up_to == 4_000), Some(&(4_000, 2)));
        assert_eq!(steps.last(), Some(&(128_000, 1)));
        assert_eq!(steps.iter().map(|(_, count)| count).sum::<u64>(), 5);
    }

    #[test]
    fn times_have_three_digits_and_a_unit() {
        for (nanos, text) in [(1_234, "1.23 us"), (45_600, "45.6 us"), (789_000, "789 us"), (12_000_000, "12.0 ms")] {
            assert_eq!(short(Duration::from_nanos(nanos)), text);
        }
        assert_eq!(short(Duration::from_secs(90)), "90.0 s");
    }

    #[test]
    fn whatever_is_wrong_is_said() {
        let all = v1::QueueCounts { inserted: 8, acked: 8, ..v1::QueueCounts::default() };
        let before = v1::QueueCounts { inserted: 5, acked: 5, ..v1::QueueCounts::default() };
        let counts = Counts { delivered: 3, acked: 3, expired: 1, lease_lost: 1, ..Counts::default() };
        let faults = |counts, after| Verdict::new(3, counts, &before, after).faults().join("; ");
        assert_eq!(faults(counts, all), "");
        assert_eq!(
            faults(Counts { doubled: 1, unexpected: 2, damaged: 3, ..counts }, all),
            "1 doubled, 2 unexpected, 3 damaged".replace(", ", "; ")
        );
        assert!(faults(Counts { acked: 2, ..counts }, all).starts_with("1 missing"));
        assert!(faults(counts, v1::QueueCounts { ready: 1, ..all }).starts_with("the queue has 1 ready"));
        assert!(faults(counts, v1::QueueCounts { acked: 7, ..all }).starts_with("the queue counts 3 inserted and 2"));
    }
}
