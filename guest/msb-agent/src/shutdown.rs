//! Ends the guest: its processes, its file systems, its power.

use std::time::{Duration, Instant};

use rustix::fs::sync;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount_remount, unmount};
use rustix::system::{RebootCommand, reboot};

use crate::sys;

/// How long killed processes have to vanish.
const VANISH: Duration = Duration::from_millis(500);
/// When the power goes off even if a file system does not answer.
const WATCHDOG: Duration = Duration::from_secs(10);

/// A shutdown on its way, as far as processes are concerned.
#[derive(Debug)]
pub(crate) struct Shutdown {
    deadline: Instant,
    killing: bool,
}

impl Shutdown {
    /// Asks all processes to end and gives them some time.
    pub(crate) fn begin(grace: Duration) -> Self {
        sys::signal_everybody(libc::SIGTERM);
        // A stopped process would not notice.
        sys::signal_everybody(libc::SIGCONT);
        Self {
            deadline: Instant::now() + grace,
            killing: false,
        }
    }

    /// When [`Self::is_over`] should be asked at the latest.
    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Whether there is nothing more to wait for. Kills what is left when its time is over.
    pub(crate) fn is_over(&mut self, now: Instant, no_processes: bool) -> bool {
        if no_processes {
            return true;
        }
        if now < self.deadline {
            return false;
        }
        if self.killing {
            return true;
        }
        sys::signal_everybody(libc::SIGKILL);
        self.killing = true;
        self.deadline = now + VANISH;
        false
    }
}

/// Writes everything back and unmounts what can be unmounted.
pub(crate) fn finish() {
    start_watchdog();
    sync();
    for target in mounts().iter().rev() {
        match unmount(target.as_str(), UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(_) => {
                // What is still in use is at least made clean.
                let _ = remount_read_only(target);
                let _ = unmount(
                    target.as_str(),
                    UnmountFlags::NOFOLLOW | UnmountFlags::DETACH,
                );
            }
        }
    }
    for layer in ["/", "upper", "root"] {
        let _ = remount_read_only(layer);
    }
    sync();
}

/// Turns the machine off.
pub(crate) fn power_off() {
    sync();
    if let Err(error) = reboot(off()) {
        eprintln!("msb-agent: cannot power off: {error}");
    }
}

/// What turns the machine off. A PC without ACPI has no switch for that, and its processor would
/// only halt; the VMMs that make such machines end when one is restarted.
fn off() -> RebootCommand {
    let switch =
        !cfg!(target_arch = "x86_64") || std::path::Path::new("sys/firmware/acpi").exists();
    if switch {
        RebootCommand::PowerOff
    } else {
        RebootCommand::Restart
    }
}

/// Turns the machine off after something that the agent cannot go on with.
pub(crate) fn give_up(message: &str) {
    eprintln!("msb-agent: {message}");
    power_off();
}

/// A server of a share may have stopped answering: the unmount would wait for good.
fn start_watchdog() {
    if let Ok(None) = sys::fork() {
        std::thread::sleep(WATCHDOG);
        eprintln!("msb-agent: a file system did not answer in time");
        let _ = reboot(off());
        sys::exit_now(1);
    }
}

fn remount_read_only(target: &str) -> Result<(), Errno> {
    mount_remount(target, MountFlags::RDONLY, "")
}

/// Every mount that the sandbox sees but its root, in the order in which they were made.
fn mounts() -> Vec<String> {
    let table = std::fs::read_to_string("proc/self/mountinfo").unwrap_or_default();
    parse_mounts(&table)
}

fn parse_mounts(table: &str) -> Vec<String> {
    let target = |line: &str| line.split(' ').nth(4).map(unescape);
    table
        .lines()
        .filter_map(target)
        .filter(|target| target != "/")
        .collect()
}

/// The kernel writes spaces and the like as a backslash with three octal digits.
fn unescape(field: &str) -> String {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let digits = after
            .first_chunk::<3>()
            .and_then(|digits| std::str::from_utf8(digits).ok());
        let escaped = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        if let (b'\\', Some(escaped)) = (byte, escaped) {
            bytes.push(escaped);
            rest = after.get(3..).unwrap_or_default();
        } else {
            bytes.push(byte);
            rest = after;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_table_is_read() {
        let table = "25 1 0:23 / / rw,relatime - overlay overlay rw\n\
            26 25 0:24 / /proc rw,nosuid - proc proc rw\n\
            27 25 0:25 / /a\\040b\\134 rw - tmpfs tmpfs rw\n";
        assert_eq!(parse_mounts(table), ["/proc", "/a b\\"]);
    }
}
