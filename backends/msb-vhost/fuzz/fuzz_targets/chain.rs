//! Hostile bytes for `msb_vhost_fuzz::chain`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| msb_vhost_fuzz::chain(data).unwrap());
