//! Operations for `msb_fs_fuzz::sequence`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| msb_fs_fuzz::sequence(data));
