//! A disk that takes its time: a file system of one file, whose reads are answered after a while.
//!
//! Any number of reads wait at a time, as in a disk in the network. What a server gains by having
//! many of them under way cannot be told on a disk that is faster than the server.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::image::BYTES;
use crate::harness::server::unpin;

/// How long a read takes.
const DELAY: Duration = Duration::from_millis(1);
/// Reads under way at a time at most, as INIT tells the kernel.
const MOST: u16 = 256;

const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
/// FORGET, INTERRUPT and BATCH_FORGET.
const UNANSWERED: [u32; 3] = [2, 36, 42];
/// ASYNC_READ, ASYNC_DIO.
const FLAGS: u32 = 1 | 1 << 15;

/// A mounted disk. It ends when dropped.
pub struct SlowDisk {
    path: PathBuf,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl SlowDisk {
    /// Mounts it in `folder`.
    ///
    /// # Errors
    ///
    /// When this process may not mount.
    pub fn mount(folder: &Path) -> Result<Self> {
        let path = folder.join("slow.raw");
        File::create(&path)?;
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let device = File::from(rustix::fs::open("/dev/fuse", flags, Mode::empty())?);
        let number = device.as_raw_fd();
        let data = format!("fd={number},rootmode=100644,user_id=0,group_id=0\0");
        let data = std::ffi::CStr::from_bytes_with_nul(data.as_bytes())?;
        mount("slow", &path, "fuse", MountFlags::empty(), data)
            .context("mounting a file system, which takes root")?;
        // The thread inherits where this one may run.
        unpin()?;
        let thread = std::thread::Builder::new()
            .name("slow-disk".to_owned())
            .spawn(move || serve(&device))?;
        let disk = Self {
            path,
            thread: Some(thread),
        };
        ensure!(
            fs::metadata(&disk.path)?.len() == BYTES,
            "the slow disk has another size"
        );
        Ok(disk)
    }

    /// The file that is the disk.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        unmount(&self.path, UnmountFlags::FORCE | UnmountFlags::DETACH).ok();
        if let Some(Ok(Err(error))) = self.thread.take().map(JoinHandle::join) {
            eprintln!("    (the slow disk failed: {error})");
        }
    }
}

/// A read that waits: when it is due, its number and its length.
type Waiting = (Instant, u64, usize);

fn serve(device: &File) -> io::Result<()> {
    let mut waiting: VecDeque<Waiting> = VecDeque::new();
    let mut request = vec![0; 256 << 10];
    loop {
        let now = Instant::now();
        while let Some((_, unique, len)) = waiting.pop_front_if(|(due, ..)| *due <= now) {
            answer(device, unique, 0, &vec![0; len])?;
        }
        let limit = waiting.front().map(|(due, ..)| due.duration_since(now));
        let limit = limit.map(|left| Timespec {
            tv_sec: 0,
            tv_nsec: i64::from(left.subsec_nanos()),
        });
        match poll(&mut [PollFd::new(device, PollFlags::IN)], limit.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        loop {
            match rustix::io::read(device, &mut request) {
                Ok(len) => {
                    let request = request.get(..len).unwrap_or_default();
                    waiting.extend(take(device, request)?);
                }
                // The second: the request was taken back.
                Err(Errno::AGAIN | Errno::NOENT | Errno::INTR) => break,
                Err(Errno::NODEV) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Answers a request, except for a read, which is given back to be answered later.
fn take(device: &File, request: &[u8]) -> io::Result<Option<Waiting>> {
    let word = |at: usize| {
        let bytes = request.get(at..at + 4).unwrap_or_default();
        bytes.try_into().map_or(0, u32::from_le_bytes)
    };
    let unique = u64::from(word(8)) | u64::from(word(12)) << 32;
    match word(4) {
        READ => {
            let len = usize::try_from(word(56)).unwrap_or(0);
            return Ok(Some((Instant::now() + DELAY, unique, len)));
        }
        INIT => {
            let mut reply = [7, 31, 0, FLAGS, 0, 4096, 1].map(u32::to_le_bytes).concat();
            // The most requests under way, and from how many on the kernel holds back.
            reply.splice(16..20, [MOST.to_le_bytes(), MOST.to_le_bytes()].concat());
            reply.resize(64, 0);
            answer(device, unique, 0, &reply)?;
        }
        GETATTR => answer(device, unique, 0, &attributes())?,
        OPEN => answer(device, unique, 0, &[0; 16])?,
        RELEASE | FLUSH => answer(device, unique, 0, &[])?,
        kind if UNANSWERED.contains(&kind) => {}
        _ => answer(device, unique, -Errno::NOSYS.raw_os_error(), &[])?,
    }
    Ok(None)
}

/// The answer to GETATTR: valid for a day, a regular file of the size of the disk.
fn attributes() -> Vec<u8> {
    let mut reply = [86_400_u64, 0, 1, BYTES, BYTES / 512, 0, 0, 0]
        .map(u64::to_le_bytes)
        .concat();
    let rest = [0, 0, 0, 0o100_644, 1, 0, 0, 0, 4096, 0_u32];
    reply.extend(rest.map(u32::to_le_bytes).concat());
    reply
}

fn answer(device: &File, unique: u64, error: i32, body: &[u8]) -> io::Result<()> {
    let len = u32::try_from(16 + body.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut reply = Vec::with_capacity(16 + body.len());
    reply.extend(len.to_le_bytes());
    reply.extend(error.to_le_bytes());
    reply.extend(unique.to_le_bytes());
    reply.extend(body);
    match rustix::io::write(device, &reply) {
        // Whoever asked has gone.
        Ok(_) | Err(Errno::NOENT | Errno::NODEV) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
