//! The targets of the workloads, and how a run is judged by them.

use crate::harness::compare::Measure::{self, Overhead, Requests, Wall};
use crate::harness::table::{Against, Goal};

/// What is wanted of a step in a class.
struct Target {
    step: &'static str,
    profile: &'static str,
    measure: Measure,
    ratio: f64,
    against: Against,
}

const fn target(step: &'static str, profile: &'static str, measure: Measure, ratio: f64) -> Target {
    // Requests are compared with virtiofsd as it comes, times with one that promises the same.
    let shared = matches!(profile.as_bytes(), b"shared");
    let against = match measure {
        Requests => Against::Default,
        _ if shared => Against::Default,
        _ => Against::Tuned,
    };
    Target {
        step,
        profile,
        measure,
        ratio,
        against,
    }
}

const TARGETS: &[Target] = &[
    target("untar", "shared", Requests, 1.15),
    target("untar", "shared", Overhead, 1.8),
    target("untar", "exclusive", Requests, 1.25),
    target("untar", "exclusive", Overhead, 1.3),
    target("untar", "writeback", Requests, 1.8),
    target("untar", "writeback", Overhead, 1.3),
    target("find", "shared", Requests, 2.0),
    target("find", "shared", Wall, 2.0),
    target("find", "exclusive", Requests, 2.0),
    target("find", "exclusive", Wall, 2.0),
    target("du", "shared", Requests, 2.0),
    target("du", "shared", Wall, 2.0),
    target("du", "exclusive", Requests, 2.0),
    target("du", "exclusive", Wall, 2.0),
    target("cat", "shared", Requests, 1.27),
    target("cat", "shared", Wall, 1.4),
    target("cat", "exclusive", Requests, 3.4),
    target("cat", "exclusive", Wall, 2.2),
    target("find-cat", "shared", Requests, 1.55),
    target("find-cat", "shared", Wall, 1.6),
    target("find-cat", "exclusive", Requests, 5.0),
    target("find-cat", "exclusive", Wall, 2.5),
    target("missing", "shared", Requests, 100.0),
    target("missing", "shared", Wall, 2.0),
    target("missing", "exclusive", Requests, 100.0),
    target("missing", "exclusive", Wall, 2.0),
    target("small-files", "shared", Requests, 1.2),
    target("small-files", "shared", Wall, 1.2),
    target("small-files", "exclusive", Requests, 1.5),
    target("small-files", "exclusive", Wall, 1.6),
    target("copy", "shared", Requests, 1.25),
    target("copy", "shared", Overhead, 1.25),
    target("copy", "exclusive", Requests, 2.1),
    target("copy", "exclusive", Overhead, 1.6),
    target("clone", "shared", Requests, 1.1),
    target("clone", "shared", Overhead, 1.25),
    target("clone", "exclusive", Requests, 1.25),
    target("clone", "exclusive", Overhead, 1.6),
    target("clone", "writeback", Requests, 1.8),
    target("clone", "writeback", Overhead, 1.6),
    target("status", "shared", Requests, 1.15),
    target("status", "shared", Wall, 1.2),
    target("status", "exclusive", Requests, 2.6),
    target("status", "exclusive", Wall, 2.0),
    target("sqlite", "shared", Requests, 1.1),
    target("sqlite", "exclusive", Requests, 1.25),
    target("sqlite", "exclusive", Wall, 1.3),
    target("sqlite", "writeback", Requests, 1.8),
    target("sqlite", "writeback", Wall, 1.3),
    target("small-writes", "writeback", Requests, 10.0),
    target("remove", "shared", Requests, 1.0),
    target("remove", "shared", Wall, 1.4),
    target("remove", "exclusive", Requests, 1.16),
    target("remove", "exclusive", Wall, 1.4),
];

/// The goals of a step in a class.
pub fn goals(id: &'static str, step: &str, what: &'static str, profile: &str) -> Vec<Goal> {
    TARGETS
        .iter()
        .filter(|target| target.step == step && target.profile == profile)
        .map(|target| Goal {
            id,
            what,
            measure: target.measure,
            target: target.ratio,
            against: target.against,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{TARGETS, goals};
    use crate::work::profiles::PROFILES;
    use crate::work::steps::STEPS;

    #[test]
    fn every_target_belongs_to_a_step_and_a_class() {
        for target in TARGETS {
            assert!(
                STEPS.iter().any(|step| step.name == target.step),
                "{}",
                target.step
            );
            assert!(
                PROFILES
                    .iter()
                    .any(|profile| profile.name == target.profile),
                "{}",
                target.profile
            );
        }
        for step in STEPS {
            let judged = PROFILES
                .iter()
                .any(|profile| !goals(step.id, step.name, step.what, profile.name).is_empty());
            assert!(judged, "nothing is wanted of {}", step.name);
        }
    }
}
