//! Serves one virtio device from one vhost-user process.
//!
//! Device code implements [`Device`] and receives [`Request`]s: a readable part, a writable part
//! and a completion. It never sees a vring, a guest address or a vhost-user message.

#![deny(unsafe_code)]

mod device;
mod request;

pub use device::{ConfigError, Device, QueueLimits};
pub use request::{Request, Segments, ShortSegments};
