//! Line charts, written as SVG by hand: panels side by side, a legend for all of them, and lines of text below.
//!
//! A picture has a background of its own, so it reads in light and dark surroundings. A line is told by its colour and by
//! the shape of its points.

use std::{
    fmt::{self, Write},
    fs, io,
    path::{Path, PathBuf},
};

/// Of a picture and its parts, in pixels.
const WIDTH: f64 = 960.0;
const PLOT_HEIGHT: f64 = 300.0;
const MARGIN: f64 = 20.0;
/// Left of a plot for the labels of its axis, and between its end and the next panel.
const LEFT: f64 = 70.0;
const RIGHT: f64 = 14.0;
/// Of a line of text.
const LINE: f64 = 18.0;
/// Roughly a letter's width, in the legend's size.
const LETTER: f64 = 6.6;
/// Letters of a line below.
const LETTERS: usize = 160;

/// Told apart by those who see few colours, too (Okabe and Ito).
const COLORS: [&str; 7] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#555555"];

/// A picture.
pub(crate) struct Picture {
    pub(crate) title: String,
    pub(crate) panels: Vec<Panel>,
    /// What it was measured with.
    pub(crate) foot: Vec<String>,
}

/// A chart.
pub(crate) struct Panel {
    pub(crate) title: String,
    pub(crate) x: Axis,
    pub(crate) y: Axis,
    pub(crate) lines: Vec<Line>,
}

/// An axis. Its scale is logarithmic unless it begins at 0.
pub(crate) struct Axis {
    /// With the unit.
    pub(crate) label: String,
    /// Rising, from one end of the axis to the other.
    pub(crate) ticks: Vec<f64>,
    pub(crate) unit: &'static str,
}

/// A line has the same name in all panels.
pub(crate) struct Line {
    pub(crate) name: String,
    /// From left to right. Those that are not finite are left out.
    pub(crate) points: Vec<[f64; 2]>,
}

impl Axis {
    /// A logarithmic axis around these values: its ticks are 1, 2 and 5 times powers of ten.
    pub(crate) fn around(label: String, values: impl Iterator<Item = f64>) -> Self {
        let values = values.filter(|value| value.is_finite() && *value > 0.0).collect::<Vec<_>>();
        if values.is_empty() {
            return Self { label, ticks: vec![1.0, 10.0], unit: "" };
        }
        let least = values.iter().copied().fold(f64::INFINITY, f64::min);
        let most = values.iter().copied().fold(0.0, f64::max);
        let all =
            (-3..=9).flat_map(|power| [1.0, 2.0, 5.0].map(|digit| digit * 10_f64.powi(power))).collect::<Vec<_>>();
        let first = all.iter().rposition(|tick| *tick <= least).unwrap_or_default();
        let last = all.iter().position(|tick| *tick >= most).unwrap_or_default();
        // A single value gets an axis all the same.
        Self { label, ticks: all[first..=last.max(first + 1).min(all.len() - 1)].to_vec(), unit: "" }
    }

    /// Where a value lies between the ends, from 0 to 1.
    fn place(&self, value: f64) -> f64 {
        let (Some(first), Some(last)) = (self.ticks.first(), self.ticks.last()) else { return 0.0 };
        if *first > 0.0 { (value / first).ln() / (last / first).ln() } else { value / last }
    }
}

/// Where a panel's chart is.
struct Plot {
    left: f64,
    top: f64,
    width: f64,
}

impl Plot {
    fn at(&self, panel: &Panel, [x, y]: [f64; 2]) -> (f64, f64) {
        (self.left + self.width * panel.x.place(x), self.top + PLOT_HEIGHT * (1.0 - panel.y.place(y)))
    }
}

