//! Builds the initramfs of the guest: the agent as `/init`, and the kernel modules it may need.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::{Error, ErrorKind, MicrosandboxResult, rundir};

/// Changed whenever the same inputs give another archive.
const FORMAT: u8 = 1;

/// One entry of the archive.
struct Entry {
    name: String,
    mode: u32,
    /// Major and minor number of a device.
    device: (u32, u32),
    data: Vec<u8>,
}

/// The initramfs of an agent and of the modules `names`, made in the folder `cache` unless it lies
/// there already. A module that the kernel has built in, or does not have, is left out: the agent
/// says so if it is really needed.
///
/// # Errors
///
/// An error when a file cannot be read or the archive cannot be written.
pub(crate) fn build(
    agent: &Path,
    modules: Option<&Path>,
    names: &[String],
    cache: &Path,
) -> MicrosandboxResult<PathBuf> {
    let agent = read(agent)?;
    let mut entries = vec![
        Entry::folder("dev"),
        // The kernel opens it for the agent's own messages before anything is mounted.
        Entry {
            device: (5, 1),
            ..Entry::new("dev/console", 0o020_600, vec![])
        },
        Entry::new("init", 0o100_755, agent),
    ];
    if let Some(modules) = modules {
        let dependencies = fs::read_to_string(modules.join("modules.dep")).map_err(|error| {
            Error::io(
                format!("cannot read {}/modules.dep", modules.display()),
                error,
            )
        })?;
        let sets = sets(&dependencies, names);
        entries.push(Entry::folder("modules"));
        entries.push(Entry::new(
            "modules/index",
            0o100_644,
            index(&sets).into_bytes(),
        ));
        let mut files: Vec<_> = sets.iter().flat_map(|(_, files)| files).collect();
        files.sort_unstable();
        files.dedup();
        for file in files {
            let name = format!("modules/{}", file_name(file));
            entries.push(Entry::new(&name, 0o100_644, read(&modules.join(file))?));
        }
    }
    store(&archive(&entries)?, cache)
}

/// Keeps the archive under a name that tells its content, so that whoever comes next finds it, and
/// whoever boots from another one is not disturbed.
fn store(archive: &[u8], cache: &Path) -> MicrosandboxResult<PathBuf> {
    let digest = Sha256::digest(archive);
    let name: String = digest
        .iter()
        .take(12)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let path = cache.join(format!("initramfs-{FORMAT}-{name}"));
    if path.is_file() {
        return Ok(path);
    }
    let failed = |error| Error::io(format!("cannot write {}", path.display()), error);
    rundir::write_once(&path, archive).map_err(failed)?;
    Ok(path)
}

/// For each of `names` that is a module, its files below the folder of modules, in the order in
/// which they must be loaded.
///
/// `modules.dep` has a line `file: file file…` for each module. What is named last must be loaded
/// first, and names are the same whether they are written with `-` or with `_`.
fn sets<'a>(dependencies: &'a str, names: &[String]) -> Vec<(String, Vec<&'a str>)> {
    let modules: HashMap<_, _> = dependencies
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(file, needed)| (module_name(file), (file, needed)))
        .collect();
    let set = |name: &String| {
        let (file, needed) = modules.get(&module_name(name))?;
        let files = needed.split_whitespace().rev().chain([*file]).collect();
        Some((module_name(name), files))
    };
    names.iter().filter_map(set).collect()
}

