//! Which sandboxes use a volume.

use serde::Serialize;

use crate::MicrosandboxResult;
use crate::rundir::Home;
use crate::spec::{Access, MountSource, SandboxName, VolumeName};

/// A sandbox that mounts a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VolumeUse {
    /// The sandbox.
    pub sandbox: SandboxName,
    /// Whether it runs now.
    pub running: bool,
    /// Whether it can only read the volume.
    pub read_only: bool,
}

/// The sandboxes whose request names the volume, in the order of their names.
///
/// # Errors
///
/// [`crate::ErrorKind::Io`] when the sandboxes cannot be listed. A sandbox whose request cannot be
/// read, because it is just being removed, does not count.
pub(crate) fn sandboxes_using(
    home: &Home,
    volume: &VolumeName,
) -> MicrosandboxResult<Vec<VolumeUse>> {
    let mut users = Vec::new();
    for dir in home.list_sandboxes()? {
        let Ok(spec) = dir.spec() else { continue };
        let mut accesses = spec
            .mounts
            .iter()
            .filter(
                |mount| matches!(&mount.source, MountSource::Named { name, .. } if name == volume),
            )
            .map(|mount| mount.access)
            .peekable();
        if accesses.peek().is_some() {
            users.push(VolumeUse {
                sandbox: spec.name.clone(),
                running: dir.is_running(),
                read_only: accesses.all(|access| access == Access::ReadOnly),
            });
        }
    }
    Ok(users)
}
