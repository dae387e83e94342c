//! What all benchmarks stand on: a driver for queues, servers, comparisons and tables.

pub mod cli;
pub mod compare;
pub mod device;
pub mod load;
pub mod machine;
pub mod ring;
pub mod server;
pub mod table;
