//! The system calls a backend may make; any other ends the process.
//!
//! Two filters are stacked. The first answers calls that libraries try and can do without, with an
//! error. The second allows what is listed. The kernel caches the verdict of calls whose arguments
//! are not looked at, so only rare ones carry checks.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::{JailError, Layer};

/// A condition on the lower half of one argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Check {
    argument: u8,
    mask: u64,
    value: u64,
}

impl Check {
    /// The argument is this.
    pub const fn equals(argument: u8, value: u64) -> Self {
        Self {
            argument,
            mask: 0xffff_ffff,
            value,
        }
    }

    /// These bits of the argument have these values.
    pub const fn masked(argument: u8, mask: u64, value: u64) -> Self {
        Self {
            argument,
            mask,
            value,
        }
    }
}

/// A system call that is allowed, when all its checks pass. Several entries for one call are
/// alternatives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    number: i64,
    checks: [Option<Check>; 2],
}

impl Call {
    /// The call with any arguments.
    pub const fn any(number: libc::c_long) -> Self {
        Self {
            number,
            checks: [None, None],
        }
    }

    /// The same, only if this passes as well; at most two checks.
    #[must_use]
    pub const fn only(mut self, check: Check) -> Self {
        match self.checks[0] {
            None => self.checks[0] = Some(check),
            Some(_) => self.checks[1] = Some(check),
        }
        self
    }
}

/// No execution: what is mapped or changed never becomes code.
const NO_EXEC: Check = Check::masked(2, libc::PROT_EXEC as u64, 0);

/// A new thread, never a process or a namespace.
const THREAD: Check = Check::masked(0, THREAD_BITS | NAMESPACE_BITS, THREAD_BITS);
const THREAD_BITS: u64 =
    (libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND | libc::CLONE_FILES) as u64;
const NAMESPACE_BITS: u64 = (libc::CLONE_NEWUSER
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_PTRACE) as u64;

/// `FIONBIO`, with which the standard library makes a socket non-blocking.
const FIONBIO: Check = Check::equals(1, libc::FIONBIO);

/// `PR_SET_VMA`, with which the C library names its memory.
const PR_SET_VMA: u64 = 0x5356_4d41;

/// What the transport, the threads, the log and the C library need.
const BASE: &[Call] = &[
    Call::any(libc::SYS_read),
    Call::any(libc::SYS_write),
    Call::any(libc::SYS_readv),
    Call::any(libc::SYS_writev),
    Call::any(libc::SYS_close),
    Call::any(libc::SYS_close_range),
    Call::any(libc::SYS_dup),
    Call::any(libc::SYS_fstat),
    Call::any(libc::SYS_statx),
    Call::any(libc::SYS_lseek),
    Call::any(libc::SYS_fcntl).only(Check::equals(1, libc::F_GETFD as u64)),
    Call::any(libc::SYS_fcntl).only(Check::equals(1, libc::F_SETFD as u64)),
    Call::any(libc::SYS_fcntl).only(Check::equals(1, libc::F_GETFL as u64)),
    Call::any(libc::SYS_fcntl).only(Check::equals(1, libc::F_SETFL as u64)),
    Call::any(libc::SYS_fcntl).only(Check::equals(1, libc::F_DUPFD_CLOEXEC as u64)),
    Call::any(libc::SYS_fcntl).only(Check::equals(1, libc::F_ADD_SEALS as u64)),
    Call::any(libc::SYS_fcntl).only(Check::equals(1, libc::F_GET_SEALS as u64)),
    Call::any(libc::SYS_ioctl).only(FIONBIO),
    Call::any(libc::SYS_accept4),
    Call::any(libc::SYS_recvmsg),
    Call::any(libc::SYS_recvfrom),
    Call::any(libc::SYS_sendmsg),
    Call::any(libc::SYS_sendto)
        .only(Check::equals(4, 0))
        .only(Check::equals(5, 0)),
    Call::any(libc::SYS_shutdown),
    Call::any(libc::SYS_getsockopt),
    Call::any(libc::SYS_ppoll),
    Call::any(libc::SYS_epoll_create1),
    Call::any(libc::SYS_epoll_ctl),
    Call::any(libc::SYS_epoll_pwait),
    Call::any(libc::SYS_epoll_pwait2),
    Call::any(libc::SYS_eventfd2),
    Call::any(libc::SYS_timerfd_create),
    Call::any(libc::SYS_timerfd_settime),
    Call::any(libc::SYS_memfd_create),
    Call::any(libc::SYS_ftruncate),
    Call::any(libc::SYS_mmap).only(NO_EXEC),
    Call::any(libc::SYS_mprotect).only(NO_EXEC),
    Call::any(libc::SYS_munmap),
    Call::any(libc::SYS_mremap),
    Call::any(libc::SYS_madvise),
    Call::any(libc::SYS_brk),
    Call::any(libc::SYS_futex),
    Call::any(libc::SYS_membarrier),
    Call::any(libc::SYS_clone).only(THREAD),
    Call::any(libc::SYS_clone3),
    Call::any(libc::SYS_set_robust_list),
    Call::any(libc::SYS_rseq),
    Call::any(libc::SYS_prctl).only(Check::equals(0, libc::PR_SET_NAME as u64)),
    Call::any(libc::SYS_prctl).only(Check::equals(0, PR_SET_VMA)),
    Call::any(libc::SYS_sched_yield),
    Call::any(libc::SYS_sched_getaffinity),
    Call::any(libc::SYS_gettid),
    // How often a worker that polls was pushed off its CPU.
    Call::any(libc::SYS_getrusage).only(Check::equals(0, libc::RUSAGE_THREAD as u64)),
    Call::any(libc::SYS_getpid),
    Call::any(libc::SYS_sigaltstack),
    Call::any(libc::SYS_rt_sigaction),
    Call::any(libc::SYS_rt_sigprocmask),
    Call::any(libc::SYS_rt_sigtimedwait),
    Call::any(libc::SYS_rt_sigreturn),
    Call::any(libc::SYS_signalfd4),
    Call::any(libc::SYS_restart_syscall),
    Call::any(libc::SYS_nanosleep),
    Call::any(libc::SYS_clock_nanosleep),
    Call::any(libc::SYS_clock_gettime),
    Call::any(libc::SYS_getrandom),
    Call::any(libc::SYS_exit),
    Call::any(libc::SYS_exit_group),
    #[cfg(target_arch = "x86_64")]
    Call::any(libc::SYS_poll),
    #[cfg(target_arch = "x86_64")]
    Call::any(libc::SYS_epoll_wait),
    #[cfg(target_arch = "x86_64")]
    Call::any(libc::SYS_time),
];

