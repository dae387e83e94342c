//! imago in this process: what the image format costs without a device, a queue and a process.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};

use super::image::BYTES;
use crate::harness::load::Sample;

/// As many buffers take turns as requests are in flight elsewhere.
const BUFFERS: usize = 32;
const BLOCK: usize = 4096;

/// Random reads of 4 KiB of a qcow2 image for some time, one by one.
///
/// # Errors
///
/// When the image cannot be opened or read.
pub fn random_reads(path: &Path, time: Duration) -> Result<Sample> {
    let gate = PermissiveImplicitOpenGate::default();
    let image = Qcow2::<File>::builder_path(path).open(gate)?;
    let image = FormatAccess::new(image);
    let mut buffers = vec![vec![0_u8; BLOCK]; BUFFERS];
    let mut random = 88_172_645_463_325_252_u64;
    let mut round = || -> Result<u64> {
        for buffer in &mut buffers {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let at = random % (BYTES / BLOCK as u64) * BLOCK as u64;
            image.read(buffer.as_mut_slice(), at)?;
        }
        Ok(BUFFERS as u64)
    };
    let warm = Instant::now();
    while warm.elapsed() < Duration::from_millis(80) {
        round()?;
    }
    let (cpu, begin, mut units) = (thread_cpu()?, Instant::now(), 0);
    while begin.elapsed() < time {
        units += round()?;
    }
    let elapsed = begin.elapsed();
    Ok(Sample {
        units,
        elapsed,
        cpu: thread_cpu()?.saturating_sub(cpu),
        latency: Vec::new(),
        requests: units,
        native: Duration::ZERO,
    })
}

/// CPU time of this thread.
fn thread_cpu() -> Result<Duration> {
    let text = fs::read_to_string("/proc/thread-self/schedstat")?;
    let nanos = text
        .split_whitespace()
        .next()
        .context("an empty schedstat")?;
    Ok(Duration::from_nanos(nanos.parse()?))
}
