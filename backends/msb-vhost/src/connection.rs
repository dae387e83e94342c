//! One connected front end: whole messages with their descriptors, in and out.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::message::{Code, HEADER, Header, reply};

/// The kernel passes at most this many descriptors with one message (SCM_MAX_FD).
const MAX_FDS: usize = 253;

/// A message as it arrived. Descriptors that nobody takes are closed with it.
pub(crate) struct Message {
    pub(crate) code: Code,
    pub(crate) header: Header,
    pub(crate) body: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

/// A connected socket, and what says that the end is asked for: nothing here waits past that.
pub(crate) struct Connection<'a> {
    socket: OwnedFd,
    end: BorrowedFd<'a>,
}

impl<'a> Connection<'a> {
    pub(crate) fn new(socket: OwnedFd, end: BorrowedFd<'a>) -> Self {
        Self { socket, end }
    }

    /// The next message; `None` when the front end has closed the connection.
    pub(crate) fn receive(&self) -> io::Result<Option<Message>> {
        let mut head = [0; HEADER];
        let mut fds = Vec::new();
        if !self.fill(&mut head, &mut fds)? {
            return Ok(None);
        }
        let garbled = || io::Error::new(io::ErrorKind::InvalidData, "not a vhost-user message");
        let header = Header::parse(&head).ok_or_else(garbled)?;
        let mut body = vec![0; header.size];
        if !self.fill(&mut body, &mut fds)? && header.size > 0 {
            return Ok(None);
        }
        Ok(Some(Message {
            code: Code::from(header.number),
            header,
            body,
            fds,
        }))
    }

    /// Answers `header` with `body` and perhaps a descriptor.
    pub(crate) fn reply(
        &self,
        header: Header,
        body: &[u8],
        fd: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        send(self.socket.as_fd(), &reply(header.number, body), fd, || {
            wait(&self.socket, PollFlags::OUT, self.end)
        })
    }

    /// Reads until `out` is full; false when the stream ended before.
    fn fill(&self, out: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<bool> {
        let mut filled = 0;
        while let Some(rest) = out.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            if !wait(&self.socket, PollFlags::IN, self.end)? {
                return Ok(false);
            }
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let received = match recvmsg(
                &self.socket,
                &mut [IoSliceMut::new(rest)],
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            ) {
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::CONNRESET) => return Ok(false),
                result => result?,
            };
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    fds.extend(rights);
                }
            }
            if received.flags.contains(ReturnFlags::CTRUNC) {
                // Descriptors were lost, most likely because this process may open no more.
                tracing::warn!("descriptors of a message were lost");
            }
            if received.bytes == 0 {
                return Ok(false);
            }
            filled += received.bytes;
        }
        Ok(true)
    }
}

impl AsFd for Connection<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Waits until `socket` is ready for `what`; false when the end is asked for first.
pub(crate) fn wait(socket: impl AsFd, what: PollFlags, end: BorrowedFd<'_>) -> io::Result<bool> {
    let mut fds = [
        PollFd::new(&socket, what),
        PollFd::from_borrowed_fd(end, PollFlags::IN),
    ];
    loop {
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => {
                let [_, end] = &fds;
                return Ok(end.revents().is_empty());
            }
        }
    }
}

/// Sends all of `bytes`, the descriptor with the first of them. `wait` waits for room; what it
/// returns says whether to go on.
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    mut bytes: &[u8],
    fd: Option<BorrowedFd<'_>>,
    mut wait: impl FnMut() -> io::Result<bool>,
) -> io::Result<()> {
    let mut first = fd.as_slice();
    while !bytes.is_empty() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !first.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(first)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        match sendmsg(
            socket,
            &[IoSlice::new(bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        ) {
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => {
                if !wait()? {
                    return Err(io::ErrorKind::Interrupted.into());
                }
            }
            result => {
                let sent = result?;
                bytes = bytes.get(sent..).unwrap_or_default();
                first = &[];
            }
        }
    }
    Ok(())
}
