//! How results are written: tables on a terminal, lines with tabs elsewhere, JSON where it is asked for.
//!
//! `cell` is one thing that is told, `table` how things are set in columns.

mod cell;
mod table;

use std::{
    fmt::Write as _,
    io::{ErrorKind, IsTerminal, Write, stdout},
};

use data_queue_client::TaskValue;
use serde_json::json;

pub(crate) use self::cell::Cell;
use self::table::Table;
use crate::{Stop, args::Output};

struct Field {
    name: &'static str,
    cell: Cell,
    is_for_json: bool,
}

/// What is told of one thing, in order.
#[derive(Default)]
pub(crate) struct Row(Vec<Field>);

impl Row {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// A column, and a field of the JSON object; that has `_seconds` at the end of its name if it is a length of time.
    pub(crate) fn with(mut self, name: &'static str, cell: impl Into<Cell>) -> Self {
        self.0.push(Field { name, cell: cell.into(), is_for_json: false });
        self
    }

    /// A field of the JSON object only.
    pub(crate) fn with_json(mut self, name: &'static str, cell: impl Into<Cell>) -> Self {
        self.0.push(Field { name, cell: cell.into(), is_for_json: true });
        self
    }

    /// As columns only these, in this order; the others in JSON.
    pub(crate) fn only(mut self, names: &[&str]) -> Self {
        let place = |field: &Field| names.iter().position(|name| *name == field.name);
        self.0.iter_mut().for_each(|field| field.is_for_json |= place(field).is_none());
        self.0.sort_by_key(|field| place(field).unwrap_or(usize::MAX));
        self
    }

    fn columns(&self) -> impl Iterator<Item = &Field> {
        self.0.iter().filter(|field| !field.is_for_json)
    }

    fn line(&self) -> String {
        let there = self.columns().filter(|field| !matches!(field.cell, Cell::Mark(_, false)));
        let cells: Vec<_> = there.map(|field| field.cell.text(true)).collect();
        cells.join("\t") + "\n"
    }

    fn json(&self) -> String {
        let field = |Field { name, cell, .. }: &Field| {
            let name = match cell {
                Cell::Span(_) | Cell::Age(_) => format!("{name}_seconds"),
                Cell::Value(TaskValue::Bytes(_)) => "data".to_owned(),
                _ => (*name).to_owned(),
            };
            format!("{}:{}", json!(name), cell.json())
        };
        let fields: Vec<_> = self.0.iter().map(field).collect();
        format!("{{{}}}\n", fields.join(","))
    }

    /// One line for each column, for people or for programs.
    fn record(&self, is_table: bool, shade: &Shade) -> String {
        let mut text = String::new();
        let width = self.columns().map(|field| field.name.len()).max().unwrap_or_default();
        for Field { name, cell, .. } in self.columns() {
            let value = cell.text(!is_table);
            // Writing to a String does not fail.
            let _ = if is_table {
                writeln!(text, "{}{name:<width$}{}  {value}", shade.bold, shade.end)
            } else {
                writeln!(text, "{name}\t{value}")
            };
        }
        text
    }
}

/// Where results go.
pub(crate) struct Out {
    form: Output,
    shade: Shade,
    has_head: bool,
}

impl Out {
    /// In the form that was asked for, or that fits what stdout is.
    pub(crate) fn new(asked: Option<Output>) -> Self {
        let fitting = if stdout().is_terminal() { Output::Table } else { Output::Plain };
        Self { form: asked.unwrap_or(fitting), shade: Shade::of_stdout(), has_head: false }
    }

    /// Things of one kind: a table, a line each, or an object each. They may come in several calls.
    pub(crate) fn rows(&mut self, rows: &[Row]) -> Result<(), Stop> {
        let text = match self.form {
            Output::Table => self.table(rows),
            Output::Plain => rows.iter().map(Row::line).collect(),
            Output::Json => rows.iter().map(Row::json).collect(),
        };
        write(&text)
    }

    /// One of many things that are looked at one by one: a record, a line, or an object.
    pub(crate) fn item(&mut self, row: &Row) -> Result<(), Stop> {
        let gap = if std::mem::replace(&mut self.has_head, true) { "\n" } else { "" };
        match self.form {
            Output::Table => write(&format!("{gap}{}", row.record(true, &self.shade))),
            Output::Plain => write(&row.line()),
            Output::Json => write(&row.json()),
        }
    }

    /// One thing: a record, with a line for each of its fields, or an object.
    pub(crate) fn record(&self, row: &Row) -> Result<(), Stop> {
        match self.form {
            Output::Json => write(&row.json()),
            form => write(&row.record(form == Output::Table, &self.shade)),
        }
    }

