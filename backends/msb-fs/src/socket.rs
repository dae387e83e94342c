//! What stands beside a listening socket: its group, and the file with the process's number.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Seek, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, OFlags};

/// How long the last server on a socket is waited for.
const PATIENCE: Duration = Duration::from_millis(500);

/// What stands beside the socket cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another server is running.
    #[error("another process holds {path}: a server listens on this socket already")]
    Running {
        /// Its file.
        path: PathBuf,
    },
    /// The file with the number cannot be written.
    #[error("cannot write {path}")]
    PidFile {
        /// Which one.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no such group.
    #[error("there is no group {0:?} for --socket-group")]
    NoGroup(String),
    /// The socket cannot be given to the group.
    #[error("cannot open {path} to group {group:?}")]
    Group {
        /// The socket.
        path: PathBuf,
        /// The group.
        group: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The file `<socket>.pid`, locked as long as the process lives. The lock tells a live server from
/// the rest of a dead one; the number is for people and for their programs.
#[derive(Debug)]
pub struct PidFile(#[allow(dead_code, reason = "held for its lock")] File);

impl PidFile {
    /// Makes or takes over the file beside `socket`.
    ///
    /// # Errors
    ///
    /// [`SocketError::Running`] and [`SocketError::PidFile`].
    pub fn beside(socket: &Path) -> Result<Self, SocketError> {
        let mut path = socket.as_os_str().to_owned();
        path.push(".pid");
        let path = PathBuf::from(path);
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(flags.bits().cast_signed())
            .open(&path);
        let write = |mut file: File| {
            file.set_len(0)?;
            file.rewind()?;
            writeln!(file, "{}", std::process::id())?;
            Ok(file)
        };
        let fail = |source| SocketError::PidFile {
            path: path.clone(),
            source,
        };
        let file = opened.map_err(fail)?;
        // A server that was killed a moment ago may still be on its way out.
        for _ in 0..PATIENCE.as_millis() {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => return Err(fail(error.into())),
                Ok(()) => return write(file).map(Self).map_err(fail),
            }
        }
        Err(SocketError::Running { path })
    }
}

/// Lets the members of `group`, a name or a number, connect to the socket at `path`.
///
/// # Errors
///
/// [`SocketError::NoGroup`] and [`SocketError::Group`].
pub fn open_to_group(path: &Path, group: &str) -> Result<(), SocketError> {
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    let number = number_of(&groups, group).or_else(|| group.parse().ok());
    let number = number.ok_or_else(|| SocketError::NoGroup(group.to_owned()))?;
    std::os::unix::fs::lchown(path, None, Some(number))
        .and_then(|()| fs::set_permissions(path, Permissions::from_mode(0o660)))
        .map_err(|source| SocketError::Group {
            path: path.to_owned(),
            group: group.to_owned(),
            source,
        })
}

/// The number of a group in the lines of /etc/group.
fn number_of(groups: &str, name: &str) -> Option<u32> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let found = fields.next() == Some(name);
        fields.nth(1).filter(|_| found)?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_found_by_their_whole_name() {
        let groups = "root:x:0:\nkvm-users:x:7:a\nkvm:x:106:qemu,me\nbad\n";
        assert_eq!(number_of(groups, "kvm"), Some(106));
        assert_eq!(number_of(groups, "root"), Some(0));
        assert_eq!(number_of(groups, "kv"), None);
        assert_eq!(number_of(groups, "bad"), None);
    }

    #[test]
    fn a_second_server_is_refused_while_the_first_lives() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        let first = PidFile::beside(&socket).unwrap();
        let text = fs::read_to_string(folder.path().join("s.pid")).unwrap();
        assert_eq!(text.trim(), std::process::id().to_string());
        assert!(matches!(
            PidFile::beside(&socket),
            Err(SocketError::Running { .. })
        ));
        drop(first);
        PidFile::beside(&socket).unwrap();
    }
}
