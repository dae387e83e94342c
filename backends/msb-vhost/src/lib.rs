//! Serves one virtio device from one vhost-user process.
//!
//! Device code implements [`Device`] and receives [`Request`]s: a readable part, a writable part
//! and a completion. It never sees a vring, a guest address or a vhost-user message.

#![deny(unsafe_code)]

mod connection;
mod device;
pub mod jail;
mod message;
mod queue;
mod request;
mod serve;
mod session;
mod startup;
#[expect(unsafe_code, reason = "guest memory is reached through raw addresses")]
mod sys;

pub use device::{Backlog, ConfigError, Device, FrontEnd, QueueLimits};
pub use request::{Request, Segments, ShortSegments};
pub use serve::{Endpoint, Options, ServeError, serve};
pub use startup::{chain, exit_with_parent, start_log};
