//! Applies the layers of an image to its tree, one upon the other.
//!
//! A name `.wh.NAME` takes NAME of the layers below away, `.wh..wh..opq` everything that they have
//! in its folder (OCI image specification, layers, whiteouts). Neither touches what the layer itself
//! brings, in whatever order the two come.

use std::collections::HashSet;
use std::io::{self, Read};

use super::reader::{TarEntry, TarError, TarKind, TarReader};
use super::tree::{Components, Metadata, Tree, TreeError};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
const AUFS: &[u8] = b".wh..wh.";

/// More than any real image holds, and what an archive of a few megabytes can pretend to hold.
const ENTRIES_MAX: u64 = 4_000_000;
const BYTES_MAX: u64 = 256 << 30;
const PATHS_MAX: usize = 512 << 20;

/// What keeps a layer from being applied.
#[derive(Debug, thiserror::Error)]
pub(super) enum LayerError {
    #[error(transparent)]
    Tar(#[from] TarError),
    #[error("`{path}` cannot be unpacked")]
    Entry {
        path: String,
        #[source]
        reason: TreeError,
    },
    #[error("the image holds more than {0}")]
    TooMuch(&'static str),
    #[error("the unpacked files cannot be finished")]
    Finish(#[source] TreeError),
}

/// The tree of an image, and how much is in it.
pub(super) struct Layers {
    tree: Tree,
    pub(super) bytes: u64,
    pub(super) entries: u64,
}

/// What one layer has brought.
#[derive(Default)]
struct Brought {
    paths: HashSet<Vec<u8>>,
    path_bytes: usize,
    /// Folders and their times, which are set when nothing changes in them any more.
    folders: Vec<(Components, (i64, u32))>,
}

impl Layers {
    pub(super) fn new(tree: Tree) -> Self {
        Self {
            tree,
            bytes: 0,
            entries: 0,
        }
    }

    /// Applies a layer, and gives its stream back, read to the end.
    pub(super) fn apply<R: Read>(&mut self, stream: R) -> Result<R, LayerError> {
        let mut reader = TarReader::new(stream);
        let mut brought = Brought::default();
        while let Some(entry) = reader.next_entry()? {
            self.entries += 1;
            self.bytes = self.bytes.saturating_add(entry.size);
            if self.entries > ENTRIES_MAX {
                return Err(LayerError::TooMuch("four million files"));
            }
            if self.bytes > BYTES_MAX {
                return Err(LayerError::TooMuch("256 GiB"));
            }
            self.entry(&entry, &mut reader, &mut brought)
                .map_err(|reason| match reason {
                    TreeError::Io(error) if is_tar(&error) => {
                        LayerError::Tar(TarError::Read(error))
                    }
                    reason => LayerError::Entry {
                        path: String::from_utf8_lossy(&entry.path).into_owned(),
                        reason,
                    },
                })?;
            if brought.path_bytes > PATHS_MAX {
                return Err(LayerError::TooMuch("512 MiB of file names in one layer"));
            }
        }
        for (path, mtime) in brought.folders.iter().rev() {
            match self.tree.touch(path, *mtime) {
                // A later entry of the layer may have put something else in its place.
                Ok(()) | Err(TreeError::NotDirectory | TreeError::NoTarget) => {}
                Err(reason) => return Err(LayerError::Finish(reason)),
            }
        }
        Ok(reader.drain()?)
    }

    /// Waits until everything is on disk.
    pub(super) fn finish(&self) -> Result<(), LayerError> {
        self.tree.sync().map_err(LayerError::Finish)
    }

    fn entry(
        &mut self,
        entry: &TarEntry,
        content: &mut dyn Read,
        brought: &mut Brought,
    ) -> Result<(), TreeError> {
        let parts = Tree::split(&entry.path)?;
        let Some((name, above)) = parts.split_last() else {
            return match entry.kind {
                TarKind::Directory => {
                    brought.folders.push((parts, entry.mtime));
                    self.tree
                        .describe(&self.tree.root(), &metadata(entry, 0o040_000, (0, 0)))
                }
                _ => Err(TreeError::Root),
            };
        };
        let parent = self.tree.folder(above, true)?;
        if name == OPAQUE {
            return self
                .tree
                .clear(&parent, &|path| brought.paths.contains(path));
        }
        if name.starts_with(AUFS) {
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            if hidden.is_empty() || hidden == b"." || hidden == b".." {
                return Err(TreeError::Parent);
            }
            let gone = self
                .tree
                .remove_except(&parent, hidden, &|path| brought.paths.contains(path));
            return gone.map(drop);
        }
        let path = parent.path_of(name);
        brought.path_bytes = brought.path_bytes.saturating_add(path.len());
        brought.paths.insert(path);
        let mut file = |mode, device, content: &mut dyn Read| {
            self.tree
                .make_file(&parent, name, content, &metadata(entry, mode, device))
                .map(drop)
        };
        match &entry.kind {
            TarKind::File => file(0o100_000, (0, 0), content),
            TarKind::Char(major, minor) => file(0o020_000, (*major, *minor), &mut io::empty()),
            TarKind::Block(major, minor) => file(0o060_000, (*major, *minor), &mut io::empty()),
            TarKind::Fifo => file(0o010_000, (0, 0), &mut io::empty()),
            TarKind::Symlink(target) => {
                // Its permission bits mean nothing; Linux shows all of them.
                let link = Metadata {
                    mode: 0o120_777,
                    ..metadata(entry, 0, (0, 0))
                };
                self.tree.make_symlink(&parent, name, target, &link)
            }
            TarKind::Link(target) => self.tree.make_link(&parent, name, &Tree::split(target)?),
            TarKind::Directory => {
                let (folder, _) = self.tree.make_folder(&parent, name)?;
                brought.folders.push((parts.clone(), entry.mtime));
                self.tree
                    .describe(&folder, &metadata(entry, 0o040_000, (0, 0)))
            }
        }
    }
}

fn metadata(entry: &TarEntry, file_type: u32, device: (u32, u32)) -> Metadata<'_> {
    Metadata {
        mode: file_type | entry.mode,
        owner: entry.owner,
        device,
        mtime: entry.mtime,
        xattrs: &entry.xattrs,
    }
}

/// Whether reading the archive failed, rather than writing the file.
fn is_tar(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<TarError>())
}
