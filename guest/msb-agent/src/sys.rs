//! Every unsafe call of the agent: fork, exec, signals, and four that rustix does not have.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

use rustix::io::Errno;
use rustix::process::Pid;

/// Copies this process; nothing in the parent, the child's id, as fork(2).
///
/// The agent has one thread, so the child may run any code before it executes a program.
pub(crate) fn fork() -> Result<Option<Pid>, Errno> {
    // SAFETY: no other thread exists (the agent never starts one), so no lock is held in the child.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        Err(last_errno())
    } else {
        Ok(Pid::from_raw(pid))
    }
}

/// Ends this process without running anything of the parent's; for the child of [`fork`].
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: _exit(2) takes any value, runs no handler and does not return.
    unsafe { libc::_exit(code) }
}

/// Closes every descriptor but standard input, output and error; for the child of [`fork`] that
/// does not execute a program, which would close them.
pub(crate) fn close_all_but_standard() {
    // SAFETY: the caller is a child that leaves by `exit_now` and uses no other descriptor, so none
    // of its owned ones is used or closed again.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
}

/// Replaces this process by a program. Returns only if that fails.
pub(crate) fn execve(path: &CStr, argv: &[&CStr], env: &[&CStr]) -> Errno {
    let argv: Vec<_> = argv
        .iter()
        .map(|s| s.as_ptr())
        .chain([ptr::null()])
        .collect();
    let env: Vec<_> = env
        .iter()
        .map(|s| s.as_ptr())
        .chain([ptr::null()])
        .collect();
    // SAFETY: both vectors end with a null pointer and their strings outlive the call.
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), env.as_ptr()) };
    last_errno()
}

/// A stream to a port of the host's vsock.
pub(crate) fn connect_to_host(port: u32) -> Result<OwnedFd, Errno> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
    // SAFETY: it takes three numbers.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, kind, 0) };
    if fd < 0 {
        return Err(last_errno());
    }
    // SAFETY: the kernel has just given us this descriptor and nobody else knows it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: the address consists of numbers, for which zero is a value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).map_err(|_| Errno::INVAL)?;
    address.svm_cid = libc::VMADDR_CID_HOST;
    address.svm_port = port;
    let length = libc::socklen_t::try_from(size_of_val(&address)).map_err(|_| Errno::INVAL)?;
    // SAFETY: the pointer leads to an address of that length, which is only read.
    let result =
        unsafe { libc::connect(fd, (&raw const address).cast::<libc::sockaddr>(), length) };
    if result < 0 {
        Err(last_errno())
    } else {
        Ok(socket)
    }
}

/// Blocks all signals and returns a descriptor that tells of SIGCHLD.
pub(crate) fn child_signals() -> Result<OwnedFd, Errno> {
    set_blocked_signals(true)?;
    let set = signal_set(&[libc::SIGCHLD]);
    // SAFETY: `set` is an initialised signal set; -1 asks for a new descriptor.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(last_errno());
    }
    // SAFETY: the kernel has just given us this descriptor and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Gives a new program the signal state it expects: nothing blocked, nothing ignored.
pub(crate) fn default_signals() -> Result<(), Errno> {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: SIG_DFL is a valid disposition; a signal that takes none is refused and stays.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    set_blocked_signals(false)
}

fn set_blocked_signals(blocked: bool) -> Result<(), Errno> {
    let all: Vec<_> = if blocked {
        (1..=libc::SIGRTMAX()).collect()
    } else {
        vec![]
    };
    let set = signal_set(&all);
    // SAFETY: `set` is an initialised signal set and the old one is not asked for.
    let failed = unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const set, ptr::null_mut()) };
    if failed == 0 {
        Ok(())
    } else {
        Err(last_errno())
    }
}

fn signal_set(signals: &[i32]) -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::uninit();
    // SAFETY: sigemptyset(3) initialises the whole set it is given.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    for &signal in signals {
        // SAFETY: the set was initialised above; an invalid number is refused.
        unsafe { libc::sigaddset(set.as_mut_ptr(), signal) };
    }
    // SAFETY: sigemptyset(3) above initialised it.
    unsafe { set.assume_init() }
}

/// Sends a signal to every process but this one.
pub(crate) fn signal_everybody(signal: i32) {
    // SAFETY: kill(2) has no memory effects here; as process 1 the agent itself is left out.
    unsafe { libc::kill(-1, signal) };
}

/// Adds `attributes` (`MOUNT_ATTR_*`) to the mount that `mount` is the root of.
pub(crate) fn set_mount_attributes(mount: impl AsFd, attributes: u64) -> Result<(), Errno> {
    let attr = libc::mount_attr {
        attr_set: attributes,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the empty path is a C string, `attr` is a whole struct of the size given, and both
    // outlive the call.
    let failed = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of_val(&attr),
        )
    };
    if failed == 0 {
        Ok(())
    } else {
        Err(last_errno())
    }
}

/// Brings the loopback interface up.
pub(crate) fn loopback_up(socket: impl AsFd) -> Result<(), Errno> {
    // SAFETY: ifreq is plain data, for which zero is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(*b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    let socket = socket.as_fd().as_raw_fd();
    // SAFETY: the request is a whole ifreq with a terminated name, and outlives the call.
    let failed = unsafe { libc::ioctl(socket, libc::SIOCSIFFLAGS, &raw const request) };
    if failed == 0 {
        Ok(())
    } else {
        Err(last_errno())
    }
}

fn last_errno() -> Errno {
    std::io::Error::last_os_error()
        .raw_os_error()
        .map_or(Errno::IO, Errno::from_raw_os_error)
}
