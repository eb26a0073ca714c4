//! Things in columns.

use super::{Cell, Row};

/// A cell of a table is cut here, in characters: lines that wrap are hard to read. Records show all.
const WIDEST_CELL: usize = 60;
/// Between two columns.
const GAP: &str = "  ";

/// A column: its cells are as wide as the widest of them.
struct Column {
    name: &'static str,
    head: String,
    cells: Vec<String>,
    is_number: bool,
    width: usize,
}

pub(super) struct Table {
    columns: Vec<Column>,
    rows: usize,
}

impl Table {
    pub(super) fn of(rows: &[Row]) -> Self {
        let names: Vec<_> = rows.first().into_iter().flat_map(Row::columns).map(|field| field.name).collect();
        let column = |(at, name): (usize, &'static str)| {
            let cells: Vec<&Cell> =
                rows.iter().filter_map(|row| row.columns().nth(at)).map(|field| &field.cell).collect();
            Column::of(name, &cells)
        };
        Self { columns: names.into_iter().enumerate().map(column).collect(), rows: rows.len() }
    }

    pub(super) fn width(&self) -> usize {
        let gaps = self.columns.len().saturating_sub(1) * GAP.len();
        self.columns.iter().map(|column| column.width).sum::<usize>() + gaps
    }

    pub(super) fn leave_out(&mut self, name: &str) {
        self.columns.retain(|column| column.name != name);
    }

    pub(super) fn lines(&self, has_head: bool) -> Vec<String> {
        let head = has_head.then(|| self.line(|column| &column.head));
        let cells = (0..self.rows).map(|row| self.line(|column| column.cells.get(row).map_or("", String::as_str)));
        head.into_iter().chain(cells).collect()
    }

    fn line<'a>(&'a self, cell: impl Fn(&'a Column) -> &'a str) -> String {
        let cells: Vec<_> = self.columns.iter().map(|column| column.aligned(cell(column))).collect();
        let mut line = cells.join(GAP);
        line.truncate(line.trim_end().len());
        line
    }
}

impl Column {
    fn of(name: &'static str, cells: &[&Cell]) -> Self {
        let head = name.to_uppercase().replace('_', " ");
        // A column of numbers is one whatever its first cell is: they are told apart by all of them.
        let is_number = cells.iter().any(|cell| cell.is_number())
            && cells.iter().all(|cell| cell.is_number() || matches!(cell, Cell::Nothing));
        let cells: Vec<_> = cells.iter().map(|cell| cut(cell.text(false))).collect();
        let width = cells.iter().chain([&head]).map(|cell| cell.chars().count()).max().unwrap_or_default();
        Self { name, head, cells, is_number, width }
    }

    fn aligned(&self, cell: &str) -> String {
        let gap = " ".repeat(self.width.saturating_sub(cell.chars().count()));
        if self.is_number { format!("{gap}{cell}") } else { format!("{cell}{gap}") }
    }
}

fn cut(text: String) -> String {
    match text.char_indices().nth(WIDEST_CELL) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
