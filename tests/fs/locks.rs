//! Locks that two guests and the host have in common: `--locks host`.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use msb_testkit::share::{Server, Setup, Share};
use rustix::fs::{FlockOperation, fcntl_lock, flock};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

use crate::bridge::skipped;

const SETUP: Setup<'_> = Setup {
    flags: &["--locks", "host"],
    ordinary: false,
    file: None,
    bridge: msb_testkit::bridge::Options {
        queues: 1,
        slots: 64,
    },
};

/// Both kinds of lock on a whole file.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Fcntl,
    Flock,
}

const KINDS: [Kind; 2] = [Kind::Fcntl, Kind::Flock];

impl Kind {
    fn take(self, file: &File, how: FlockOperation) -> rustix::io::Result<()> {
        match self {
            Self::Fcntl => fcntl_lock(file.as_fd(), how),
            Self::Flock => flock(file, how),
        }
    }

    /// Another process, which waits for the lock and then says so, or holds it until it ends.
    fn process(self, path: &Path, waits: bool) -> Result<Server> {
        let call = match self {
            Self::Fcntl => "lockf",
            Self::Flock => "flock",
        };
        let script = format!(
            "import fcntl,sys,time\n\
             f=open(sys.argv[1],'r+')\n\
             fcntl.{call}(f,fcntl.LOCK_EX{})\n\
             print('locked',flush=True)\n\
             time.sleep(60)",
            if waits { "" } else { "|fcntl.LOCK_NB" }
        );
        let mut command = Command::new("python3");
        command.args(["-c", &script]).arg(path);
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        Ok(Server(command.spawn().context("python3")?))
    }
}

fn open(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true);
    options
        .open(path)
        .with_context(|| path.display().to_string())
}

/// Whether a process has printed its line within the time.
fn says_locked(child: &mut Child, within: Duration) -> Result<bool> {
    use rustix::event::{PollFd, PollFlags, poll};
    let output = child.stdout.as_ref().context("piped")?;
    let time = rustix::event::Timespec::try_from(within)?;
    let mut fds = [PollFd::new(output, PollFlags::IN)];
    poll(&mut fds, Some(&time))?;
    Ok(fds[0].revents().contains(PollFlags::IN))
}

const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(300);

#[test]
fn two_guests_and_the_host_exclude_each_other() -> Result<()> {
    use FlockOperation::{
        NonBlockingLockExclusive as Exclusive, NonBlockingLockShared as Shared,
        NonBlockingUnlock as Free,
    };
    if skipped() {
        return Ok(());
    }
    let share = Share::new(SETUP)?;
    let peer = share.peer("other", SETUP)?;
    std::fs::write(share.host("file"), "x")?;
    for kind in KINDS {
        let mine = open(&share.guest("file"))?;
        let other = open(&peer.guest("file"))?;
        let host = open(&share.host("file"))?;
        kind.take(&mine, Exclusive)?;
        for (name, file) in [("guest", &other), ("host", &host)] {
            for how in [Exclusive, Shared] {
                // The host's fcntl(2) locks are this process's, and no other process's.
                let result = kind.take(file, how);
                ensure!(
                    matches!(result, Err(Errno::AGAIN | Errno::ACCESS)),
                    "{kind:?}: the {name} gets {how:?}: {result:?}"
                );
            }
        }
        kind.take(&mine, Shared)?;
        kind.take(&other, Shared)?;
        kind.take(&host, Shared)?;
        ensure!(kind.take(&other, Exclusive).is_err(), "{kind:?}: shared");
        kind.take(&mine, Free)?;
        kind.take(&host, Free)?;
        kind.take(&other, Exclusive)?;
        // Closing gives a lock back, of which the kernel tells the server later.
        drop(other);
        let begin = Instant::now();
        while kind.take(&host, Exclusive).is_err() {
            ensure!(begin.elapsed() < LONG, "{kind:?}: not given back");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    peer.finish()?;
    share.finish()
}

#[test]
fn who_waits_gets_the_lock_and_can_be_interrupted() -> Result<()> {
    if skipped() {
        return Ok(());
    }
    let share = Share::new(SETUP)?;
    let peer = share.peer("other", SETUP)?;
    std::fs::write(share.host("file"), "x")?;
    for kind in KINDS {
        let mine = open(&share.guest("file"))?;
        kind.take(&mine, FlockOperation::LockExclusive)?;
        // More of them than the server has threads for what takes time.
        let mut waiters = Vec::new();
        for _ in 0..6 {
            waiters.push(kind.process(&peer.guest("file"), true)?);
        }
        let first = &mut waiters[0].0;
        ensure!(!says_locked(first, SHORT)?, "{kind:?}: did not wait");
        // Requests of others are not held up.
        std::fs::write(peer.guest("beside"), "goes through")?;
        File::open(peer.guest("beside"))?.sync_all()?;
        let interrupted = waiters.pop().context("one of them")?;
        let begin = Instant::now();
        let mut child = interrupted;
        let process = i32::try_from(child.0.id())?;
        kill_process(Pid::from_raw(process).context("a process")?, Signal::TERM)?;
        while child.0.try_wait()?.is_none() {
            ensure!(begin.elapsed() < LONG, "{kind:?}: cannot be interrupted");
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(mine);
        // One after the other, as each ends.
        while !waiters.is_empty() {
            let begin = Instant::now();
            let holder = loop {
                let mut holder = None;
                for (at, waiter) in waiters.iter_mut().enumerate() {
                    if says_locked(&mut waiter.0, Duration::from_millis(10))? {
                        ensure!(holder.is_none(), "{kind:?}: two have the lock");
                        holder = Some(at);
                    }
                }
                if let Some(holder) = holder {
                    break holder;
                }
                ensure!(begin.elapsed() < LONG, "{kind:?}: nobody gets the lock");
            };
            drop(waiters.remove(holder));
        }
    }
    peer.finish()?;
    share.finish()
}

#[test]
fn a_killed_server_holds_nothing() -> Result<()> {
    if skipped() {
        return Ok(());
    }
    let share = Share::new(SETUP)?;
    std::fs::write(share.host("file"), "x")?;
    for (number, kind) in KINDS.into_iter().enumerate() {
        let mut peer = share.peer(&format!("other{number}"), SETUP)?;
        let held = open(&peer.guest("file"))?;
        kind.take(&held, FlockOperation::NonBlockingLockExclusive)?;
        let mut waiter = kind.process(&share.guest("file"), true)?;
        ensure!(
            !says_locked(&mut waiter.0, SHORT)?,
            "{kind:?}: did not wait"
        );
        peer.kill()?;
        ensure!(says_locked(&mut waiter.0, LONG)?, "{kind:?}: still held");
        drop(held);
    }
    share.finish()
}

#[test]
fn without_the_flag_locks_are_the_guests_own() -> Result<()> {
    if skipped() {
        return Ok(());
    }
    let share = Share::new(Setup::default())?;
    std::fs::write(share.host("file"), "x")?;
    for kind in KINDS {
        let (mine, host) = (open(&share.guest("file"))?, open(&share.host("file"))?);
        kind.take(&mine, FlockOperation::NonBlockingLockExclusive)?;
        kind.take(&host, FlockOperation::NonBlockingLockExclusive)?;
        let mut second = kind.process(&share.guest("file"), true)?;
        ensure!(
            !says_locked(&mut second.0, SHORT)?,
            "{kind:?}: within a guest"
        );
    }
    share.finish()
}
