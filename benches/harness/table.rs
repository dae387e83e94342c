//! Results as Markdown: one line for each row, with its target and whether it is met.

use std::fmt::Write as _;

use super::compare::{Measure, median};
use super::load::Sample;
use super::server::{Contender, Role};

/// What is judged about a row.
#[derive(Debug, Clone, Copy)]
pub struct Goal {
    /// Number in the list of targets.
    pub id: &'static str,
    /// What is done, in words.
    pub what: &'static str,
    /// What is compared.
    pub measure: Measure,
    /// The ratio that is wanted.
    pub target: f64,
    /// Against the peer as it comes, or against the best of its configurations.
    pub against: Against,
}

/// A goal against the best of the peer's configurations.
pub(crate) const fn goal(
    id: &'static str,
    what: &'static str,
    measure: Measure,
    target: f64,
) -> Goal {
    Goal {
        id,
        what,
        measure,
        target,
        against: Against::Best,
    }
}

/// Whom a ratio is taken against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Against {
    /// The peer without tuning.
    Default,
    /// Whichever of its configurations does best.
    Best,
    /// Its configuration of the same class.
    Tuned,
    /// Our own on an easier subject.
    Itself,
    /// The host without a server.
    Native,
}

impl Against {
    fn is(self, role: Role) -> bool {
        match self {
            Self::Default => role == Role::Peer,
            Self::Tuned => role == Role::TunedPeer,
            Self::Itself => role == Role::Itself,
            Self::Native => role == Role::Native,
            Self::Best => matches!(role, Role::Peer | Role::TunedPeer),
        }
    }
}

/// What is left of a time when the CPU time of our server is taken out of it.
const FREE: &str = "without its CPU";

/// A finished row.
#[derive(Debug, Clone)]
pub struct Line {
    goal: Goal,
    /// Label, role and median of each contender.
    figures: Vec<(String, Role, f64)>,
}

impl Line {
    /// Judges the samples of a row.
    pub fn new(goal: Goal, contenders: &[Contender], samples: &[Vec<Sample>]) -> Self {
        let of = |samples: &Vec<Sample>| {
            let values: Vec<f64> = samples.iter().map(|one| goal.measure.of(one)).collect();
            median(&values)
        };
        let figures: Vec<f64> = samples.iter().map(of).collect();
        let mut line = Self::of(goal, contenders, &figures);
        let judged = contenders.iter().position(|one| one.role == Role::Judged);
        if let (true, Some(ours)) = (
            goal.measure.holds_server(),
            judged.and_then(|at| samples.get(at)),
        ) {
            // All of it counts as if the program had waited for it: that is the most it can save.
            let rest: Vec<Sample> = ours.iter().map(Sample::without_server).collect();
            line.figures.push((FREE.to_owned(), Role::Floor, of(&rest)));
        }
        line
    }

    /// Judges one figure of each contender.
    pub fn of(goal: Goal, contenders: &[Contender], figures: &[f64]) -> Self {
        let one = |(contender, figure): (&Contender, &f64)| {
            (contender.label.clone(), contender.role, *figure)
        };
        let figures = contenders.iter().zip(figures).map(one).collect();
        Self { goal, figures }
    }

    /// Shows what the bare system calls cost beside figures of CPU: no server needs less.
    #[must_use]
    pub fn beside(mut self, label: &str, bare: Option<f64>) -> Self {
        if let (Measure::Cpu, Some(cost)) = (self.goal.measure, bare) {
            self.figures.push((label.to_owned(), Role::Floor, cost));
        }
        self
    }

    /// How often better our default is than whom the goal names; `None` when one of both is missing.
    pub fn ratio(&self) -> Option<f64> {
        self.ratio_to(Role::Judged, |role| self.goal.against.is(role))
    }

    /// The same of a server that would do nothing but what none can do without: no ratio is larger.
    /// `None` where ours took less than that, for then it was no floor.
    fn bound(&self) -> Option<f64> {
        let most = self.ratio_to(Role::Floor, |role| self.goal.against.is(role))?;
        Some(most).filter(|most| self.ratio().is_none_or(|ratio| ratio <= *most))
    }

    fn ratio_to(&self, of: Role, whom: impl Fn(Role) -> bool) -> Option<f64> {
        let judged = |(_, role, _): &&(String, Role, f64)| *role == of;
        let ours = self.figures.iter().find(judged)?.2;
        self.figures
            .iter()
            .filter(|(_, role, _)| whom(*role))
            .map(|(_, _, theirs)| self.goal.measure.ratio(ours, *theirs))
            .min_by(f64::total_cmp)
    }

    /// A line of the table, for the columns of `labels`.
    fn markdown(&self, labels: &[String]) -> String {
        let goal = self.goal;
        let mut line = format!("| {} | {} | {} |", goal.id, goal.what, goal.measure.unit());
        for label in labels {
            let figure = self.figures.iter().find(|(name, ..)| name == label);
            let text = figure.map_or("–".to_owned(), |(_, _, value)| number(*value));
            write!(line, " {text} |").expect("writing to a string");
        }
        // Both are shown, and one is judged.
        let default = self.ratio_to(Role::Judged, |role| role == Role::Peer);
        let bound = self.bound();
        let (ratio, verdict) = match self.ratio() {
            None => ("–".to_owned(), "–"),
            Some(ratio) if ratio >= goal.target => (format!("**{}**", times(ratio)), "met"),
            Some(ratio) if bound.is_some_and(|most| most < goal.target) => {
                (times(ratio), "out of reach")
            }
            Some(ratio) => (times(ratio), "missed"),
        };
        let [default, bound] = [default, bound].map(|one| one.map_or("–".to_owned(), times));
        write!(
            line,
            " {default} | {ratio} | {bound} | ≥ {} | {verdict} |",
            goal.target
        )
        .expect("writing to a string");
        line
    }
}

