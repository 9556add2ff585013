//! Results as a table for people or as JSON lines for programs.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::stats::Summary;

/// The system that the others are compared with in the table.
pub const BASE: &str = "floor";

/// What one system achieved in one case of a benchmark.
#[derive(Clone, Debug)]
pub struct Line {
    /// The case.
    pub case: &'static str,
    /// The system.
    pub system: &'static str,
    /// Unit of the figures.
    pub unit: &'static str,
    /// The figures, or why there are none.
    pub result: Result<Summary, String>,
}

/// One JSON object a line. Figures are rounded to a thousandth of their unit.
#[must_use]
pub fn json_lines(bench: &str, lines: &[Line]) -> String {
    let mut text = String::new();
    for Line { case, system, unit, result } in lines {
        let object: Value = match result {
            Ok(Summary { median, min, max, runs }) => json!({
                "bench": bench, "case": case, "system": system, "unit": unit,
                "median": round(*median), "min": round(*min), "max": round(*max), "runs": runs,
            }),
            Err(why) => json!({"bench": bench, "case": case, "system": system, "skipped": why}),
        };
        let _ = writeln!(text, "{object}");
    }
    text
}

fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// One table a case: median, extremes, and the median as a multiple of [`BASE`]'s.
#[must_use]
pub fn table(bench: &str, lines: &[Line]) -> String {
    let mut text = String::new();
    let mut cases: Vec<&str> = lines.iter().map(|line| line.case).collect();
    cases.dedup();
    for case in cases {
        let of_case: Vec<&Line> = lines.iter().filter(|line| line.case == case).collect();
        let base = of_case.iter().find(|line| line.system == BASE).and_then(|line| line.result.as_ref().ok());
        let unit = of_case.first().map_or("", |line| line.unit);
        let title = format!("{bench} {case} ({unit})");
        let _ = writeln!(text, "{title:<28}{:>10}{:>10}{:>10}{:>12}", "median", "min", "max", "x floor");
        for Line { system, result, .. } in of_case {
            let _ = match result {
                Ok(Summary { median, min, max, .. }) => {
                    let ratio = base
                        .filter(|base| base.median > 0.0)
                        .map_or("-".to_owned(), |base| format!("{:.2}", median / base.median));
                    writeln!(text, "{system:<28}{median:>10.2}{min:>10.2}{max:>10.2}{ratio:>12}")
                }
                Err(why) => writeln!(text, "{system:<28}skipped: {why}"),
            };
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines() -> Vec<Line> {
        let line = |case, system, result| Line { case, system, unit: "ms", result };
        let of = |median| Ok(Summary { median, min: 1.0, max: 9.87654, runs: 3 });
        vec![
            line("first-byte", "vmm", of(3.0)),
            line("first-byte", "qemu", Err("not \"found\"".to_owned())),
            line("first-byte", "floor", of(2.0)),
            line("other", "vmm", of(3.0)),
        ]
    }

    #[test]
    fn json_has_the_keys_of_the_contract_and_one_object_a_line() {
        let text = json_lines("start", &lines());
        let objects: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(objects.len(), 4);
        let vmm = json!({"bench": "start", "case": "first-byte", "system": "vmm", "unit": "ms",
            "median": 3.0, "min": 1.0, "max": 9.877, "runs": 3});
        assert_eq!(objects[0], vmm);
        let qemu =
            json!({"bench": "start", "case": "first-byte", "system": "qemu", "skipped": "not \"found\""});
        assert_eq!(objects[1], qemu);
    }

    #[test]
    fn table_gives_ratios_to_the_floor_where_there_is_one() {
        let text = table("start", &lines());
        let row = |nth: usize| text.lines().nth(nth).unwrap().split_ascii_whitespace().collect::<Vec<_>>();
        assert_eq!(row(1), ["vmm", "3.00", "1.00", "9.88", "1.50"]);
        assert_eq!(row(2), ["qemu", "skipped:", "not", "\"found\""]);
        assert_eq!(row(3).last(), Some(&"1.00"));
        assert_eq!(row(6).last(), Some(&"-"), "no floor in this case");
    }
}
