//! Hostile bytes for `msb_vhost_fuzz::messages`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| msb_vhost_fuzz::messages(data).unwrap());
