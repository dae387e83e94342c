//! The limit: the same accesses without a server, by fio or by bare calls.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::harness::load::Sample;

/// Microseconds of a bare write of `len` bytes behind the end of a new file in `folder`: what the
/// host takes for new blocks, which no server can avoid. `bytes` are written in all.
///
/// # Errors
///
/// What the host reports.
pub fn new_blocks(folder: &Path, len: usize, bytes: u64) -> Result<f64> {
    let path = folder.join("bare");
    let file = File::create(&path)?;
    let block = vec![0x5a; len];
    let count = bytes / len as u64;
    let begin = Instant::now();
    for nth in 0..count {
        file.write_all_at(&block, nth * len as u64)?;
    }
    let elapsed = begin.elapsed();
    fs::remove_file(path)?;
    Ok(elapsed.as_secs_f64() * 1e6 / count as f64)
}

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
