//! Command lines against the real program: what is printed, exit codes, and what is made.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod scratch;
mod verbs;
mod volumes;
mod wrong;
