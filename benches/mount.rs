//! Real programs on a mounted share: `cargo bench -p msb-benches --bench mount -- untar`.

use std::collections::{BTreeMap, HashSet};

use anyhow::{Context, Result, bail};
use clap::Parser;
use msb_benches::harness::cli::Options;
use msb_benches::harness::load::Sample;
use msb_benches::harness::machine::prepare_machine;
use msb_benches::harness::server::Contender;
use msb_benches::harness::table::{Line, markdown};
use msb_benches::work::place::{Outcomes, run};
use msb_benches::work::profiles::{NATIVE, PROFILES, Profile, contenders};
use msb_benches::work::source::Source;
use msb_benches::work::steps::{STEPS, Step};
use msb_benches::work::verdict::goals;
use msb_testkit::bridge::{obstacle, private_mounts};

/// Samples of each step, by the label of the contender.
type Results = BTreeMap<&'static str, BTreeMap<String, Vec<Sample>>>;

fn main() -> Result<()> {
    let options = Options::parse();
    let wanted: HashSet<&str> = STEPS
        .iter()
        .filter(|step| options.wants(step.id, step.name))
        .map(|step| step.name)
        .collect();
    if options.list {
        for step in STEPS.iter().filter(|step| wanted.contains(step.name)) {
            println!("{:<5} {:<22} {}", step.id, step.name, step.what);
        }
        return Ok(());
    }
    if wanted.is_empty() {
        return Ok(());
    }
    if let Some(obstacle) = obstacle() {
        bail!("cannot mount: {obstacle}");
    }
    let _prepared = prepare_machine();
    private_mounts()?;
    let folder = tempfile::Builder::new()
        .prefix("bench.")
        .tempdir_in(options.scratch())?;
    let source = Source::make(folder.path())?;
    let servers = contenders(&options)?;
    let mut results = Results::new();
    for _ in 0..options.rounds {
        let natives = run(None, &wanted, &source, folder.path()).context(NATIVE)?;
        let base: BTreeMap<_, _> = natives
            .iter()
            .map(|(step, sample)| (*step, sample.elapsed))
            .collect();
        keep(&mut results, NATIVE, natives);
        for server in &servers {
            let mut outcomes = run(Some(server), &wanted, &source, folder.path())
                .with_context(|| server.label.clone())?;
            for (step, sample) in &mut outcomes {
                sample.native = base.get(step).copied().unwrap_or_default();
            }
            keep(&mut results, &server.label, outcomes);
        }
    }
    for profile in PROFILES {
        let lines: Vec<Line> = STEPS
            .iter()
            .filter_map(|step| Some(judge(step, profile, results.get(step.name)?, &servers)))
            .flatten()
            .collect();
        if !lines.is_empty() {
            let title = format!(
                "msb-fs and virtiofsd, mounted, {}: {}",
                profile.name, profile.title
            );
            println!("{}", markdown(&title, &lines));
        }
    }
    Ok(())
}

fn keep(results: &mut Results, label: &str, outcomes: Outcomes) {
    for (step, sample) in outcomes {
        let of_step = results.entry(step).or_default();
        of_step.entry(label.to_owned()).or_default().push(sample);
    }
}

/// The lines of one step in one class.
fn judge(
    step: &Step,
    profile: &Profile,
    samples: &BTreeMap<String, Vec<Sample>>,
    servers: &[Contender],
) -> Vec<Line> {
    let mut members = Vec::new();
    let mut theirs = Vec::new();
    for (label, role) in profile.members {
        let server = servers.iter().find(|server| server.label == *label);
        if let (Some(server), Some(samples)) = (server, samples.get(*label)) {
            members.push(Contender {
                role: *role,
                ..server.clone()
            });
            theirs.push(samples.clone());
        }
    }
    goals(step.id, step.name, step.what, profile.name)
        .into_iter()
        .map(|goal| Line::new(goal, &members, &theirs))
        .collect()
}
