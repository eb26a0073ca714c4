//! The figures, and how they are printed.

use std::fmt;

use serde_json::{Value, json};

/// Of the table.
const COLUMNS: usize = 7;

/// One value a round, of one thing.
#[derive(Default)]
pub(crate) struct Figure {
    pub(crate) measurement: &'static str,
    pub(crate) what: String,
    pub(crate) unit: &'static str,
    pub(crate) values: Vec<f64>,
    /// Microseconds, p50 and p99 of a call, one of each a round.
    pub(crate) latencies: Vec<[f64; 2]>,
    /// Microseconds on a core that a task costs, by process, for each round.
    pub(crate) cpu: Vec<Vec<(&'static str, f64)>>,
    /// What an answer survives, of a queue that is compared with others.
    pub(crate) durability: &'static str,
    pub(crate) goal: Option<Goal>,
}

impl Figure {
    pub(crate) fn median(&self) -> f64 {
        median(&self.values)
    }
}

/// What the median is to reach.
#[derive(Clone, Copy)]
pub(crate) enum Goal {
    AtLeast(f64),
    AtMost(f64),
}

impl Goal {
    fn met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(least) => value >= least,
            Self::AtMost(most) => value <= most,
        }
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(least) => write!(f, "≥ {least}"),
            Self::AtMost(most) => write!(f, "≤ {most}"),
        }
    }
}

