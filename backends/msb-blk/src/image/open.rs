//! Opens an image with everything it refers to, locks it, and refuses what is not safe.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};

use super::beside::open_beside;
use super::lock::lock;
use super::qcow2::{self, Header, HeaderError, Qcow2};
use super::vmdk::{self, VmdkError};
use super::{Image, ImageError, Raw, References};
use crate::file::{BlockingFile, Caching, HostFile};

/// Longest chain of backing images.
const MAX_CHAIN: usize = 32;

/// How the bytes of an image file are to be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The file is the disk.
    Raw,
    /// QEMU's format, version 2 or 3.
    Qcow2,
    /// VMware's format: a descriptor or a sparse extent.
    Vmdk,
}

impl Format {
    /// The format a file name stands for: by its extension, otherwise raw. The content never
    /// counts, because a guest can write it.
    pub fn of_path(path: &Path) -> Self {
        match path
            .extension()
            .map(OsStr::to_ascii_lowercase)
            .as_deref()
            .map(OsStr::as_bytes)
        {
            Some(b"qcow2") => Self::Qcow2,
            Some(b"vmdk") => Self::Vmdk,
            _ => Self::Raw,
        }
    }

    fn of_name(name: &[u8]) -> Option<Self> {
        match name {
            b"raw" => Some(Self::Raw),
            b"qcow2" => Some(Self::Qcow2),
            b"vmdk" => Some(Self::Vmdk),
            _ => None,
        }
    }
}

/// How an image is to be opened.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Format of the image itself.
    pub format: Format,
    /// Open it for reading only, with a shared lock.
    pub read_only: bool,
    /// What stands between the guest and the disk.
    pub caching: Caching,
    /// Follow references to plain names in the folder of the image.
    pub allow_references: bool,
    /// Take a lock on every file.
    pub lock: bool,
}

/// Why an image cannot be served. The message says what to do about it where something can be done.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The host refused.
    #[error("cannot open {}", path.display())]
    Host {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// Somebody else uses the file in a way that excludes this one.
    #[error("{} is in use by another process (a disk has one writer or many readers)", path.display())]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// The qcow2 header is refused.
    #[error("cannot open {}", path.display())]
    Qcow2 {
        /// The file.
        path: PathBuf,
        /// Why.
        source: HeaderError,
    },
    /// The VMDK descriptor or header is refused.
    #[error("cannot open {}", path.display())]
    Vmdk {
        /// The file.
        path: PathBuf,
        /// Why.
        source: VmdkError,
    },
    /// It names another file that may not be opened.
    #[error("{} refers to {kind} {name:?}: {reason}", path.display())]
    Reference {
        /// The image that refers.
        path: PathBuf,
        /// What the other file is to it.
        kind: &'static str,
        /// The name as stored.
        name: String,
        /// Why not, and the way out.
        reason: String,
    },
    /// It is damaged or cannot be written.
    #[error("{}: {reason}", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// Why, and the way out.
        reason: &'static str,
    },
    /// Its tables cannot be read.
    #[error("cannot read the metadata of {}", path.display())]
    Metadata {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ImageError,
    },
}

/// Opens the image at `path` and everything it may refer to.
///
/// # Errors
///
/// [`OpenError`]; nothing stays open or locked then.
pub fn open(path: &Path, options: &OpenOptions) -> Result<Image, OpenError> {
    let host = |source: io::Error| OpenError::Host {
        path: path.to_owned(),
        source,
    };
    let real = std::fs::canonicalize(path).map_err(host)?;
    let folder = real.parent().unwrap_or(Path::new("/"));
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = rustix::fs::open(folder, flags, Mode::empty()).map_err(|e| host(e.into()))?;
    let access = if options.read_only {
        OFlags::RDONLY
    } else {
        OFlags::RDWR
    };
    let flags = access | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    let fd = rustix::fs::open(&real, flags, Mode::empty()).map_err(|e| host(e.into()))?;
    let mut opener = Opener {
        references: References {
            folder,
            allowed: options.allow_references,
        },
        options,
        opened: Vec::new(),
    };
    let file = opener.admit(fd, path, options.read_only)?;
    opener.image(file, path, options.format, options.read_only, 0)
}

