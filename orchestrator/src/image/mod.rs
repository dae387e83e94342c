//! The local image store: root file systems unpacked once and shared by every sandbox.
//!
//! ```text
//! images/.lock             held while names change
//! images/index.json        name:tag → image id
//! images/<id>/rootfs/      the files, with owners and modes as overrides (spec stat-virt 2.2)
//! images/<id>/image.json   what the archive said about the image
//! images/<id>/lock         locked, shared, by every sandbox that runs on the image
//! ```
//!
//! An image never changes once it has its name: it is put together in a folder of its own and
//! renamed when it is whole and on disk.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::rundir::{self, Home};
use crate::{Error, ErrorKind, MicrosandboxResult};

mod archive;
mod layer;
mod load;
mod manifest;
mod reader;
mod tree;

pub use load::Loaded;
pub(crate) use reader::{TarEntry, TarKind, TarReader};

/// The images of one home.
#[derive(Debug, Clone)]
pub struct ImageStore {
    folder: PathBuf,
}

/// One image of the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    folder: PathBuf,
    /// What is recorded about it.
    pub record: ImageRecord,
    /// The names that lead to it, such as `alpine:latest`.
    pub references: Vec<String>,
}

/// What is recorded about an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// The first 16 hexadecimal digits of the digest of its configuration, or of its archive when
    /// it has none.
    pub id: String,
    /// Bytes of its regular files.
    pub size_bytes: u64,
    /// Number of its files, directories and links.
    pub entries: u64,
    /// When it was loaded, in milliseconds since the epoch.
    pub loaded_at_ms: u64,
    /// How it is meant to be run.
    pub config: ImageConfig,
}

/// How an image is meant to be run (OCI image configuration, `config`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    /// Program and leading arguments.
    pub entrypoint: Vec<String>,
    /// Arguments when none are given.
    pub cmd: Vec<String>,
    /// Environment, as names and values.
    pub env: Vec<(String, String)>,
    /// Working directory.
    pub workdir: Option<String>,
    /// User as `name`, `uid`, `name:group` or `uid:gid`.
    pub user: Option<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
}

/// Names and the images that they lead to.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Index {
    references: BTreeMap<String, String>,
}

impl ImageStore {
    /// The store of a home; it is made when something is put into it.
    pub fn of(home: &Home) -> Self {
        Self {
            folder: home.images(),
        }
    }

    /// The image of a name such as `alpine`, `alpine:3.20`, or of the beginning of its id.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::ImageNotFound`] when there is none.
    pub fn find(&self, reference: &str) -> MicrosandboxResult<Image> {
        let images = self.list()?;
        let full = full_reference(reference);
        let by_name = images.iter().find(|image| image.references.contains(&full));
        let by_id = || {
            let long_enough = reference.len() >= 6;
            images
                .iter()
                .find(|image| long_enough && image.record.id.starts_with(reference))
        };
        by_name.or_else(by_id).cloned().ok_or_else(|| {
            Error::new(ErrorKind::ImageNotFound, format!("there is no image `{reference}`"))
                .with_value(reference)
                .with_hint("load one with `msb image load FILE`; `msb image ls` lists them; a directory is written `./rootfs`")
        })
    }

