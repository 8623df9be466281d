#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| carport_image::fuzzing::contents(data));
