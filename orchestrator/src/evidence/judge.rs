//! Compares what is seen of a backend with what its jail promises.

use std::fmt;

use super::{Descriptor, DescriptorKind, Evidence, FileId};

/// What a process of a backend is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// It serves the device.
    Serves,
    /// It waits for the one that serves, and holds nothing.
    Waits,
}

/// What is promised.
#[derive(Debug, Clone)]
pub(crate) struct Expected {
    pub(crate) role: Role,
    /// The user that it is.
    pub(crate) user: u32,
    /// The group that it is.
    pub(crate) group: u32,
    /// Whether we can see through: we are root.
    pub(crate) seen_by_root: bool,
    /// Capabilities that it may keep, in a user namespace of its own.
    pub(crate) capabilities: u64,
    pub(crate) root: WantedRoot,
    pub(crate) read_only: bool,
    /// The files that it may have open.
    pub(crate) files: Files,
}

/// What its root directory is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum WantedRoot {
    /// Empty.
    Empty,
    /// This directory.
    Is(FileId),
}

/// The files that a backend may have open before a VM is connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Files {
    /// Only these files and directories.
    Only(Vec<FileId>),
    /// Regular files and disks: those that make up an image.
    Images,
}

/// One thing that was compared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Row {
    /// What.
    pub(crate) name: &'static str,
    pub(crate) verdict: Verdict,
    /// What was found.
    pub(crate) found: String,
}

/// The outcome of a comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// As promised.
    Holds,
    /// Nothing can be said, because the process hides it from us, as it should.
    Hidden,
    /// Not as promised.
    Broken,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.found)
    }
}

/// Compares `seen` with `expected`. `own` is what is seen of this process, which is in no jail.
pub(crate) fn judge(expected: &Expected, seen: &Evidence, own: &Evidence) -> Vec<Row> {
    let serves = expected.role == Role::Serves;
    let allowed = if serves { expected.capabilities } else { 0 };
    let mut rows = vec![
        row(
            "user",
            all(&seen.users, expected.user),
            format!("{:?}", seen.users),
        ),
        row(
            "group",
            all(&seen.groups, expected.group),
            format!("{:?}", seen.groups),
        ),
        // An ordinary user cannot drop them.
        row(
            "supplementary groups",
            seen.supplementary.is_empty() || !expected.seen_by_root,
            format!("{:?}", seen.supplementary),
        ),
        capabilities(seen, allowed),
        row(
            "no_new_privs",
            seen.no_new_privs,
            u8::from(seen.no_new_privs).to_string(),
        ),
        row(
            "seccomp",
            seen.seccomp == 2 && seen.filters > 0,
            format!("mode {}, {} filters", seen.seccomp, seen.filters),
        ),
        row(
            "threads",
            seen.odd_threads.is_empty(),
            format!("these differ from the first: {:?}", seen.odd_threads),
        ),
        row(
            "user namespace",
            seen.uid_map != own.uid_map || differs(seen, own, "user"),
            format!("its map of users is `{}`", seen.uid_map),
        ),
        row(
            "core dumps",
            seen.core_limit == "0",
            seen.core_limit.clone(),
        ),
        // Root's own processes look the same, dumpable or not.
        row(
            "not dumpable",
            seen.hidden || expected.user == 0,
            "its files in /proc belong to itself".to_owned(),
        ),
        namespaces(expected, seen, own),
        root_mount(expected, seen),
        hidden_from(expected, "environment", seen.environment, |bytes| {
            (*bytes == 0, format!("{bytes} bytes"))
        }),
    ];
    if serves {
        rows.push(row(
            "pid namespace",
            seen.pids.len() > own.pids.len(),
            format!("its pids are {:?}", seen.pids),
        ));
        rows.push(root(expected, seen));
    }
    rows.push(descriptors(expected, seen));
    rows
}

fn row(name: &'static str, holds: bool, found: String) -> Row {
    let verdict = if holds {
        Verdict::Holds
    } else {
        Verdict::Broken
    };
    Row {
        name,
        verdict,
        found,
    }
}

/// A row about something that only root is shown.
fn hidden_from<T>(
    expected: &Expected,
    name: &'static str,
    value: Option<T>,
    test: impl FnOnce(&T) -> (bool, String),
) -> Row {
    match value {
        Some(value) => {
            let (holds, found) = test(&value);
            row(name, holds, found)
        }
        None => Row {
            name,
            verdict: if expected.seen_by_root {
                Verdict::Broken
            } else {
                Verdict::Hidden
            },
            found: "cannot be seen".to_owned(),
        },
    }
}

fn all(ids: &[u32], wanted: u32) -> bool {
    ids.len() == 4 && ids.iter().all(|id| *id == wanted)
}

fn capabilities(seen: &Evidence, allowed: u64) -> Row {
    let beyond = seen
        .capabilities
        .iter()
        .find(|(set, bits)| {
            let allowed = if matches!(set.as_str(), "CapInh" | "CapAmb") {
                0
            } else {
                allowed
            };
            bits.0 & !allowed != 0
        })
        .map(|(set, bits)| format!("{set} is {:016x}", bits.0));
    let complete = seen.capabilities.len() == 5;
    row(
        "capabilities",
        beyond.is_none() && complete,
        beyond.unwrap_or_default(),
    )
}