/// Everything that was found.
#[derive(Default)]
pub(crate) struct Report {
    settings: Vec<(&'static str, String)>,
    versions: Vec<(&'static str, String)>,
    figures: Vec<Figure>,
    missing: Vec<(&'static str, String)>,
    voids: Vec<(&'static str, String)>,
    notes: Vec<String>,
    failures: Vec<String>,
}

impl Report {
    pub(crate) fn setting(&mut self, name: &'static str, value: String) {
        self.settings.push((name, value));
    }

    pub(crate) fn version(&mut self, name: &'static str, value: String) {
        if !self.versions.iter().any(|(known, _)| *known == name) {
            self.versions.push((name, value));
        }
    }

    /// What could not be measured, and what would have to be done.
    pub(crate) fn missing(&mut self, measurement: &'static str, why: String) {
        if !self.missing.contains(&(measurement, why.clone())) {
            self.missing.push((measurement, why));
        }
    }

    /// What went wrong, so that there is no figure.
    pub(crate) fn void(&mut self, measurement: &'static str, why: String) {
        eprintln!("bench: {measurement} is void: {why}");
        self.voids.push((measurement, why));
    }

    /// What went wrong at all.
    pub(crate) fn voids(&self) -> &[(&'static str, String)] {
        &self.voids
    }

    /// What was measured well, and is not as it must be.
    pub(crate) fn fail(&mut self, why: String) {
        self.failures.push(why);
    }

    pub(crate) fn failures(&self) -> &[String] {
        &self.failures
    }

    /// What a figure alone does not say.
    pub(crate) fn note(&mut self, note: String) {
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    /// What stands below a picture: where and when it was measured, and with which versions.
    pub(crate) fn foot(&self, programs: &[&str]) -> Vec<String> {
        let settings = self.settings.iter().filter(|(name, _)| ["date", "machine", "cores", "build"].contains(name));
        let settings = settings.map(|(_, value)| value.as_str()).collect::<Vec<_>>();
        let versions = self.versions.iter().filter(|(name, _)| programs.contains(name));
        // The rest of a version is how it is set up.
        let versions = versions.map(|(name, value)| format!("{name} {}", value.split(',').next().unwrap_or_default()));
        vec![format!("{}.", settings.join("; ")), format!("{}.", versions.collect::<Vec<_>>().join(", "))]
    }

    pub(crate) fn figure(&mut self, figure: Figure) {
        self.figures.push(figure);
    }

    /// One figure divided by another, round by round: what both had to bear cancels out.
    pub(crate) fn ratio(&mut self, what: String, above: &Figure, below: &Figure, goal: Option<Goal>) {
        let values = above.values.iter().zip(&below.values).map(|(above, below)| above / below).collect();
        let measurement = above.measurement;
        self.figure(Figure { measurement, what, unit: "×", values, goal, ..Figure::default() });
    }

    /// The same of what a task costs all processes together. It leaves out what was waited for, and with it what others
    /// did to the disk meanwhile: beside the ratio of the rates, it tells where a difference comes from.
    pub(crate) fn ratio_of_cpu(&mut self, what: String, above: &Figure, below: &Figure) {
        let all = |round: &Vec<(&str, f64)>| round.iter().map(|(_, micros)| micros).sum::<f64>();
        let values = above.cpu.iter().zip(&below.cpu).map(|(above, below)| all(below) / all(above)).collect();
        let measurement = above.measurement;
        self.figure(Figure { measurement, what, unit: "×", values, ..Figure::default() });
    }

    pub(crate) fn json(&self) -> Value {
        let pairs = |pairs: &[(&str, String)]| {
            Value::Object(pairs.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect())
        };
        let figures = self.figures.iter().map(|figure| {
            let (least, most) = spread(&figure.values);
            let median = median(&figure.values);
            let latencies = (!figure.latencies.is_empty()).then(|| {
                let [p50, p99] = medians(&figure.latencies);
                json!({ "p50": p50, "p99": p99 })
            });
            json!({
                "measurement": figure.measurement,
                "what": figure.what,
                "unit": figure.unit,
                "median": median,
                "min": least,
                "max": most,
                "rounds": figure.values,
                "latency_us": latencies,
                "cpu_us_a_task": cpu_medians(&figure.cpu)
                    .into_iter()
                    .map(|(name, value)| (name.to_owned(), json!(value)))
                    .collect::<serde_json::Map<_, _>>(),
                "durability": Some(figure.durability).filter(|durability| !durability.is_empty()),
                "goal": figure.goal.map(|goal| goal.to_string()),
                "met": figure.goal.map(|goal| goal.met(median)),
            })
        });
        let reasons = |reasons: &[(&str, String)]| {
            let reasons = reasons.iter().map(|(name, why)| json!({ "measurement": name, "why": why }));
            reasons.collect::<Vec<_>>()
        };
        json!({
            "settings": pairs(&self.settings),
            "versions": pairs(&self.versions),
            "figures": figures.collect::<Vec<_>>(),
            "missing": reasons(&self.missing),
            "void": reasons(&self.voids),
            "notes": self.notes,
            "failures": self.failures,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const HEAD: [&str; COLUMNS] =
            ["measurement", "what", "median (min to max)", "durability", "a call, p50 and p99", "CPU a task", "goal"];
        let mut rows = vec![HEAD.map(str::to_owned)];
        rows.extend(self.figures.iter().map(row));
        for (measurement, why) in &self.missing {
            rows.push([(*measurement).to_owned(), why.clone(), "missing".to_owned()].pad());
        }
        for (measurement, why) in &self.voids {
            let line = why.lines().next().unwrap_or_default().to_owned();
            rows.push([(*measurement).to_owned(), line, "VOID".to_owned()].pad());
        }
        let widths: [_; COLUMNS] =
            std::array::from_fn(|column| rows.iter().map(|row| row[column].chars().count()).max());
        for (number, row) in rows.iter().enumerate() {
            for (cell, width) in row.iter().zip(widths) {
                write!(f, "| {cell:<0$} ", width.unwrap_or(0))?;
            }
            writeln!(f, "|")?;
            if number == 0 {
                for width in widths {
                    write!(f, "|-{:-<1$}-", "", width.unwrap_or(0))?;
                }
                writeln!(f, "|")?;
            }
        }
        writeln!(f)?;
        for (name, value) in &self.settings {
            writeln!(f, "- {name}: {value}")?;
        }
        for (name, value) in &self.versions {
            writeln!(f, "- {name}: {value}")?;
        }
        for note in self.notes.iter().chain(&self.failures) {
            writeln!(f, "- {note}")?;
        }
        Ok(())
    }
}

/// Fills a row up with empty cells.
trait Pad {
    fn pad(self) -> [String; COLUMNS];
}

impl<const N: usize> Pad for [String; N] {
    fn pad(self) -> [String; COLUMNS] {
        let mut cells = self.into_iter();
        std::array::from_fn(|_| cells.next().unwrap_or_default())
    }
}

fn row(figure: &Figure) -> [String; COLUMNS] {
    let median = median(&figure.values);
    let (least, most) = spread(&figure.values);
    let value = if figure.values.len() > 1 {
        format!("{} {} ({} to {})", number(median), figure.unit, number(least), number(most))
    } else {
        format!("{} {}", number(median), figure.unit)
    };
    let latency = if figure.latencies.is_empty() {
        String::new()
    } else {
        let [p50, p99] = medians(&figure.latencies);
        format!("{}, {} µs", number(p50), number(p99))
    };
    let cpu = cpu_medians(&figure.cpu);
    let cpu = cpu.iter().map(|(name, value)| format!("{name} {value:.1} µs")).collect::<Vec<_>>().join(", ");
    let goal = figure.goal.map_or_else(String::new, |goal| {
        let met = if goal.met(median) { "met" } else { "NOT MET" };
        format!("{goal}: {met}")
    });
    [figure.measurement.to_owned(), figure.what.clone(), value, figure.durability.to_owned(), latency, cpu, goal]
}

/// With as many digits as the measurement bears.
pub(crate) fn number(value: f64) -> String {
    if value < 10.0 {
        return format!("{value:.2}");
    }
    if value < 100.0 {
        return format!("{value:.1}");
    }
    count(value as u64)
}

/// A whole number, in groups.
pub(crate) fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// The value below which this share of the values lies; 0 of none.
pub(crate) fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    sorted.get((last as f64 * share).round() as usize).copied().unwrap_or_default()
}

pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        length => f64::midpoint(sorted[(length - 1) / 2], sorted[length / 2]),
    }
}

fn spread(values: &[f64]) -> (f64, f64) {
    (quantile(values, 0.0), quantile(values, 1.0))
}

fn medians(pairs: &[[f64; 2]]) -> [f64; 2] {
    [0, 1].map(|index| median(&pairs.iter().map(|pair| pair[index]).collect::<Vec<_>>()))
}

fn cpu_medians(rounds: &[Vec<(&'static str, f64)>]) -> Vec<(&'static str, f64)> {
    let names = rounds.first().map(|round| round.iter().map(|(name, _)| *name).collect::<Vec<_>>());
    let of = |name: &str| {
        let values = rounds.iter().flatten().filter(|(found, _)| *found == name).map(|(_, value)| *value);
        median(&values.collect::<Vec<_>>())
    };
    names.unwrap_or_default().into_iter().map(|name| (name, of(name))).collect()
}
