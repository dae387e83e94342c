//! Block servers: what is asked of them over virtio-blk, and which rows come of it.

pub mod idle;
pub mod image;
#[cfg(feature = "imago")]
pub mod library;
pub mod loads;
pub mod native;
pub mod peers;
pub mod rows;
pub mod slow;
pub mod targets;