fn differs(seen: &Evidence, own: &Evidence, kind: &str) -> bool {
    match (&seen.namespaces, &own.namespaces) {
        (Some(theirs), Some(ours)) => {
            theirs.get(kind).is_some() && theirs.get(kind) != ours.get(kind)
        }
        _ => false,
    }
}

fn namespaces(expected: &Expected, seen: &Evidence, own: &Evidence) -> Row {
    let kinds: &[&str] = match expected.role {
        Role::Serves => &["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"],
        // Its children are in another pid namespace, not itself.
        Role::Waits => &["user", "mnt", "net", "ipc", "uts", "cgroup"],
    };
    hidden_from(expected, "namespaces", seen.namespaces.as_ref(), |_| {
        let shared: Vec<&str> = kinds
            .iter()
            .copied()
            .filter(|kind| !differs(seen, own, kind))
            .collect();
        (
            shared.is_empty(),
            format!("shared with the host: {}", shared.join(", ")),
        )
    })
}

fn root(expected: &Expected, seen: &Evidence) -> Row {
    match expected.root {
        WantedRoot::Empty => hidden_from(expected, "root", seen.root_entries, |entries| {
            (*entries == 0, format!("it holds {entries} entries"))
        }),
        WantedRoot::Is(wanted) => hidden_from(expected, "root", seen.root, |root| {
            let found = format!("device {}, inode {}", root.device, root.inode);
            (*root == wanted, found)
        }),
    }
}

fn root_mount(expected: &Expected, seen: &Evidence) -> Row {
    let read_only = expected.read_only || expected.root == WantedRoot::Empty;
    hidden_from(expected, "root mount", seen.root_mount.as_ref(), |mount| {
        let has = |option: &str| mount.options.iter().any(|has| has == option);
        let harmless = ["nosuid", "nodev", "nosymfollow"].into_iter().all(has);
        let holds = harmless && (!read_only || has("ro"));
        (holds, mount.options.join(","))
    })
}

fn descriptors(expected: &Expected, seen: &Evidence) -> Row {
    hidden_from(expected, "descriptors", seen.descriptors.as_ref(), |open| {
        let odd: Vec<String> = open
            .iter()
            .filter(|descriptor| !is_allowed(expected, descriptor))
            .map(|odd| format!("{} is {}", odd.number, odd.target))
            .collect();
        (odd.is_empty(), odd.join(", "))
    })
}

