//! Puts an image into the store: from its archive to a folder that exists whole or not at all.

use std::fs::File;
use std::io::{self, Seek};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::SystemTime;

use rustix::fs::{CWD, FlockOperation, RenameFlags};
use rustix::io::Errno;

use super::archive::{self, ArchiveError, Digesting, Files, Telling};
use super::layer::{LayerError, Layers};
use super::manifest::{self, Configuration, Found, ManifestError};
use super::tree::{Tree, TreeError};
use super::{Image, ImageConfig, ImageRecord, ImageStore, full_reference, open_lock};
use crate::rundir;
use crate::{Error, ErrorKind, MicrosandboxResult};

/// What loading an archive did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// Names that lead to the image now.
    pub references: Vec<String>,
    /// What is recorded about it.
    pub record: ImageRecord,
    /// Whether the store had it already.
    pub known: bool,
}

/// What keeps an image from being loaded.
#[derive(Debug, thiserror::Error)]
enum LoadError {
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error(transparent)]
    Layer(#[from] LayerError),
    #[error("the root of the image cannot be made")]
    Root(#[source] TreeError),
    #[error("layer {0} is damaged: its content does not have the recorded digest")]
    Digest(usize),
    #[error("the image store cannot be written")]
    Store(#[from] io::Error),
}

/// An image that is being put together.
struct Draft {
    folder: tempfile::TempDir,
    /// Locked while somebody works on it.
    _lock: File,
}

impl ImageStore {
    /// Unpacks an archive: one of `docker save`, an OCI layout (archive or folder), or the tar of a
    /// root file system; each may be compressed with gzip or zstd. `tell` is called now and then
    /// with the bytes done and the bytes to do.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidConfig`] when the archive is no image; nothing is left in the store then.
    pub fn load(
        &self,
        path: &Path,
        name: Option<&str>,
        tell: &dyn Fn(u64, u64),
    ) -> MicrosandboxResult<Loaded> {
        let fallback = name_of_file(path);
        if let Some(name) = name {
            check_name(name)?;
        }
        rundir::make_dir(&self.folder).map_err(|error| {
            Error::io(format!("cannot make `{}`", self.folder.display()), error)
        })?;
        self.sweep();
        let failed = |error: LoadError| {
            let kind = match &error {
                LoadError::Store(_) | LoadError::Root(_) => ErrorKind::Io,
                _ => ErrorKind::InvalidConfig,
            };
            Error::new(kind, format!("cannot load `{}`", path.display())).with_source(error)
        };
        let draft = self.draft().map_err(|error| failed(error.into()))?;
        let (record, names) = self.unpack(path, &draft, tell).map_err(failed)?;
        let mut references: Vec<String> = match name {
            Some(name) => vec![full_reference(name)],
            None => names
                .iter()
                .map(|name| full_reference(short_name(name)))
                .collect(),
        };
        references.retain(|reference| check_name(reference).is_ok());
        if references.is_empty() {
            references.push(full_reference(&fallback));
        }
        self.keep(draft, record, references)
    }

    /// Unpacks into the draft; an image that the store has already is not unpacked again.
    fn unpack(
        &self,
        path: &Path,
        draft: &Draft,
        tell: &dyn Fn(u64, u64),
    ) -> Result<(ImageRecord, Vec<String>), LoadError> {
        let metadata = std::fs::metadata(path).map_err(ArchiveError::Read)?;
        let file;
        let files = if metadata.is_dir() {
            Some(Files::of_folder(path)?)
        } else {
            let mut opened = File::open(path).map_err(ArchiveError::Read)?;
            if metadata.file_type().is_fifo() || metadata.file_type().is_char_device() {
                let mut spool = tempfile::tempfile_in(draft.folder.path())?;
                io::copy(&mut opened, &mut spool).map_err(ArchiveError::Read)?;
                spool.rewind()?;
                opened = spool;
            }
            file = opened;
            let copy = file.try_clone().map_err(ArchiveError::Read)?;
            let files = Files::of_archive(copy, draft.folder.path())?;
            if files.is_none() {
                return self.unpack_rootfs(&file, draft, tell);
            }
            files
        };
        let Some(files) = files else {
            return Err(ManifestError::Empty.into());
        };
        let found = find(&files)?;
        let config = files.read(&found.config)?;
        let configuration = manifest::configuration(&found.config, &config)?;
        let id = archive::hex(&<sha2::Sha256 as sha2::Digest>::digest(&config));
        let id: String = id.chars().take(16).collect();
        if let Ok(record) = rundir::read_json(&self.folder.join(&id).join("image.json")) {
            return Ok((record, found.names));
        }
        let record = unpack_layers(&files, &found, configuration, id, draft, tell)?;
        Ok((record, found.names))
    }

    /// Unpacks the tar of a root file system, which is its own only layer.
    fn unpack_rootfs(
        &self,
        file: &File,
        draft: &Draft,
        tell: &dyn Fn(u64, u64),
    ) -> Result<(ImageRecord, Vec<String>), LoadError> {
        let total = file.metadata()?.len();
        let mut rewound = file;
        rewound.rewind()?;
        let mut done = 0;
        let stream = Telling {
            stream: file,
            done: &mut done,
            tell: &|bytes| tell(bytes, total),
        };
        let mut layers = Layers::new(Tree::create(&draft.rootfs()).map_err(LoadError::Root)?);
        let stream = layers.apply(Digesting::new(archive::decompress_stream(stream)?))?;
        layers.finish()?;
        if layers.entries == 0 {
            return Err(ManifestError::Empty.into());
        }
        let id = stream.finish().chars().take(16).collect();
        Ok((record(id, ImageConfig::default(), &layers), Vec::new()))
    }

    /// Gives the draft its place and the image its names.
    fn keep(
        &self,
        draft: Draft,
        record: ImageRecord,
        references: Vec<String>,
    ) -> MicrosandboxResult<Loaded> {
        let cannot = |error| Error::io("cannot put the image into the store", error);
        let place = self.folder.join(&record.id);
        let _lock = self.lock()?;
        let known = place.join("image.json").exists();
        if !known {
            rundir::write_json(&draft.folder.path().join("image.json"), &record)?;
            match rustix::fs::renameat_with(
                CWD,
                draft.folder.path(),
                CWD,
                &place,
                RenameFlags::NOREPLACE,
            ) {
                // Nothing is left at the old name.
                Ok(()) => drop(draft.folder.keep()),
                Err(errno) => return Err(cannot(errno.into())),
            }
            rundir::sync_dir(&self.folder).map_err(cannot)?;
        }
        let mut index = self.index()?;
        for reference in &references {
            index
                .references
                .insert(reference.clone(), record.id.clone());
        }
        self.write_index(&index)?;
        Ok(Loaded {
            references,
            record,
            known,
        })
    }

    fn draft(&self) -> io::Result<Draft> {
        let folder = tempfile::Builder::new()
            .prefix(".new-")
            .tempdir_in(&self.folder)?;
        let lock = open_lock(&folder.path().join("lock"))?;
        rustix::fs::flock(&lock, FlockOperation::LockShared)?;
        Ok(Draft {
            folder,
            _lock: lock,
        })
    }

    /// Removes drafts that nobody works on any more.
    pub(crate) fn sweep(&self) {
        // Those of the index are made under the store's lock.
        if let Ok(Some(_lock)) = self.try_lock() {
            rundir::remove_drafts(&self.folder);
        }
        for entry in std::fs::read_dir(&self.folder)
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = entry.file_name();
            let draft = name
                .to_str()
                .is_some_and(|n| n.starts_with(".new-") || n.starts_with(".rm-"));
            if !draft {
                continue;
            }
            let free = File::open(entry.path().join("lock"))
                .map_err(|_| Errno::NOENT)
                .and_then(|lock| rustix::fs::flock(lock, FlockOperation::NonBlockingLockExclusive));
            if free.is_ok() {
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
    }
}

impl Draft {
    fn rootfs(&self) -> std::path::PathBuf {
        self.folder.path().join("rootfs")
    }
}

impl Image {
    /// The folder that keeps the image with this root file system, if it is one of a store.
    pub(crate) fn folder_of_rootfs(rootfs: &Path) -> Option<&Path> {
        let folder = rootfs.parent()?;
        (rootfs.ends_with("rootfs") && folder.join("image.json").exists()).then_some(folder)
    }
}

fn unpack_layers(
    files: &Files,
    found: &Found,
    configuration: Configuration,
    id: String,
    draft: &Draft,
    tell: &dyn Fn(u64, u64),
) -> Result<ImageRecord, LoadError> {
    let mut total = 0_u64;
    for path in &found.layers {
        total = total.saturating_add(files.open(path)?.1);
    }
    let mut done = 0;
    let mut layers = Layers::new(Tree::create(&draft.rootfs()).map_err(LoadError::Root)?);
    let recorded = configuration.diff_ids.len() == found.layers.len();
    for (number, path) in found.layers.iter().enumerate() {
        let (stream, _) = files.open(path)?;
        let stream = Telling {
            stream,
            done: &mut done,
            tell: &|bytes| tell(bytes, total),
        };
        let stream = layers.apply(Digesting::new(archive::decompress_stream(stream)?))?;
        let digest = format!("sha256:{}", stream.finish());
        if recorded && configuration.diff_ids.get(number) != Some(&digest) {
            return Err(LoadError::Digest(number + 1));
        }
    }
    layers.finish()?;
    Ok(record(id, configuration.config, &layers))
}

fn find(files: &Files) -> Result<Found, LoadError> {
    match files.read("manifest.json") {
        Ok(text) => return Ok(manifest::of_docker(&text)?),
        Err(ArchiveError::Missing(_)) => {}
        Err(error) => return Err(error.into()),
    }
    let text = files.read("index.json")?;
    manifest::of_oci(&text, |path| Ok(files.read(path)?))
}

fn record(id: String, config: ImageConfig, layers: &Layers) -> ImageRecord {
    ImageRecord {
        id,
        size_bytes: layers.bytes,
        entries: layers.entries,
        loaded_at_ms: rundir::millis(SystemTime::now()),
        config,
    }
}

/// A name without what everybody leaves out: `docker.io/library/alpine` is `alpine`.
fn short_name(name: &str) -> &str {
    let name = name.strip_prefix("docker.io/").unwrap_or(name);
    name.strip_prefix("library/").unwrap_or(name)
}

fn check_name(name: &str) -> MicrosandboxResult<()> {
    let good = name.len() <= 255
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "._-/:@".contains(c))
        && !name
            .split('/')
            .any(|part| part.is_empty() || part == "." || part == "..");
    if good {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::InvalidConfig,
        format!("`{name}` is not an image name"),
    )
    .with_value(name)
    .with_hint(
        "use letters, digits, `.`, `_`, `-`, `/` and a `:tag`, beginning with a letter or digit",
    ))
}

/// A name for an image that brings none: `/x/alpine-rootfs.tar.gz` is `alpine-rootfs`.
fn name_of_file(path: &Path) -> String {
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or("image");
    let mut name = name.to_ascii_lowercase();
    for ending in [".gz", ".tgz", ".zst", ".tar", ".oci"] {
        if let Some(stem) = name.strip_suffix(ending) {
            name = stem.to_owned();
        }
    }
    let name = name.replace(
        |c: char| !(c.is_ascii_alphanumeric() || "._-".contains(c)),
        "-",
    );
    let name = name.trim_start_matches(|c: char| !c.is_ascii_alphanumeric());
    if name.is_empty() {
        "image".to_owned()
    } else {
        name.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_without_a_name_are_called_after_their_file() {
        for (path, name) in [
            ("/x/alpine-rootfs.tar.gz", "alpine-rootfs"),
            ("rootfs.tgz", "rootfs"),
            ("-", "image"),
            ("My Image.tar.zst", "my-image"),
        ] {
            assert_eq!(name_of_file(Path::new(path)), name);
        }
    }

    #[test]
    fn names_are_shortened_and_checked() {
        assert_eq!(short_name("docker.io/library/alpine:3"), "alpine:3");
        assert_eq!(short_name("docker.io/grafana/loki:3"), "grafana/loki:3");
        assert!(check_name("ghcr.io/a/b:c").is_ok());
        for bad in ["", "../x", "-v", "a//b", "a b", "/a"] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
