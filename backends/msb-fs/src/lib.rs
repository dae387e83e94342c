//! Serves a host directory or file over virtio-fs.
//!
//! A request comes in as bytes of guest memory (`device`), is taken apart (`session`, `wire`) and
//! carried out on the host (`tree`). The guest is hostile: it names nodes and handles by number
//! and entries by single components, and nothing it sends is used unchecked.

#![deny(unsafe_code)]

pub mod args;
pub mod device;
pub mod quota;
pub mod sandbox;
pub mod session;
pub mod socket;
#[expect(unsafe_code, reason = "system calls that no crate offers")]
mod sys;
pub mod tree;
pub mod wire;
