//! System calls of the jail that have no safe wrapper.

#![allow(unsafe_code)]

use std::ffi::c_int;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use rustix::process::{Pid, WaitStatus};
use rustix::thread::UnshareFlags;

fn checked(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Moves the process into new namespaces.
pub(super) fn unshare(flags: UnshareFlags) -> io::Result<()> {
    debug_assert!(!flags.contains(UnshareFlags::FILES));
    // SAFETY: the table of descriptors stays shared, which is all that this call can break; every
    // caller passes namespace flags only.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(Into::into)
}

/// Splits the process; returns the child's pid in the parent and nothing in the child.
pub(super) fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: `enter` has checked that the process has one thread, so the child finds no lock held
    // by a thread that it does not have.
    let pid = checked(unsafe { libc::fork() })?;
    Ok(Pid::from_raw(pid))
}

/// Ends the process at once, without running destructors: those belong to its child.
pub(super) fn end(code: i32) -> ! {
    // SAFETY: the call does not return and touches no memory of the process.
    unsafe { libc::_exit(code) }
}

/// Closes a descriptor that no value of this program owns.
pub(super) fn close_unowned(fd: RawFd) {
    // SAFETY: the callers pass descriptors that came through exec and were taken over by nobody, or
    // run in a process that uses nothing of its memory afterwards.
    unsafe { libc::close(fd) };
}

/// Whether a descriptor would be closed by exec; also true when it is not open.
pub(super) fn closes_on_exec(fd: RawFd) -> bool {
    // SAFETY: the call takes integers only.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    flags < 0 || flags & libc::FD_CLOEXEC != 0
}

/// Closes every descriptor but one, in a process that uses no other.
pub(super) fn close_all_but(kept: &impl AsRawFd) {
    let kept = kept.as_raw_fd().unsigned_abs();
    for (first, last) in [(0, kept.checked_sub(1)), (kept + 1, Some(u32::MAX))] {
        if let Some(last) = last {
            // SAFETY: the call takes integers only; the caller only waits from now on, and ends
            // without running the destructors of what owned the descriptors.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    }
}

/// Overwrites the environment, which stays readable in `/proc` otherwise, and empties it.
pub(super) fn wipe_environment() {
    unsafe extern "C" {
        static mut environ: *mut *mut libc::c_char;
    }
    // SAFETY: the process has one thread, so nobody changes the variable meanwhile.
    let mut entry = unsafe { environ };
    if entry.is_null() {
        return;
    }
    loop {
        // SAFETY: `environ` points to an array that ends with a null pointer, not yet reached.
        let text = unsafe { *entry };
        if text.is_null() {
            break;
        }
        // SAFETY: every entry is a C string.
        let length = unsafe { libc::strlen(text) };
        // SAFETY: those bytes are the entry's own, and nobody has a reference to them.
        unsafe { text.write_bytes(0, length) };
        // SAFETY: the terminating null pointer was not reached, so there is a next element.
        entry = unsafe { entry.add(1) };
    }
    // SAFETY: the process has one thread.
    unsafe { libc::clearenv() };
}

/// Sets attributes of a mount and of all mounts below it, and makes them private.
pub(super) fn set_mount_attributes(tree: BorrowedFd<'_>, set: u64) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: set,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    // SAFETY: the path is an empty C string, the attributes and their size belong together, and
    // both live until the call returns.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Refuses memory that is writable and executable, or becomes executable later (Linux 6.3).
pub(super) fn refuse_exec_gain() -> io::Result<()> {
    // SAFETY: the call takes integers only.
    checked(unsafe { libc::prctl(libc::PR_SET_MDWE, libc::PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) })?;
    Ok(())
}

/// The signals that were blocked before [`block_signals`].
pub(super) struct SignalMask(libc::sigset_t);

/// Blocks every signal.
pub(super) fn block_signals() -> SignalMask {
    let (mut all, mut before) = (MaybeUninit::uninit(), MaybeUninit::uninit());
    // SAFETY: the pointer is valid for writing a signal set.
    unsafe { libc::sigfillset(all.as_mut_ptr()) };
    // SAFETY: both pointers are valid, `all` was initialised above; the call cannot fail.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr()) };
    // SAFETY: the call has written the former mask.
    SignalMask(unsafe { before.assume_init() })
}

/// Restores what [`block_signals`] found.
pub(super) fn restore_signals(mask: &SignalMask) {
    // SAFETY: the pointer is valid for the call, which cannot fail.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const mask.0, std::ptr::null_mut()) };
}

/// Restores what [`block_signals`] found, but for SIGTERM and SIGINT: these wait until somebody
/// takes them.
pub(super) fn restore_all_but_ends(mask: &SignalMask) {
    let mut kept = mask.0;
    for signal in [libc::SIGTERM, libc::SIGINT] {
        // SAFETY: the set is initialised and the number is a signal's.
        unsafe { libc::sigaddset(&raw mut kept, signal) };
    }
    restore_signals(&SignalMask(kept));
}

/// Waits for any blocked signal, at most for `limit`, and returns its number.
pub(super) fn wait_for_signal(limit: Option<Duration>) -> Option<c_int> {
    let limit = limit.map(|limit| libc::timespec {
        tv_sec: limit.as_secs().cast_signed(),
        tv_nsec: limit.subsec_nanos().into(),
    });
    let limit = limit.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    let mut all = MaybeUninit::uninit();
    // SAFETY: the pointer is valid for writing a signal set.
    unsafe { libc::sigfillset(all.as_mut_ptr()) };
    // SAFETY: the set was initialised above; no information is asked for; `limit` is null or valid.
    let signal = unsafe { libc::sigtimedwait(all.as_ptr(), std::ptr::null_mut(), limit) };
    (signal > 0).then_some(signal)
}

/// Sends a signal to a child that was not yet waited for; false when that is not allowed.
pub(super) fn signal_child(child: Pid, signal: c_int) -> bool {
    // SAFETY: the call takes integers only; the pid is still the child's.
    let sent = unsafe { libc::kill(child.as_raw_pid(), signal) } == 0;
    sent || io::Error::last_os_error().raw_os_error() != Some(libc::EPERM)
}

/// Ends the process as another one ended: with the same code, or by the same signal.
pub(super) fn end_like(status: WaitStatus) -> ! {
    if let Some(signal) = status.terminating_signal() {
        // SAFETY: the default action needs no handler; a signal that has none keeps it.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        // SAFETY: an all-zero set holds no signal.
        restore_signals(&SignalMask(unsafe { std::mem::zeroed() }));
        // SAFETY: the call takes an integer only.
        unsafe { libc::raise(signal) };
        end(128 + signal);
    }
    end(status.exit_status().unwrap_or(1))
}