/// Calls that fail instead of ending the process, unless they are on the device's own list: the
/// standard library and the transport try them and go on without.
const ANSWERED: &[(libc::c_long, i32)] = &[
    // The C library falls back to clone, whose flags can be checked.
    (libc::SYS_clone3, libc::ENOSYS),
    // Reading cgroup limits, /proc/self/maps, time zones, debug symbols of a backtrace.
    (libc::SYS_openat, libc::ENOENT),
    (libc::SYS_openat2, libc::ENOENT),
    (libc::SYS_readlinkat, libc::ENOENT),
    // Removing the socket's name at the end.
    (libc::SYS_unlinkat, libc::EACCES),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_open, libc::ENOENT),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_readlink, libc::ENOENT),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_unlink, libc::EACCES),
];

/// Installs the filter of a device for all threads.
pub(super) fn install(device: &[Call], audit: bool) -> Result<(), JailError> {
    let listed = |number| device.iter().any(|call| call.number == number);
    // What is answered is not logged, so an audit leaves only what happens with every thread.
    let wanted = |number| !listed(number) && (!audit || number == libc::SYS_clone3);
    let answered = || ANSWERED.iter().filter(|(number, _)| wanted(*number));
    let mut errors: BTreeMap<i32, Vec<Call>> = BTreeMap::new();
    for (number, errno) in answered() {
        errors.entry(*errno).or_default().push(Call::any(*number));
    }
    let mut programs = Vec::new();
    for (errno, calls) in errors {
        let errno = SeccompAction::Errno(errno.unsigned_abs());
        programs.push(compile(calls.iter(), SeccompAction::Allow, errno)?);
    }
    let also: Vec<Call> = answered().map(|(number, _)| Call::any(*number)).collect();
    // To abort, and to interrupt a thread of one's own.
    let own = u64::from(rustix::process::getpid().as_raw_pid().unsigned_abs());
    let signal = [Call::any(libc::SYS_tgkill).only(Check::equals(0, own))];
    let allowed = BASE.iter().chain(device).chain(&also).chain(&signal);
    let other = if audit {
        SeccompAction::Log
    } else {
        SeccompAction::KillProcess
    };
    programs.push(compile(allowed, other, SeccompAction::Allow)?);
    programs.iter().try_for_each(apply)
}

/// Installs a filter that allows these calls and no others.
pub(super) fn install_only(calls: &[Call]) -> Result<(), JailError> {
    let program = compile(
        calls.iter(),
        SeccompAction::KillProcess,
        SeccompAction::Allow,
    )?;
    apply(&program)
}

fn compile<'a>(
    calls: impl Iterator<Item = &'a Call>,
    otherwise: SeccompAction,
    listed: SeccompAction,
) -> Result<BpfProgram, JailError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut any: Vec<i64> = Vec::new();
    for call in calls {
        let chain = rules.entry(call.number).or_default();
        let conditions: Vec<SeccompCondition> = call
            .checks
            .iter()
            .flatten()
            .map(condition)
            .collect::<Result<_, _>>()?;
        if conditions.is_empty() {
            any.push(call.number);
        } else {
            chain.push(SeccompRule::new(conditions).map_err(refused)?);
        }
    }
    // An empty chain matches whatever the arguments are.
    for number in any {
        rules.insert(number, Vec::new());
    }
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(refused)?;
    let filter = SeccompFilter::new(rules, otherwise, listed, arch).map_err(refused)?;
    BpfProgram::try_from(filter).map_err(refused)
}

fn condition(check: &Check) -> Result<SeccompCondition, JailError> {
    let operator = SeccompCmpOp::MaskedEq(check.mask);
    SeccompCondition::new(
        check.argument,
        SeccompCmpArgLen::Dword,
        operator,
        check.value,
    )
    .map_err(refused)
}

fn apply(program: &BpfProgram) -> Result<(), JailError> {
    seccompiler::apply_filter_all_threads(program).map_err(|error| {
        JailError::layer(
            Layer::Seccomp,
            "install the filter",
            io::Error::other(error),
        )
    })
}

fn refused(error: impl std::error::Error + Send + Sync + 'static) -> JailError {
    JailError::layer(Layer::Seccomp, "build the filter", io::Error::other(error))
}
