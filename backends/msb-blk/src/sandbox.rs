//! What a disk backend may still do once it serves: nothing but input and output on open files.

use msb_vhost::jail::{Call, Identity, Jail, Root, SandboxMode};

/// User and group a disk is served as when root started it: the files are open already, so it
/// needs no power over them.
const NOBODY: u32 = 65534;

/// Descriptors of the transport (listener, connection, signals, and for each queue a kick, a call
/// and an event loop), of guest memory and of a chain of images.
const OPEN_FILES: u64 = 512;

/// The jail of a disk backend.
pub fn jail(mode: SandboxMode) -> Jail {
    Jail {
        mode,
        root: Root::Empty,
        identity: Identity::Become {
            uid: NOBODY,
            gid: NOBODY,
        },
        open_files: OPEN_FILES,
    }
}

/// The system calls of the disk, beyond those every backend has. None opens a file; a read-only
/// disk has none that writes one.
pub fn calls(read_only: bool) -> Vec<Call> {
    let mut calls = READING.to_vec();
    if !read_only {
        calls.extend_from_slice(WRITING);
    }
    calls
}

const READING: &[Call] = &[
    Call::any(libc::SYS_pread64),
    Call::any(libc::SYS_preadv),
    Call::any(libc::SYS_preadv2),
    // The rings were made before the filter, and take reads and, if the disk is writable, writes.
    Call::any(libc::SYS_io_uring_enter),
];

const WRITING: &[Call] = &[
    Call::any(libc::SYS_pwrite64),
    Call::any(libc::SYS_pwritev),
    Call::any(libc::SYS_pwritev2),
    Call::any(libc::SYS_fallocate),
    Call::any(libc::SYS_ftruncate),
    Call::any(libc::SYS_fdatasync),
    Call::any(libc::SYS_fsync),
];
