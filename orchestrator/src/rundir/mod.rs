//! Where everything lies on disk, who holds it, and how what is left over is found.
//!
//! A sandbox runs while its lock file is locked: the lock is the kernel's (`flock`), so it frees
//! itself whatever ends the supervisor. Everything else here is data that the holder of the lock
//! wrote; what it says about running processes is believed only while the lock is held.

mod file;
mod log;
mod sandbox;
mod sweep;
pub(crate) mod tree;

use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::spec::{SandboxName, SandboxSpec};
use crate::{Error, ErrorKind, MicrosandboxResult};

pub(crate) use file::{make_dir, millis, read_json, short_hash, sync_dir, write_json, write_once};
pub use log::{Record, Stream};
pub(crate) use log::{append as append_log, rfc3339};
pub use sandbox::{Making, SandboxDir, SandboxLock, SandboxState, Status};
pub(crate) use sweep::{drafting, remove_drafts};

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

    /// Makes the folder of a sandbox, with its request in it. Until it has run once it is
    /// provisional: it goes when what is given back is dropped before that.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::SandboxAlreadyExists`] when there is one of that name.
    pub fn create_sandbox(&self, spec: &SandboxSpec) -> MicrosandboxResult<(SandboxDir, Making)> {
        let dir = self.sandbox(&spec.name);
        let cannot = |error: std::io::Error| {
            Error::io(
                format!("cannot make the folder of sandbox `{}`", spec.name),
                error,
            )
        };
        make_dir(&self.sandboxes()).map_err(cannot)?;
        let _drafting = drafting(&self.sandboxes()).map_err(cannot)?;
        // It is put together under a name that no sandbox can have, so that it exists whole or not.
        let draft = tempfile::Builder::new()
            .prefix(".new-")
            .tempdir_in(self.sandboxes())
            .map_err(cannot)?;
        write_json(&draft.path().join("spec.json"), spec)?;
        File::create(draft.path().join("lock")).map_err(cannot)?;
        let making = Making::begin(draft.path()).map_err(cannot)?;
        let at = rustix::fs::CWD;
        let flags = rustix::fs::RenameFlags::NOREPLACE;
        match rustix::fs::renameat_with(at, draft.path(), at, &dir.path, flags) {
            Ok(()) => {
                // Only the new name is left; there is nothing to remove at the old one.
                let _ = draft.keep();
                sync_dir(&self.sandboxes()).map_err(cannot)?;
                Ok((dir, making))
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

    /// The folder of a running sandbox's sockets.
    pub fn socket_dir(&self, name: &SandboxName) -> SocketDir {
        SocketDir {
            path: self.run().join(short_hash(name.as_str().as_bytes())),
        }
    }
}

/// The folder of a running sandbox's sockets; its path is short, for the sake of `sun_path`.
#[derive(Debug, Clone)]
pub struct SocketDir {
    path: PathBuf,
}

impl SocketDir {
    /// The folder itself.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

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

    pub(crate) fn exists(&self) -> bool {
        self.path.symlink_metadata().is_ok()
    }

    /// Removes the folder and the sockets in it, as far as they exist.
    pub(crate) fn remove(&self) {
        // A symbolic link at the place of the folder would be unlinked, not followed.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}
