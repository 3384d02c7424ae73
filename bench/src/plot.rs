//! Draws a run as an SVG picture: latency by percentile, and throughput and tail latency over time.
//!
//! Written by hand rather than with a plotting library: three panels of lines need little, and the percentile axis,
//! which is linear in the number of nines, is one that such libraries do not offer.

use crate::driver::Outcome;
use crate::report::{Point, Report, grouped, together, total};
use crate::workload::Command;
use hdrhistogram::Histogram;
use std::fmt::Write;

const WIDTH: f64 = 960.0;
/// What the time axes say.
const SECONDS: &str = "seconds since the measurement began";
const LEFT: f64 = 90.0;
const RIGHT: f64 = 40.0;
/// Colours that people with the common kinds of colour blindness tell apart.
const COLOURS: [&str; 5] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#444444"];

/// A rectangle in which data are drawn, and how its axes map to it.
struct Panel {
    top: f64,
    height: f64,
    x: (f64, f64),
    y: (f64, f64),
    log_y: bool,
}

impl Panel {
    fn x(&self, x: f64) -> f64 {
        LEFT + (x - self.x.0) / (self.x.1 - self.x.0).max(1e-12) * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, y: f64) -> f64 {
        let scale = |v: f64| if self.log_y { v.max(1e-9).log10() } else { v };
        let (low, high) = (scale(self.y.0), scale(self.y.1));
        self.top + self.height * (1.0 - (scale(y) - low) / (high - low).max(1e-12))
    }

    fn bottom(&self) -> f64 {
        self.top + self.height
    }

    /// Title, frame, and the horizontal lines of a grid with their labels.
    fn frame(&self, svg: &mut String, title: &str, ticks: &[(f64, String)]) -> std::fmt::Result {
        writeln!(
            svg,
            r#"<text x="{LEFT}" y="{:.1}" class="title">{title}</text>"#,
            self.top - 12.0
        )?;
        for (value, label) in ticks {
            let y = self.y(*value);
            writeln!(
                svg,
                r#"<line x1="{LEFT}" x2="{:.1}" y1="{y:.1}" y2="{y:.1}" class="grid"/>"#,
                WIDTH - RIGHT
            )?;
            writeln!(
                svg,
                r#"<text x="{:.1}" y="{:.1}" class="end">{label}</text>"#,
                LEFT - 8.0,
                y + 4.0
            )?;
        }
        writeln!(
            svg,
            r#"<rect x="{LEFT}" y="{:.1}" width="{:.1}" height="{:.1}" class="frame"/>"#,
            self.top,
            WIDTH - LEFT - RIGHT,
            self.height
        )
    }

    fn x_tick(&self, svg: &mut String, x: f64, label: &str) -> std::fmt::Result {
        let (x, bottom) = (self.x(x), self.bottom());
        writeln!(
            svg,
            r#"<line x1="{x:.1}" x2="{x:.1}" y1="{:.1}" y2="{bottom:.1}" class="grid"/>"#,
            self.top
        )?;
        writeln!(
            svg,
            r#"<text x="{x:.1}" y="{:.1}" class="middle">{label}</text>"#,
            bottom + 18.0
        )
    }

    fn x_label(&self, svg: &mut String, label: &str) -> std::fmt::Result {
        writeln!(
            svg,
            r#"<text x="{:.1}" y="{:.1}" class="middle">{label}</text>"#,
            (LEFT + WIDTH - RIGHT) / 2.0,
            self.bottom() + 38.0
        )
    }

