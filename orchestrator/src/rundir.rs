//! Where everything lies on disk, who holds it, and how what is left over is found.
//!
//! A sandbox runs while its lock file is locked: the lock is the kernel's (`flock`), so it frees
//! itself whatever ends the supervisor. Everything else here is data that the holder of the lock
//! wrote; what it says about running processes is believed only while the lock is held.

use std::ffi::OsString;
use std::fs::{DirBuilder, File};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::plan::Plan;
use crate::spec::{SandboxName, SandboxSpec};
use crate::{Error, ErrorKind, MicrosandboxResult};

/// The longest path that a Unix socket's address takes, in bytes (unix(7), less the final zero).
const SUN_PATH_MAX: usize = 107;

/// The folder that holds everything of ours: `$MSB_HOME`, by default `~/.microsandbox`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Home(PathBuf);

impl Home {
    /// The home that the environment names.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidConfig`] when neither `MSB_HOME` nor `HOME` is set.
    pub fn from_env() -> MicrosandboxResult<Self> {
        Self::at(Self::locate()?.0)
    }

    /// The home that the environment names, whether it exists or not.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidConfig`] when neither `MSB_HOME` nor `HOME` is set.
    pub fn locate() -> MicrosandboxResult<Self> {
        let path = match std::env::var_os("MSB_HOME").filter(|value| !value.is_empty()) {
            Some(path) => PathBuf::from(path),
            None => match std::env::var_os("HOME").filter(|value| !value.is_empty()) {
                Some(home) => Path::new(&home).join(".microsandbox"),
                None => {
                    return Err(Error::new(
                        ErrorKind::InvalidConfig,
                        "neither MSB_HOME nor HOME is set",
                    )
                    .with_hint("set MSB_HOME to the folder that keeps sandboxes and volumes"));
                }
            },
        };
        let absolute = std::path::absolute(&path).map_err(|error| {
            Error::io(
                format!("cannot use `{}` as MSB_HOME", path.display()),
                error,
            )
        })?;
        Ok(Self(absolute))
    }

    /// The home at `path`, made when it is missing.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] when it cannot be made.
    pub fn at(path: impl Into<PathBuf>) -> MicrosandboxResult<Self> {
        let path = path.into();
        let cannot = |error| {
            Error::io(
                format!("cannot use `{}` as MSB_HOME", path.display()),
                error,
            )
        };
        let absolute = std::path::absolute(&path).map_err(cannot)?;
        make_dir(&absolute).map_err(cannot)?;
        Ok(Self(absolute))
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Folder of the named volumes.
    pub fn volumes(&self) -> PathBuf {
        self.0.join("volumes")
    }

    /// Folder of the metadata of volumes.
    pub fn state(&self) -> PathBuf {
        self.0.join("state")
    }

    /// Folder of the sandboxes.
    pub fn sandboxes(&self) -> PathBuf {
        self.0.join("sandboxes")
    }

    /// Folder of the image store.
    pub fn images(&self) -> PathBuf {
        self.0.join("images")
    }

    /// Folder of the sockets of running sandboxes.
    pub fn run(&self) -> PathBuf {
        self.0.join("run")
    }

    /// Folder of files that can be made again.
    pub fn cache(&self) -> PathBuf {
        self.0.join("cache")
    }

    /// Folder of the guest kernel: `vmlinuz` and `modules/`.
    pub fn kernel(&self) -> PathBuf {
        self.0.join("kernel")
    }

    /// The folder of one sandbox, whether it exists or not.
    pub fn sandbox(&self, name: &SandboxName) -> SandboxDir {
        SandboxDir {
            path: self.sandboxes().join(name.as_str()),
            name: name.clone(),
        }
    }

    /// Makes the folder of a sandbox, with its request in it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::SandboxAlreadyExists`] when there is one of that name.
    pub fn create_sandbox(&self, spec: &SandboxSpec) -> MicrosandboxResult<SandboxDir> {
        let dir = self.sandbox(&spec.name);
        let cannot = |error: std::io::Error| {
            Error::io(
                format!("cannot make the folder of sandbox `{}`", spec.name),
                error,
            )
        };
        make_dir(&self.sandboxes()).map_err(cannot)?;
        // It is put together under a name that no sandbox can have, so that it exists whole or not.
        let draft = tempfile::Builder::new()
            .prefix(".new-")
            .tempdir_in(self.sandboxes())
            .map_err(cannot)?;
        write_json(&draft.path().join("spec.json"), spec)?;
        File::create(draft.path().join("lock")).map_err(cannot)?;
        let at = rustix::fs::CWD;
        let flags = rustix::fs::RenameFlags::NOREPLACE;
        match rustix::fs::renameat_with(at, draft.path(), at, &dir.path, flags) {
            Ok(()) => {
                // Only the new name is left; there is nothing to remove at the old one.
                let _ = draft.keep();
                sync_dir(&self.sandboxes()).map_err(cannot)?;
                Ok(dir)
            }
            Err(Errno::EXIST | Errno::NOTEMPTY) => Err(Error::new(
                ErrorKind::SandboxAlreadyExists,
                format!("there is a sandbox `{}` already", spec.name),
            )
            .with_value(spec.name.as_str())
            .with_hint(format!(
                "remove it with `msb rm {}`, or choose another name",
                spec.name
            ))),
            Err(errno) => Err(cannot(errno.into())),
        }
    }

    /// Every sandbox, in the order of their names.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] when the folder cannot be read.
    pub fn list_sandboxes(&self) -> MicrosandboxResult<Vec<SandboxDir>> {
        let folder = self.sandboxes();
        let entries = match std::fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => {
                return Err(Error::io(
                    format!("cannot read `{}`", folder.display()),
                    error,
                ));
            }
        };
        let mut names: Vec<SandboxName> = entries
            .filter_map(Result::ok)
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter_map(|name| SandboxName::try_from(name).ok())
            .collect();
        names.sort();
        Ok(names.iter().map(|name| self.sandbox(name)).collect())
    }

