//! What the event loop waits for, and how it tells its events apart.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use msb_protocol::Channel;
use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, Event, EventData, EventFlags};
use rustix::io::Errno;

use crate::exec::Stream;

/// Most events taken at a time, so that no kind of them waits for long.
const BATCH: usize = 64;
pub(crate) const PORT: u64 = 0;
pub(crate) const CHILDREN: u64 = 1;
pub(crate) const OUTPUTS: u64 = 2;
/// Streams of commands have tokens from here on; see [`token`].
const STREAMS: u64 = 4;

pub(crate) fn wait_events(
    epoll: &OwnedFd,
    patience: Option<Duration>,
) -> Result<Vec<Event>, Errno> {
    // Rounded up, or the last part of a millisecond would be spent spinning.
    let timeout = patience.map(|time| time + Duration::from_micros(999));
    let timeout = timeout.and_then(|time| Timespec::try_from(time).ok());
    let mut events = Vec::with_capacity(BATCH);
    match epoll::wait(epoll, spare_capacity(&mut events), timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(events),
        Err(error) => Err(error),
    }
}

pub(crate) fn watch(
    epoll: &OwnedFd,
    fd: impl AsFd,
    data: EventData,
    events: EventFlags,
) -> Result<(), Errno> {
    match epoll::add(epoll, fd, data, events) {
        Err(Errno::EXIST) => Ok(()),
        result => result,
    }
}

pub(crate) fn unwatch(epoll: &OwnedFd, fd: impl AsFd) -> Result<(), Errno> {
    match epoll::delete(epoll, fd) {
        Err(Errno::NOENT) => Ok(()),
        result => result,
    }
}

pub(crate) fn token(channel: Channel, stream: Stream) -> EventData {
    let stream = match stream {
        Stream::Report => 0,
        Stream::Stdin => 1,
        Stream::Stdout => 2,
        Stream::Stderr => 3,
    };
    EventData::new_u64(STREAMS + (u64::from(channel) << 2) + stream)
}

pub(crate) fn parse_token(token: u64) -> (Channel, Stream) {
    let number = token.saturating_sub(STREAMS);
    let stream = match number & 3 {
        0 => Stream::Report,
        1 => Stream::Stdin,
        2 => Stream::Stdout,
        _ => Stream::Stderr,
    };
    (Channel::try_from(number >> 2).unwrap_or(0), stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_tell_channel_and_stream() {
        for channel in [0, 1, 77, Channel::MAX] {
            for stream in [
                Stream::Report,
                Stream::Stdin,
                Stream::Stdout,
                Stream::Stderr,
            ] {
                let token = token(channel, stream).u64();
                assert!(token >= STREAMS);
                assert_eq!(parse_token(token), (channel, stream));
            }
        }
    }
}
