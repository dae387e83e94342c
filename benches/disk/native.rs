//! The limit: the same accesses without a server, by fio or by bare calls.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::image::{BYTES, Folders, Image};
use super::loads::{Kind, Order};
use super::rows::Row;
use crate::harness::load::Sample;
use crate::share::tree::bare_cost;

impl Row {
    /// Microseconds of the bare system call that moves the data of one request, which no server can
    /// avoid; `None` where there is no such call or it would destroy the image.
    ///
    /// # Errors
    ///
    /// When the image cannot be made, or what the host reports.
    pub fn bare(&self, folders: &Folders) -> Result<Option<f64>> {
        if self.wish.direct || self.pattern.mixed || self.pattern.kind == Kind::Discard {
            return Ok(None);
        }
        let len = self.pattern.bytes as usize;
        if self.pattern.order == Order::OnceThrough {
            let path = folders.image(self.image)?;
            let folder = path.parent().unwrap_or(&folders.disk);
            return new_blocks(folder, len, BYTES).map(Some);
        }
        let write = self.pattern.kind == Kind::Write;
        let raw = matches!(self.image, Image::Raw | Image::RawSmall | Image::RawMemory);
        let filled = raw
            || matches!(
                self.image,
                Image::Qcow2 | Image::VmdkFlat | Image::VmdkSparse
            );
        if !(if write { raw } else { filled }) {
            return Ok(None);
        }
        let path = folders.image(self.image)?;
        bare_cost(&self.image.data_file(&path), len, write).map(Some)
    }
}

/// Microseconds of a bare write of `len` bytes behind the end of a new file in `folder`: what the
/// host takes for new blocks, which no server can avoid. `bytes` are written in all.
///
/// # Errors
///
/// What the host reports.
fn new_blocks(folder: &Path, len: usize, bytes: u64) -> Result<f64> {
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
