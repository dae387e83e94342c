//! Where the steps run: through a mounted server, or on the host itself.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use msb_testkit::bridge::{Bridge, Options as Mounting};

use super::profiles::NATIVE;
use super::source::Source;
use super::steps::{STEPS, Step};
use crate::harness::load::Sample;
use crate::harness::server::{Contender, Server};

/// What each step took: wall time, the server's CPU, the number of requests.
pub type Outcomes = BTreeMap<&'static str, Sample>;

/// Runs the wanted steps in order, and those that they need, in a share of their own. `None` runs
/// them on the host.
///
/// # Errors
///
/// When a program fails, or the server breaks the protocol.
pub fn run(
    contender: Option<&Contender>,
    wanted: &HashSet<&str>,
    source: &Source,
    folder: &Path,
) -> Result<Outcomes> {
    let scratch = tempfile::Builder::new()
        .prefix("work.")
        .tempdir_in(folder)?;
    let share = scratch.path().join("share");
    fs::create_dir(&share)?;
    let mut place = Place {
        contender,
        point: scratch.path().join("mnt"),
        share,
        folder: scratch.path(),
        mounted: None,
    };
    fs::create_dir(&place.point)?;
    let mut outcomes = BTreeMap::new();
    for step in STEPS {
        if !needed(step, wanted) {
            continue;
        }
        if step.cold || place.mounted.is_none() {
            place.mount()?;
        }
        let outcome = place
            .step(step, source)
            .with_context(|| format!("in the step {}", step.name))?;
        if wanted.contains(step.name) {
            outcomes.insert(step.name, outcome);
        }
    }
    place.unmount()?;
    Ok(outcomes)
}

/// Whether a step is wanted, or another that is needs it.
fn needed(step: &Step, wanted: &HashSet<&str>) -> bool {
    let needs = |other: &Step| wanted.contains(other.name) && other.needs.contains(&step.name);
    wanted.contains(step.name) || STEPS.iter().any(needs)
}

struct Place<'a> {
    contender: Option<&'a Contender>,
    share: PathBuf,
    point: PathBuf,
    folder: &'a Path,
    // The bridge ends before the server.
    mounted: Option<(Bridge, Server)>,
}

impl Place<'_> {
    fn mount(&mut self) -> Result<()> {
        self.unmount()?;
        if let Some(contender) = self.contender {
            let server = contender.start(self.folder, &self.share, false)?;
            let bridge = Bridge::mount(server.socket(), &self.point, Mounting::default())?;
            self.mounted = Some((bridge, server));
        }
        Ok(())
    }

    fn unmount(&mut self) -> Result<()> {
        match self.mounted.take() {
            None => Ok(()),
            Some((bridge, _server)) => bridge.finish(),
        }
    }

    fn step(&self, step: &Step, source: &Source) -> Result<Sample> {
        let root = match self.mounted {
            None => &self.share,
            Some(_) => &self.point,
        };
        let cpu = || match &self.mounted {
            None => Ok(Duration::ZERO),
            Some((_, server)) => server.cpu(),
        };
        if let Some((bridge, _)) = &self.mounted {
            bridge.reset_counts();
        }
        let before = cpu()?;
        let begin = Instant::now();
        (step.run)(source, root)?;
        let elapsed = begin.elapsed();
        let cpu = cpu()?.saturating_sub(before);
        let requests = self
            .mounted
            .as_ref()
            .map_or_else(Vec::new, |(bridge, _)| bridge.counts());
        let sample = Sample {
            units: 1,
            elapsed,
            cpu,
            latency: Vec::new(),
            requests: requests.iter().map(|(_, count)| count).sum(),
            native: Duration::ZERO,
        };
        self.report(step, &sample, requests);
        Ok(sample)
    }

    /// Tells who watches what a step took, and which requests it was.
    fn report(&self, step: &Step, sample: &Sample, mut requests: Vec<(&str, u64)>) {
        requests.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        let most: Vec<String> = requests
            .iter()
            .take(8)
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        eprintln!(
            "  {:<13} {:<34} {:>7.0} ms  CPU {:>6.0} ms  {:>6} requests: {}",
            step.name,
            self.contender.map_or(NATIVE, |contender| &contender.label),
            sample.elapsed.as_secs_f64() * 1e3,
            sample.cpu.as_secs_f64() * 1e3,
            sample.requests,
            most.join(", ")
        );
    }
}
