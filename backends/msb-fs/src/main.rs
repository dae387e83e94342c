//! Entry point of the msb-fs backend.
fn main() {}
