//! Finds a disk by its serial number and says what file system it holds.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::superblock::{self, Content, PROBE_LEN};

const DISKS: &str = "sys/block";
/// How long a disk may take to appear after the first look.
const PATIENCE: Duration = Duration::from_secs(20);
const INTERVAL: Duration = Duration::from_millis(5);

/// A disk that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskError {
    /// No disk has the serial number.
    #[error("no disk with the serial number {0:?} appeared within {secs} s", secs = PATIENCE.as_secs())]
    Absent(String),
    /// The disk cannot be read.
    #[error("cannot read the disk")]
    Read(#[from] std::io::Error),
    /// There is no file system on it.
    #[error("no file system on the disk: it holds {0}")]
    NoFileSystem(&'static str),
}

/// The kernel's name of the disk, such as `vda`.
pub(crate) fn find(serial: &str) -> Result<String, DiskError> {
    wait_for(|| {
        let found = look(Path::new(DISKS), serial).transpose()?;
        found.map(|name| opens(&name).then_some(name)).transpose()
    })
    .unwrap_or_else(|| Err(DiskError::Absent(serial.into())))
}

/// Whether a disk that is seen can be used as well: one that is just coming is seen first.
fn opens(name: &str) -> bool {
    let opened = File::open(format!("dev/{name}"));
    !opened.is_err_and(|error| {
        error.kind() == ErrorKind::NotFound
            || error.raw_os_error() == Some(Errno::NXIO.raw_os_error())
    })
}

/// Asks again and again for a device that may just be on its way.
pub(crate) fn wait_for<T>(mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = ask();
        if answer.is_some() || Instant::now() >= deadline {
            return answer;
        }
        std::thread::sleep(INTERVAL);
    }
}

/// The file system on a disk, by the name the kernel knows it under.
pub(crate) fn file_system(name: &str) -> Result<&'static str, DiskError> {
    let mut start = Vec::with_capacity(PROBE_LEN);
    let disk = File::open(format!("dev/{name}"))?;
    disk.take(PROBE_LEN as u64).read_to_end(&mut start)?;
    match superblock::identify(&start) {
        Content::FileSystem(name) => Ok(name),
        Content::Other(what) => Err(DiskError::NoFileSystem(what)),
        Content::Blank => Err(DiskError::NoFileSystem(
            "only zeros; was it ever formatted?",
        )),
        Content::Unknown => Err(DiskError::NoFileSystem("nothing that is known here")),
    }
}

fn look(disks: &Path, serial: &str) -> Result<Option<String>, DiskError> {
    let entries = match std::fs::read_dir(disks) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        // Only virtio disks have this file; one that is just going away has it no more.
        let found = std::fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
        if found.trim_end() == serial {
            return Ok(Some(entry.file_name().to_string_lossy().into_owned()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_found_by_its_whole_serial_number() {
        let disks = tempfile::tempdir().unwrap();
        for (name, serial) in [("vda", "data"), ("vdb", "data_2\n"), ("loop0", "")] {
            std::fs::create_dir(disks.path().join(name)).unwrap();
            if !serial.is_empty() {
                std::fs::write(disks.path().join(name).join("serial"), serial).unwrap();
            }
        }
        assert_eq!(
            look(disks.path(), "data_2").unwrap().as_deref(),
            Some("vdb")
        );
        assert_eq!(look(disks.path(), "data").unwrap().as_deref(), Some("vda"));
        assert_eq!(look(disks.path(), "dat").unwrap(), None);
        assert_eq!(look(&disks.path().join("absent"), "data").unwrap(), None);
    }
}
