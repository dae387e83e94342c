//! Each backend over its socket, without a VM.

mod blk;
mod conformance;
mod disk;
mod fs;
mod grow;
mod hostile;
mod replay;
mod transport;
