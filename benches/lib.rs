//! Numbers for what users wait for, each against its peer in the same run.

pub mod disk;
pub mod harness;
pub mod share;
pub mod work;
