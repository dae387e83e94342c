//! Access from the host to what a volume holds, whether a sandbox runs with it or not.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{FileType, Stat};

use super::blocking;
use super::root::Root;
use crate::error::{Error, MicrosandboxResult};

/// Size of the pieces of a stream.
const CHUNK: usize = 64 << 10;

/// The file system of a volume, from the host.
///
/// Paths are taken from the root of the volume, with or without a leading `/`. `..` and symbolic
/// links may be used as long as they stay inside; whatever leads out of the volume fails with
/// [`ErrorKind::PathEscape`](crate::ErrorKind::PathEscape), also while a guest changes it. An absolute
/// link stays inside when it begins with the path of the volume on this host; one that a guest made
/// means a path of the guest, which nobody here knows, and leads out.
///
/// Of a disk volume this is the folder that holds `disk.raw`, not the file system on the disk.
///
/// ```no_run
/// # use microsandbox::{MicrosandboxResult, Volume};
/// # async fn example() -> MicrosandboxResult<()> {
/// let fs = Volume::get("pip-cache").await?.fs();
/// fs.write("wheels/README", "filled by the host").await?;
/// for entry in fs.list("wheels").await? {
///     println!("{} {}", entry.name.display(), entry.metadata.len);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct VolumeFsHandle {
    folder: PathBuf,
    root: Arc<OnceLock<Root>>,
}

/// A name in a directory of a volume.
///
/// ```no_run
/// # use microsandbox::{MicrosandboxResult, VolumeFsHandle};
/// # async fn example(fs: &VolumeFsHandle) -> MicrosandboxResult<()> {
/// for entry in fs.list("/").await? {
///     println!("{} {}", entry.name.display(), entry.metadata.len);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsEntry {
    /// The name; a guest may use any bytes.
    pub name: OsString,
    /// What it is. A symbolic link is not followed.
    pub metadata: FsMetadata,
}

/// What a file or directory of a volume is, as the host sees it.
///
/// Owners and modes that a guest set are kept beside the file (see
/// [`StatVirtualization`](crate::StatVirtualization)) and do not show here.
///
/// ```no_run
/// # use microsandbox::{FsMetadata, MicrosandboxResult, VolumeFsHandle};
/// # async fn example(fs: &VolumeFsHandle) -> MicrosandboxResult<()> {
/// let FsMetadata { len, mode, .. } = fs.stat("wheels/README").await?;
/// println!("{len} bytes, mode {mode:o}");
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsMetadata {
    /// Its kind.
    pub kind: FsEntryKind,
    /// Its length in bytes.
    pub len: u64,
    /// Permission bits.
    pub mode: u32,
    /// When its content was last changed.
    pub modified: SystemTime,
}

/// What kind of thing a path of a volume is.
///
/// ```no_run
/// # use microsandbox::{FsEntryKind, MicrosandboxResult, VolumeFsHandle};
/// # async fn example(fs: &VolumeFsHandle) -> MicrosandboxResult<()> {
/// for entry in fs.list("/").await? {
///     if entry.metadata.kind == FsEntryKind::Directory {
///         println!("{}/", entry.name.display());
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FsEntryKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A FIFO, a socket or a device.
    Other,
}

/// A file of a volume that is read piece by piece.
///
/// ```no_run
/// # use microsandbox::{MicrosandboxResult, Volume};
/// # async fn example() -> MicrosandboxResult<()> {
/// let fs = Volume::get("models").await?.fs();
/// let mut stream = fs.read_stream("weights.bin").await?;
/// let mut len = 0;
/// while let Some(chunk) = stream.recv().await? {
///     len += chunk.len();
/// }
/// # let _ = len;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct VolumeReadStream {
    file: Arc<File>,
}

