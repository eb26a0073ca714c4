//! The values to insert: numbers, or the lines of a file. A file is read twice, and never held as a whole.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    ops::Range,
    path::{Path, PathBuf},
};

use serde::de::IgnoredAny;

use crate::Stop;

/// The most values in a request.
const BATCH_VALUES: usize = 500;
/// A request is closed when its values have this many bytes: 1 MiB. A larger value goes alone.
const BATCH_BYTES: usize = 1 << 20;
/// The longest line that is read: 64 MiB.
const LINE_BYTES: u64 = 64 << 20;

/// Where the values come from.
pub(crate) struct Source {
    values: Values,
    len: u64,
    taken: u64,
    // Read, and too large for the batch before.
    next: Option<String>,
}

enum Values {
    Numbers(Range<u64>),
    Lines(Lines),
}

/// Values for one request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Batch {
    /// The number of the first value, from 1: its line.
    pub(crate) first: u64,
    pub(crate) values: Vec<String>,
}

impl Source {
    /// The numbers from 0.
    pub(crate) fn numbers(count: u64) -> Self {
        Self { values: Values::Numbers(0..count), len: count, taken: 0, next: None }
    }

    /// The lines of a file, all of which are JSON.
    pub(crate) fn lines(path: &Path) -> Result<Self, Stop> {
        let mut lines = Lines::open(path)?;
        while lines.next()?.is_some() {}
        if lines.read == 0 {
            return Err(Stop::failed(format!("{} has no lines", path.display())));
        }
        Ok(Self { len: lines.read, values: Values::Lines(Lines::open(path)?), taken: 0, next: None })
    }

    /// How many values there are in all.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// The next values, or none at the end.
    pub(crate) fn batch(&mut self) -> Result<Option<Batch>, Stop> {
        let mut values = Vec::new();
        let mut bytes = 0;
        while values.len() < BATCH_VALUES {
            let Some(value) = self.take()? else { break };
            if !values.is_empty() && bytes + value.len() > BATCH_BYTES {
                self.next = Some(value);
                break;
            }
            bytes += value.len();
            values.push(value);
        }
        let first = self.taken + 1;
        self.taken += values.len() as u64;
        Ok((!values.is_empty()).then_some(Batch { first, values }))
    }

    /// What the value of this number is called.
    pub(crate) fn name(&self, number: u64) -> String {
        match &self.values {
            Values::Numbers(_) => format!("number {}", number - 1),
            Values::Lines(lines) => lines.name(number),
        }
    }

    fn take(&mut self) -> Result<Option<String>, Stop> {
        if let Some(value) = self.next.take() {
            return Ok(Some(value));
        }
        match &mut self.values {
            Values::Numbers(numbers) => Ok(numbers.next().map(|number| number.to_string())),
            Values::Lines(lines) => lines.next(),
        }
    }
}

struct Lines {
    file: BufReader<File>,
    path: PathBuf,
    read: u64,
}

impl Lines {
    fn open(path: &Path) -> Result<Self, Stop> {
        let cannot = |why: String| Stop::failed(format!("cannot read {}: {why}", path.display()));
        let file = File::open(path).map_err(|error| cannot(error.to_string()))?;
        // It is opened twice, which a pipe does not survive.
        if !file.metadata().is_ok_and(|about| about.is_file()) {
            return Err(cannot("it is not a regular file".into()));
        }
        Ok(Self { file: BufReader::new(file), path: path.to_owned(), read: 0 })
    }

    /// The next line without its end, exactly as it stands. A carriage return is white space of the JSON before it.
    fn next(&mut self) -> Result<Option<String>, Stop> {
        let mut line = Vec::new();
        let most = LINE_BYTES + 1;
        let got = self.file.by_ref().take(most).read_until(b'\n', &mut line);
        let got = got.map_err(|error| Stop::failed(format!("cannot read {}: {error}", self.path.display())))?;
        if got == 0 {
            return Ok(None);
        }
        self.read += 1;
        if line.last() == Some(&b'\n') {
            line.pop();
        } else if line.len() as u64 == most {
            return Err(Stop::failed(format!("{} is longer than 64 MiB", self.name(self.read))));
        }
        let line =
            String::from_utf8(line).map_err(|_| Stop::failed(format!("{} is not UTF-8", self.name(self.read))))?;
        match serde_json::from_str::<IgnoredAny>(&line) {
            Ok(_) => Ok(Some(line)),
            Err(error) => {
                let place = format!("column {}", error.column());
                Err(Stop::failed(format!("{} is not JSON ({place})", self.name(self.read))))
            }
        }
    }

    fn name(&self, number: u64) -> String {
        format!("line {number} of {}", self.path.display())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    /// A file that is gone when the test is.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str, content: &[u8]) -> Self {
            let path = std::env::temp_dir().join(format!("data-queue-validate-{}-{name}", std::process::id()));
            std::fs::write(&path, content).unwrap();
            Self(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    fn all(mut source: Source) -> Vec<Batch> {
        let mut batches = Vec::new();
        while let Ok(Some(batch)) = source.batch() {
            batches.push(batch);
        }
        batches
    }

    #[test]
    fn numbers_come_in_requests_of_five_hundred() {
        let batches = all(Source::numbers(1001));
        let firsts: Vec<_> = batches.iter().map(|batch| (batch.first, batch.values.len())).collect();
        assert_eq!(firsts, [(1, 500), (501, 500), (1001, 1)]);
        assert_eq!(batches[2].values, ["1000"]);
    }

    #[test]
    fn lines_are_taken_as_they_stand() {
        let file = Scratch::new("verbatim", b"{\"a\":1,\"a\":2}\n 1e400 \r\n\"\\ud800\"\n7\n7");
        let source = Source::lines(&file.0).unwrap_or_else(|Stop(_, line)| panic!("{line}"));
        assert_eq!(source.len(), 5);
        let batches = all(source);
        assert_eq!(batches[0].values, ["{\"a\":1,\"a\":2}", " 1e400 \r", "\"\\ud800\"", "7", "7"]);
    }

    #[test]
    fn a_request_stays_within_a_mebibyte_unless_one_value_is_larger() {
        let text = |bytes: usize| format!("\"{}\"\n", "x".repeat(bytes));
        let content = [text(600_000), text(600_000), text(2_000_000), text(1), text(1)].concat();
        let file = Scratch::new("large", content.as_bytes());
        let batches = all(Source::lines(&file.0).unwrap_or_else(|Stop(_, line)| panic!("{line}")));
        let shape: Vec<_> = batches.iter().map(|batch| (batch.first, batch.values.len())).collect();
        assert_eq!(shape, [(1, 1), (2, 1), (3, 1), (4, 2)]);
    }

    #[test]
    fn a_line_that_is_no_json_is_named_and_not_shown() {
        for (name, content, line) in [
            ("word", &b"1\nhush\n"[..], "line 2 of"),
            ("blank", b"1\n2\n\n", "line 3 of"),
            ("latin", b"\"\xe9\"\n", "line 1 of"),
            ("two", b"1 2\n", "line 1 of"),
            ("none", b"", "has no lines"),
        ] {
            let file = Scratch::new(name, content);
            let Err(Stop(code, text)) = Source::lines(&file.0) else { panic!("{name}") };
            assert_eq!(code, 1);
            assert!(text.contains(line) && !text.contains("hush"), "{text}");
        }
        let Err(Stop(_, text)) = Source::lines(&std::env::temp_dir()) else { panic!("a directory") };
        assert!(text.contains("not a regular file"), "{text}");
    }
}