/// The whole table, under a heading.
pub fn markdown(title: &str, lines: &[Line]) -> String {
    let mut labels: Vec<String> = Vec::new();
    for (label, ..) in lines.iter().flat_map(|line| &line.figures) {
        if !labels.contains(label) {
            labels.push(label.clone());
        }
    }
    let mut text = format!("\n### {title}\n\n| row | what | measure |");
    for label in &labels {
        write!(text, " {label} |").expect("writing to a string");
    }
    text.push_str(" to default | judged | at most | target | |\n|---|---|---|");
    text.push_str(&"--:|".repeat(labels.len()));
    text.push_str("--:|--:|--:|--:|---|\n");
    for line in lines {
        text.push_str(&line.markdown(&labels));
        text.push('\n');
    }
    text
}

/// Everything about one contender's samples, in one line for who watches.
pub fn detail(contender: &Contender, samples: &[Sample]) -> String {
    let of =
        |figure: &dyn Fn(&Sample) -> f64| median(&samples.iter().map(figure).collect::<Vec<f64>>());
    format!(
        "    {:<22} {:>9}/s  p50 {:>8} µs  p99 {:>8} µs  CPU {:>7} µs",
        contender.label,
        number(of(&Sample::rate)),
        number(of(&|one| one.percentile(0.5))),
        number(of(&|one| one.percentile(0.99))),
        number(of(&Sample::cpu_per_unit)),
    )
}

/// A ratio; one against almost nothing says no more than that.
fn times(ratio: f64) -> String {
    match ratio {
        _ if ratio >= 1000.0 => "> 1000".to_owned(),
        _ if ratio >= 100.0 => format!("{ratio:.0}"),
        _ => format!("{ratio:.2}"),
    }
}

/// Three significant digits.
pub fn number(value: f64) -> String {
    match value.abs() {
        _ if !value.is_finite() => "–".to_owned(),
        size if size >= 1e6 => format!("{:.2} M", value / 1e6),
        size if size >= 1e4 => format!("{:.0} k", value / 1e3),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Against, Goal, Line, markdown, number};
    use crate::harness::compare::Measure;
    use crate::harness::load::Sample;
    use crate::harness::server::{Contender, Role};

    fn named((label, role): (&str, Role)) -> Contender {
        Contender {
            label: label.to_owned(),
            role,
            program: "none".into(),
            flags: Vec::new(),
        }
    }

    fn sample(micros: u64) -> Sample {
        Sample {
            units: 1,
            elapsed: Duration::from_secs(1),
            cpu: Duration::from_micros(micros),
            latency: vec![1],
            requests: 1,
            native: Duration::ZERO,
        }
    }

    #[test]
    fn a_row_is_judged_by_our_default_against_the_best_peer() {
        let goal = Goal {
            id: "X1",
            what: "nothing",
            measure: Measure::Cpu,
            target: 2.0,
            against: Against::Best,
        };
        let contenders = [
            ("ours", Role::Judged),
            ("other", Role::Ours),
            ("peer", Role::Peer),
            ("tuned", Role::TunedPeer),
        ]
        .map(named);
        let samples: Vec<_> = [1, 9, 4, 3].map(|micros| vec![sample(micros)]).into();
        let line = Line::new(goal, &contenders, &samples);
        assert!((line.ratio().expect("both sides") - 3.0).abs() < 1e-9);
        let table = markdown("T", &[line]);
        assert!(
            table.contains(
                "| X1 | nothing | CPU µs | 1.00 | 9.00 | 4.00 | 3.00 | 4.00 | **3.00** | – | ≥ 2 | met |"
            ),
            "{table}"
        );
    }

    #[test]
    fn what_a_server_without_cost_would_not_reach_is_out_of_reach() {
        let contenders = [("ours", Role::Judged), ("peer", Role::Peer)].map(named);
        let sample = |millis, server| Sample {
            elapsed: Duration::from_millis(millis),
            cpu: Duration::from_millis(server),
            ..sample(0)
        };
        let samples = [vec![sample(100, 20)], vec![sample(160, 70)]];
        let row = |target| {
            let goal = Goal {
                id: "X2",
                what: "nothing",
                measure: Measure::Wall,
                target,
                against: Against::Best,
            };
            markdown("T", &[Line::new(goal, &contenders, &samples)])
        };
        let (near, far) = (row(1.9), row(2.1));
        assert!(
            near.contains("| ms | 100 | 160 | 80.0 | 1.60 | 1.60 | 2.00 | ≥ 1.9 | missed |"),
            "{near}"
        );
        assert!(far.contains("| 2.00 | ≥ 2.1 | out of reach |"), "{far}");
    }

    #[test]
    fn numbers_keep_three_digits() {
        assert_eq!(number(0.123), "0.12");
        assert_eq!(number(285_123.0), "285 k");
        assert_eq!(number(1_234_567.0), "1.23 M");
    }
}
