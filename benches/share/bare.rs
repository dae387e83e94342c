//! What a row costs without a server: the system calls that ours cannot avoid, on the same tree.

use std::ffi::CStr;
use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::fs::{AtFlags, Mode, OFlags, RawDir, ResolveFlags, Statx, StatxFlags, XattrFlags};
use rustix::time::{ClockId, clock_gettime};

use super::tree::{DIRECTORIES, KEY, SMALL_FILES, bare_cost, metadata, small};

/// The calls of one unit of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bare {
    /// One read or write of so many bytes at a random place of a file.
    Access {
        /// Name of the file in the share.
        file: &'static str,
        /// Bytes at a time.
        len: usize,
        /// Whether it is a write.
        write: bool,
    },
    /// `fstat` of an open file.
    Stat,
    /// `statx` of a name.
    Find,
    /// `statx` of a name that a directory lists, and its part of `getdents64`.
    List {
        /// The recorded metadata is read as well, as for a file that is not known yet.
        first: bool,
    },
    /// A file with recorded metadata is made in a directory that has such, and removed.
    Make,
}

/// Long enough for a steady figure.
const ENOUGH: Duration = Duration::from_millis(60);
/// What is read of a directory at once.
const LISTING: usize = 1 << 16;

impl Bare {
    /// Microseconds of one unit.
    ///
    /// # Errors
    ///
    /// What the host reports.
    pub fn cost(self, share: &Path) -> Result<f64> {
        match self {
            Self::Access { file, len, write } => bare_cost(&share.join(file), len, write),
            Self::Stat => {
                let open = |number| Ok(File::open(share.join(small(number)))?);
                let files: Vec<File> = (0..SMALL_FILES).map(open).collect::<Result<_>>()?;
                timed(|| {
                    for file in &files {
                        rustix::fs::fstat(file)?;
                    }
                    Ok(files.len())
                })
            }
            Self::Find => {
                let folder = folder(&share.join("files"))?;
                let name = |number| Ok(std::ffi::CString::new(&small(number)["files/".len()..])?);
                let names = (0..SMALL_FILES).map(name).collect::<Result<Vec<_>>>()?;
                timed(|| {
                    for name in &names {
                        stat(&folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
                    }
                    Ok(names.len())
                })
            }
            Self::List { first } => {
                let (here, share) = (folder(Path::new("."))?, share.canonicalize()?);
                let result = timed(|| {
                    let one = |number| list(&share.join(format!("many/d{number:04}")), first);
                    (0..DIRECTORIES).map(one).sum()
                });
                // Where the listing has gone to read metadata by mere names.
                rustix::process::fchdir(here)?;
                result
            }
            Self::Make => {
                let folder = folder(share)?;
                timed(|| make(&folder).map(|()| 1))
            }
        }
    }
}

/// Microseconds of the thread's CPU for each of the units that `work` counts, over and over.
fn timed(mut work: impl FnMut() -> Result<usize>) -> Result<f64> {
    let now = || {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
    };
    // The first time is warming up.
    work()?;
    let (begin, mut units) = (now(), 0);
    loop {
        units += work()?;
        let took = now().saturating_sub(begin);
        if took >= ENOUGH {
            return Ok(took.as_secs_f64() * 1e6 / units as f64);
        }
    }
}

fn folder(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).with_context(|| path.display().to_string())
}

fn stat(at: impl AsFd, name: &CStr, flags: AtFlags) -> rustix::io::Result<Statx> {
    let fields = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    rustix::fs::statx(at, name, flags, fields)
}

/// Lists a directory with the attributes of each entry; returns how many there were.
fn list(path: &Path, first: bool) -> Result<usize> {
    let folder = folder(path)?;
    if first {
        rustix::process::fchdir(&folder)?;
    }
    let mut buffer = vec![MaybeUninit::uninit(); LISTING];
    let mut listing = RawDir::new(&folder, &mut buffer);
    let mut count = 0;
    while let Some(entry) = listing.next() {
        let entry = entry?;
        let name = entry.file_name();
        count += 1;
        if name.to_bytes().starts_with(b".") {
            continue;
        }
        stat(&folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
        if first {
            let len = rustix::fs::lgetxattr(name, KEY, &mut [0_u8; 20])?;
            ensure!(len == 20, "{name:?} has no metadata");
        }
    }
    Ok(count)
}

/// What becomes of CREATE, RELEASE, UNLINK and FORGET: the metadata of the directory is read,
/// because it may hand its group down, and that of the file is written.
fn make(folder: &OwnedFd) -> Result<()> {
    stat(folder, c"", AtFlags::EMPTY_PATH)?;
    rustix::fs::fgetxattr(folder, KEY, &mut [0_u8; 20])?;
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let (name, mode) = (c"made-bare", Mode::from_raw_mode(0o600));
    let file = rustix::fs::openat2(folder, name, flags, mode, ResolveFlags::BENEATH)?;
    rustix::fs::fsetxattr(&file, KEY, &metadata(0o100_644), XattrFlags::empty())?;
    stat(&file, c"", AtFlags::EMPTY_PATH)?;
    rustix::fs::unlinkat(folder, name, AtFlags::empty())?;
    drop(file);
    Ok(())
}
