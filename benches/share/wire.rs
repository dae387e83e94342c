//! FUSE requests as bytes, as a Linux guest writes them (linux/fuse.h, protocol 7.41).

/// Request numbers.
pub mod op {
    #![allow(missing_docs, reason = "the names are those of linux/fuse.h")]
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const UNLINK: u32 = 10;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const RELEASE: u32 = 18;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const CREATE: u32 = 35;
    pub const READDIRPLUS: u32 = 44;
}

/// Bytes of the header of a request.
pub const IN_HEADER: usize = 40;
/// Bytes of the header of a reply.
pub const OUT_HEADER: u32 = 16;
/// Bytes of a fuse_entry_out and of a fuse_attr_out.
pub const ENTRY: u32 = 128;
/// See [`ENTRY`].
pub const ATTR: u32 = 104;
/// The root directory.
pub const ROOT: u64 = 1;

/// What a 6.12 kernel offers at INIT on virtio-fs: see fuse_send_init(). SECURITY_CTX is left out,
/// because every CREATE would have to carry a label.
pub const GUEST_FLAGS: u64 = 0x1fc_7bff_fffb;

/// One request: header, fixed arguments, and how large the rest may be.
#[derive(Debug, Clone)]
pub struct Request {
    /// fuse_in_header.
    pub header: [u8; IN_HEADER],
    /// What follows it.
    pub arguments: Vec<u8>,
    /// Bytes of data to the device.
    pub data: u32,
    /// Bytes of fixed reply after its header.
    pub reply: u32,
    /// Bytes of data from the device.
    pub back: u32,
}

impl Request {
    /// A request without data, for a reply of at most `reply` bytes.
    pub fn new(opcode: u32, node: u64, arguments: Vec<u8>, reply: u32) -> Self {
        let mut request = Self {
            header: [0; IN_HEADER],
            arguments,
            data: 0,
            reply,
            back: 0,
        };
        request.header[4..8].copy_from_slice(&opcode.to_le_bytes());
        request.header[16..24].copy_from_slice(&node.to_le_bytes());
        request.header[32..36].copy_from_slice(&1_u32.to_le_bytes());
        request.seal()
    }

    fn seal(mut self) -> Self {
        let len = IN_HEADER + self.arguments.len();
        let len = u32::try_from(len).expect("a short request") + self.data;
        self.header[..4].copy_from_slice(&len.to_le_bytes());
        self
    }

    /// GETATTR.
    pub fn getattr(node: u64) -> Self {
        Self::new(op::GETATTR, node, vec![0; 16], ATTR)
    }

    /// LOOKUP.
    pub fn lookup(parent: u64, name: &str) -> Self {
        Self::new(op::LOOKUP, parent, text(name), ENTRY)
    }

    /// READ.
    pub fn read(node: u64, handle: u64, offset: u64, len: u32) -> Self {
        let mut request = Self::new(op::READ, node, range(handle, offset, len), 0);
        request.back = len;
        request
    }

    /// WRITE.
    pub fn write(node: u64, handle: u64, offset: u64, len: u32) -> Self {
        let mut request = Self::new(op::WRITE, node, range(handle, offset, len), 8);
        request.data = len;
        request.seal()
    }

    /// READDIRPLUS.
    pub fn readdirplus(node: u64, handle: u64, offset: u64, len: u32) -> Self {
        let mut request = Self::new(op::READDIRPLUS, node, range(handle, offset, len), 0);
        request.back = len;
        request
    }

    /// CREATE, as open(O_WRONLY | O_CREAT, 0644) does it.
    pub fn create(parent: u64, name: &str) -> Self {
        let flags = (libc_flags::O_WRONLY | libc_flags::O_CREAT).to_le_bytes();
        let mut arguments = flags.to_vec();
        for word in [0o100_644_u32, 0o022, 0] {
            arguments.extend_from_slice(&word.to_le_bytes());
        }
        arguments.extend_from_slice(&text(name));
        Self::new(op::CREATE, parent, arguments, ENTRY + 16)
    }

    /// UNLINK.
    pub fn unlink(parent: u64, name: &str) -> Self {
        Self::new(op::UNLINK, parent, text(name), 0)
    }

    /// OPEN or OPENDIR.
    pub fn open(opcode: u32, node: u64, flags: u32) -> Self {
        let mut arguments = flags.to_le_bytes().to_vec();
        arguments.resize(8, 0);
        Self::new(opcode, node, arguments, 16)
    }

    /// RELEASE.
    pub fn release(node: u64, handle: u64) -> Self {
        let mut arguments = handle.to_le_bytes().to_vec();
        arguments.resize(24, 0);
        Self::new(op::RELEASE, node, arguments, 0)
    }

    /// FORGET of one lookup, which has no reply.
    pub fn forget(node: u64) -> Self {
        Self::new(op::FORGET, node, 1_u64.to_le_bytes().to_vec(), 0)
    }

    /// INIT with what a current guest offers.
    pub fn init() -> Self {
        let mut arguments = Vec::new();
        let flags = GUEST_FLAGS.to_le_bytes();
        for word in [7_u32, 41, 128 << 10] {
            arguments.extend_from_slice(&word.to_le_bytes());
        }
        arguments.extend_from_slice(&flags);
        arguments.resize(64, 0);
        Self::new(op::INIT, 0, arguments, 64)
    }
}

/// Open flags of x86-64 and arm64, which are those of the wire.
pub mod libc_flags {
    #![allow(missing_docs, reason = "the names are those of open(2)")]
    pub const O_RDONLY: u32 = 0;
    pub const O_WRONLY: u32 = 1;
    pub const O_RDWR: u32 = 2;
    pub const O_CREAT: u32 = 0o100;
}

fn text(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

/// fuse_read_in and fuse_write_in begin alike and are of one size.
fn range(handle: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = handle.to_le_bytes().to_vec();
    bytes.extend_from_slice(&offset.to_le_bytes());
    bytes.extend_from_slice(&len.to_le_bytes());
    bytes.resize(40, 0);
    bytes
}
