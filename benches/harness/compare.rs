//! Contenders in turns: A B A B, medians and ratios.

use anyhow::{Context, Result};

use super::load::Sample;
use super::server::Contender;

/// Which way a comparison goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measure {
    /// Microseconds of the server's CPU for each unit; less is better.
    Cpu,
    /// Median latency in microseconds; less is better.
    Latency,
    /// 99th percentile of the latency in microseconds; less is better.
    Tail,
    /// Units a second; more is better.
    Rate,
    /// Requests that reached the server; less is better.
    Requests,
    /// Milliseconds that the whole took; less is better.
    Wall,
    /// Milliseconds that it took longer than without a server; less is better.
    Overhead,
    /// A figure that no run gives but the caller, in this unit; less is better.
    Plain(&'static str),
}

impl Measure {
    /// The figure of one run.
    pub fn of(self, sample: &Sample) -> f64 {
        match self {
            Self::Cpu => sample.cpu_per_unit(),
            Self::Latency => sample.percentile(0.5),
            Self::Tail => sample.percentile(0.99),
            Self::Rate => sample.rate(),
            Self::Requests => sample.requests as f64,
            Self::Wall => sample.elapsed.as_secs_f64() * 1e3,
            Self::Plain(_) => f64::NAN,
            // A run as fast as the host's has an overhead that cannot be told from none.
            Self::Overhead => {
                let over = sample.elapsed.saturating_sub(sample.native);
                (over.as_secs_f64() * 1e3).max(1.0)
            }
        }
    }

    /// Whether the figure is a time in which the server's own work is contained.
    pub fn holds_server(self) -> bool {
        matches!(self, Self::Wall | Self::Overhead)
    }

    /// How often better `ours` is than `theirs`.
    pub fn ratio(self, ours: f64, theirs: f64) -> f64 {
        match self {
            // Also where both are nothing.
            _ if ours.total_cmp(&theirs).is_eq() => 1.0,
            Self::Rate => ours / theirs,
            _ => theirs / ours.max(f64::MIN_POSITIVE),
        }
    }

    /// What the figures are.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Cpu => "CPU µs",
            Self::Latency => "p50 µs",
            Self::Tail => "p99 µs",
            Self::Rate => "/s",
            Self::Requests => "requests",
            Self::Wall => "ms",
            Self::Overhead => "ms over native",
            Self::Plain(unit) => unit,
        }
    }
}

/// Runs every contender `rounds` times, in turns; the samples of each, in the order of contenders.
///
/// # Errors
///
/// What a run reports, with the contender's name.
pub fn in_turns(
    contenders: &[Contender],
    rounds: usize,
    mut run: impl FnMut(&Contender) -> Result<Sample>,
) -> Result<Vec<Vec<Sample>>> {
    let mut samples = vec![Vec::new(); contenders.len()];
    for _ in 0..rounds.max(1) {
        for (contender, samples) in contenders.iter().zip(&mut samples) {
            let sample = run(contender).with_context(|| contender.label.clone())?;
            samples.push(sample);
        }
    }
    Ok(samples)
}

/// The middle one; the mean of both where there are two.
pub fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    match values.as_slice() {
        [] => f64::NAN,
        sorted if sorted.len() % 2 == 1 => sorted[half],
        sorted => f64::midpoint(sorted[half - 1], sorted[half]),
    }
}

#[cfg(test)]
mod tests {
    use super::{Measure, median};

    #[test]
    fn the_median_is_the_middle() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
    }

    #[test]
    fn a_ratio_above_one_means_that_ours_is_better() {
        assert!(Measure::Cpu.ratio(1.0, 3.0) > 1.0);
        assert!(Measure::Rate.ratio(3.0, 1.0) > 1.0);
    }
}
