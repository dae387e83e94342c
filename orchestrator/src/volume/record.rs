//! What is recorded about a volume, and where.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::fit::VolumeFacts;
use crate::MicrosandboxResult;
use crate::rundir::{Home, read_json};
use crate::spec::{Mebibytes, SandboxName, VolumeKind, VolumeName};

/// Name of the image inside a disk volume's folder.
pub(crate) const DISK_IMAGE: &str = "disk.raw";

/// Folder, in the state folder, of the accounts by which quotas are kept.
pub(crate) const QUOTA_ACCOUNTS: &str = "state/quota";

/// The metadata of a volume, as it lies in `state/volumes/<name>.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) name: VolumeName,
    pub(crate) kind: VolumeKind,
    pub(crate) phase: Phase,
    pub(crate) capacity_bytes: Option<u64>,
    pub(crate) quota_mib: Option<Mebibytes>,
    #[serde(default)]
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) created_at_ms: u64,
    /// The sandbox whose first start made it, until that sandbox runs: should it never run, the
    /// volume is taken back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) made_for: Option<SandboxName>,
}

/// Whether what the record speaks of is there whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Phase {
    /// It is being made. Found without its lock being held, whoever made it was interrupted.
    Making,
    /// It is whole.
    Ready,
    /// It is being removed; likewise.
    Removing,
}

impl Record {
    pub(crate) fn facts(&self) -> VolumeFacts {
        VolumeFacts {
            kind: self.kind,
            capacity_bytes: self.capacity_bytes,
            quota: self.quota_mib,
            labels: self.labels.clone(),
        }
    }
}

/// The folder that is, or holds, a volume.
pub(crate) fn folder(home: &Home, name: &VolumeName) -> PathBuf {
    home.volumes().join(name.as_str())
}

/// Folder of the records.
pub(crate) fn records(home: &Home) -> PathBuf {
    home.state().join("volumes")
}

pub(crate) fn record_path(home: &Home, name: &VolumeName) -> PathBuf {
    records(home).join(format!("{name}.json"))
}

/// The record of a volume, if there is one.
pub(crate) fn read(home: &Home, name: &VolumeName) -> MicrosandboxResult<Option<Record>> {
    let path = record_path(home, name);
    match std::fs::symlink_metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        _ => read_json(&path).map(Some),
    }
}
