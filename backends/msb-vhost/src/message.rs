//! vhost-user messages as bytes: headers and bodies, without I/O.
//!
//! Own code and not the vhost crate's, whose request handler is one with its socket: it drops the
//! connection at a short read, a refused request or a second SET_OWNER, and refuses INFLIGHT.
//!
//! ```text
//!   0         4       8      12
//!   +---------+-------+------+----------------+
//!   | request | flags | size | body (size)    |   native endian
//!   +---------+-------+------+----------------+
//! ```

/// Length of a header.
pub(crate) const HEADER: usize = 12;

/// Largest body that is taken; the largest one there is carries 512 bytes of configuration.
pub(crate) const MAX_BODY: usize = 4096;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// Protocol feature bits that are offered.
pub(crate) mod feature {
    pub(crate) const MQ: u64 = 1 << 0;
    pub(crate) const REPLY_ACK: u64 = 1 << 3;
    pub(crate) const BACKEND_REQ: u64 = 1 << 5;
    pub(crate) const CONFIG: u64 = 1 << 9;
    pub(crate) const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub(crate) const RESET_DEVICE: u64 = 1 << 13;
    pub(crate) const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;

    /// All of them.
    pub(crate) const OFFERED: u64 =
        MQ | REPLY_ACK | BACKEND_REQ | CONFIG | INFLIGHT_SHMFD | RESET_DEVICE | CONFIGURE_MEM_SLOTS;
}

/// What a front end asks for (vhost-user.rst, "Front-end message types").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Code {
    GetFeatures,
    SetFeatures,
    SetOwner,
    ResetOwner,
    SetMemTable,
    SetVringNum,
    SetVringAddr,
    SetVringBase,
    GetVringBase,
    SetVringKick,
    SetVringCall,
    SetVringErr,
    GetProtocolFeatures,
    SetProtocolFeatures,
    GetQueueNum,
    SetVringEnable,
    SetBackendReqFd,
    GetConfig,
    SetConfig,
    GetInflightFd,
    SetInflightFd,
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg,
    RemMemReg,
    /// Anything else; it is answered negatively.
    Other(u32),
}

impl From<u32> for Code {
    fn from(code: u32) -> Self {
        match code {
            1 => Self::GetFeatures,
            2 => Self::SetFeatures,
            3 => Self::SetOwner,
            4 => Self::ResetOwner,
            5 => Self::SetMemTable,
            8 => Self::SetVringNum,
            9 => Self::SetVringAddr,
            10 => Self::SetVringBase,
            11 => Self::GetVringBase,
            12 => Self::SetVringKick,
            13 => Self::SetVringCall,
            14 => Self::SetVringErr,
            15 => Self::GetProtocolFeatures,
            16 => Self::SetProtocolFeatures,
            17 => Self::GetQueueNum,
            18 => Self::SetVringEnable,
            21 => Self::SetBackendReqFd,
            24 => Self::GetConfig,
            25 => Self::SetConfig,
            31 => Self::GetInflightFd,
            32 => Self::SetInflightFd,
            34 => Self::ResetDevice,
            36 => Self::GetMaxMemSlots,
            37 => Self::AddMemReg,
            38 => Self::RemMemReg,
            other => Self::Other(other),
        }
    }
}

/// A header as it arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    /// The number of the request, to be repeated in the reply.
    pub(crate) number: u32,
    /// Whether an acknowledgement is asked for.
    pub(crate) need_reply: bool,
    /// Length of the body in bytes.
    pub(crate) size: usize,
}

impl Header {
    /// Reads a header; `None` when the stream cannot be one of vhost-user messages.
    pub(crate) fn parse(bytes: &[u8; HEADER]) -> Option<Self> {
        let mut body = Body(bytes);
        let (number, flags, size) = (body.u32()?, body.u32()?, body.u32()?);
        let size = usize::try_from(size).ok()?;
        let plain = flags & VERSION_MASK == VERSION && flags & REPLY == 0;
        (plain && size <= MAX_BODY).then_some(Self {
            number,
            need_reply: flags & NEED_REPLY != 0,
            size,
        })
    }
}

/// A whole reply to request `number`.
pub(crate) fn reply(number: u32, body: &[u8]) -> Vec<u8> {
    message(number, VERSION | REPLY, body)
}

/// Tells the front end that the configuration space has changed: BACKEND_CONFIG_CHANGE_MSG.
pub(crate) fn config_change() -> Vec<u8> {
    message(2, VERSION, &[])
}

fn message(number: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).unwrap_or(0);
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    for word in [number, flags, size] {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes.extend_from_slice(body);
    bytes
}

/// A body, read from the front.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Body<'a>(pub(crate) &'a [u8]);

impl<'a> Body<'a> {
    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_ne_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_ne_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_ne_bytes)
    }

    /// What is left.
    pub(crate) fn rest(self) -> &'a [u8] {
        self.0
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }
}

/// A region of guest memory, as SET_MEM_TABLE and ADD_MEM_REG describe it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RegionMessage {
    pub(crate) guest: u64,
    pub(crate) size: u64,
    pub(crate) user: u64,
    pub(crate) offset: u64,
}

impl RegionMessage {
    pub(crate) fn parse(body: &mut Body<'_>) -> Option<Self> {
        Some(Self {
            guest: body.u64()?,
            size: body.u64()?,
            user: body.u64()?,
            offset: body.u64()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(number: u32, flags: u32, size: u32) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..4].copy_from_slice(&number.to_ne_bytes());
        bytes[4..8].copy_from_slice(&flags.to_ne_bytes());
        bytes[8..].copy_from_slice(&size.to_ne_bytes());
        bytes
    }

    #[test]
    fn headers_of_other_protocols_are_refused() {
        assert!(Header::parse(&header(1, 1, 0)).is_some());
        assert_eq!(
            Header::parse(&header(5, 9, 40)).map(|header| header.need_reply),
            Some(true)
        );
        for (flags, size) in [(0, 0), (2, 0), (5, 0), (1, 4097), (1, u32::MAX)] {
            assert_eq!(
                Header::parse(&header(1, flags, size)),
                None,
                "{flags} {size}"
            );
        }
    }

    #[test]
    fn bodies_end_where_they_end() {
        let mut body = Body(&[1, 0, 0, 0, 2]);
        assert_eq!((body.u32(), body.u16()), (Some(1), None));
        assert_eq!(body.rest(), [2]);
    }
}
