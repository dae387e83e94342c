//! Hostile bytes for `msb_blk::fuzzing::qcow2_model`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| msb_blk::fuzzing::qcow2_model(data));
