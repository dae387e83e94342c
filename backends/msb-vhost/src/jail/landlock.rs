//! Landlock: the share and nothing beside it, or nothing at all.

use std::io;
use std::os::fd::OwnedFd;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus,
    PathBeneath, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope, make_bitflags,
};
use rustix::fs::FileType;

use super::{JailError, Layer};

/// The newest version whose rights are asked for; older kernels grant what they know.
const NEWEST: ABI = ABI::V9;

/// Restricts this thread, and those it starts, to `share`. Returns the version in force.
pub(super) fn restrict(
    share: Option<&OwnedFd>,
    read_only: bool,
    special_files: bool,
) -> Result<u8, JailError> {
    let refused = |step: &'static str| {
        move |error: landlock::RulesetError| {
            JailError::layer(Layer::Landlock, step, io::Error::other(error))
        }
    };
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(NEWEST)))
        .and_then(|rules| rules.scope(Scope::from_all(NEWEST)))
        .and_then(Ruleset::create)
        .map_err(refused("make its rules"))?;
    if let Some(share) = share {
        let stat = rustix::fs::fstat(share)
            .map_err(|error| JailError::layer(Layer::Landlock, "look at the share", error))?;
        let mut rights = rights(read_only, special_files);
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            rights &= AccessFs::from_file(NEWEST);
        }
        rules = rules
            .add_rule(PathBeneath::new(share, rights))
            .map_err(refused("allow the share"))?;
    }
    let status = rules
        .restrict_self()
        .map_err(refused("enforce its rules"))?;
    match (status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, _) | (_, LandlockStatus::NotEnabled) => Err(missing(
            "it is not enabled (boot parameter lsm=, which must list landlock)",
        )),
        (_, LandlockStatus::NotImplemented) => Err(missing(
            "the kernel does not have it (Linux 5.13, CONFIG_SECURITY_LANDLOCK)",
        )),
        (_, LandlockStatus::Available { effective_abi, .. }) => Ok(effective_abi as u8),
    }
}

/// What a server does with files. Executing, devices and ioctls of devices are not among it, and
/// sockets and fifos rarely: most such files of the guest are ordinary ones on the host.
fn rights(read_only: bool, special_files: bool) -> BitFlags<AccessFs> {
    let read = make_bitflags!(AccessFs::{ReadFile | ReadDir});
    if read_only {
        return read;
    }
    let write = make_bitflags!(AccessFs::{
        WriteFile | Truncate | RemoveDir | RemoveFile | MakeDir | MakeReg | MakeSym | Refer
    });
    if special_files {
        // An overlay's whiteout is a character device by its type.
        read | write | make_bitflags!(AccessFs::{MakeFifo | MakeSock | MakeChar})
    } else {
        read | write
    }
}

fn missing(reason: &'static str) -> JailError {
    JailError::layer(Layer::Landlock, "use it", io::Error::other(reason))
}
