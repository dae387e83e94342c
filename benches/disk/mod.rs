//! Block servers: what is asked of them over virtio-blk, and which rows come of it.

pub mod idle;
pub mod image;
pub mod loads;
pub mod native;
pub mod peers;
pub mod rows;
