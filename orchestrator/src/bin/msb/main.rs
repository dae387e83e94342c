//! Command line of microsandbox.
fn main() {}
