//! Serves a raw, qcow2 or vmdk image over virtio-blk.
//!
//! Imports point downwards: `main → args → device → control | commit | request | image → file → sys`.

#![deny(unsafe_code)]
#![warn(clippy::indexing_slicing)]

pub mod args;
pub mod control;
pub mod device;
pub mod file;
pub mod fuzzing;
pub mod image;
pub mod request;
pub mod sandbox;

mod commit;
mod sys;
