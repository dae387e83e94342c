//! What a file server may still do once it serves: work on the files below its one directory.

use std::os::fd::OwnedFd;

use msb_vhost::jail::{Call, CapabilitySet, Check, Identity, Jail, Root, SandboxMode};

use crate::sys::SYS_GETXATTRAT;
use crate::tree::{Rules, StatVirt};

/// The jail of a file server for the share behind `source`, which belongs to `owner`. `open_files`
/// bounds the descriptors.
pub fn jail(
    mode: SandboxMode,
    source: OwnedFd,
    read_only: bool,
    ownership: StatVirt,
    owner: (u32, u32),
    open_files: u64,
) -> Jail {
    Jail {
        mode,
        root: Root::Share {
            source,
            read_only,
            special_files: makes_special_files(ownership),
        },
        identity: identity(read_only, ownership, owner),
        open_files,
    }
}

/// Who a server is that root started: the owner of the share, as which it can do on the host what
/// that user can. Only in `off` may files belong to anybody, and be given to others.
fn identity(read_only: bool, ownership: StatVirt, (uid, gid): (u32, u32)) -> Identity {
    if ownership != StatVirt::Off {
        return Identity::Owner { uid, gid };
    }
    let mut kept = CapabilitySet::DAC_READ_SEARCH;
    if !read_only {
        kept |= CapabilitySet::DAC_OVERRIDE
            | CapabilitySet::FOWNER
            | CapabilitySet::CHOWN
            | CapabilitySet::FSETID;
    }
    Identity::Keep(kept)
}

/// Whether pipes and sockets of the guest are such on the host: for root, that serves its files as
/// they are.
fn makes_special_files(ownership: StatVirt) -> bool {
    ownership == StatVirt::Off && rustix::process::geteuid().is_root()
}

/// The system calls of the file server, beyond those every backend has. A read-only share has
/// none that changes a file.
pub fn calls(rules: &Rules, limited: bool) -> Vec<Call> {
    let mut calls = READING.to_vec();
    if limited {
        calls.extend_from_slice(LOCKING);
    }
    if rules.locks {
        calls.extend_from_slice(SHARED_LOCKS);
    }
    if !rules.readonly {
        calls.extend_from_slice(WRITING);
        if makes_special_files(rules.ownership.mode) {
            calls.extend_from_slice(SPECIAL);
        }
    }
    calls
}

/// `*at` calls take a directory that is open, or the folder of descriptors that is the working
/// directory; the root directory is the share. That no symbolic link is followed is the mount's
/// work: a filter that looks at flags costs something at every call.
const READING: &[Call] = &[
    Call::any(libc::SYS_openat),
    Call::any(libc::SYS_openat2),
    Call::any(libc::SYS_newfstatat),
    Call::any(libc::SYS_readlinkat),
    Call::any(libc::SYS_getdents64),
    Call::any(libc::SYS_pread64),
    Call::any(libc::SYS_preadv),
    Call::any(libc::SYS_preadv2),
    Call::any(libc::SYS_getxattr),
    Call::any(libc::SYS_fgetxattr),
    Call::any(SYS_GETXATTRAT),
    Call::any(libc::SYS_listxattr),
    Call::any(libc::SYS_flistxattr),
    Call::any(libc::SYS_fstatfs),
    Call::any(libc::SYS_statfs),
    Call::any(libc::SYS_fsync),
    Call::any(libc::SYS_fdatasync),
    Call::any(libc::SYS_syncfs),
    Call::any(libc::SYS_fadvise64),
    Call::any(libc::SYS_geteuid),
    Call::any(libc::SYS_fcntl).only(Check::equals(1, libc::F_DUPFD as u64)),
];

const WRITING: &[Call] = &[
    Call::any(libc::SYS_pwrite64),
    Call::any(libc::SYS_pwritev),
    Call::any(libc::SYS_pwritev2),
    Call::any(libc::SYS_fallocate),
    Call::any(libc::SYS_ftruncate),
    Call::any(libc::SYS_copy_file_range),
    Call::any(libc::SYS_mkdirat),
    Call::any(libc::SYS_mknodat).only(Check::masked(2, S_IFMT, 0)),
    Call::any(libc::SYS_mknodat).only(Check::masked(2, S_IFMT, libc::S_IFREG as u64)),
    Call::any(libc::SYS_symlinkat),
    Call::any(libc::SYS_linkat),
    Call::any(libc::SYS_unlinkat),
    Call::any(libc::SYS_renameat2),
    Call::any(libc::SYS_fchmod),
    Call::any(libc::SYS_fchmodat),
    Call::any(libc::SYS_fchown),
    Call::any(libc::SYS_fchownat),
    Call::any(libc::SYS_utimensat),
    Call::any(libc::SYS_setxattr),
    Call::any(libc::SYS_fsetxattr),
    Call::any(libc::SYS_removexattr),
    Call::any(libc::SYS_fremovexattr),
];

/// Locks of open file descriptions.
const LOCKING: &[Call] = &[
    Call::any(libc::SYS_fcntl).only(Check::equals(1, libc::F_OFD_SETLK as u64)),
    Call::any(libc::SYS_fcntl).only(Check::equals(1, libc::F_OFD_SETLKW as u64)),
];

/// The guest's locks as the host's; they are asked for again and never waited for.
const SHARED_LOCKS: &[Call] = &[
    Call::any(libc::SYS_flock),
    Call::any(libc::SYS_fcntl).only(Check::equals(1, libc::F_OFD_SETLK as u64)),
    Call::any(libc::SYS_fcntl).only(Check::equals(1, libc::F_OFD_GETLK as u64)),
];

/// Pipes, sockets, and the device 0:0, which is none.
const SPECIAL: &[Call] = &[
    Call::any(libc::SYS_mknodat).only(Check::masked(2, S_IFMT, libc::S_IFIFO as u64)),
    Call::any(libc::SYS_mknodat).only(Check::masked(2, S_IFMT, libc::S_IFSOCK as u64)),
    Call::any(libc::SYS_mknodat)
        .only(Check::masked(2, S_IFMT, libc::S_IFCHR as u64))
        .only(Check::equals(3, 0)),
];

const S_IFMT: u64 = libc::S_IFMT as u64;
