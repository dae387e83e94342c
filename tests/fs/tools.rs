//! Programs of others that judge the file server; `make test` installs them.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

/// Where a program of crates.io is.
pub(crate) fn tool(name: &str) -> Result<PathBuf> {
    let folder = std::env::var_os("MSB_TOOLS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools"),
        PathBuf::from,
    );
    let path = folder.join("bin").join(name);
    ensure!(
        path.exists(),
        "no {name} at {}: run `make tools`",
        path.display()
    );
    Ok(path)
}

/// The number in an environment variable, or `default`.
pub(crate) fn number(variable: &str, default: u64) -> u64 {
    let text = std::env::var(variable).ok();
    text.and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// What random tests begin with: `MSB_SEED`, or something new each time.
pub(crate) fn seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = now.map_or(0, |now| u64::from(now.subsec_nanos()));
    number("MSB_SEED", now)
}