fn is_allowed(expected: &Expected, descriptor: &Descriptor) -> bool {
    if expected.role == Role::Waits {
        return descriptor.kind == DescriptorKind::Pipe;
    }
    match descriptor.kind {
        DescriptorKind::Socket
        | DescriptorKind::Pipe
        | DescriptorKind::Null
        | DescriptorKind::Memory
        | DescriptorKind::Anonymous => true,
        DescriptorKind::Device => false,
        DescriptorKind::ProcDirectory => expected.root != WantedRoot::Empty,
        DescriptorKind::File | DescriptorKind::Disk if expected.files == Files::Images => true,
        DescriptorKind::File | DescriptorKind::Disk | DescriptorKind::Directory => {
            match (&expected.files, descriptor.file) {
                (Files::Only(files), Some(file)) => files.contains(&file),
                _ => false,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::evidence::{Bits, RootMount};

    const SHARE: FileId = FileId {
        device: 1,
        inode: 2,
    };

    fn namespaces(first: u64) -> Option<BTreeMap<String, u64>> {
        let kinds = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"];
        Some(
            kinds
                .iter()
                .map(|kind| (*kind).to_owned())
                .zip(first..)
                .collect(),
        )
    }

    fn jailed() -> Evidence {
        let sets = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"];
        let descriptor = |number, target: &str, kind, file| Descriptor {
            number,
            target: target.to_owned(),
            kind,
            file,
        };
        Evidence {
            pid: 7,
            name: "msb-fs".into(),
            state: 'S',
            users: vec![1000; 4],
            groups: vec![1000; 4],
            supplementary: vec![],
            capabilities: sets
                .iter()
                .map(|set| ((*set).to_owned(), Bits(0)))
                .collect(),
            no_new_privs: true,
            seccomp: 2,
            filters: 1,
            threads: 3,
            odd_threads: vec![],
            pids: vec![7, 1],
            uid_map: "1000 1000 1".into(),
            namespaces: namespaces(100),
            root: Some(SHARE),
            root_entries: Some(4),
            root_mount: Some(RootMount {
                folder: "/srv".into(),
                options: ["rw", "nosuid", "nodev", "nosymfollow"]
                    .map(String::from)
                    .to_vec(),
                kind: "ext4".into(),
                mounts: 1,
            }),
            descriptors: Some(vec![
                descriptor(0, "/dev/null", DescriptorKind::Null, None),
                descriptor(3, "socket:[1]", DescriptorKind::Socket, None),
                descriptor(8, "/", DescriptorKind::Directory, Some(SHARE)),
            ]),
            environment: Some(0),
            hidden: true,
            core_limit: "0".into(),
            cgroups: vec![],
        }
    }

    fn unjailed() -> Evidence {
        Evidence {
            uid_map: "0 0 4294967295".into(),
            namespaces: namespaces(1),
            pids: vec![7],
            ..jailed()
        }
    }

    fn expected() -> Expected {
        Expected {
            role: Role::Serves,
            user: 1000,
            group: 1000,
            seen_by_root: true,
            capabilities: 0,
            root: WantedRoot::Is(SHARE),
            read_only: false,
            files: Files::Only(vec![SHARE]),
        }
    }

    /// Names of the rows that do not hold.
    fn broken(expected: &Expected, seen: &Evidence) -> Vec<&'static str> {
        let rows = judge(expected, seen, &unjailed());
        let broken = rows.iter().filter(|row| row.verdict == Verdict::Broken);
        broken.map(|row| row.name).collect()
    }

    #[test]
    fn a_jailed_process_passes() {
        assert_eq!(broken(&expected(), &jailed()), [""; 0]);
    }

    #[test]
    fn each_missing_layer_is_named() {
        type Fault = (&'static str, fn(&mut Evidence));
        let faults: [Fault; 18] = [
            ("user", |seen| seen.users[2] = 0),
            ("group", |seen| seen.groups[1] = 0),
            ("supplementary groups", |seen| seen.supplementary = vec![4]),
            ("capabilities", |seen| {
                seen.capabilities.insert("CapBnd".into(), Bits(2));
            }),
            ("capabilities", |seen| {
                seen.capabilities.remove("CapAmb");
            }),
            ("no_new_privs", |seen| seen.no_new_privs = false),
            ("seccomp", |seen| seen.seccomp = 0),
            ("threads", |seen| seen.odd_threads = vec![9]),
            ("core dumps", |seen| seen.core_limit = "unlimited".into()),
            ("not dumpable", |seen| seen.hidden = false),
            ("namespaces", |seen| {
                seen.namespaces.as_mut().unwrap().insert("net".into(), 4);
            }),
            ("namespaces", |seen| seen.namespaces = None),
            ("root mount", |seen| {
                seen.root_mount
                    .as_mut()
                    .unwrap()
                    .options
                    .retain(|has| has != "nosymfollow");
            }),
            ("environment", |seen| seen.environment = Some(5)),
            ("pid namespace", |seen| seen.pids = vec![7]),
            ("root", |seen| seen.root.as_mut().unwrap().inode = 1),
            ("descriptors", |seen| {
                let device = Descriptor {
                    number: 9,
                    target: "/dev/mem".into(),
                    kind: DescriptorKind::Device,
                    file: None,
                };
                seen.descriptors.as_mut().unwrap().push(device);
            }),
            ("descriptors", |seen| {
                seen.descriptors.as_mut().unwrap()[2].file = Some(FileId {
                    device: 1,
                    inode: 9,
                });
            }),
        ];
        for (name, fault) in faults {
            let mut seen = jailed();
            fault(&mut seen);
            assert_eq!(broken(&expected(), &seen), [name]);
        }
        assert_eq!(
            broken(&expected(), &unjailed()),
            ["user namespace", "namespaces", "pid namespace"]
        );
    }

    #[test]
    fn a_read_only_share_and_an_empty_root_are_mounted_read_only() {
        let read_only = Expected {
            read_only: true,
            ..expected()
        };
        assert_eq!(broken(&read_only, &jailed()), ["root mount"]);
        let empty = Expected {
            root: WantedRoot::Empty,
            files: Files::Only(vec![]),
            ..expected()
        };
        assert_eq!(
            broken(&empty, &jailed()),
            ["root mount", "root", "descriptors"]
        );
    }

    #[test]
    fn what_is_hidden_from_a_user_is_no_fault() {
        let mut seen = jailed();
        (
            seen.namespaces,
            seen.root,
            seen.descriptors,
            seen.environment,
        ) = (None, None, None, None);
        let user = Expected {
            seen_by_root: false,
            ..expected()
        };
        assert_eq!(broken(&user, &seen), [""; 0]);
        assert_eq!(
            broken(&expected(), &seen),
            ["namespaces", "environment", "root", "descriptors"]
        );
    }

    #[test]
    fn the_one_that_waits_holds_a_pipe_and_no_capability() {
        let waits = Expected {
            role: Role::Waits,
            capabilities: 2,
            ..expected()
        };
        let mut seen = jailed();
        seen.pids = vec![7];
        seen.descriptors.as_mut().unwrap().truncate(0);
        assert_eq!(broken(&waits, &seen), [""; 0]);
        seen.capabilities.insert("CapEff".into(), Bits(2));
        seen.descriptors = jailed().descriptors;
        assert_eq!(broken(&waits, &seen), ["capabilities", "descriptors"]);
    }
}
