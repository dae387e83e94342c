//! Reads what /proc shows of a process.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use super::{Bits, Descriptor, DescriptorKind, Evidence, FileId, RootMount};

/// The namespaces that are looked at; `time` has nothing to separate here.
const NAMESPACES: [&str; 7] = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"];

/// Lines of a thread's status that must be the same in all threads.
const SAME: [&str; 10] = [
    "Uid",
    "Gid",
    "Groups",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
];

/// Looks at a process.
///
/// # Errors
///
/// When it has ended.
pub fn read(pid: u32) -> io::Result<Evidence> {
    let folder = format!("/proc/{pid}");
    let folder = Path::new(&folder);
    let status = fs::read_to_string(folder.join("status"))?;
    let fields = Status(&status);
    let users = fields.numbers("Uid");
    let (threads, odd_threads) = threads(folder, &fields)?;
    let root = fs::metadata(folder.join("root/")).ok();
    let capabilities = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].map(|set| {
        let bits = u64::from_str_radix(fields.text(set), 16);
        // A set that cannot be read counts as full.
        (set.to_owned(), Bits(bits.unwrap_or(u64::MAX)))
    });
    let owner = fs::symlink_metadata(folder.join("environ")).map_or(u32::MAX, |file| file.uid());
    let text = |name: &str| fs::read_to_string(folder.join(name)).unwrap_or_default();
    Ok(Evidence {
        pid,
        name: fields.text("Name").to_owned(),
        state: fields.text("State").chars().next().unwrap_or('?'),
        hidden: owner == 0 && users.get(1).is_some_and(|user| *user != 0),
        users,
        groups: fields.numbers("Gid"),
        supplementary: fields.numbers("Groups"),
        capabilities: BTreeMap::from(capabilities),
        no_new_privs: fields.text("NoNewPrivs") == "1",
        seccomp: fields.number("Seccomp"),
        filters: fields.number("Seccomp_filters"),
        threads,
        odd_threads,
        pids: fields.numbers("NSpid"),
        uid_map: words(&text("uid_map")),
        namespaces: namespaces(folder),
        root: root.as_ref().map(id),
        root_entries: fs::read_dir(folder.join("root/")).ok().map(Iterator::count),
        root_mount: root_mount(&text("mountinfo")),
        descriptors: descriptors(folder),
        environment: fs::read(folder.join("environ"))
            .ok()
            .map(|bytes| bytes.iter().filter(|byte| **byte != 0).count()),
        core_limit: core_limit(&text("limits")).to_owned(),
        cgroups: text("cgroup").lines().map(str::to_owned).collect(),
    })
}

/// The processes that a process has started and not waited for.
pub fn children(pid: u32) -> Vec<u32> {
    if let Ok(list) = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")) {
        return list
            .split_whitespace()
            .filter_map(|pid| pid.parse().ok())
            .collect();
    }
    // A kernel without that list.
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|child| parent(*child) == Some(pid))
        .collect()
}

/// A process and everything below it, parents first.
pub fn family(pid: u32) -> Vec<Evidence> {
    let mut found = Vec::new();
    let mut waiting = vec![pid];
    while let Some(pid) = waiting.pop() {
        // One that has ended meanwhile is left out.
        if let Ok(evidence) = read(pid) {
            found.push(evidence);
            waiting.extend(children(pid).into_iter().rev());
        }
    }
    found
}

fn parent(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    Status(&status).text("PPid").parse().ok()
}

/// The lines `Name: value` of a status file.
struct Status<'a>(&'a str);

impl<'a> Status<'a> {
    fn text(&self, name: &str) -> &'a str {
        let line = self
            .0
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.map_or("", str::trim)
    }

    fn number(&self, name: &str) -> u32 {
        self.text(name).parse().unwrap_or_default()
    }

    fn numbers(&self, name: &str) -> Vec<u32> {
        let words = self.text(name).split_whitespace();
        words.filter_map(|word| word.parse().ok()).collect()
    }
}

/// How many threads there are, and those that differ from the first.
fn threads(folder: &Path, first: &Status) -> io::Result<(usize, Vec<u32>)> {
    let mut count = 0;
    let mut odd = Vec::new();
    for entry in fs::read_dir(folder.join("task"))? {
        let entry = entry?;
        // A thread that has ended meanwhile is none.
        let Ok(status) = fs::read_to_string(entry.path().join("status")) else {
            continue;
        };
        count += 1;
        let status = Status(&status);
        if SAME
            .iter()
            .any(|name| status.text(name) != first.text(name))
        {
            let name = entry.file_name();
            odd.extend(name.to_str().and_then(|name| name.parse::<u32>().ok()));
        }
    }
    Ok((count, odd))
}

