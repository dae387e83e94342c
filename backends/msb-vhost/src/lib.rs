//! Serves one virtio device from one vhost-user process.
//!
//! Device code implements [`Device`] and receives [`Request`]s: a readable part, a writable part
//! and a completion. It never sees a vring, a guest address or a vhost-user message.

#![deny(unsafe_code)]

mod device;
pub mod jail;
mod request;
mod serve;
mod startup;

pub use device::{ConfigError, Device, QueueLimits};
pub use request::{Request, Segments, ShortSegments};
pub use serve::{Endpoint, Options, ServeError, serve};
pub use startup::{exit_with_parent, start_log};