/// A file that is already open, by device and inode number.
struct Opened {
    id: (u64, u64),
    file: Arc<BlockingFile>,
}

/// The files opened so far, and what may be opened yet.
pub(super) struct Opener<'a> {
    references: References,
    options: &'a OpenOptions,
    opened: Vec<Opened>,
}

impl Opener<'_> {
    /// Checks and locks a file that was just opened.
    fn admit(
        &mut self,
        fd: OwnedFd,
        path: &Path,
        read_only: bool,
    ) -> Result<Arc<BlockingFile>, OpenError> {
        let host = |source: io::Error| OpenError::Host {
            path: path.to_owned(),
            source,
        };
        let stat = rustix::fs::fstat(&fd).map_err(|e| host(e.into()))?;
        let mut file = BlockingFile::new(fd, self.options.caching).map_err(host)?;
        if self.options.lock && !lock(file.as_fd(), read_only).map_err(host)? {
            return Err(OpenError::Locked {
                path: path.to_owned(),
            });
        }
        if self.options.caching == Caching::None {
            let access = if read_only {
                OFlags::RDONLY
            } else {
                OFlags::RDWR
            };
            file.go_direct(access).map_err(host)?;
        }
        let file = Arc::new(file);
        self.opened.push(Opened {
            id: (stat.st_dev, stat.st_ino),
            file: Arc::clone(&file),
        });
        Ok(file)
    }

    fn image(
        &mut self,
        file: Arc<BlockingFile>,
        path: &Path,
        format: Format,
        read_only: bool,
        depth: usize,
    ) -> Result<Image, OpenError> {
        match format {
            Format::Raw => {
                let size = file.size().map_err(|source| host_error(path, source))?;
                Ok(Image::Raw(Raw::new(file, size, read_only)))
            }
            Format::Qcow2 => self.qcow2(file, path, read_only, depth),
            Format::Vmdk => self.vmdk(file, path, read_only, depth),
        }
    }

    fn qcow2(
        &mut self,
        file: Arc<BlockingFile>,
        path: &Path,
        read_only: bool,
        depth: usize,
    ) -> Result<Image, OpenError> {
        let size = file.size().map_err(|source| host_error(path, source))?;
        let len = usize::try_from(size)
            .unwrap_or(qcow2::MAX_HEADER)
            .min(qcow2::MAX_HEADER);
        let mut bytes = vec![0; len];
        file.read_at(&mut bytes, 0)
            .map_err(|source| host_error(path, source))?;
        let header = Header::parse(&bytes).map_err(|source| OpenError::Qcow2 {
            path: path.to_owned(),
            source,
        })?;
        let refuse = |reason| {
            Err(OpenError::Refused {
                path: path.to_owned(),
                reason,
            })
        };
        if header.corrupt && !read_only {
            return refuse(
                "the image is marked corrupt (repair it with `qemu-img check -r all`, or open it with --read-only)",
            );
        }
        if header.dirty && !read_only {
            return refuse(
                "the image was not closed cleanly (repair it with `qemu-img check -r all`, or open it with --read-only)",
            );
        }
        if self.options.caching == Caching::None && header.cluster_bits < 12 {
            return refuse("clusters below 4 KiB need --cache writeback");
        }
        let data: Option<Arc<dyn HostFile>> = match &header.data_file {
            Some(name) if header.external_data => {
                Some(self.reference(path, "data file", name, read_only)?)
            }
            None if header.external_data => {
                return refuse("the image needs a data file but does not name it");
            }
            _ => None,
        };
        let backing = match &header.backing {
            Some(name) => {
                let format = header.backing_format.as_deref().and_then(Format::of_name);
                let Some(format) = format else {
                    let reason = "its format is missing or not raw, qcow2 or vmdk; record it with `qemu-img rebase -u -F FORMAT`";
                    return Err(reference_error(
                        path,
                        "backing file",
                        name,
                        reason.to_owned(),
                    ));
                };
                Some(self.below(path, "backing file", name, format, depth)?)
            }
            None => None,
        };
        Qcow2::open(header, file, data, backing, read_only)
            .map(|image| Image::Qcow2(Box::new(image)))
            .map_err(|source| OpenError::Metadata {
                path: path.to_owned(),
                source,
            })
    }

    /// Opens the image below another one, read-only.
    pub(super) fn below(
        &mut self,
        path: &Path,
        kind: &'static str,
        name: &[u8],
        format: Format,
        depth: usize,
    ) -> Result<Arc<Image>, OpenError> {
        if depth >= MAX_CHAIN {
            let reason = format!("the chain is longer than {MAX_CHAIN} images");
            return Err(reference_error(path, kind, name, reason));
        }
        let file = self.reference(path, kind, name, true)?;
        let below = path.with_file_name(OsStr::from_bytes(name));
        Ok(Arc::new(self.image(
            file,
            &below,
            format,
            true,
            depth + 1,
        )?))
    }

    /// Opens a file the image names, if that is allowed, and no file twice.
    fn reference(
        &mut self,
        path: &Path,
        kind: &'static str,
        name: &[u8],
        read_only: bool,
    ) -> Result<Arc<BlockingFile>, OpenError> {
        if !self.references.allowed {
            let reason = "an image may not refer to other files; --allow-references permits plain names beside it";
            return Err(reference_error(path, kind, name, reason.to_owned()));
        }
        let (file, id) = self.open_reference(path, kind, name, read_only)?;
        if self.opened.iter().any(|opened| opened.id == id) {
            let reason = "it is part of this disk already".to_owned();
            return Err(reference_error(path, kind, name, reason));
        }
        self.admit(
            file,
            &path.with_file_name(OsStr::from_bytes(name)),
            read_only,
        )
    }

    fn open_reference(
        &self,
        path: &Path,
        kind: &'static str,
        name: &[u8],
        read_only: bool,
    ) -> Result<(OwnedFd, (u64, u64)), OpenError> {
        let refused = |e: io::Error| reference_error(path, kind, name, e.to_string());
        let file =
            open_beside(self.references.folder.as_fd(), name, !read_only).map_err(refused)?;
        let stat = rustix::fs::fstat(&file).map_err(|e| refused(e.into()))?;
        Ok((file, (stat.st_dev, stat.st_ino)))
    }

    /// Opens an extent of a VMDK. Those that bear the descriptor's own name are part of it; others
    /// need permission. One file may serve several extents.
    pub(super) fn extent(
        &mut self,
        path: &Path,
        name: &str,
        read_only: bool,
    ) -> Result<Arc<BlockingFile>, OpenError> {
        let bytes = name.as_bytes();
        if !self.references.allowed && !vmdk::is_own_extent(path, name) {
            let reason = "an extent must be called after the descriptor (NAME-flat.vmdk, NAME-s001.vmdk, NAME-f001.vmdk); --allow-references permits any plain name beside it";
            return Err(reference_error(path, "extent", bytes, reason.to_owned()));
        }
        let (file, id) = self.open_reference(path, "extent", bytes, read_only)?;
        if let Some(opened) = self.opened.iter().find(|opened| opened.id == id) {
            return Ok(Arc::clone(&opened.file));
        }
        self.admit(file, &path.with_file_name(name), read_only)
    }
}

pub(super) fn host_error(path: &Path, source: io::Error) -> OpenError {
    OpenError::Host {
        path: path.to_owned(),
        source,
    }
}

pub(super) fn reference_error(
    path: &Path,
    kind: &'static str,
    name: &[u8],
    reason: String,
) -> OpenError {
    let name = String::from_utf8_lossy(name.get(..name.len().min(200)).unwrap_or_default());
    OpenError::Reference {
        path: path.to_owned(),
        kind,
        name: name.into_owned(),
        reason,
    }
}
