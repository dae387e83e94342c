//! Each backend over its socket, without a VM.

mod conformance;
mod hostile;
