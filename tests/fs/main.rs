//! The file server as a file system of the host's kernel: no VM, real programs.

mod bridge;
mod cache;
mod content;
mod differential;
mod load;
mod locks;
mod posix;
mod privilege;
