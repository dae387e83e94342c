//! The limit: fio on the same file, without a server.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::harness::load::Sample;

/// Random reads of 4 KiB past the page cache.
///
/// # Errors
///
/// When fio cannot be started or does not report.
pub fn random_reads(path: &Path, depth: u16, time: Duration) -> Result<Sample> {
    let output = Command::new("fio")
        .args([
            "--name=native",
            "--rw=randread",
            "--bs=4k",
            "--direct=1",
            "--ioengine=io_uring",
        ])
        .args([
            "--time_based",
            "--ramp_time=100ms",
            "--output-format=terse",
            "--terse-version=3",
        ])
        .arg(format!("--iodepth={depth}"))
        .arg(format!("--runtime={}ms", time.as_millis()))
        .arg(format!("--filename={}", path.display()))
        .output()
        .context("starting fio")?;
    ensure!(
        output.status.success(),
        "fio: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8_lossy(&output.stdout);
    // Terse version 3: field 8 is the rate of reads, fields 40 and 41 the mean latency in µs.
    let fields: Vec<&str> = text.trim().split(';').collect();
    let field = |number: usize| fields.get(number - 1).copied().unwrap_or("").parse::<f64>();
    let rate = field(8).context("fio's report")?;
    let mean = field(40).unwrap_or(0.0);
    Ok(Sample {
        units: (rate * time.as_secs_f64()) as u64,
        elapsed: time,
        cpu: Duration::ZERO,
        latency: vec![(mean * 1000.0) as u32],
        requests: 0,
        native: Duration::ZERO,
    })
}