    /// The folder of a sandbox that exists.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::SandboxNotFound`] when it does not.
    pub fn find_sandbox(&self, name: &SandboxName) -> MicrosandboxResult<SandboxDir> {
        let dir = self.sandbox(name);
        if dir.spec_path().exists() {
            return Ok(dir);
        }
        Err(Error::new(
            ErrorKind::SandboxNotFound,
            format!("there is no sandbox `{name}`"),
        )
        .with_value(name.as_str())
        .with_hint("`msb ls` lists the sandboxes"))
    }

    /// Removes what sandboxes left behind whose supervisor ended without clearing up: sockets,
    /// half-made folders, and sandboxes that were to be removed when they stop.
    pub fn sweep(&self) {
        for dir in self.list_sandboxes().unwrap_or_default() {
            let Ok(Some(lock)) = dir.try_lock() else {
                continue;
            };
            let ephemeral = dir.spec().is_ok_and(|spec| spec.ephemeral);
            let never_ran = dir
                .state()
                .is_ok_and(|state| state.status == Status::Created);
            self.socket_dir(&dir.name).remove();
            // One that was only just made is about to be started by whoever made it.
            if ephemeral && !(never_ran && dir.is_young()) {
                let _ = dir.remove_locked(&lock);
            }
        }
        let drafts = std::fs::read_dir(self.sandboxes())
            .into_iter()
            .flatten()
            .flatten();
        for draft in drafts {
            let name = draft.file_name();
            let left_over = name.to_str().is_some_and(|n| n.starts_with(".rm-"))
                || (name.to_str().is_some_and(|n| n.starts_with(".new-"))
                    && !is_young(&draft.path()));
            if left_over {
                let _ = std::fs::remove_dir_all(draft.path());
            }
        }
    }

    /// The folder of a running sandbox's sockets.
    pub fn socket_dir(&self, name: &SandboxName) -> SocketDir {
        SocketDir {
            path: self.run().join(short_hash(name.as_str().as_bytes())),
        }
    }
}

/// The folder of one sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxDir {
    path: PathBuf,
    name: SandboxName,
}

