//! Frames on the byte stream.
//!
//! ```text
//!   0        4        8     9
//!   +--------+--------+-----+------------------+
//!   | length | channel| kind| payload (length) |   little endian
//!   +--------+--------+-----+------------------+
//! ```

use serde::{Serialize, de::DeserializeOwned};

use crate::Channel;

/// Largest payload of one frame in bytes.
pub const MAX_PAYLOAD: usize = 1 << 20;

const HEADER: usize = 9;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A message as a JSON object.
    Control,
    /// Bytes for the command's standard input; none at all closes it.
    Stdin,
    /// Bytes of the command's standard output.
    Stdout,
    /// Bytes of the command's standard error.
    Stderr,
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The command it belongs to; zero is the agent itself.
    pub channel: Channel,
    /// What the payload is.
    pub kind: Kind,
    /// The payload, at most [`MAX_PAYLOAD`] bytes.
    pub payload: Vec<u8>,
}

/// A frame that cannot be made or understood. The stream cannot be used after it.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The payload is larger than [`MAX_PAYLOAD`].
    #[error("frame of {0} bytes is too large")]
    TooLarge(usize),
    /// The kind is none of [`Kind`].
    #[error("unknown frame kind {0}")]
    UnknownKind(u8),
    /// The payload is not the message it should be.
    #[error("malformed message")]
    Message(#[source] serde_json::Error),
}

impl Frame {
    /// A control frame that carries `message`.
    ///
    /// # Errors
    ///
    /// [`FrameError::TooLarge`] when the message does not fit.
    pub fn control(channel: Channel, message: &impl Serialize) -> Result<Self, FrameError> {
        let payload = serde_json::to_vec(message).map_err(FrameError::Message)?;
        Self::data(channel, Kind::Control, payload)
    }

    /// A frame of raw bytes.
    ///
    /// # Errors
    ///
    /// [`FrameError::TooLarge`] when they do not fit.
    pub fn data(channel: Channel, kind: Kind, payload: Vec<u8>) -> Result<Self, FrameError> {
        if payload.len() > MAX_PAYLOAD {
            return Err(FrameError::TooLarge(payload.len()));
        }
        Ok(Self {
            channel,
            kind,
            payload,
        })
    }

    /// The message of a control frame.
    ///
    /// # Errors
    ///
    /// [`FrameError::Message`] when the payload is not such a message.
    pub fn message<M: DeserializeOwned>(&self) -> Result<M, FrameError> {
        serde_json::from_slice(&self.payload).map_err(FrameError::Message)
    }

    /// The frame as bytes for the stream.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + self.payload.len());
        bytes.extend_from_slice(&Self::header(self.channel, self.kind, self.payload.len()));
        bytes.extend_from_slice(&self.payload);
        bytes
    }

    /// The bytes that go before a payload of `length` bytes, at most [`MAX_PAYLOAD`], for those who
    /// have it elsewhere.
    pub fn header(channel: Channel, kind: Kind, length: usize) -> [u8; HEADER] {
        let [l0, l1, l2, l3] = u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes();
        let [c0, c1, c2, c3] = channel.to_le_bytes();
        let kind = match kind {
            Kind::Control => 0,
            Kind::Stdin => 1,
            Kind::Stdout => 2,
            Kind::Stderr => 3,
        };
        [l0, l1, l2, l3, c0, c1, c2, c3, kind]
    }
}

/// Puts frames together from a stream that arrives in pieces of any size.
#[derive(Debug, Default)]
pub struct Decoder {
    pending: Vec<u8>,
    /// How much of `pending` has been handed out.
    done: usize,
}

impl Decoder {
    /// Takes the next bytes of the stream.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.pending.drain(..self.done);
        self.done = 0;
        self.pending.extend_from_slice(bytes);
    }

    /// The next whole frame, if one has arrived.
    ///
    /// # Errors
    ///
    /// [`FrameError`] when the stream is not one of frames.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let unread = self.pending.get(self.done..).unwrap_or_default();
        let Some((header, rest)) = unread.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let [l0, l1, l2, l3, c0, c1, c2, c3, kind] = *header;
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        if length > MAX_PAYLOAD {
            return Err(FrameError::TooLarge(length));
        }
        let kind = match kind {
            0 => Kind::Control,
            1 => Kind::Stdin,
            2 => Kind::Stdout,
            3 => Kind::Stderr,
            other => return Err(FrameError::UnknownKind(other)),
        };
        let Some(payload) = rest.get(..length) else {
            return Ok(None);
        };
        let frame = Frame {
            channel: u32::from_le_bytes([c0, c1, c2, c3]),
            kind,
            payload: payload.to_vec(),
        };
        self.done += HEADER + length;
        Ok(Some(frame))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FromAgent, ToAgent};

    #[test]
    fn frames_survive_any_split_of_the_stream() {
        let frames = [
            Frame::control(7, &ToAgent::Signal { signal: 15 }).unwrap(),
            Frame::data(7, Kind::Stdin, vec![]).unwrap(),
            Frame::data(9, Kind::Stdout, vec![1, 2, 3]).unwrap(),
        ];
        let stream: Vec<u8> = frames.iter().flat_map(Frame::encode).collect();
        for piece in 1..=stream.len() {
            let mut decoder = Decoder::default();
            let mut seen = Vec::new();
            for bytes in stream.chunks(piece) {
                decoder.feed(bytes);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    seen.push(frame);
                }
            }
            assert_eq!(seen, frames, "pieces of {piece} bytes");
        }
    }

    #[test]
    fn hostile_headers_are_refused() {
        let mut decoder = Decoder::default();
        decoder.feed(&[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0]);
        assert!(matches!(decoder.next_frame(), Err(FrameError::TooLarge(_))));
        let mut decoder = Decoder::default();
        decoder.feed(&[0, 0, 0, 0, 0, 0, 0, 0, 9]);
        assert!(matches!(
            decoder.next_frame(),
            Err(FrameError::UnknownKind(9))
        ));
    }

    #[test]
    fn messages_round_trip_as_json() {
        let message = FromAgent::Exited(crate::ExitStatus::Signal(9));
        let frame = Frame::control(3, &message).unwrap();
        assert_eq!(frame.message::<FromAgent>().unwrap(), message);
        assert!(frame.message::<ToAgent>().is_err());
    }
}
