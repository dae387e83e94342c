//! A served directory, mounted on the host's kernel through the bridge.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::bridge::{Bridge, Options, private_mounts};
use crate::msb::binary;

/// A user of the host without any privilege.
pub const ORDINARY: u32 = 1000;

/// How a share is served.
#[derive(Debug, Clone, Copy, Default)]
pub struct Setup<'a> {
    /// More flags for msb-fs.
    pub flags: &'a [&'a str],
    /// The server runs as [`ORDINARY`], who owns the directory, and not as root.
    pub ordinary: bool,
    /// Only this file of the directory is served.
    pub file: Option<&'a str>,
    /// How it is mounted.
    pub bridge: Options,
}

/// A directory of the host, msb-fs that serves it, and its mount.
pub struct Share {
    // Dropped in this order: first the mount, then the server, then the files.
    bridge: Option<Bridge>,
    server: Server,
    scratch: TempDir,
}

/// Another server of the same directory, and its mount.
pub struct Peer {
    bridge: Option<Bridge>,
    server: Server,
    point: PathBuf,
}

/// A process that ends with its owner.
pub struct Server(pub Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended with its front end already.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

impl Share {
    /// Serves an empty directory and mounts it, in a table of mounts of the calling thread's own.
    ///
    /// # Errors
    ///
    /// When the server does not start, or this process may not mount.
    pub fn new(setup: Setup<'_>) -> Result<Self> {
        let scratch = tempfile::Builder::new().prefix("msb-fs.").tempdir()?;
        let share = scratch.path().join("share");
        fs::create_dir(&share)?;
        fs::create_dir(scratch.path().join("mnt"))?;
        // Other users of the tests pass through here.
        fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o755))?;
        fs::set_permissions(&share, fs::Permissions::from_mode(0o755))?;
        if setup.ordinary {
            chown(scratch.path(), Some(ORDINARY), Some(ORDINARY))?;
            chown(&share, Some(ORDINARY), Some(ORDINARY))?;
        }
        if let Some(name) = setup.file {
            fs::write(share.join(name), "")?;
        }
        private_mounts()?;
        Self::serve(scratch, setup)
    }

    fn serve(scratch: TempDir, setup: Setup<'_>) -> Result<Self> {
        let server = serve(
            &scratch.path().join("share"),
            &scratch.path().join("fs.sock"),
            setup,
        )?;
        let (socket, point) = (scratch.path().join("fs.sock"), scratch.path().join("mnt"));
        let bridge = Bridge::mount(&socket, &point, setup.bridge)?;
        Ok(Self {
            bridge: Some(bridge),
            server,
            scratch,
        })
    }

    /// A path in the directory on the host.
    pub fn host(&self, name: &str) -> PathBuf {
        self.scratch.path().join("share").join(name)
    }

    /// The same path through the mount.
    pub fn guest(&self, name: &str) -> PathBuf {
        self.scratch.path().join("mnt").join(name)
    }

    /// A path beside the directory, on the same file system.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// The mount.
    pub fn bridge(&self) -> &Bridge {
        self.bridge.as_ref().expect("mounted")
    }

    /// The server's process id.
    pub fn server(&self) -> u32 {
        self.server.0.id()
    }

    /// Serves the same directory once more and mounts it elsewhere, as another guest would.
    ///
    /// # Errors
    ///
    /// As [`Share::new`].
    pub fn peer(&self, name: &str, setup: Setup<'_>) -> Result<Peer> {
        let point = self.beside(name);
        fs::create_dir(&point)?;
        let socket = self.beside(&format!("{name}.sock"));
        let server = serve(&self.beside("share"), &socket, setup)?;
        let bridge = Some(Bridge::mount(&socket, &point, setup.bridge)?);
        Ok(Peer {
            bridge,
            server,
            point,
        })
    }

    /// Unmounts and mounts again: the guest has forgotten everything, the server is a new one.
    ///
    /// # Errors
    ///
    /// As [`Share::new`] and [`Share::finish`].
    pub fn again(mut self, setup: Setup<'_>) -> Result<Self> {
        self.bridge.take().context("mounted")?.finish()?;
        Self::serve(self.scratch, setup)
    }

    /// Unmounts; fails when something was against the protocol.
    ///
    /// # Errors
    ///
    /// When the server has broken the protocol, or files are still open.
    pub fn finish(mut self) -> Result<()> {
        self.bridge.take().context("mounted")?.finish()
    }
}

impl Peer {
    /// A path through this mount.
    pub fn guest(&self, name: &str) -> PathBuf {
        self.point.join(name)
    }

    /// Kills the server, as a crash would end it.
    ///
    /// # Errors
    ///
    /// When it has ended already.
    pub fn kill(&mut self) -> Result<()> {
        self.server.0.kill()?;
        self.server.0.wait()?;
        Ok(())
    }

    /// Unmounts; fails when something was against the protocol.
    ///
    /// # Errors
    ///
    /// As [`Share::finish`].
    pub fn finish(mut self) -> Result<()> {
        self.bridge.take().context("mounted")?.finish()
    }
}

/// Starts msb-fs for `share` on `socket`.
///
/// # Errors
///
/// When it cannot be started.
pub fn serve(share: &Path, socket: &Path, setup: Setup<'_>) -> Result<Server> {
    let mut command = Command::new(binary("msb-fs"));
    command
        .arg("--socket-path")
        .arg(socket)
        .args(["--tag", "share", "--log-level", "warn"])
        .args(["--num-request-queues", &setup.bridge.queues.to_string()])
        .args(setup.flags)
        .stdin(Stdio::null());
    match setup.file {
        Some(name) => command.arg("--shared-file").arg(share.join(name)),
        None => command.arg("--shared-dir").arg(share),
    };
    if setup.ordinary {
        command.uid(ORDINARY).gid(ORDINARY);
    }
    fs::remove_file(socket).ok();
    Ok(Server(command.spawn().context("starting msb-fs")?))
}