    /// Every image, in the order of their names.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Io`] when the store cannot be read.
    pub fn list(&self) -> MicrosandboxResult<Vec<Image>> {
        let index = self.index()?;
        let entries = match std::fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => {
                return Err(Error::io(
                    format!("cannot read `{}`", self.folder.display()),
                    error,
                ));
            }
        };
        let mut images = Vec::new();
        for entry in entries.filter_map(Result::ok) {
            let folder = entry.path();
            let Ok(record) = rundir::read_json::<ImageRecord>(&folder.join("image.json")) else {
                continue;
            };
            let references = index
                .references
                .iter()
                .filter(|(_, id)| **id == record.id)
                .map(|(name, _)| name.clone());
            images.push(Image {
                references: references.collect(),
                folder,
                record,
            });
        }
        images.sort_by(|a, b| (&a.references, &a.record.id).cmp(&(&b.references, &b.record.id)));
        Ok(images)
    }

    /// Takes a name away, and the image with it when it was its last or when its id was given.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::ImageNotFound`], or [`ErrorKind::InUse`] while a sandbox runs on it.
    pub fn remove(&self, reference: &str) -> MicrosandboxResult<()> {
        let image = self.find(reference)?;
        let _lock = self.lock()?;
        let full = full_reference(reference);
        let named = image.references.contains(&full);
        let mut index = self.index()?;
        if named && image.references.len() > 1 {
            index.references.remove(&full);
            return self.write_index(&index);
        }
        let _unused = image.lock_for_removal()?;
        index.references.retain(|_, id| *id != image.record.id);
        self.write_index(&index)?;
        let doomed = self
            .folder
            .join(format!(".rm-{}-{}", std::process::id(), image.record.id));
        std::fs::rename(&image.folder, &doomed)
            .and_then(|()| std::fs::remove_dir_all(&doomed))
            .map_err(|error| Error::io(format!("cannot remove image `{reference}`"), error))
    }

    fn index(&self) -> MicrosandboxResult<Index> {
        let path = self.folder.join("index.json");
        if path.exists() {
            rundir::read_json(&path)
        } else {
            Ok(Index::default())
        }
    }

    fn write_index(&self, index: &Index) -> MicrosandboxResult<()> {
        rundir::write_json(&self.folder.join("index.json"), index)
    }

    /// The right to change names, if nobody has it and there is a store.
    fn try_lock(&self) -> std::io::Result<Option<File>> {
        if !self.folder.exists() {
            return Ok(None);
        }
        let file = open_lock(&self.folder.join(".lock"))?;
        let free = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
        Ok(free.is_ok().then_some(file))
    }

    /// Waits for the right to change names; given back when the file is closed.
    fn lock(&self) -> MicrosandboxResult<File> {
        let path = self.folder.join(".lock");
        let cannot = |error| Error::io(format!("cannot lock `{}`", path.display()), error);
        rundir::make_dir(&self.folder).map_err(cannot)?;
        let file = open_lock(&path).map_err(cannot)?;
        rustix::fs::flock(&file, FlockOperation::LockExclusive)
            .map_err(|errno| cannot(errno.into()))?;
        Ok(file)
    }
}

impl Image {
    /// The folder of its root file system, for `msb-fs` to serve.
    pub fn rootfs(&self) -> PathBuf {
        self.folder.join("rootfs")
    }

    /// Marks the image as used; nobody removes it while the file is open.
    pub(crate) fn lock_for_use(folder: &Path) -> std::io::Result<File> {
        let file = open_lock(&folder.join("lock"))?;
        rustix::fs::flock(&file, FlockOperation::LockShared)?;
        Ok(file)
    }

    /// Whether a sandbox runs on it.
    pub(crate) fn is_used(&self) -> bool {
        let lock = open_lock(&self.folder.join("lock"));
        lock.is_ok_and(|lock| {
            rustix::fs::flock(lock, FlockOperation::NonBlockingLockExclusive)
                == Err(Errno::WOULDBLOCK)
        })
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    fn lock_for_removal(&self) -> MicrosandboxResult<File> {
        let path = self.folder.join("lock");
        let cannot = |error| Error::io(format!("cannot lock `{}`", path.display()), error);
        let file = open_lock(&path).map_err(cannot)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(file),
            Err(Errno::WOULDBLOCK) => Err(Error::new(
                ErrorKind::InUse,
                format!("image `{}` is used by a running sandbox", self.record.id),
            )
            .with_hint("`msb ls --running` lists the running sandboxes")),
            Err(errno) => Err(cannot(errno.into())),
        }
    }
}

/// `alpine` → `alpine:latest`; a registry's port is not taken for a tag.
fn full_reference(reference: &str) -> String {
    let name = reference.rsplit('/').next().unwrap_or(reference);
    if name.contains(':') || name.contains('@') {
        reference.to_owned()
    } else {
        format!("{reference}:latest")
    }
}

fn open_lock(path: &Path) -> std::io::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_without_a_tag_is_the_latest() {
        for (given, full) in [
            ("alpine", "alpine:latest"),
            ("alpine:3.20", "alpine:3.20"),
            ("host:5000/a", "host:5000/a:latest"),
            ("host:5000/a:b", "host:5000/a:b"),
            ("a@sha256:00", "a@sha256:00"),
        ] {
            assert_eq!(full_reference(given), full);
        }
    }
}
