//! What a request is answered with, and how that goes back.

use msb_vhost::Request;
use rustix::io::Errno;
use zerocopy::{Immutable, IntoBytes};

use super::task::Task;
use crate::wire::abi::{EntryOut, InHeader, LkIn, OpenOut};
use crate::wire::reply;

/// Longest answer of fixed length: that of CREATE.
const FIXED_MAX: usize = size_of::<EntryOut>() + size_of::<OpenOut>();

/// What a request is answered with.
pub(crate) enum Answer {
    /// Nothing: the protocol has no reply for it.
    None,
    /// A structure or two.
    Fixed([u8; FIXED_MAX], usize),
    /// These bytes.
    Bytes(Vec<u8>),
    /// So many bytes, which lie in place already.
    Placed(usize),
    /// Nothing beside the header; this handle is closed afterwards.
    Closed(u64),
    /// Nothing beside the header, when a lock of this node can be had.
    Locked(u64, LkIn),
    /// What this gives, which may take a while.
    Later(Task),
}

impl Answer {
    pub(crate) fn of(value: &(impl IntoBytes + Immutable)) -> Self {
        Self::pair(value, &[0_u8; 0])
    }

    pub(crate) fn pair(
        first: &(impl IntoBytes + Immutable),
        second: &(impl IntoBytes + Immutable),
    ) -> Self {
        let (first, second) = (first.as_bytes(), second.as_bytes());
        let mut bytes = [0; FIXED_MAX];
        let len = first.len() + second.len();
        match bytes.get_mut(..len) {
            Some(place) => {
                let (front, back) = place.split_at_mut(first.len());
                front.copy_from_slice(first);
                back.copy_from_slice(second);
                Self::Fixed(bytes, len)
            }
            None => Self::Bytes([first, second].concat()),
        }
    }

    pub(crate) fn empty() -> Self {
        Self::Placed(0)
    }
}

/// Sends an answer: the header to what was set aside for it, if that `replies`, the rest behind it.
pub(crate) fn send(
    header: &InHeader,
    replies: bool,
    mut request: Request,
    result: Result<Answer, Errno>,
) {
    if matches!(result, Ok(Answer::None)) || !replies {
        return request.complete(0);
    }
    let result = result.and_then(|answer| match answer {
        Answer::None | Answer::Closed(_) => Ok(0),
        Answer::Placed(len) => Ok(len),
        Answer::Fixed(bytes, len) => match bytes.get(..len) {
            Some(bytes) if request.writable.write_all(bytes).is_ok() => Ok(len),
            _ => Err(Errno::IO),
        },
        Answer::Bytes(bytes) => match request.writable.write_all(&bytes) {
            Ok(()) => Ok(bytes.len()),
            Err(_) => Err(Errno::IO),
        },
        // Whoever is asked has carried it out.
        Answer::Later(_) | Answer::Locked(..) => Err(Errno::IO),
    });
    let reply = match result {
        Ok(len) => reply::header(header.unique, 0, len),
        Err(error) => {
            tracing::trace!(opcode = header.opcode, node = header.nodeid, %error);
            reply::header(header.unique, error.raw_os_error(), 0)
        }
    };
    let len = if request.writable.write_aside(reply.as_bytes()).is_ok() {
        reply.len
    } else {
        0
    };
    request.complete(len);
}
