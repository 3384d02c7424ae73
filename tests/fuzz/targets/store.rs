//! A table of items against a hash map: `src/store/model.rs` says what the bytes mean.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| memkv::fuzzing::store(data));
