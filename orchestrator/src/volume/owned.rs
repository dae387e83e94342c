//! Volumes of one sandbox's own, which lie in its folder and go with it.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};

use super::disk::make_ext4;
use crate::error::{Error, ErrorKind, MicrosandboxResult};
use crate::plan::OwnedPlan;
use crate::rundir::{sync_dir, tree};

/// Makes the volume if it is not there yet; whether it was made.
///
/// # Errors
///
/// [`ErrorKind::VolumeAlreadyExists`] when the sandbox has another one for the same guest path, and
/// whatever keeps it from being made.
pub(crate) fn ensure(plan: &OwnedPlan) -> MicrosandboxResult<bool> {
    let cannot = |error| {
        Error::io(
            format!("cannot make the volume at `{}`", plan.target),
            error,
        )
    };
    let other = match plan.capacity_bytes {
        Some(_) => plan.path.with_extension(""),
        None => plan.path.with_extension("raw"),
    };
    if other.symlink_metadata().is_ok() {
        return Err(another(plan, "of the other kind"));
    }
    match (plan.path.symlink_metadata(), plan.capacity_bytes) {
        (Ok(found), Some(bytes)) if found.len() != bytes => {
            Err(another(plan, &format!("of {} bytes", found.len())))
        }
        (Ok(_), _) => Ok(false),
        (Err(error), _) if error.kind() != io::ErrorKind::NotFound => Err(cannot(error)),
        (Err(_), Some(bytes)) => make_ext4(&plan.path, bytes, "msb-owned").map(|()| true),
        (Err(_), None) => {
            let made = DirBuilder::new().mode(0o700).create(&plan.path);
            // In the guest it is open to every user; on the host the folder around it is not.
            let opened =
                made.and_then(|()| fs::set_permissions(&plan.path, Permissions::from_mode(0o755)));
            opened.map_err(cannot)?;
            let folder = plan.path.parent().unwrap_or(&plan.path);
            sync_dir(folder).map_err(cannot)?;
            Ok(true)
        }
    }
}

/// Removes a volume that was made for a mount that the sandbox did not get after all.
pub(super) fn take_back(plan: &OwnedPlan) {
    // What cannot be removed goes with the sandbox.
    let _ = tree::remove_path(&plan.path);
}

fn another(plan: &OwnedPlan, which: &str) -> Error {
    let message = format!(
        "the sandbox has a volume {which} for `{}` already",
        plan.target
    );
    Error::new(ErrorKind::VolumeAlreadyExists, message)
        .with_value(plan.target.as_str())
        .with_hint("ask for it as it is, or choose another guest path")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::GuestPath;

    #[test]
    fn a_volume_is_made_once_and_found_again_as_what_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let plan = |capacity_bytes, name: &str| OwnedPlan {
            target: GuestPath::try_from("/x".to_owned()).unwrap(),
            path: folder.path().join(name),
            capacity_bytes,
        };
        let directory = plan(None, "volume-x");
        assert!(ensure(&directory).unwrap());
        fs::write(directory.path.join("kept"), "x").unwrap();
        assert!(!ensure(&directory).unwrap());
        assert!(directory.path.join("kept").exists());
        let disk = plan(Some(4 << 20), "volume-x.raw");
        let refused = ensure(&disk).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::VolumeAlreadyExists);
        assert!(!disk.path.exists());
        take_back(&directory);
        assert!(ensure(&disk).unwrap());
        assert!(!ensure(&disk).unwrap());
        let refused = ensure(&plan(Some(8 << 20), "volume-x.raw")).unwrap_err();
        assert!(refused.to_string().contains("4194304 bytes"), "{refused}");
        assert!(ensure(&directory).is_err());
    }
}