/// A file of a volume that is written piece by piece.
///
/// ```no_run
/// # use microsandbox::{MicrosandboxResult, Volume};
/// # async fn example() -> MicrosandboxResult<()> {
/// let fs = Volume::get("models").await?.fs();
/// let mut stream = fs.write_stream("weights.bin").await?;
/// stream.write(b"first").await?;
/// stream.write(b"second").await?;
/// stream.close().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct VolumeWriteStream {
    file: Arc<File>,
}

impl VolumeFsHandle {
    pub(super) fn new(folder: PathBuf) -> Self {
        Self {
            folder,
            root: Arc::new(OnceLock::new()),
        }
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The whole content of a file.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, VolumeFsHandle};
    /// # async fn example(fs: &VolumeFsHandle) -> MicrosandboxResult<()> {
    /// let wheel = fs.read("wheels/requests.whl").await?;
    /// assert!(wheel.starts_with(b"PK"));
    /// # Ok(())
    /// # }
    /// ```
    pub async fn read(&self, path: &str) -> MicrosandboxResult<Vec<u8>> {
        let shown = path.to_owned();
        self.run(path, move |root, path| {
            let mut content = Vec::new();
            let done = root.read(path)?.read_to_end(&mut content);
            done.map_err(|error| broken("read", &shown, error))?;
            Ok(content)
        })
        .await
    }

    /// The whole content of a file as text.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, VolumeFsHandle};
    /// # async fn example(fs: &VolumeFsHandle) -> MicrosandboxResult<()> {
    /// print!("{}", fs.read_to_string("wheels/README").await?);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`](crate::ErrorKind::Io) also when it is not UTF-8.
    pub async fn read_to_string(&self, path: &str) -> MicrosandboxResult<String> {
        String::from_utf8(self.read(path).await?).map_err(|error| {
            broken(
                "read",
                path,
                io::Error::new(io::ErrorKind::InvalidData, error.utf8_error()),
            )
        })
    }

