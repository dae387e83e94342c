//! `msb df`: what everything takes of the disk.

use std::process::ExitCode;

use microsandbox::rundir::Home;
use microsandbox::{Error, Usage, UsageClass, usage};
use serde::Serialize;

use crate::args::{DiskUsage, OutputFormat};
use crate::output::{self, Table};

/// `msb df --format json`.
#[derive(Serialize)]
struct Report {
    summary: Vec<Sum>,
    entries: Vec<Usage>,
}

/// All things of a kind.
#[derive(Serialize)]
struct Sum {
    #[serde(rename = "type")]
    class: UsageClass,
    count: usize,
    in_use: usize,
    logical_bytes: u64,
    allocated_bytes: u64,
    reclaimable_bytes: u64,
}

/// `msb df`.
pub(super) fn df(args: &DiskUsage) -> Result<ExitCode, Error> {
    let entries = usage(&Home::from_env()?)?;
    let summary = sums(&entries);
    if args.format.format == OutputFormat::Json {
        output::json(&Report { summary, entries })?;
        return Ok(ExitCode::SUCCESS);
    }
    let sizes =
        |logical, allocated, reclaimable| [logical, allocated, reclaimable].map(output::bytes);
    let mut table = if args.verbose {
        Table::new(&[
            "TYPE",
            "NAME",
            "IN USE",
            "LOGICAL",
            "ALLOCATED",
            "RECLAIMABLE",
        ])
    } else {
        Table::new(&[
            "TYPE",
            "COUNT",
            "IN USE",
            "LOGICAL",
            "ALLOCATED",
            "RECLAIMABLE",
        ])
    };
    if args.verbose {
        for entry in &entries {
            let used = if entry.in_use { "yes" } else { "-" };
            let row = [word(entry.class), entry.name.clone(), used.to_owned()];
            table.row(row.into_iter().chain(sizes(
                entry.logical_bytes,
                entry.allocated_bytes,
                entry.reclaimable_bytes,
            )));
        }
    } else {
        for sum in &summary {
            let row = [
                word(sum.class),
                sum.count.to_string(),
                sum.in_use.to_string(),
            ];
            table.row(row.into_iter().chain(sizes(
                sum.logical_bytes,
                sum.allocated_bytes,
                sum.reclaimable_bytes,
            )));
        }
    }
    table.print()?;
    Ok(ExitCode::SUCCESS)
}

fn sums(entries: &[Usage]) -> Vec<Sum> {
    let classes = [
        UsageClass::Sandbox,
        UsageClass::DirVolume,
        UsageClass::DiskVolume,
        UsageClass::Image,
        UsageClass::Cache,
    ];
    let sum = |class| {
        let of = || entries.iter().filter(move |entry| entry.class == class);
        Sum {
            class,
            count: of().count(),
            in_use: of().filter(|entry| entry.in_use).count(),
            logical_bytes: of().map(|entry| entry.logical_bytes).sum(),
            allocated_bytes: of().map(|entry| entry.allocated_bytes).sum(),
            reclaimable_bytes: of().map(|entry| entry.reclaimable_bytes).sum(),
        }
    };
    classes.into_iter().map(sum).collect()
}

fn word(class: UsageClass) -> String {
    let word = match class {
        UsageClass::Sandbox => "sandboxes",
        UsageClass::DirVolume => "directory volumes",
        UsageClass::DiskVolume => "disk volumes",
        UsageClass::Image => "images",
        UsageClass::Cache => "cache",
    };
    word.to_owned()
}
