//! The folder of one sandbox: what lies in it, and who holds it.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::plan::Plan;
use crate::spec::{SandboxName, SandboxSpec};
use crate::{Error, ErrorKind, MicrosandboxResult};

use super::file::{millis, read_json, sync_dir, write_json};
use super::tree;

/// The folder of one sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxDir {
    pub(super) path: PathBuf,
    pub(super) name: SandboxName,
}

/// A lock on a sandbox, held until it is dropped or the process ends.
#[derive(Debug)]
pub struct SandboxLock {
    _file: File,
}

/// Marks a sandbox as provisional, and who is making it: the process that holds a lock on it.
const MAKING: &str = "making";

/// How often a lock is tried that others hold only to ask who has it.
const ATTEMPTS: usize = 200;

/// Held by whoever makes a sandbox, until it has run for the first time.
#[derive(Debug)]
pub struct Making {
    _file: File,
}

impl Making {
    pub(super) fn begin(folder: &Path) -> std::io::Result<Self> {
        let file = File::create(folder.join(MAKING))?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Self { _file: file })
    }
}

/// What a sandbox is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It was made and has never run.
    Created,
    /// Its processes are being started.
    Starting,
    /// It accepts commands.
    Running,
    /// It is being ended.
    Stopping,
    /// It does not run.
    Stopped,
    /// It does not run, because it could not be started or broke down.
    Failed,
}

/// What the supervisor last wrote about a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxState {
    /// What it was doing.
    pub status: Status,
    /// Process id of the supervisor, while there is one.
    pub pid: Option<u32>,
    /// Milliseconds since the epoch at which it was started last.
    pub started_at_ms: Option<u64>,
    /// Milliseconds from the start of the supervisor to readiness.
    pub boot_ms: Option<u64>,
    /// Why it failed, if it did.
    pub failure: Option<String>,
}

impl SandboxState {
    /// The state of a sandbox that has never run.
    pub fn created() -> Self {
        Self {
            status: Status::Created,
            pid: None,
            started_at_ms: None,
            boot_ms: None,
            failure: None,
        }
    }
}

impl SandboxDir {
    /// The sandbox's name.
    pub fn name(&self) -> &SandboxName {
        &self.name
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The request.
    pub fn spec_path(&self) -> PathBuf {
        self.path.join("spec.json")
    }

    /// The plan of the last start.
    pub fn plan_path(&self) -> PathBuf {
        self.path.join("plan.json")
    }

    /// The disk that takes what the sandbox writes to its root file system.
    pub fn root_disk(&self) -> PathBuf {
        self.path.join("root.raw")
    }

    /// What the guest's kernel and agent printed.
    pub fn console_log(&self) -> PathBuf {
        self.path.join("console.log")
    }

    /// What commands printed that nobody waited for, as [`Record`](super::Record)s.
    pub fn output_log(&self) -> PathBuf {
        self.path.join("output.log")
    }

    /// What the supervisor and its children printed.
    pub fn supervisor_log(&self) -> PathBuf {
        self.path.join("supervisor.log")
    }

    /// The request as it was made.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] when it cannot be read.
    pub fn spec(&self) -> MicrosandboxResult<SandboxSpec> {
        read_json(&self.spec_path())
    }

    /// Records a request that has changed; only the holder of the lock does.
    pub(crate) fn write_spec(&self, spec: &SandboxSpec) -> MicrosandboxResult<()> {
        let path = self.spec_path();
        let made = std::fs::metadata(&path).and_then(|old| old.modified());
        write_json(&path, spec)?;
        // The age of this file is the sandbox's own.
        let dated = made.and_then(|made| File::open(&path)?.set_modified(made));
        dated.map_err(|error| Error::io(format!("cannot date `{}`", path.display()), error))
    }

    /// The plan of the last start.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] when it cannot be read, as before the first start.
    pub fn plan(&self) -> MicrosandboxResult<Plan> {
        read_json(&self.plan_path())
    }

    /// When it was made, in milliseconds since the epoch.
    pub fn created_at_ms(&self) -> u64 {
        let made = std::fs::metadata(self.spec_path()).and_then(|spec| spec.modified());
        made.map_or(0, millis)
    }

    /// What the sandbox is doing now.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] when its folder cannot be read.
    pub fn state(&self) -> MicrosandboxResult<SandboxState> {
        let path = self.path.join("state.json");
        let mut state = if path.exists() {
            read_json(&path)?
        } else {
            SandboxState::created()
        };
        let claims_to_run = matches!(
            state.status,
            Status::Starting | Status::Running | Status::Stopping
        );
        if claims_to_run && !self.is_running() {
            state.status = Status::Failed;
            state.pid = None;
            state.failure = Some("its supervisor was killed".to_owned());
        }
        Ok(state)
    }

    /// Records what the sandbox is doing; only the holder of the lock does.
    pub(crate) fn write_state(&self, state: &SandboxState) -> MicrosandboxResult<()> {
        write_json(&self.path.join("state.json"), state)
    }

    /// Whether a supervisor holds its lock.
    pub fn is_running(&self) -> bool {
        is_locked(&self.path.join("lock"))
    }

    /// Whether it has not run yet, so that it goes unless whoever makes it brings it up.
    pub(crate) fn is_provisional(&self) -> bool {
        self.path.join(MAKING).exists()
    }

    /// Whether somebody is making it now.
    pub(crate) fn is_being_made(&self) -> bool {
        is_locked(&self.path.join(MAKING))
    }

    /// It has run: from now on it stays, whatever happens.
    pub(crate) fn commit(&self) -> std::io::Result<()> {
        match std::fs::remove_file(self.path.join(MAKING)) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            removed => removed.and_then(|()| sync_dir(&self.path)),
        }
    }