    /// A file, to be read in pieces of up to 64 KiB.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, VolumeFsHandle};
    /// # async fn example(fs: &VolumeFsHandle) -> MicrosandboxResult<()> {
    /// let mut stream = fs.read_stream("dataset.csv").await?;
    /// while let Some(chunk) = stream.recv().await? {
    ///     println!("{} more bytes", chunk.len());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn read_stream(&self, path: &str) -> MicrosandboxResult<VolumeReadStream> {
        let file = self.run(path, Root::read).await?;
        Ok(VolumeReadStream {
            file: Arc::new(file),
        })
    }

    /// Replaces the content of a file, which is made with its parents when it is missing.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, VolumeFsHandle};
    /// # async fn example(fs: &VolumeFsHandle) -> MicrosandboxResult<()> {
    /// fs.write("wheels/README", "filled by the host\n").await?;
    /// fs.write("/empty", b"").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn write(&self, path: &str, content: impl AsRef<[u8]>) -> MicrosandboxResult<()> {
        let content = content.as_ref().to_owned();
        self.run(path, move |root, path| {
            let done = root.write(path)?.write_all(&content);
            done.map_err(|error| broken("write", path, error))
        })
        .await
    }

    /// A file to be written in pieces, made with its parents when it is missing.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, VolumeFsHandle};
    /// # async fn example(fs: &VolumeFsHandle) -> MicrosandboxResult<()> {
    /// let mut stream = fs.write_stream("logs/today").await?;
    /// stream.write("first line\n").await?;
    /// stream.close().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn write_stream(&self, path: &str) -> MicrosandboxResult<VolumeWriteStream> {
        let file = self.run(path, Root::write).await?;
        Ok(VolumeWriteStream {
            file: Arc::new(file),
        })
    }

    /// What is in a directory, by name.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, VolumeFsHandle};
    /// # async fn example(fs: &VolumeFsHandle) -> MicrosandboxResult<()> {
    /// for entry in fs.list("wheels").await? {
    ///     println!("{}", entry.name.display());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn list(&self, path: &str) -> MicrosandboxResult<Vec<FsEntry>> {
        let entries = self.run(path, Root::list).await?;
        let entry = |(name, stat): (OsString, Stat)| FsEntry {
            name,
            metadata: metadata(&stat),
        };
        Ok(entries.into_iter().map(entry).collect())
    }

    /// Makes a directory and its parents; one that is there already is left as it is.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, VolumeFsHandle};
    /// # async fn example(fs: &VolumeFsHandle) -> MicrosandboxResult<()> {
    /// fs.mkdir("wheels/cp313").await?;
    /// assert!(fs.exists("wheels").await?);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn mkdir(&self, path: &str) -> MicrosandboxResult<()> {
        self.run(path, Root::mkdir).await
    }

    /// Removes a file, a symbolic link or an empty directory.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, VolumeFsHandle};
    /// # async fn example(fs: &VolumeFsHandle) -> MicrosandboxResult<()> {
    /// fs.remove("wheels/README").await?;
    /// assert!(!fs.exists("wheels/README").await?);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn remove(&self, path: &str) -> MicrosandboxResult<()> {
        self.run(path, Root::remove).await
    }

    /// Removes a directory with everything in it.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, VolumeFsHandle};
    /// # async fn example(fs: &VolumeFsHandle) -> MicrosandboxResult<()> {
    /// fs.write("old/wheels/README", "filled by the host").await?;
    /// fs.remove_dir("old").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn remove_dir(&self, path: &str) -> MicrosandboxResult<()> {
        self.run(path, Root::remove_dir).await
    }

    /// Copies a file within the volume; the copy is made with its parents when it is missing.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, VolumeFsHandle};
    /// # async fn example(fs: &VolumeFsHandle) -> MicrosandboxResult<()> {
    /// fs.copy("settings.toml", "backup/settings.toml").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn copy(&self, from: &str, to: &str) -> MicrosandboxResult<()> {
        let to = to.to_owned();
        self.run(from, move |root, from| {
            let mut source = root.read(from)?;
            let mut copy = root.write(&to)?;
            io::copy(&mut source, &mut copy).map_err(|error| broken("copy", from, error))?;
            Ok(())
        })
        .await
    }

    /// Renames within the volume; what has the new name already is replaced.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, VolumeFsHandle};
    /// # async fn example(fs: &VolumeFsHandle) -> MicrosandboxResult<()> {
    /// fs.write("state.json.new", "{}").await?;
    /// fs.rename("state.json.new", "state.json").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn rename(&self, from: &str, to: &str) -> MicrosandboxResult<()> {
        let to = to.to_owned();
        self.run(from, move |root, from| root.rename(from, &to))
            .await
    }

    /// What a path is, at the end of all symbolic links.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, VolumeFsHandle};
    /// # async fn example(fs: &VolumeFsHandle) -> MicrosandboxResult<()> {
    /// let stat = fs.stat("wheels/README").await?;
    /// println!("{} bytes, changed {:?} ago", stat.len, stat.modified.elapsed());
    /// # Ok(())
    /// # }
    /// ```
    pub async fn stat(&self, path: &str) -> MicrosandboxResult<FsMetadata> {
        Ok(metadata(&self.run(path, Root::stat).await?))
    }

    /// Whether there is something at a path, at the end of all symbolic links.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, VolumeFsHandle};
    /// # async fn example(fs: &VolumeFsHandle) -> MicrosandboxResult<()> {
    /// if !fs.exists("wheels").await? {
    ///     fs.mkdir("wheels").await?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn exists(&self, path: &str) -> MicrosandboxResult<bool> {
        self.run(path, Root::exists).await
    }

    /// Runs an operation on the pinned root where it may block.
    async fn run<T: Send + 'static>(
        &self,
        path: &str,
        operation: impl FnOnce(&Root, &str) -> MicrosandboxResult<T> + Send + 'static,
    ) -> MicrosandboxResult<T> {
        let (this, path) = (self.clone(), path.to_owned());
        blocking(move || {
            let root = match this.root.get() {
                Some(root) => root,
                // Two may open it at once; both see the same folder, and one of them is kept.
                None => {
                    let opened = Root::open(&this.folder)?;
                    this.root.get_or_init(|| opened)
                }
            };
            operation(root, &path)
        })
        .await
    }
}