    /// What was done: in words, or as a line or an object.
    pub(crate) fn done(&self, words: &str, row: &Row) -> Result<(), Stop> {
        match self.form {
            Output::Table => write(&format!("{words}\n")),
            Output::Plain => write(&row.line()),
            Output::Json => write(&row.json()),
        }
    }

    /// The same things again: on a terminal in the place of the last ones.
    pub(crate) fn again(&mut self, rows: &[Row]) -> Result<(), Stop> {
        if self.form != Output::Table || !stdout().is_terminal() {
            return self.rows(rows);
        }
        self.has_head = false;
        let text = self.table(rows);
        write(&format!("\u{1b}[H\u{1b}[J{text}"))
    }

    /// Whether people look at it while it changes: what moves goes to a screen then.
    pub(crate) fn is_watched(&self) -> bool {
        let is_dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
        self.form == Output::Table && stdout().is_terminal() && !is_dumb
    }

    /// The lines of a table with its head, not wider than this: what does not fit is left out, the columns `less` first.
    pub(crate) fn fitted(&self, rows: &[Row], less: &[&str], width: usize) -> Vec<String> {
        let mut table = Table::of(rows);
        for name in less {
            if table.width() > width {
                table.leave_out(name);
            }
        }
        let mut lines = table.lines(true).into_iter().map(|line| line.chars().take(width).collect::<String>());
        let head = lines.next().map(|head| format!("{}{head}{}", self.shade.bold, self.shade.end));
        head.into_iter().chain(lines).collect()
    }

    fn table(&mut self, rows: &[Row]) -> String {
        if rows.is_empty() {
            return String::new();
        }
        let has_head = std::mem::replace(&mut self.has_head, true);
        let mut lines = Table::of(rows).lines(!has_head);
        if let Some(head) = lines.first_mut().filter(|_| !has_head) {
            *head = format!("{}{head}{}", self.shade.bold, self.shade.end);
        }
        lines.join("\n") + "\n"
    }
}

pub(crate) fn write(text: &str) -> Result<(), Stop> {
    let mut stdout = stdout().lock();
    written(stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()))
}

/// Whoever reads may stop: that is no failure, and nothing more is to be said.
pub(crate) fn written(written: std::io::Result<()>) -> Result<(), Stop> {
    written.map_err(|error| match error.kind() {
        ErrorKind::BrokenPipe => Stop::unread(),
        _ => Stop::failed(format!("cannot write to stdout: {error}")),
    })
}

/// Colours, if they are wanted.
#[derive(Default)]
pub(crate) struct Shade {
    pub(crate) bold: &'static str,
    pub(crate) bar: &'static str,
    pub(crate) end: &'static str,
}

impl Shade {
    pub(crate) fn of_stdout() -> Self {
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        if refused || !stdout().is_terminal() {
            return Self::default();
        }
        Self { bold: "\u{1b}[1m", bar: "\u{1b}[36m", end: "\u{1b}[0m" }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use std::time::Duration;

    use super::*;

    fn out(form: Output) -> Out {
        Out { form, shade: Shade::default(), has_head: false }
    }

    #[test]
    fn an_object_keeps_the_value_as_it_was() {
        let value = TaskValue::Json("{\"n\": 12345678901234567890123,\n \"n\": 1.0}".into());
        let row = Row::new()
            .with("id", "a\"b")
            .with("lease", Cell::Span(Some(Duration::from_millis(1_500))))
            .with_json("retention", Cell::Span(None))
            .with("error", String::new())
            .with_json("paused", true)
            .with("value", Cell::Value(value));
        let json = row.json();
        assert_eq!(
            json,
            "{\"id\":\"a\\\"b\",\"lease_seconds\":1.5,\"retention_seconds\":null,\"error\":null,\"paused\":true,\
             \"value\":{\"n\": 12345678901234567890123,  \"n\": 1.0}}\n"
        );
        assert!(serde_json::from_str::<serde_json::Value>(&json).is_ok());
        assert_eq!(row.line(), "a\"b\t1s 500ms\t-\t{\"n\": 12345678901234567890123,  \"n\": 1.0}\n");
        assert_eq!(Row::new().with("value", Cell::Value(TaskValue::Bytes("é".into()))).json(), "{\"data\":\"w6k=\"}\n");
    }

    #[test]
    fn a_table_is_aligned_has_one_head_and_cuts_what_is_long() {
        let row = |name: &str, ready: u64| Row::new().with("queue", name).with("ready", ready);
        let mut out = out(Output::Table);
        assert_eq!(out.table(&[row("a", 5), row("mail", 1_000)]), "QUEUE  READY\na          5\nmail    1000\n");
        assert_eq!(out.table(&[row(&"x".repeat(70), 1)]), format!("{}…      1\n", "x".repeat(60)));
        assert_eq!(out.table(&[]), "");
    }
}
