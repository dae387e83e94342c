//! Hostile bytes for `msb_blk::fuzzing::request`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| msb_blk::fuzzing::request(data));
