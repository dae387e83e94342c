//! Fixtures of the tests.

pub mod attack;
pub mod frontend;
pub mod msb;
pub mod sys;