    /// Takes the lock, or nothing when somebody holds it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::SandboxNotFound`] when the folder is gone, [`ErrorKind::Io`] otherwise.
    pub fn try_lock(&self) -> MicrosandboxResult<Option<SandboxLock>> {
        let path = self.path.join("lock");
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = match rustix::fs::open(&path, flags, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(Errno::NOENT | Errno::NOTDIR) => {
                return Err(Error::new(
                    ErrorKind::SandboxNotFound,
                    format!("there is no sandbox `{}`", self.name),
                )
                .with_value(self.name.as_str()));
            }
            Err(errno) => {
                return Err(Error::io(
                    format!("cannot open `{}`", path.display()),
                    errno,
                ));
            }
        };
        match lock_alone(&file) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Ok(None),
            Err(errno) => {
                return Err(Error::io(
                    format!("cannot lock `{}`", path.display()),
                    errno,
                ));
            }
        }
        // The folder may have been removed, and made anew, between the two calls.
        let same = match (file.metadata(), std::fs::symlink_metadata(&path)) {
            (Ok(ours), Ok(named)) => ours.ino() == named.ino() && ours.dev() == named.dev(),
            _ => false,
        };
        if same {
            Ok(Some(SandboxLock { _file: file }))
        } else {
            Err(Error::new(
                ErrorKind::SandboxNotFound,
                format!("sandbox `{}` has just been removed", self.name),
            ))
        }
    }

    /// Removes the sandbox with its root disk, the volumes of its own and logs.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::SandboxStillRunning`] while it runs.
    pub fn remove(&self) -> MicrosandboxResult<()> {
        match self.try_lock()? {
            Some(lock) => self.remove_locked(&lock),
            None => Err(Error::new(
                ErrorKind::SandboxStillRunning,
                format!("sandbox `{}` is running", self.name),
            )
            .with_hint(format!("stop it first, or use `msb rm -f {}`", self.name))),
        }
    }

    pub(crate) fn remove_locked(&self, _lock: &SandboxLock) -> MicrosandboxResult<()> {
        let cannot = |error| Error::io(format!("cannot remove sandbox `{}`", self.name), error);
        let mut doomed = OsString::from(".rm-");
        doomed.push(format!("{}-{}", std::process::id(), self.name));
        // Renamed first, so that no half-removed sandbox is ever listed.
        let doomed = self.path.with_file_name(doomed);
        std::fs::rename(&self.path, &doomed).map_err(cannot)?;
        match tree::remove_path(&doomed) {
            // Somebody who swept was faster.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            removed => removed.map_err(cannot),
        }
    }
}

/// Whether somebody holds the exclusive lock of a file. Those who ask do not disturb each other.
fn is_locked(path: &Path) -> bool {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let Ok(file) = rustix::fs::open(path, flags, Mode::empty()) else {
        return false;
    };
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK)
}

/// Takes the exclusive lock of a file, past those who only ask who holds it.
fn lock_alone(file: &File) -> rustix::io::Result<()> {
    for _ in 0..ATTEMPTS {
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => {}
            done => return done,
        }
        // Shared with whoever asks, refused by whoever holds it alone.
        rustix::fs::flock(file, FlockOperation::NonBlockingLockShared)?;
        rustix::fs::flock(file, FlockOperation::Unlock)?;
        std::thread::sleep(Duration::from_millis(1));
    }
    Err(Errno::WOULDBLOCK)
}
