//! Gives up identity, capabilities and everything else a process could grow by.

use std::io::{self, Read};

use rustix::process::{
    DumpableBehavior, Gid, Resource, Rlimit, Signal, Uid, geteuid, getrlimit, setrlimit,
};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets};

use super::{Identity, JailError, Layer, sys};

/// Far above one for each of 64 queues, those of a pool and the process that waits.
const MOST_THREADS: u64 = 256;

/// The end of a pipe whose other end the waiting parent holds until it ends.
pub(super) type Bond = io::PipeReader;

/// Drops groups, ids and capabilities.
pub(super) fn drop_privileges(identity: Identity) -> Result<(), JailError> {
    let mut kept = identity.capabilities();
    let now = rustix::thread::capabilities(None).map_err(failed("read the capabilities"))?;
    kept &= now.permitted;
    if now.effective.contains(CapabilitySet::SETPCAP) {
        shrink_bounding_set(kept).map_err(failed("shrink the bounding set"))?;
        lock_secure_bits().map_err(failed("lock the secure bits"))?;
    }
    rustix::thread::clear_ambient_capability_set().map_err(failed("clear the ambient set"))?;
    if now.effective.contains(CapabilitySet::SETGID) {
        match rustix::thread::set_thread_groups(&[]) {
            // In the user namespace of an ordinary user the groups cannot be dropped.
            Ok(()) | Err(rustix::io::Errno::PERM) => {}
            Err(error) => return Err(failed("drop the supplementary groups")(error)),
        }
    }
    if let Identity::Become { uid, gid } | Identity::Owner { uid, gid } = identity
        && geteuid().is_root()
        && uid != 0
    {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(failed("change the group"))?;
        rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(failed("change the user"))?;
    }
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, sets).map_err(failed("drop the capabilities"))
}

fn shrink_bounding_set(kept: CapabilitySet) -> rustix::io::Result<()> {
    for bit in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        if kept.contains(capability) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // Beyond the last capability this kernel knows.
            Err(rustix::io::Errno::INVAL) => break,
            other => other?,
        }
    }
    Ok(())
}

fn lock_secure_bits() -> rustix::io::Result<()> {
    rustix::thread::set_capabilities_secure_bits(
        CapabilitiesSecureBits::NO_ROOT
            | CapabilitiesSecureBits::NO_ROOT_LOCKED
            | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
            | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED,
    )
}

/// Limits the number of open descriptors, or raises it as far as it goes.
pub(super) fn limit_descriptors(count: u64) {
    let hard = getrlimit(Resource::Nofile).maximum;
    let count = hard.map_or(count, |hard| hard.min(count));
    // Lowering both limits is always allowed.
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: Some(count),
            maximum: Some(count),
        },
    )
    .ok();
}

/// Limits the threads, in a user namespace of one's own: elsewhere all processes of the user count.
pub(super) fn limit_threads() {
    let count = Some(MOST_THREADS);
    setrlimit(
        Resource::Nproc,
        Rlimit {
            current: count,
            maximum: count,
        },
    )
    .ok();
}

/// Makes the process unable to gain anything by exec, to be looked into, and to outlive its parent.
///
/// `parent_death` is the signal that was asked for before; changes of identity have cleared it. With
/// a `bond` the parent is the one that waits, and nothing is to outlive that.
pub(super) fn harden(parent_death: Option<Signal>, bond: Option<Bond>) -> Result<(), JailError> {
    let process = |step| move |error| JailError::layer(Layer::Process, step, error);
    setrlimit(
        Resource::Core,
        Rlimit {
            current: Some(0),
            maximum: Some(0),
        },
    )
    .map_err(|error| process("forbid core dumps")(io::Error::from(error)))?;
    rustix::thread::set_no_new_privs(true)
        .map_err(|error| process("give up new privileges")(error.into()))?;
    match sys::refuse_exec_gain() {
        // A kernel before 6.3.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
        other => other.map_err(process("refuse executable memory"))?,
    }
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(|error| process("forbid dumps")(error.into()))?;
    let signal = if bond.is_some() {
        Some(Signal::KILL)
    } else {
        parent_death
    };
    rustix::process::set_parent_process_death_signal(signal)
        .map_err(|error| process("follow the parent")(error.into()))?;
    if let Some(bond) = bond
        && parent_has_gone(bond).map_err(process("look after the parent"))?
    {
        let gone = io::Error::other("the parent process has gone");
        return Err(process("follow the parent")(gone));
    }
    Ok(())
}

/// Whether the other end of the pipe is closed: the signal came too late to be asked for.
fn parent_has_gone(mut bond: Bond) -> io::Result<bool> {
    rustix::io::ioctl_fionbio(&bond, true)?;
    match bond.read(&mut [0]) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        other => other.map(|count| count == 0),
    }
}

fn failed(step: &'static str) -> impl Fn(rustix::io::Errno) -> JailError {
    move |error| JailError::layer(Layer::Credentials, step, error)
}