/// The file that tells the agent what there is: a line `name file file…` for each set.
fn index(sets: &[(String, Vec<&str>)]) -> String {
    let line = |(name, files): &(String, Vec<&str>)| {
        let files: Vec<_> = files.iter().map(|file| file_name(file)).collect();
        format!("{name} {}\n", files.join(" "))
    };
    sets.iter().map(line).collect()
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

fn module_name(path: &str) -> String {
    let file = file_name(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

fn read(path: &Path) -> MicrosandboxResult<Vec<u8>> {
    fs::read(path).map_err(|error| Error::io(format!("cannot read {}", path.display()), error))
}

impl Entry {
    fn new(name: &str, mode: u32, data: Vec<u8>) -> Self {
        Self {
            name: name.to_owned(),
            mode,
            device: (0, 0),
            data,
        }
    }

    fn folder(name: &str) -> Self {
        Self::new(name, 0o040_755, vec![])
    }
}

/// The entries in cpio's format `newc`: a header of 13 numbers of 8 hexadecimal digits, the name
/// with a zero byte, the data; name and data padded to 4 bytes.
fn archive(entries: &[Entry]) -> MicrosandboxResult<Vec<u8>> {
    let mut bytes = Vec::new();
    let end = [Entry {
        name: "TRAILER!!!".into(),
        mode: 0,
        device: (0, 0),
        data: vec![],
    }];
    for (number, entry) in entries.iter().chain(&end).enumerate() {
        let too_large = |_| {
            Error::new(
                ErrorKind::Unsupported,
                format!("{} is too large", entry.name),
            )
        };
        let size = u32::try_from(entry.data.len()).map_err(too_large)?;
        let number = u32::try_from(number + 1).map_err(too_large)?;
        let name_size = u32::try_from(entry.name.len() + 1).map_err(too_large)?;
        let (major, minor) = entry.device;
        // Owner, group and time are zero: the same inputs give the same bytes.
        let fields = [
            number, entry.mode, 0, 0, 1, 0, size, 0, 0, major, minor, name_size, 0,
        ];
        bytes.extend_from_slice(b"070701");
        for field in fields {
            bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        bytes.extend_from_slice(entry.name.as_bytes());
        bytes.push(0);
        pad(&mut bytes);
        bytes.extend_from_slice(&entry.data);
        pad(&mut bytes);
    }
    Ok(bytes)
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    const DEPENDENCIES: &str = "kernel/fs/btrfs/btrfs.ko.xz: kernel/crypto/xor.ko.xz kernel/lib/raid6_pq.ko.xz\n\
        kernel/lib/raid6_pq.ko.xz:\n\
        kernel/fs/nls/nls_iso8859-1.ko.xz:\n";

    #[test]
    fn dependencies_come_before_their_module() {
        let names = ["btrfs", "ext4", "nls_iso8859_1"].map(str::to_owned);
        let sets = sets(DEPENDENCIES, &names);
        assert_eq!(
            index(&sets),
            "btrfs raid6_pq.ko.xz xor.ko.xz btrfs.ko.xz\nnls_iso8859_1 nls_iso8859-1.ko.xz\n"
        );
    }

    #[test]
    fn the_archive_holds_the_agent_and_each_module_once_and_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let modules = dir.path().join("modules");
        fs::create_dir_all(modules.join("kernel")).unwrap();
        for name in ["a", "b", "lib"] {
            fs::write(modules.join(format!("kernel/{name}.ko")), name.repeat(5)).unwrap();
        }
        let dependencies =
            "kernel/a.ko: kernel/lib.ko\nkernel/b.ko: kernel/lib.ko\nkernel/lib.ko:\n";
        fs::write(modules.join("modules.dep"), dependencies).unwrap();
        let agent = dir.path().join("agent");
        fs::write(&agent, "agent").unwrap();
        let names = ["a", "b"].map(str::to_owned);
        let path = build(&agent, Some(&modules), &names, dir.path()).unwrap();
        assert_eq!(
            build(&agent, Some(&modules), &names, dir.path()).unwrap(),
            path
        );
        let bytes = fs::read(&path).unwrap();
        let count = |needle: &[u8]| bytes.windows(needle.len()).filter(|w| *w == needle).count();
        assert_eq!(count(b"modules/lib.ko\0"), 1);
        assert_eq!(count(b"liblibliblibli"), 1);
        assert_eq!(count(b"a lib.ko a.ko\nb lib.ko b.ko\n"), 1);
        fs::write(&agent, "another").unwrap();
        assert_ne!(
            build(&agent, Some(&modules), &names, dir.path()).unwrap(),
            path
        );
    }

    #[test]
    fn busybox_or_cpio_can_unpack_it() {
        let dir = tempfile::tempdir().unwrap();
        let agent = dir.path().join("agent");
        fs::write(&agent, "odd").unwrap();
        let path = build(&agent, None, &[], dir.path()).unwrap();
        let out = dir.path().join("out");
        fs::create_dir(&out).unwrap();
        let unpack = |program: &str, args: &[&str]| {
            let archive = fs::File::open(&path).unwrap();
            let mut command = Command::new(program);
            command
                .args(args)
                .current_dir(&out)
                .stdin(archive)
                .stderr(Stdio::null());
            command.status()
        };
        // A device node needs root: only the file is asked for.
        let unpacked = match unpack("cpio", &["-i", "init"]) {
            Err(_) => {
                let busybox = std::env::var("MSB_BUSYBOX").unwrap_or_else(|_| "busybox".into());
                unpack(&busybox, &["cpio", "-i", "init"])
            }
            status => status,
        };
        match unpacked {
            Ok(status) => {
                assert!(status.success());
                assert_eq!(fs::read_to_string(out.join("init")).unwrap(), "odd");
            }
            Err(error) => println!("skipped: neither cpio nor busybox: {error}"),
        }
    }
}
