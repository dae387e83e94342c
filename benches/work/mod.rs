//! What users wait for: real programs on a mounted share, counted in requests and in time.

pub mod place;
pub mod profiles;
pub mod source;
pub mod steps;
pub mod verdict;
