//! The file servers that are compared.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use msb_testkit::msb::bin_dir;

use crate::harness::cli::{Options, target};
use crate::harness::server::{Contender, Role};

/// What a row wants of the servers.
#[derive(Debug, Clone, Copy)]
pub struct Wish {
    /// Request queues of ours; virtiofsd has one.
    pub queues: u16,
    /// Flags that make virtiofsd faster at this row.
    pub tuned: &'static [&'static str],
}

/// All that take part in a row.
///
/// # Errors
///
/// When a program is missing.
pub fn contenders(options: &Options, wish: Wish) -> Result<Vec<Contender>> {
    let mut all = vec![
        ours("msb-fs", Role::Judged, &bin_dir(), "strict", options, wish),
        ours("msb-fs off", Role::Ours, &bin_dir(), "off", options, wish),
    ];
    if let Some(other) = std::env::var_os("MSB_BIN_DIR_B") {
        let other = PathBuf::from(other);
        all.push(ours(
            "msb-fs B",
            Role::Ours,
            &other,
            "strict",
            options,
            wish,
        ));
        all.push(ours(
            "msb-fs off B",
            Role::Ours,
            &other,
            "off",
            options,
            wish,
        ));
    }
    all.push(virtiofsd("virtiofsd", Role::Peer, &[]));
    all.push(virtiofsd("virtiofsd tuned", Role::TunedPeer, wish.tuned));
    all.retain(|contender| options.takes(&contender.label));
    for contender in &all {
        ensure!(
            contender.program.exists(),
            "no {}: run `make bench`, which builds it, or name its folder (MSB_BIN_DIR, MSB_PEERS)",
            contender.program.display()
        );
    }
    Ok(all)
}

fn ours(
    label: &str,
    role: Role,
    folder: &Path,
    mode: &str,
    options: &Options,
    wish: Wish,
) -> Contender {
    let flags = [
        "--socket-path={socket}",
        "--shared-dir={subject}",
        "--tag=bench",
        "--log-level=error",
        &format!("--stat-virt={mode}"),
        &format!("--num-request-queues={}", wish.queues),
    ];
    let mut flags: Vec<String> = flags.map(str::to_owned).into();
    flags.extend(options.extra());
    Contender {
        label: label.to_owned(),
        role,
        program: folder.join("msb-fs"),
        flags,
    }
}

fn virtiofsd(label: &str, role: Role, more: &[&str]) -> Contender {
    let flags = [
        "--socket-path={socket}",
        "--shared-dir={subject}",
        "--log-level=error",
    ];
    Contender {
        label: label.to_owned(),
        role,
        program: peers_dir().join("virtiofsd"),
        flags: flags
            .iter()
            .chain(more)
            .map(|&flag| flag.to_owned())
            .collect(),
    }
}

/// Where virtiofsd lies: `MSB_PEERS`, or where `benches/setup.sh` puts it.
pub fn peers_dir() -> PathBuf {
    std::env::var_os("MSB_PEERS").map_or_else(|| target().join("peers/bin"), PathBuf::from)
}
