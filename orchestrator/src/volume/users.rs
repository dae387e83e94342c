//! Which sandboxes use a volume.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::MicrosandboxResult;
use crate::rundir::Home;
use crate::spec::{Access, MountSource, SandboxName, VolumeName};

/// A sandbox that mounts a volume.
///
/// ```no_run
/// # use microsandbox::{MicrosandboxResult, VolumeHandle, VolumeUse};
/// # async fn example(volume: &VolumeHandle) -> MicrosandboxResult<()> {
/// for VolumeUse { sandbox, running, .. } in volume.used_by().await? {
///     println!("{} {}", sandbox.as_str(), if running { "runs" } else { "is stopped" });
/// }
/// # Ok(())
/// # }
/// ```
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
/// [`crate::ErrorKind::Io`] when the sandboxes cannot be listed.
pub(crate) fn sandboxes_using(
    home: &Home,
    volume: &VolumeName,
) -> MicrosandboxResult<Vec<VolumeUse>> {
    Ok(uses(home)?.remove(volume).unwrap_or_default())
}

/// The volumes that sandboxes name in their requests, each with those sandboxes. A sandbox whose
/// request cannot be read, because it is just being removed, does not count.
///
/// # Errors
///
/// [`crate::ErrorKind::Io`] when the sandboxes cannot be listed.
pub fn uses(home: &Home) -> MicrosandboxResult<BTreeMap<VolumeName, Vec<VolumeUse>>> {
    let mut uses: BTreeMap<VolumeName, Vec<VolumeUse>> = BTreeMap::new();
    for dir in home.list_sandboxes()? {
        let Ok(spec) = dir.spec() else { continue };
        let running = dir.is_running();
        for mount in &spec.mounts {
            let MountSource::Named { name, .. } = &mount.source else {
                continue;
            };
            let read_only = mount.access == Access::ReadOnly;
            let users = uses.entry(name.clone()).or_default();
            match users.last_mut().filter(|last| last.sandbox == spec.name) {
                // Mounted twice: it can be written if one of them can.
                Some(last) => last.read_only &= read_only,
                None => users.push(VolumeUse {
                    sandbox: spec.name.clone(),
                    running,
                    read_only,
                }),
            }
        }
    }
    Ok(uses)
}
