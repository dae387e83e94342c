//! Translates the bytes of the FUSE protocol to typed requests and replies, without I/O.

pub mod abi;
pub mod acl;
pub mod dirent;
pub mod reply;
pub mod request;
