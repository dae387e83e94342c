//! Fixtures of the tests.

pub mod msb;