impl VolumeReadStream {
    /// The next piece, or nothing at the end of the file.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, VolumeFsHandle};
    /// # async fn example(fs: &VolumeFsHandle) -> MicrosandboxResult<()> {
    /// let mut stream = fs.read_stream("dataset.csv").await?;
    /// if let Some(chunk) = stream.recv().await? {
    ///     println!("begins with {:?}", chunk.first());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn recv(&mut self) -> MicrosandboxResult<Option<Vec<u8>>> {
        let file = Arc::clone(&self.file);
        blocking(move || {
            let mut chunk = vec![0; CHUNK];
            let len = file
                .as_ref()
                .read(&mut chunk)
                .map_err(|e| broken("read", "stream", e))?;
            chunk.truncate(len);
            Ok((len > 0).then_some(chunk))
        })
        .await
    }

    /// Everything that is left.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, VolumeFsHandle};
    /// # async fn example(fs: &VolumeFsHandle) -> MicrosandboxResult<()> {
    /// let mut stream = fs.read_stream("dataset.csv").await?;
    /// let first = stream.recv().await?;
    /// println!("{:?}, then {} bytes", first.map(|f| f.len()), stream.collect().await?.len());
    /// # Ok(())
    /// # }
    /// ```
    pub async fn collect(mut self) -> MicrosandboxResult<Vec<u8>> {
        let mut content = Vec::new();
        while let Some(chunk) = self.recv().await? {
            content.extend_from_slice(&chunk);
        }
        Ok(content)
    }
}

impl VolumeWriteStream {
    /// Writes the next piece.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, VolumeFsHandle};
    /// # async fn example(fs: &VolumeFsHandle) -> MicrosandboxResult<()> {
    /// let mut stream = fs.write_stream("numbers").await?;
    /// for number in 0..1000 {
    ///     stream.write(format!("{number}\n")).await?;
    /// }
    /// stream.close().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn write(&mut self, chunk: impl AsRef<[u8]>) -> MicrosandboxResult<()> {
        let (file, chunk) = (Arc::clone(&self.file), chunk.as_ref().to_owned());
        blocking(move || {
            file.as_ref()
                .write_all(&chunk)
                .map_err(|error| broken("write", "stream", error))
        })
        .await
    }

    /// Ends the file. What was written is on the host's disk when this returns.
    ///
    /// ```no_run
    /// # use microsandbox::{MicrosandboxResult, VolumeFsHandle};
    /// # async fn example(fs: &VolumeFsHandle) -> MicrosandboxResult<()> {
    /// let mut stream = fs.write_stream("seed").await?;
    /// stream.write([0_u8; 4096]).await?;
    /// stream.close().await?;
    /// assert_eq!(fs.stat("seed").await?.len, 4096);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn close(self) -> MicrosandboxResult<()> {
        blocking(move || {
            self.file
                .sync_all()
                .map_err(|error| broken("write", "stream", error))
        })
        .await
    }
}

fn broken(verb: &str, path: &str, error: io::Error) -> Error {
    Error::io(format!("cannot {verb} `{path}` in the volume"), error).with_value(path)
}

fn metadata(stat: &Stat) -> FsMetadata {
    let seconds = u64::try_from(stat.st_mtime).unwrap_or(0);
    let nanoseconds = u32::try_from(stat.st_mtime_nsec).unwrap_or(0);
    FsMetadata {
        kind: match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => FsEntryKind::File,
            FileType::Directory => FsEntryKind::Directory,
            FileType::Symlink => FsEntryKind::Symlink,
            _ => FsEntryKind::Other,
        },
        len: u64::try_from(stat.st_size).unwrap_or(0),
        mode: stat.st_mode & 0o7777,
        modified: UNIX_EPOCH + Duration::new(seconds, nanoseconds.min(999_999_999)),
    }
}
