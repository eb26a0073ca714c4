//! What the comparison of tests/bench concludes from figures, and how it draws them. That it measures anything is shown by
//! `tests/bench/run --smoke`.
#![allow(clippy::unwrap_used, dead_code, missing_docs, unreachable_pub)]

#[path = "bench/baseline.rs"]
mod baseline;
#[path = "bench/fault.rs"]
mod fault;
#[path = "bench/ledger.rs"]
mod ledger;
#[path = "bench/picture.rs"]
mod picture;
#[path = "bench/report.rs"]
mod report;

use std::collections::BTreeMap;

use baseline::Baseline;
use ledger::{Ledger, payload};
use picture::{Axis, Line, Panel, Picture};
use report::{Figure, Goal, Report};

fn ratios(pairs: &[(&str, f64)]) -> BTreeMap<String, f64> {
    pairs.iter().map(|(what, ratio)| ((*what).to_owned(), *ratio)).collect()
}

#[test]
fn a_ratio_has_fallen_when_it_is_a_quarter_below_in_every_try() {
    let baseline = Baseline::new(ratios(&[("insert", 0.4), ("pop", 0.2)]));
    let (whole, low, other) = (
        ratios(&[("insert", 0.31), ("pop", 0.2)]),
        ratios(&[("insert", 0.29), ("pop", 0.2)]),
        ratios(&[("insert", 0.4), ("pop", 0.1)]),
    );
    assert!(baseline.judge(std::slice::from_ref(&whole)).is_ok());
    assert!(baseline.judge(std::slice::from_ref(&low)).is_err());
    assert!(baseline.judge(&[low.clone(), whole]).unwrap().starts_with("ok at the second try"));
    assert!(baseline.judge(&[low.clone(), other]).is_ok(), "noise does not choose the same ratio twice");
    let verdict = baseline.judge(&[low.clone(), low]).unwrap_err();
    assert_eq!(verdict, "FAILED, below 0.75 of the recorded: insert: 0.29 and then 0.29, recorded 0.4");
}

#[test]
fn a_ratio_that_was_recorded_must_be_measured_and_be_a_number() {
    let baseline = Baseline::new(ratios(&[("insert", 0.4)]));
    assert!(baseline.judge(&[ratios(&[("pop", 0.4)])]).unwrap_err().contains("not measured"));
    assert!(baseline.judge(&[ratios(&[("insert", f64::NAN)])]).is_err());
    assert!(
        baseline.judge(&[ratios(&[("insert", 0.4), ("new", 0.0)])]).is_ok(),
        "one that was not recorded is not judged"
    );
}

#[test]
fn a_ledger_tells_lost_doubled_and_changed_tasks() {
    let mut ledger = Ledger::new(20);
    ledger.deliver(&payload(0, 20)).unwrap();
    assert!(ledger.deliver(&payload(0, 20)).is_err(), "twice");
    assert!(ledger.deliver(&payload(1, 19)).is_err(), "too short");
    ledger.acked(1);
    assert!(ledger.verify(2).is_err(), "one is lost");
    ledger.verify(1).unwrap();
}

#[test]
fn a_figure_says_its_durability_and_whether_its_goal_is_met() {
    let mut report = Report::default();
    let figure = |what: &str, value, goal| Figure {
        measurement: "p3",
        what: what.to_owned(),
        unit: "×",
        values: vec![value],
        durability: "fsync before OK",
        goal: Some(goal),
        ..Figure::default()
    };
    report.figure(figure("fast", 2.0, Goal::AtLeast(1.5)));
    report.figure(figure("slow", 2.0, Goal::AtMost(1.5)));
    let table = report.to_string();
    let row = |what| table.lines().find(|line| line.contains(what)).unwrap();
    assert!(row("fast").contains("| fsync before OK |") && row("fast").contains("≥ 1.5: met"));
    assert!(row("slow").contains("≤ 1.5: NOT MET"));
    let cells = |line: &str| line.matches(" |").count();
    assert_eq!(cells(row("fast")), cells(table.lines().next().unwrap()));
}

#[test]
fn a_picture_is_whole_xml_with_a_background_and_leaves_out_what_is_no_number() {
    let line = |name: &str, points: &[[f64; 2]]| Line { name: name.to_owned(), points: points.to_vec() };
    let picture = Picture {
        title: "a < b & c".to_owned(),
        panels: vec![Panel {
            title: "Insert".to_owned(),
            x: Axis { label: "callers".to_owned(), ticks: vec![1.0, 4.0], unit: "" },
            y: Axis::around("a second".to_owned(), [700.0, 4_000.0, f64::NAN].into_iter()),
            lines: vec![line("one", &[[1.0, 700.0], [4.0, 4_000.0]]), line("none", &[[1.0, f64::NAN], [4.0, 0.0]])],
        }],
        foot: vec!["word ".repeat(100)],
    };
    let svg = picture.to_string();
    assert!(svg.contains("a &lt; b &amp; c") && !svg.contains("NaN") && !svg.contains("inf"));
    assert!(svg.contains(r##"rx="8" fill="#ffffff""##), "it is read on a dark page, too");
    assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
    assert!(svg.contains(">500</text>") && svg.contains(">5k</text>"), "the axis has the values between its ends");
}

#[test]
fn an_axis_of_nothing_is_an_axis() {
    assert!(Axis::around(String::new(), std::iter::empty()).ticks.len() >= 2);
    assert_eq!(Axis::around(String::new(), [5.0].into_iter()).ticks, [5.0, 10.0]);
}