fn namespaces(folder: &Path) -> Option<BTreeMap<String, u64>> {
    NAMESPACES
        .iter()
        .map(|kind| {
            let link = fs::read_link(folder.join("ns").join(kind)).ok()?;
            let number = link.to_str()?.split(['[', ']']).nth(1)?.parse().ok()?;
            Some(((*kind).to_owned(), number))
        })
        .collect()
}

/// `36 35 98:0 /folder / rw,nosuid shared:1 - ext4 /dev/sda1 rw`; see proc_pid_mountinfo(5).
fn root_mount(table: &str) -> Option<RootMount> {
    let line = table
        .lines()
        .find(|line| line.split(' ').nth(4) == Some("/"))?;
    let mut fields = line.split(' ');
    let folder = fields.nth(3)?.to_owned();
    let options = fields.nth(1)?.split(',').map(str::to_owned).collect();
    let kind = line.split_once(" - ")?.1.split(' ').next()?.to_owned();
    Some(RootMount {
        folder,
        options,
        kind,
        mounts: table.lines().count(),
    })
}

fn descriptors(folder: &Path) -> Option<Vec<Descriptor>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder.join("fd")).ok()? {
        let path = entry.ok()?.path();
        // One that was closed meanwhile is none.
        let Ok(target) = fs::read_link(&path) else {
            continue;
        };
        let target = target.to_string_lossy().into_owned();
        let stat = fs::metadata(&path).ok();
        found.push(Descriptor {
            number: path.file_name()?.to_str()?.parse().ok()?,
            kind: kind(&path, &target, stat.as_ref()),
            file: stat.as_ref().map(id),
            target,
        });
    }
    found.sort_by_key(|descriptor| descriptor.number);
    Some(found)
}

fn kind(path: &Path, target: &str, stat: Option<&fs::Metadata>) -> DescriptorKind {
    if target.starts_with("anon_inode:") {
        return DescriptorKind::Anonymous;
    }
    if target.starts_with("/memfd:") {
        return DescriptorKind::Memory;
    }
    let Some(stat) = stat else {
        return DescriptorKind::Device;
    };
    let kind = stat.file_type();
    if kind.is_socket() {
        DescriptorKind::Socket
    } else if kind.is_fifo() {
        DescriptorKind::Pipe
    } else if kind.is_char_device() && stat.rdev() == rustix::fs::makedev(1, 3) {
        DescriptorKind::Null
    } else if kind.is_block_device() {
        DescriptorKind::Disk
    } else if kind.is_dir() && is_proc(path) {
        DescriptorKind::ProcDirectory
    } else if kind.is_dir() {
        DescriptorKind::Directory
    } else if kind.is_file() {
        DescriptorKind::File
    } else {
        DescriptorKind::Device
    }
}

fn is_proc(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|found| found.f_type == rustix::fs::PROC_SUPER_MAGIC)
}

fn id(stat: &fs::Metadata) -> FileId {
    FileId {
        device: stat.dev(),
        inode: stat.ino(),
    }
}

/// The soft limit of the line `Max core file size  0  0  bytes`.
fn core_limit(limits: &str) -> &str {
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max core file size"));
    line.and_then(|line| line.split_whitespace().next())
        .unwrap_or_default()
}

fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_seen() {
        let seen = read(std::process::id()).unwrap();
        assert_eq!(seen.pid, std::process::id());
        assert_eq!(seen.pids.first(), Some(&std::process::id()));
        assert!(seen.threads >= 1 && seen.odd_threads.is_empty());
        assert_eq!(seen.namespaces.unwrap().len(), NAMESPACES.len());
        assert!(seen.environment.unwrap() > 0);
        assert!(seen.root_entries.unwrap() > 0);
        let descriptors = seen.descriptors.unwrap();
        assert!(descriptors.iter().any(|found| found.number == 0));
    }

    #[test]
    fn children_are_found_while_they_live() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        // Only the first thread's children are listed by the kernel; tests run on others.
        let found = parent(child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found, Some(std::process::id()));
        assert!(read(u32::MAX).is_err());
    }

    #[test]
    fn the_root_mount_is_read() {
        let table = "90 67 254:0 /srv/share / rw,nosuid,nosymfollow - ext4 /dev/vda rw\n\
            91 90 0:5 / /sub ro shared:2 - tmpfs none rw\n";
        let root = root_mount(table).unwrap();
        assert_eq!(root.folder, "/srv/share");
        assert_eq!(root.options, ["rw", "nosuid", "nosymfollow"]);
        assert_eq!((root.kind.as_str(), root.mounts), ("ext4", 2));
        assert_eq!(
            core_limit("Limit Soft\nMax core file size   0   7  bytes\n"),
            "0"
        );
    }
}
