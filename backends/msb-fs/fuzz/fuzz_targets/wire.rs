//! Hostile bytes for `msb_fs_fuzz::wire`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| msb_fs_fuzz::wire(data));
