//! What /proc shows of a process, and whether a backend's jail stands before a VM gets its socket.
//!
//! A backend checks itself before it serves; this is the second opinion, by somebody who does not
//! believe it. [`read`] looks, [`judge`] compares with what the plan promises and touches nothing.

mod judge;
mod read;

use std::collections::BTreeMap;

use serde::{Serialize, Serializer};

pub(crate) use judge::{Expected, Files, Role, Row, Verdict, WantedRoot, judge};
pub use read::{children, family, read};

/// What is seen of one process. What a process that is not dumpable hides from ordinary users is
/// absent; root sees everything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Evidence {
    /// Its pid here.
    pub pid: u32,
    /// Name of its program, at most 15 bytes.
    pub name: String,
    /// Its state, such as `S` when it sleeps.
    pub state: char,
    /// Real, effective, saved and file system user.
    pub users: Vec<u32>,
    /// The same for the group.
    pub groups: Vec<u32>,
    /// Supplementary groups.
    pub supplementary: Vec<u32>,
    /// The five capability sets by their names (`CapEff` and so on).
    pub capabilities: BTreeMap<String, Bits>,
    /// No program it runs can give it more privileges.
    pub no_new_privs: bool,
    /// Mode of seccomp: 2 is a filter.
    pub seccomp: u32,
    /// Number of seccomp filters.
    pub filters: u32,
    /// Number of threads.
    pub threads: usize,
    /// Threads whose identity, capabilities, privileges or seccomp mode differ from the first's.
    pub odd_threads: Vec<u32>,
    /// Its pid in each pid namespace, from ours inwards.
    pub pids: Vec<u32>,
    /// User ids of its user namespace and what they are outside.
    pub uid_map: String,
    /// Number of the namespace of each kind.
    pub namespaces: Option<BTreeMap<String, u64>>,
    /// Its root directory.
    pub root: Option<FileId>,
    /// Number of entries in it; absent when it is not listed, too.
    pub root_entries: Option<usize>,
    /// Where its root file system lies and how it is mounted.
    pub root_mount: Option<RootMount>,
    /// What it holds open.
    pub descriptors: Option<Vec<Descriptor>>,
    /// Bytes of its environment that are not zero.
    pub environment: Option<usize>,
    /// Whether its files in /proc belong to root although it does not: it is not dumpable.
    pub hidden: bool,
    /// Largest core dump that it may leave, as the kernel words it.
    pub core_limit: String,
    /// Its control groups.
    pub cgroups: Vec<String>,
}

/// A capability set, written as the kernel writes it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bits(pub u64);

impl Serialize for Bits {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:016x}", self.0))
    }
}

/// A file, by device and inode number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct FileId {
    /// Device.
    pub device: u64,
    /// Inode.
    pub inode: u64,
}

/// The first mount that a process sees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RootMount {
    /// Which folder of its file system is visible.
    pub folder: String,
    /// Mount options.
    pub options: Vec<String>,
    /// Kind of file system.
    pub kind: String,
    /// Number of mounts in all.
    pub mounts: usize,
}

/// An open descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Descriptor {
    /// Its number.
    pub number: u32,
    /// What the kernel calls it.
    pub target: String,
    /// What it is.
    pub kind: DescriptorKind,
    /// Which file it is.
    pub file: Option<FileId>,
}

/// What a descriptor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DescriptorKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A directory of /proc.
    ProcDirectory,
    /// A socket.
    Socket,
    /// A pipe.
    Pipe,
    /// `/dev/null`.
    Null,
    /// A block device.
    Disk,
    /// Another device.
    Device,
    /// Memory: guest memory, or a record of requests in flight.
    Memory,
    /// An object of the kernel without a file, such as an eventfd.
    Anonymous,
}
