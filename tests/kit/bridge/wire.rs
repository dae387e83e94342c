//! What a virtio-fs driver must know of a FUSE request: its name, and the room for its reply.

/// Length of the header of a request.
pub(super) const IN_HEADER: usize = 40;
/// Length of the header of a reply.
pub(super) const OUT_HEADER: usize = 16;
/// Largest payload of one READ or WRITE: the 256 pages that Linux allows.
pub(super) const DATA_MAX: usize = 1 << 20;

pub(super) const INIT: u32 = 26;
pub(super) const DESTROY: u32 = 38;

/// Flags of INIT that a virtio-fs guest with Linux 6.12 offers. /dev/fuse on a newer host offers
/// passthrough (bit 37) and what came later (from bit 41 on) as well.
const GUEST_FLAGS: u64 = ((1 << 41) - 1) & !(1 << 37);
/// The minor version of Linux 6.12.
const GUEST_MINOR: u32 = 41;

/// Names by number; the empty ones were never given out, or never leave the kernel.
const NAMES: [&str; 54] = [
    "",
    "LOOKUP",
    "FORGET",
    "GETATTR",
    "SETATTR",
    "READLINK",
    "SYMLINK",
    "",
    "MKNOD",
    "MKDIR",
    "UNLINK",
    "RMDIR",
    "RENAME",
    "LINK",
    "OPEN",
    "READ",
    "WRITE",
    "STATFS",
    "RELEASE",
    "",
    "FSYNC",
    "SETXATTR",
    "GETXATTR",
    "LISTXATTR",
    "REMOVEXATTR",
    "FLUSH",
    "INIT",
    "OPENDIR",
    "READDIR",
    "RELEASEDIR",
    "FSYNCDIR",
    "GETLK",
    "SETLK",
    "SETLKW",
    "ACCESS",
    "CREATE",
    "INTERRUPT",
    "BMAP",
    "DESTROY",
    "IOCTL",
    "POLL",
    "NOTIFY_REPLY",
    "BATCH_FORGET",
    "FALLOCATE",
    "READDIRPLUS",
    "RENAME2",
    "LSEEK",
    "COPY_FILE_RANGE",
    "SETUPMAPPING",
    "REMOVEMAPPING",
    "SYNCFS",
    "TMPFILE",
    "STATX",
    "COPY_FILE_RANGE_64",
];

/// How many opcodes are counted one by one; the last place stands for all others.
pub(super) const OPCODES: usize = NAMES.len() + 1;

/// The name of opcode `code`.
pub(super) fn name(code: usize) -> &'static str {
    match NAMES.get(code) {
        Some(name) if !name.is_empty() => name,
        _ => "OTHER",
    }
}

/// Where opcode `code` is counted.
pub(super) fn place(code: u32) -> usize {
    usize::try_from(code).map_or(OPCODES - 1, |code| code.min(OPCODES - 1))
}

/// The room that the kernel of a guest gives for the payload of a reply, to the byte: a server
/// that answers with more is told so by its ring. `None` for requests without reply.
pub(super) fn room(code: u32, body: &[u8]) -> Option<usize> {
    let word = |at: usize| {
        let bytes = body.get(at..at + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?) as usize)
    };
    // Where a request says itself how much it wants.
    let asked = |at: usize| word(at).unwrap_or(0).min(DATA_MAX);
    Some(match name(place(code)) {
        "FORGET" | "BATCH_FORGET" | "INTERRUPT" => return None,
        "LOOKUP" | "SYMLINK" | "MKNOD" | "MKDIR" | "LINK" => 128,
        "GETATTR" | "SETATTR" => 104,
        "CREATE" | "TMPFILE" => 144,
        "OPEN" | "OPENDIR" => 16,
        "READ" | "READDIR" | "READDIRPLUS" => asked(16),
        "GETXATTR" | "LISTXATTR" => asked(0).max(8),
        "READLINK" => 4095,
        "WRITE" | "LSEEK" | "COPY_FILE_RANGE" | "COPY_FILE_RANGE_64" | "BMAP" | "POLL" => 8,
        "STATFS" => 80,
        "INIT" => 64,
        "GETLK" => 24,
        "IOCTL" => 16 + asked(28),
        "STATX" => 288,
        _ => 0,
    })
}

/// Makes an INIT of /dev/fuse one of a guest. `body` follows the header of the request.
pub(super) fn as_guest(body: &mut [u8]) {
    let mut put = |at: usize, value: u32| {
        if let Some(place) = body.get_mut(at..at + 4) {
            let old = place.try_into().map_or(0, u32::from_le_bytes);
            let new = if at == 4 { old.min(value) } else { old & value };
            place.copy_from_slice(&new.to_le_bytes());
        }
    };
    put(4, GUEST_MINOR);
    put(12, (GUEST_FLAGS & u64::from(u32::MAX)) as u32);
    put(16, (GUEST_FLAGS >> 32) as u32);
}

/// What a server agreed to in its reply to INIT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Agreed {
    /// The flags, the extended ones in the upper half.
    pub flags: u64,
    /// Largest WRITE.
    pub max_write: u32,
}

impl Agreed {
    /// Reads the payload of the reply.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| {
            let bytes = bytes.get(at..at + 4)?;
            Some(u32::from_le_bytes(bytes.try_into().ok()?))
        };
        Some(Self {
            flags: u64::from(word(12)?) | u64::from(word(32)?) << 32,
            max_write: word(20)?,
        })
    }
}
