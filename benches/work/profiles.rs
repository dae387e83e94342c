//! The configurations that are compared: of one consistency class each.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use msb_testkit::msb::bin_dir;

use crate::harness::cli::Options;
use crate::harness::server::{Contender, Role};
use crate::share::peers::peers_dir;

/// One class: ours, virtiofsd as it comes, and virtiofsd in the same class where that is another.
pub struct Profile {
    /// What it is called.
    pub name: &'static str,
    /// What it promises.
    pub title: &'static str,
    /// Labels of ours and of its peers.
    pub members: &'static [(&'static str, Role)],
}

const SHARED: &str = "msb-fs";
const EXCLUSIVE: &str = "msb-fs --exclusive";
const WRITEBACK: &str = "msb-fs --exclusive --writeback";
const AUTO: &str = "virtiofsd --xattr";
const ALWAYS: &str = "virtiofsd --xattr, cache=always";
const ALWAYS_WRITEBACK: &str = "virtiofsd --xattr, cache=always, writeback";

/// The label of the host's own file system.
pub const NATIVE: &str = "native";

/// All classes.
pub const PROFILES: &[Profile] = &[
    Profile {
        name: "shared",
        title: "the host may change files",
        members: &[(SHARED, Role::Judged), (AUTO, Role::Peer)],
    },
    Profile {
        name: "exclusive",
        title: "only this guest changes files",
        members: &[
            (EXCLUSIVE, Role::Judged),
            (AUTO, Role::Peer),
            (ALWAYS, Role::TunedPeer),
        ],
    },
    Profile {
        name: "writeback",
        title: "and the guest collects writes",
        members: &[
            (WRITEBACK, Role::Judged),
            (AUTO, Role::Peer),
            (ALWAYS_WRITEBACK, Role::TunedPeer),
        ],
    },
];

/// Every server that takes part in one of the classes.
///
/// # Errors
///
/// When a program is missing.
pub fn contenders(options: &Options) -> Result<Vec<Contender>> {
    let ours = |label, more: &[&str]| {
        let mut contender = server(label, bin_dir().join("msb-fs"), more);
        contender.flags.push("--tag=bench".to_owned());
        contender.flags.extend(options.extra());
        contender
    };
    let theirs = |label, more: &[&str]| {
        let mut contender = server(label, peers_dir().join("virtiofsd"), more);
        // Ours serves extended attributes as well, and the kernel asks for them on its own.
        contender.flags.push("--xattr".to_owned());
        contender
    };
    let mut all = vec![
        ours(SHARED, &[]),
        theirs(AUTO, &[]),
        ours(EXCLUSIVE, &["--exclusive"]),
        theirs(ALWAYS, &["--cache=always", "--inode-file-handles=never"]),
        ours(WRITEBACK, &["--exclusive", "--writeback"]),
        theirs(
            ALWAYS_WRITEBACK,
            &[
                "--cache=always",
                "--writeback",
                "--inode-file-handles=never",
            ],
        ),
    ];
    all.retain(|contender| options.takes(&contender.label));
    for contender in &all {
        ensure!(
            contender.program.exists(),
            "no {}: run `make bench`, which builds it",
            contender.program.display()
        );
    }
    Ok(all)
}

fn server(label: &str, program: PathBuf, more: &[&str]) -> Contender {
    let flags = [
        "--socket-path={socket}",
        "--shared-dir={subject}",
        "--log-level=error",
    ];
    Contender {
        label: label.to_owned(),
        // Which it is depends on the class.
        role: Role::Ours,
        program,
        flags: flags
            .iter()
            .chain(more)
            .map(|&flag| flag.to_owned())
            .collect(),
    }
}
