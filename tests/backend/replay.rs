//! What the fuzzers of the transport found once, and a few inputs that never did harm.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

#[expect(unreachable_pub, reason = "it is a crate of its own for the fuzzer")]
#[path = "../../backends/msb-vhost/fuzz/src/lib.rs"]
mod targets;

fn repeat(folder: &str, target: fn(&[u8]) -> Result<()>) -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../backends/msb-vhost/fuzz/regressions");
    for entry in fs::read_dir(root.join(folder))? {
        let path = entry?.path();
        target(&fs::read(&path)?).with_context(|| path.display().to_string())?;
    }
    for seed in 0..64_u8 {
        let data: Vec<u8> = (0..=255_u8)
            .map(|place| place.wrapping_mul(seed | 1).rotate_left(3) ^ seed)
            .collect();
        target(&data).with_context(|| format!("seed {seed}"))?;
    }
    Ok(())
}

#[test]
fn messages_do_no_harm() -> Result<()> {
    repeat("messages", targets::messages)
}

#[test]
fn chains_do_no_harm() -> Result<()> {
    repeat("chain", targets::chain)
}
