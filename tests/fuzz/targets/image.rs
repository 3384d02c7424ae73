//! An image that the bytes made or damaged is read: `src/data_dir/fuzz.rs` says how.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| memkv::fuzzing::image(data));