/// A lock on a sandbox, held until it is dropped or the process ends.
#[derive(Debug)]
pub struct SandboxLock {
    _file: File,
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

    /// What commands printed that nobody waited for.
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
        matches!(self.try_lock(), Ok(None))
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
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
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

    /// Removes the sandbox with its root disk and logs.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::WrongState`] while it runs.
    pub fn remove(&self) -> MicrosandboxResult<()> {
        match self.try_lock()? {
            Some(lock) => self.remove_locked(&lock),
            None => Err(Error::new(
                ErrorKind::WrongState,
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
        std::fs::remove_dir_all(&doomed).map_err(cannot)
    }

    fn is_young(&self) -> bool {
        is_young(&self.path)
    }
}

/// The folder of a running sandbox's sockets; its path is short, for the sake of `sun_path`.
#[derive(Debug, Clone)]
pub struct SocketDir {
    path: PathBuf,
}

impl SocketDir {
    /// Makes the folder anew, empty.
    pub(crate) fn create(&self) -> MicrosandboxResult<()> {
        let cannot = |error| Error::io(format!("cannot make `{}`", self.path.display()), error);
        self.remove();
        if let Some(run) = self.path.parent() {
            make_dir(run).map_err(cannot)?;
        }
        DirBuilder::new()
            .mode(0o700)
            .create(&self.path)
            .map_err(cannot)
    }

    /// The path of a socket.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidConfig`] when the path is too long for an address.
    pub fn socket(&self, name: &str) -> MicrosandboxResult<PathBuf> {
        let path = self.path.join(name);
        let length = path.as_os_str().len();
        if length <= SUN_PATH_MAX {
            return Ok(path);
        }
        Err(Error::new(
            ErrorKind::InvalidConfig,
            format!(
                "socket path `{}` has {length} bytes, {SUN_PATH_MAX} are possible",
                path.display()
            ),
        )
        .with_hint("set MSB_HOME to a folder with a shorter path"))
    }

    /// Removes the folder and the sockets in it, as far as they exist.
    pub(crate) fn remove(&self) {
        // A symbolic link at the place of the folder would be unlinked, not followed.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// The first eight hexadecimal digits of a SHA-256.
pub(crate) fn short_hash(bytes: &[u8]) -> String {
    use sha2::Digest;
    let digest = sha2::Sha256::digest(bytes);
    digest
        .iter()
        .take(4)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Makes a folder and its parents, for the user alone.
pub(crate) fn make_dir(path: &Path) -> std::io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Writes a file whole: its old content stays until the new one is on disk.
pub(crate) fn write_file(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().ok_or(std::io::ErrorKind::InvalidInput)?;
    let mut draft = tempfile::Builder::new()
        .prefix(".draft-")
        .tempfile_in(folder)?;
    draft.write_all(content)?;
    draft.as_file().sync_all()?;
    draft.persist(path).map_err(|error| error.error)?;
    sync_dir(folder)
}

pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> MicrosandboxResult<()> {
    let cannot = |error| Error::io(format!("cannot write `{}`", path.display()), error);
    let mut text = serde_json::to_vec_pretty(value).map_err(|error| cannot(error.into()))?;
    text.push(b'\n');
    write_file(path, &text).map_err(cannot)
}

pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> MicrosandboxResult<T> {
    let cannot = |error| Error::io(format!("cannot read `{}`", path.display()), error);
    let text = std::fs::read(path).map_err(cannot)?;
    serde_json::from_slice(&text).map_err(|error| cannot(error.into()))
}

pub(crate) fn sync_dir(path: &Path) -> std::io::Result<()> {
    File::open(path)?.sync_all()
}

/// Milliseconds since the epoch.
pub(crate) fn millis(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Whether a folder was changed within the last minute, so that its maker may still be at work.
fn is_young(path: &Path) -> bool {
    let changed = std::fs::symlink_metadata(path).and_then(|metadata| metadata.modified());
    changed.is_ok_and(|time| time.elapsed().is_ok_and(|age| age.as_secs() < 60))
}
