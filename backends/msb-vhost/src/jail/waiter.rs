//! The process that was started, once its child serves: waits, passes signals on, holds nothing.
//!
//! It keeps the pid that the orchestrator knows. It has the child's identity without capabilities,
//! one end of a pipe and a system call filter of its own, and ends as the child ended.

use std::io;
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitOptions, getpid};

use super::credentials::{self, Bond};
use super::{Call, CapabilitySet, Check, Identity, JailError, Layer, seccomp, sys};

/// Splits the process. Returns in the child only, with what tells it that the parent lives.
///
/// `parent_death` and `parent` were read before anything could clear the first.
pub(super) fn split(
    identity: Identity,
    parent_death: Option<Signal>,
    parent: Option<Pid>,
) -> Result<Bond, JailError> {
    let failed = |error| JailError::layer(Layer::Namespaces, "fork into them", error);
    let (bond, hold) = io::pipe().map_err(failed)?;
    let mask = sys::block_signals();
    let child = match sys::fork().map_err(failed) {
        Ok(Some(child)) => child,
        Ok(None) => {
            // The first process of a pid namespace is not sent what it does not block or handle,
            // and what asks it to end may come before it serves.
            sys::restore_all_but_ends(&mask);
            return Ok(bond);
        }
        Err(error) => {
            sys::restore_signals(&mask);
            return Err(error);
        }
    };
    let mut owed = 0;
    if let Err(error) = let_go(child, identity, parent_death, &hold) {
        tracing::error!("{error}");
        owed |= bit(libc::SIGKILL);
    }
    if parent_death.is_some() && rustix::process::getppid() != parent {
        owed |= bit(libc::SIGTERM);
    }
    wait(child, owed)
}

fn let_go(
    child: Pid,
    identity: Identity,
    parent_death: Option<Signal>,
    hold: &io::PipeWriter,
) -> Result<(), JailError> {
    sys::close_all_but(hold);
    let identity = match identity {
        Identity::Keep(_) => Identity::Keep(CapabilitySet::empty()),
        become_other => become_other,
    };
    credentials::drop_privileges(identity)?;
    credentials::harden(parent_death, None)?;
    let pid = u64::from(child.as_raw_pid().unsigned_abs());
    let own = u64::from(getpid().as_raw_pid().unsigned_abs());
    let mut calls = CALLS.to_vec();
    calls.push(Call::any(libc::SYS_kill).only(Check::equals(0, pid)));
    calls.push(Call::any(libc::SYS_tgkill).only(Check::equals(0, own)));
    seccomp::install_only(&calls)
}

/// How soon a signal is tried again that the child could not be sent.
const RETRY: Duration = Duration::from_millis(1);

/// What waiting takes, and ending by the signal that ended the child.
const CALLS: &[Call] = &[
    Call::any(libc::SYS_rt_sigtimedwait),
    Call::any(libc::SYS_rt_sigaction),
    Call::any(libc::SYS_rt_sigprocmask),
    Call::any(libc::SYS_rt_sigreturn),
    Call::any(libc::SYS_restart_syscall),
    Call::any(libc::SYS_wait4),
    Call::any(libc::SYS_getpid),
    Call::any(libc::SYS_getppid),
    Call::any(libc::SYS_gettid),
    Call::any(libc::SYS_exit_group),
];

/// The place of a signal in a set of them.
fn bit(signal: i32) -> u64 {
    1_u64.checked_shl(signal.unsigned_abs()).unwrap_or(0)
}

/// Passes on the signals in `owed` and those that come.
fn wait(child: Pid, mut owed: u64) -> ! {
    loop {
        // Until the child has taken on the ids of this process, it may not be sent anything.
        for signal in 1..64 {
            if owed & bit(signal) != 0 && sys::signal_child(child, signal) {
                owed &= !bit(signal);
            }
        }
        // Signals are blocked, so one that comes between the two calls is not lost.
        match rustix::process::waitpid(Some(child), WaitOptions::NOHANG) {
            Ok(Some((_, status))) => sys::end_like(status),
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => sys::end(1),
        }
        match sys::wait_for_signal((owed != 0).then_some(RETRY)) {
            None | Some(libc::SIGCHLD | libc::SIGCONT | libc::SIGTTIN | libc::SIGTTOU) => {}
            Some(signal) => owed |= bit(signal),
        }
    }
}
