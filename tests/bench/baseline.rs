//! The recorded ratios, and whether others are far below them.

use std::{cmp::Ordering, collections::BTreeMap, fs, io, path::PathBuf};

/// Of a recorded ratio, at the least.
pub(crate) const BOUND: f64 = 0.75;

/// Ratios by name: each found more than once, of which the median counts.
pub(crate) type Ratios = BTreeMap<String, Vec<f64>>;

/// What `baseline.json` says.
pub(crate) struct Baseline(BTreeMap<String, f64>);

impl Baseline {
    pub(crate) fn new(recorded: BTreeMap<String, f64>) -> Self {
        Self(recorded)
    }

    pub(crate) fn read() -> io::Result<Self> {
        Ok(Self(serde_json::from_str(&fs::read_to_string(file())?)?))
    }

    pub(crate) fn write(&self) -> io::Result<()> {
        fs::write(file(), format!("{}\n", serde_json::to_string_pretty(&self.0)?))
    }

    /// What this ratio must reach; nothing if it was never recorded.
    pub(crate) fn bound(&self, what: &str) -> Option<f64> {
        self.0.get(what).map(|recorded| rounded(recorded * BOUND))
    }

    /// Those below their bounds, of one try.
    pub(crate) fn below<'r>(&self, medians: &'r BTreeMap<String, f64>) -> Vec<&'r str> {
        let below = |(what, median): &(&'r String, &f64)| {
            self.bound(what).is_some_and(|bound| median.partial_cmp(&&bound).is_none_or(Ordering::is_lt))
        };
        medians.iter().filter(below).map(|(what, _)| what.as_str()).collect()
    }

    /// What the tries say together: a ratio has fallen if it is below its bound in each of them, as noise does not choose the
    /// same one twice. In words, either way.
    pub(crate) fn judge(&self, tries: &[BTreeMap<String, f64>]) -> Result<String, String> {
        let of = |what: &str, medians: &BTreeMap<String, f64>| medians.get(what).copied().unwrap_or_default();
        let recorded = |what: &str| self.0.get(what).copied().unwrap_or_default();
        let Some(last) = tries.last() else { return Err("nothing was measured".to_owned()) };
        if let Some(gone) = self.0.keys().find(|what| !last.contains_key(*what)) {
            return Err(format!("FAILED: {gone} was recorded, and not measured"));
        }
        let fallen =
            self.below(last).into_iter().filter(|what| tries.iter().all(|medians| self.below(medians).contains(what)));
        let fallen = fallen.map(|what| {
            let found = tries.iter().map(|medians| of(what, medians).to_string()).collect::<Vec<_>>();
            format!("{what}: {}, recorded {}", found.join(" and then "), recorded(what))
        });
        let fallen = fallen.collect::<Vec<_>>();
        if !fallen.is_empty() {
            return Err(format!("FAILED, below {BOUND} of the recorded: {}", fallen.join("; ")));
        }
        let share = |what: &str| tries.iter().map(|medians| of(what, medians) / recorded(what)).fold(0.0, f64::max);
        let lowest = self.0.keys().map(|what| (share(what), what)).min_by(|one, other| one.0.total_cmp(&other.0));
        let lowest =
            lowest.map_or_else(String::new, |(share, what)| format!("; the lowest, {what}, is {share:.2} of it"));
        let again = if tries.len() > 1 { " at the second try" } else { "" };
        Ok(format!("ok{again}: {} ratios, none below {BOUND} of the recorded one{lowest}", self.0.len()))
    }
}

/// The medians, with as many digits as the measurement bears.
pub(crate) fn medians(ratios: &Ratios) -> BTreeMap<String, f64> {
    ratios.iter().map(|(what, values)| (what.clone(), rounded(crate::report::median(values)))).collect()
}

fn rounded(ratio: f64) -> f64 {
    (ratio * 1e3).round() / 1e3
}

fn file() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/bench/baseline.json")
}