    /// Names, colours and dashes of lines, flush right above the frame, where no line can be.
    fn legend(&self, svg: &mut String, entries: &[(&str, &str, &str)]) -> std::fmt::Result {
        let mut right = WIDTH - RIGHT;
        let y = self.top - 12.0;
        for (name, colour, dash) in entries.iter().rev() {
            // About as wide as the letters of a common font.
            let at = right - 7.0 * name.len() as f64;
            writeln!(svg, r#"<text x="{at:.1}" y="{y:.1}">{name}</text>"#)?;
            let from = at - 30.0;
            writeln!(
                svg,
                r#"<line x1="{from:.1}" x2="{:.1}" y1="{mid:.1}" y2="{mid:.1}" class="line" stroke="{colour}"{dash}/>"#,
                from + 24.0,
                mid = y - 4.0
            )?;
            right = from - 22.0;
        }
        Ok(())
    }

    fn line(&self, svg: &mut String, colour: &str, dash: &str, points: &[(f64, f64)]) -> std::fmt::Result {
        write!(svg, r#"<polyline class="line" stroke="{colour}"{dash} points=""#)?;
        for &(x, y) in points {
            write!(svg, "{:.1},{:.1} ", self.x(x), self.y(y))?;
        }
        writeln!(svg, r#""/>"#)?;
        // Few points deserve to be seen as such.
        if points.len() <= 40 {
            for &(x, y) in points {
                let (x, y) = (self.x(x), self.y(y));
                writeln!(svg, r#"<circle cx="{x:.1}" cy="{y:.1}" r="2.5" fill="{colour}"/>"#)?;
            }
        }
        Ok(())
    }
}

/// The picture of a run.
pub fn svg(report: &Report, outcome: &Outcome) -> String {
    let mut svg = String::new();
    // Writing to a string cannot fail.
    let _ = draw(&mut svg, report, outcome);
    svg
}

fn draw(svg: &mut String, report: &Report, outcome: &Outcome) -> std::fmt::Result {
    let height = 1030.0;
    writeln!(
        svg,
        r#"<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">
<style>
text {{ font: 12px sans-serif; fill: #222 }}
.head {{ font-size: 17px; font-weight: bold }}
.title {{ font-size: 14px; font-weight: bold }}
.end {{ text-anchor: end }}
.middle {{ text-anchor: middle }}
.grid {{ stroke: #ddd; stroke-width: 1 }}
.frame {{ fill: none; stroke: #888; stroke-width: 1 }}
.line {{ fill: none; stroke-width: 2; stroke-linejoin: round }}
</style>
<rect width="100%" height="100%" fill="white"/>"#
    )?;
    let load = match report.rate {
        Some(rate) => format!("open loop at {} requests/s", grouped(rate)),
        None => "closed loop".to_string(),
    };
    let head = format!(
        "{} at {}: {} operations/s",
        report.protocol,
        report.target,
        grouped(report.operations_per_second)
    );
    writeln!(svg, r#"<text x="{LEFT}" y="32" class="head">{}</text>"#, escape(&head))?;
    writeln!(svg, r#"<text x="{LEFT}" y="53">{}</text>"#, escape(&report.workload))?;
    let (connections, pipeline, threads) = (report.connections, report.pipeline, report.threads);
    writeln!(
        svg,
        r#"<text x="{LEFT}" y="70">{connections} connections, pipeline {pipeline}, {threads} generator thread(s), {load}</text>"#
    )?;
    if let Some(cut) = report.cut {
        writeln!(
            svg,
            r##"<text x="{LEFT}" y="20" dy="-5" style="fill:#c00">The run ended early: {cut}</text>"##
        )?;
    }
    percentiles(svg, outcome)?;
    over_time(svg, &report.series, report.elapsed_s)?;
    writeln!(svg, "</svg>")
}

/// The percentile axis: 0 for the median's left end, one unit per nine.
fn nines(quantile: f64) -> f64 {
    -(1.0 - quantile).log10()
}

fn percentiles(svg: &mut String, outcome: &Outcome) -> std::fmt::Result {
    let latencies = total(outcome);
    let mut lines: Vec<(&str, Histogram<u64>)> = Command::ALL
        .into_iter()
        .map(|c| (c.name(), latencies[c as usize].clone()))
        .filter(|(_, histogram)| !histogram.is_empty())
        .collect();
    if lines.len() > 1 {
        lines.push(("all", together(&latencies)));
    }
    // No more nines than the number of requests can tell.
    let most = lines.iter().map(|(_, h)| h.len()).max().unwrap_or(1).max(10);
    let right = (most as f64).log10().floor().clamp(2.0, 6.0);
    let curves: Vec<(&str, Vec<(f64, f64)>)> = lines
        .iter()
        .map(|(name, histogram)| {
            let reach = (histogram.len() as f64).log10().clamp(0.5, right);
            let points = (0..=200).map(|i| {
                let x = reach * f64::from(i) / 200.0;
                (
                    x,
                    histogram.value_at_quantile(1.0 - 10f64.powf(-x)).max(1) as f64 / 1000.0,
                )
            });
            (*name, points.collect())
        })
        .collect();
    let values = || curves.iter().flat_map(|(_, points)| points.iter().map(|p| p.1));
    let (low, high) = bounds(values(), 1.0);
    let (low, high) = (10f64.powf(low.log10().floor()), 10f64.powf(high.log10().ceil()));
    let high = if high <= low { low * 10.0 } else { high };
    let panel = Panel {
        top: 110.0,
        height: 300.0,
        x: (0.0, right),
        y: (low, high),
        log_y: true,
    };
    let decades = (high / low).log10().round() as i32;
    let steps: &[f64] = if decades <= 2 { &[1.0, 2.0, 5.0] } else { &[1.0] };
    let ticks: Vec<(f64, String)> = (0..=decades)
        .flat_map(|d| steps.iter().map(move |s| s * low * 10f64.powi(d)))
        .filter(|&t| t <= high * 1.001)
        .map(|t| (t, time_label(t)))
        .collect();
    panel.frame(svg, "Latency by percentile", &ticks)?;
    for quantile in [0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999_999] {
        if nines(quantile) <= right + 1e-9 {
            let label = format!("{} %", trim(quantile * 100.0));
            panel.x_tick(svg, nines(quantile), &label)?;
        }
    }
    let mut entries = Vec::new();
    for (i, (name, points)) in curves.iter().enumerate() {
        // The sum of all is drawn last; where it hides the others it must let them show through.
        let (colour, dash) = match *name {
            "all" => (COLOURS[4], r#" stroke-dasharray="3 7""#),
            _ => (COLOURS[i % 4], ""),
        };
        panel.line(svg, colour, dash, points)?;
        entries.push((*name, colour, dash));
    }
    panel.legend(svg, &entries)?;
    panel.x_label(svg, "share of requests that were at least this quick")
}

fn over_time(svg: &mut String, series: &[Point], elapsed_s: f64) -> std::fmt::Result {
    let end = series.last().map_or(1.0, |p| p.at_s).max(elapsed_s).max(1e-3);
    let rates: Vec<_> = series.iter().map(|p| (p.at_s, p.operations_per_second)).collect();
    let p99_9: Vec<_> = series.iter().map(|p| (p.at_s, p.p99_9_us)).collect();
    let p50: Vec<_> = series.iter().map(|p| (p.at_s, p.p50_us)).collect();

    let (_, high) = bounds(rates.iter().map(|p| p.1), 1.0);
    let (high, ticks) = linear_ticks(high, grouped);
    let panel = Panel {
        top: 500.0,
        height: 190.0,
        x: (0.0, end),
        y: (0.0, high),
        log_y: false,
    };
    panel.frame(svg, "Throughput over time, operations/s", &ticks)?;
    time_ticks(svg, &panel, end)?;
    panel.line(svg, COLOURS[0], "", &rates)?;
    panel.x_label(svg, SECONDS)?;

    let (_, high) = bounds(p99_9.iter().map(|p| p.1), 1.0);
    let (high, ticks) = linear_ticks(high, time_label);
    let panel = Panel {
        top: 780.0,
        height: 190.0,
        x: (0.0, end),
        y: (0.0, high),
        log_y: false,
    };
    panel.frame(svg, "Latency over time", &ticks)?;
    time_ticks(svg, &panel, end)?;
    panel.line(svg, COLOURS[1], "", &p99_9)?;
    panel.line(svg, COLOURS[2], "", &p50)?;
    panel.legend(svg, &[("99.9 %", COLOURS[1], ""), ("median", COLOURS[2], "")])?;
    panel.x_label(svg, SECONDS)
}

fn time_ticks(svg: &mut String, panel: &Panel, end: f64) -> std::fmt::Result {
    let step = nice(end / 10.0);
    let mut at = 0.0;
    while at <= end * 1.0001 {
        panel.x_tick(svg, at, &trim(at))?;
        at += step;
    }
    Ok(())
}

/// The least and greatest of `values`, or `default` for both where there are none.
fn bounds(values: impl Iterator<Item = f64>, default: f64) -> (f64, f64) {
    let (low, high) = values.fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(v), high.max(v)));
    if low > high { (default, default) } else { (low, high) }
}

/// The first of 1, 2, 5, 10, ... (times a power of ten) that is not below `x`.
fn nice(x: f64) -> f64 {
    let power = 10f64.powf(x.max(1e-9).log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0];
    steps
        .into_iter()
        .map(|s| s * power)
        .find(|&s| s >= x * 0.9999)
        .unwrap_or(10.0 * power)
}

/// A round upper end for an axis from 0, and its ticks.
fn linear_ticks(high: f64, label: impl Fn(f64) -> String) -> (f64, Vec<(f64, String)>) {
    let step = nice(high * 1.05 / 5.0);
    let n = (high * 1.05 / step).ceil().max(1.0) as u32;
    (
        (f64::from(n)) * step,
        (0..=n)
            .map(|i| (f64::from(i) * step, label(f64::from(i) * step)))
            .collect(),
    )
}

/// A latency in microseconds, in the unit that suits it.
fn time_label(us: f64) -> String {
    if us >= 1e6 {
        format!("{} s", trim(us / 1e6))
    } else if us >= 1e3 {
        format!("{} ms", trim(us / 1e3))
    } else if us > 0.0 {
        format!("{} µs", trim(us))
    } else {
        "0".to_string()
    }
}

/// A number without needless digits.
fn trim(x: f64) -> String {
    let text = format!("{x:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_end_at_round_numbers() {
        assert_eq!(nice(0.07), 0.1);
        assert_eq!(nice(3.0), 5.0);
        assert_eq!(nice(10.0), 10.0);
        let (high, ticks) = linear_ticks(870.0, trim);
        assert_eq!(high, 1000.0);
        assert_eq!(ticks.last().map(|t| t.1.as_str()), Some("1000"));
        let (high, _) = linear_ticks(0.0, trim);
        assert!(high > 0.0);
    }

    #[test]
    fn labels_have_their_unit() {
        assert_eq!(time_label(10.0), "10 µs");
        assert_eq!(time_label(2500.0), "2.5 ms");
        assert_eq!(time_label(1e6), "1 s");
        assert_eq!(escape("a<b>&c"), "a&lt;b&gt;&amp;c");
    }

    #[test]
    fn nines_count() {
        assert!((nines(0.999) - 3.0).abs() < 1e-9);
        assert!((nines(0.9) - 1.0).abs() < 1e-9);
    }
}