impl fmt::Display for Picture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.names();
        let foot = self.foot.iter().flat_map(|text| wrapped(text)).collect::<Vec<_>>();
        let rows = legend_rows(&names);
        let top = MARGIN + 34.0 + rows.len() as f64 * LINE + 34.0;
        let bottom = top + PLOT_HEIGHT + 62.0;
        let height = bottom + foot.len() as f64 * LINE + MARGIN / 2.0;
        writeln!(
            f,
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" font-family="Helvetica, Arial, sans-serif" font-size="12" role="img">"#
        )?;
        writeln!(f, "<title>{}</title>", escaped(&self.title))?;
        writeln!(f, r##"<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>"##)?;
        text(f, (MARGIN, MARGIN + 14.0), r##"font-size="18" font-weight="bold" fill="#1f2328""##, &self.title)?;
        for (row, entries) in rows.iter().enumerate() {
            let y = MARGIN + 44.0 + row as f64 * LINE;
            for (index, x) in entries {
                let color = color(*index);
                writeln!(f, r#"<path d="M{x} {y}h24" stroke="{color}" stroke-width="2.5"/>"#)?;
                writeln!(f, r#"<path d="{}" fill="{color}"/>"#, mark(*index, (x + 12.0, y)))?;
                text(f, (x + 30.0, y + 4.0), r##"fill="#1f2328""##, names[*index])?;
            }
        }
        let width = (WIDTH - 2.0 * MARGIN) / self.panels.len().max(1) as f64;
        for (index, panel) in self.panels.iter().enumerate() {
            let left = MARGIN + index as f64 * width + LEFT;
            panel.draw(f, &Plot { left, top, width: width - LEFT - RIGHT }, &names)?;
        }
        for (index, line) in foot.iter().enumerate() {
            let y = bottom + index as f64 * LINE;
            text(f, (MARGIN, y), r##"font-size="11" fill="#59636e""##, line)?;
        }
        writeln!(f, "</svg>")
    }
}

impl Picture {
    /// Writes it into this directory; answers the file.
    pub(crate) fn write(&self, directory: &Path, name: &str) -> io::Result<PathBuf> {
        fs::create_dir_all(directory)?;
        let path = directory.join(name);
        fs::write(&path, self.to_string())?;
        Ok(path)
    }

    /// Of all lines, as they come.
    fn names(&self) -> Vec<&str> {
        let mut names = Vec::new();
        for line in self.panels.iter().flat_map(|panel| &panel.lines) {
            if !names.contains(&line.name.as_str()) {
                names.push(&line.name);
            }
        }
        names
    }
}

impl Panel {
    fn draw(&self, f: &mut fmt::Formatter<'_>, plot: &Plot, names: &[&str]) -> fmt::Result {
        let (right, low) = (plot.left + plot.width, plot.top + PLOT_HEIGHT);
        let middle = plot.left + plot.width / 2.0;
        let title = r##"font-size="14" font-weight="bold" text-anchor="middle" fill="#1f2328""##;
        text(f, (middle, plot.top - 12.0), title, &self.title)?;
        for tick in &self.y.ticks {
            let y = plot.top + PLOT_HEIGHT * (1.0 - self.y.place(*tick));
            writeln!(f, r##"<path d="M{:.1} {y:.1}H{right:.1}" stroke="#d8dee4"/>"##, plot.left)?;
            let label = r##"text-anchor="end" fill="#59636e""##;
            text(f, (plot.left - 6.0, y + 4.0), label, &format!("{}{}", short(*tick), self.y.unit))?;
        }
        for tick in &self.x.ticks {
            let x = plot.left + plot.width * self.x.place(*tick);
            writeln!(f, r##"<path d="M{x:.1} {low:.1}v5" stroke="#59636e"/>"##)?;
            let label = r##"text-anchor="middle" fill="#59636e""##;
            text(f, (x, low + 19.0), label, &format!("{}{}", short(*tick), self.x.unit))?;
        }
        writeln!(
            f,
            r##"<path d="M{:.1} {:.1}V{low:.1}H{right:.1}" fill="none" stroke="#59636e"/>"##,
            plot.left, plot.top
        )?;
        text(f, (middle, low + 38.0), r##"text-anchor="middle" fill="#1f2328""##, &self.x.label)?;
        let (x, y) = (plot.left - 52.0, plot.top + PLOT_HEIGHT / 2.0);
        let turned = format!(r##"text-anchor="middle" fill="#1f2328" transform="rotate(-90 {x:.1} {y:.1})""##);
        text(f, (x, y), &turned, &self.y.label)?;
        for line in &self.lines {
            let index = names.iter().position(|name| *name == line.name).unwrap_or_default();
            self.draw_line(f, plot, line, index)?;
        }
        Ok(())
    }

    fn draw_line(&self, f: &mut fmt::Formatter<'_>, plot: &Plot, line: &Line, index: usize) -> fmt::Result {
        let (mut path, mut marks) = (String::new(), String::new());
        let finite =
            line.points.iter().map(|point| plot.at(self, *point)).filter(|(x, y)| x.is_finite() && y.is_finite());
        for (x, y) in finite {
            let pen = if path.is_empty() { 'M' } else { 'L' };
            write!(path, "{pen}{x:.1} {y:.1}")?;
            marks += &mark(index, (x, y));
        }
        let color = color(index);
        writeln!(f, r#"<path d="{path}" fill="none" stroke="{color}" stroke-width="2.5" stroke-linejoin="round"/>"#)?;
        writeln!(f, r#"<path d="{marks}" fill="{color}"/>"#)
    }
}

/// Which entries are in each row of the legend, and how far from the left.
fn legend_rows(names: &[&str]) -> Vec<Vec<(usize, f64)>> {
    let mut rows = vec![Vec::new()];
    let mut x = MARGIN;
    for (index, name) in names.iter().enumerate() {
        let width = 54.0 + name.chars().count() as f64 * LETTER;
        if x + width > WIDTH - MARGIN && x > MARGIN {
            rows.push(Vec::new());
            x = MARGIN;
        }
        if let Some(row) = rows.last_mut() {
            row.push((index, x));
        }
        x += width;
    }
    rows
}

fn color(index: usize) -> &'static str {
    COLORS[index % COLORS.len()]
}

/// The path of a point: circle, square, triangle or diamond.
fn mark(index: usize, (x, y): (f64, f64)) -> String {
    match index % 4 {
        0 => format!("M{:.1} {y:.1}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z", x - 4.0),
        1 => format!("M{:.1} {:.1}h8v8h-8z", x - 4.0, y - 4.0),
        2 => format!("M{x:.1} {:.1}l5 9h-10z", y - 5.5),
        _ => format!("M{x:.1} {:.1}l5 5l-5 5l-5 -5z", y - 5.0),
    }
}

fn text(f: &mut fmt::Formatter<'_>, (x, y): (f64, f64), style: &str, text: &str) -> fmt::Result {
    writeln!(f, r#"<text x="{x:.1}" y="{y:.1}" {style}>{}</text>"#, escaped(text))
}

/// The lines of a text.
fn wrapped(text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.is_empty() => *line += word,
            Some(line) if line.chars().count() + 1 + word.chars().count() <= LETTERS => *line += &format!(" {word}"),
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// A tick's number, thousands as k.
fn short(value: f64) -> String {
    if value >= 1e6 {
        format!("{}M", value / 1e6)
    } else if value >= 1e3 {
        format!("{}k", value / 1e3)
    } else {
        format!("{}", (value * 1e3).round() / 1e3)
    }
}
