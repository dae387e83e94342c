//! Loads the kernel modules that lie in the initramfs.
//!
//! `modules/index` has a line for each module: its name, then the files to load, in order. What
//! has no line is built into the kernel, or not to be had at all, which shows soon enough.

use std::collections::HashSet;
use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;

use rustix::io::Errno;

const FOLDER: &str = "modules";
const INDEX: &str = "modules/index";
/// `MODULE_INIT_COMPRESSED_FILE` of `finit_module(2)`.
const COMPRESSED: i32 = 4;

/// What the port to the host may need.
const PORT: [&str; 4] = [
    "virtio_pci",
    "virtio_mmio",
    "virtio_console",
    "vmw_vsock_virtio_transport",
];

/// The modules that can be loaded, and those that have been.
#[derive(Debug, Default)]
pub(crate) struct Modules {
    sets: Vec<(String, Vec<String>)>,
    loaded: HashSet<String>,
}

/// A module that cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ModuleError {
    /// A file of the initramfs cannot be read.
    #[error("cannot read {0}")]
    Read(String, #[source] std::io::Error),
    /// The kernel refuses the module.
    #[error("cannot load the kernel module {0}")]
    Load(String, #[source] Errno),
}

impl Modules {
    /// Reads the index; a guest whose kernel has everything built in has none.
    pub(crate) fn read() -> Result<Self, ModuleError> {
        let index = match std::fs::read_to_string(INDEX) {
            Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
            index => index.map_err(|error| ModuleError::Read(INDEX.into(), error))?,
        };
        Ok(Self {
            sets: parse(&index),
            loaded: HashSet::new(),
        })
    }

    /// Loads what the port to the host may need.
    pub(crate) fn load_port(&mut self) -> Result<(), ModuleError> {
        PORT.iter().try_for_each(|name| self.load(name))
    }

    /// Loads what a file system needs, also what the kernel would ask a modprobe for.
    pub(crate) fn load_file_system(&mut self, kind: &str) -> Result<(), ModuleError> {
        let names: &[&str] = match kind {
            "vfat" => &["nls_cp437", "nls_ascii", "nls_iso8859_1", "vfat"],
            "iso9660" => &["isofs"],
            "btrfs" => &["xxhash_generic", "blake2b_generic", "btrfs"],
            kind => &[kind],
        };
        names.iter().try_for_each(|name| self.load(name))
    }

    /// Loads a module and what it depends on, if it is there and not loaded yet.
    pub(crate) fn load(&mut self, name: &str) -> Result<(), ModuleError> {
        let Some((_, files)) = self.sets.iter().find(|(set, _)| set == name) else {
            return Ok(());
        };
        for file in files {
            if self.loaded.insert(file.clone()) {
                load_file(file)?;
            }
        }
        Ok(())
    }
}

fn parse(index: &str) -> Vec<(String, Vec<String>)> {
    let words = |line: &str| {
        let mut words = line.split_whitespace().map(str::to_owned);
        words.next().map(|name| (name, words.collect()))
    };
    index.lines().filter_map(words).collect()
}

fn load_file(name: &str) -> Result<(), ModuleError> {
    let path = Path::new(FOLDER).join(name);
    let file = File::open(&path).map_err(|error| ModuleError::Read(name.into(), error))?;
    let flags = if name.ends_with(".ko") { 0 } else { COMPRESSED };
    match rustix::system::finit_module(&file, c"", flags) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(ModuleError::Load(name.into(), error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_is_read_line_by_line() {
        let sets = parse("overlay overlay.ko\n\nxfs libcrc32c.ko.xz xfs.ko.xz\n");
        assert_eq!(sets.len(), 2);
        assert_eq!(
            sets[0],
            ("overlay".to_owned(), vec!["overlay.ko".to_owned()])
        );
        assert_eq!(sets[1].1, ["libcrc32c.ko.xz", "xfs.ko.xz"]);
    }
}
