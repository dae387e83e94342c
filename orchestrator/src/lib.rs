//! Storage for microVM sandboxes: turns a sandbox request into running processes and back.

#![deny(unsafe_code)]

mod name;
pub mod plan;
mod size;
pub mod spec;

pub use name::NameError;
pub use size::{Mebibytes, SizeError, SizeExt};
