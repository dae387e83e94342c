//! Entry point of the msb-blk backend.
fn main() {}
