//! File servers: what is asked of them over virtio-fs, and which rows come of it.

pub mod bare;
pub mod census;
pub mod loads;
pub mod peers;
pub mod rows;
pub mod session;
pub mod tree;
pub mod wire;
