//! Fixtures of the tests.

pub mod attack;
pub mod bridge;
pub mod documents;
pub mod frontend;
pub mod msb;
pub mod share;
pub mod suites;
pub mod sys;
