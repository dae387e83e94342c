//! A FUSE mount of the host's kernel, and the descriptors that serve it.

use std::ffi::CString;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::thread::UnshareFlags;

/// `FUSE_DEV_IOC_CLONE` of linux/fuse.h.
const CLONE: libc::c_ulong = 0x8004_e500;

/// Why no file system can be mounted here, if so: tests print it and go.
pub fn obstacle() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("mounting needs root".to_owned());
    }
    match open_device() {
        Ok(_) => None,
        Err(error) => Some(format!("{error:#}")),
    }
}

/// Gives the calling thread, and what it starts, a table of mounts of its own, so that nothing
/// stays mounted when the process is killed.
///
/// # Errors
///
/// What the kernel reports.
pub fn private_mounts() -> Result<()> {
    // SAFETY: a table of mounts and a working directory of its own change nothing that Rust code
    // relies on; descriptors stay shared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.context("unshare")?;
    let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", flags).context("making all mounts private")
}

fn open_device() -> Result<OwnedFd> {
    openat(
        CWD,
        "/dev/fuse",
        OFlags::RDWR | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .context("/dev/fuse")
}

/// A mounted file system.
pub(super) struct Mount {
    point: PathBuf,
}

impl Mount {
    /// Mounts at `point`; returns `count` descriptors that take requests.
    ///
    /// The calling thread and those that it starts from now on have a table of descriptors of their
    /// own, which holds these and ends with them. A thread that waits for a reply would otherwise
    /// keep the mount alive, and so itself, after its process was killed.
    pub(super) fn new(point: &Path, count: usize) -> Result<(Self, Vec<RawFd>)> {
        // SAFETY: all open descriptors keep their numbers in the new table; this thread only ends
        // it as a whole, and nothing that it owns is closed in the other table.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FILES) }.context("unshare")?;
        let first = open_device()?;
        // As virtiofs: permissions are the guest kernel's business, for all users.
        let data = CString::new(format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other",
            first.as_raw_fd()
        ))?;
        rustix::mount::mount("msb", point, "fuse", MountFlags::empty(), data.as_c_str())
            .with_context(|| format!("mounting on {}", point.display()))?;
        let mount = Self {
            point: point.to_owned(),
        };
        let mut files = Vec::with_capacity(count);
        for _ in 1..count {
            let next = open_device()?;
            let number = u32::try_from(first.as_raw_fd())?;
            // SAFETY: the call reads one number, which outlives it.
            let result = unsafe { libc::ioctl(next.as_raw_fd(), CLONE, &raw const number) };
            if result != 0 {
                return Err(std::io::Error::last_os_error()).context("FUSE_DEV_IOC_CLONE");
            }
            files.push(next.into_raw_fd());
        }
        files.push(first.into_raw_fd());
        Ok((mount, files))
    }

    /// Ends the file system: politely, or by force when somebody still uses it. True when it was
    /// not in use.
    pub(super) fn end(&self) -> std::io::Result<bool> {
        match rustix::mount::unmount(&self.point, UnmountFlags::NOFOLLOW) {
            // The second: somebody else was faster.
            Ok(()) | Err(rustix::io::Errno::INVAL) => Ok(true),
            Err(_) => self.abort().map(|()| false),
        }
    }

    /// Fails all requests, present and future, and takes the mount away.
    pub(super) fn abort(&self) -> std::io::Result<()> {
        let flags = UnmountFlags::NOFOLLOW | UnmountFlags::FORCE | UnmountFlags::DETACH;
        match rustix::mount::unmount(&self.point, flags) {
            // It is none any more.
            Ok(()) | Err(rustix::io::Errno::INVAL) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
