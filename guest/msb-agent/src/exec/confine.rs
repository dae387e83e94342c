//! Takes from a command what the restricted profile does not leave it.

use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// What is left: enough to install packages, change owners and users, and serve the network.
///
/// Everything else is mount administration, or brings it back: modules, raw memory and disks,
/// tracing the agent, device nodes, file handles of other mounts, settings of the kernel (the
/// limit on user namespaces is one that `CAP_SYS_RESOURCE` lifts), another kernel.
const LEFT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::NET_ADMIN)
    .union(CapabilitySet::NET_RAW)
    .union(CapabilitySet::IPC_LOCK)
    .union(CapabilitySet::IPC_OWNER)
    .union(CapabilitySet::LEASE)
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::SYS_NICE)
    .union(CapabilitySet::AUDIT_WRITE);

/// Drops the rest from the bounding set and from everything that execve(2) computes with it, and
/// closes the ways in which a program could gain it back. Before the change of the user id.
pub(super) fn bound() -> Result<(), Errno> {
    for bit in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        if LEFT.contains(capability) {
            continue;
        }
        match remove_capability_from_bounding_set(capability) {
            // There is no such capability, nor any after it.
            Err(Errno::INVAL) => break,
            result => result?,
        }
    }
    Ok(())
}

/// Drops the rest from this process. After the change of the user id.
pub(super) fn drop_rest(is_root: bool) -> Result<(), Errno> {
    clear_ambient_capability_set()?;
    let left = if is_root {
        LEFT
    } else {
        CapabilitySet::empty()
    };
    let none = CapabilitySet::empty();
    set_capabilities(
        None,
        CapabilitySets {
            effective: left,
            permitted: left,
            inheritable: none,
        },
    )?;
    set_no_new_privs(true)
}
