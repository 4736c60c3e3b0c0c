//! Names in multi-part uploads: any header is read without a panic, a name that clients write is
//! read as it was, and what is read is a path or refused.

#![no_main]

use envd::fuzzing::{file_name, resolve};
use libfuzzer_sys::fuzz_target;

fn written(name: &str) -> String {
    let escaped = name.replace('\\', "\\\\").replace('"', "\\\"");
    format!("form-data; name=\"file\"; filename=\"{escaped}\"")
}

fuzz_target!(|bytes: &[u8]| {
    if let Some(name) = file_name(bytes) {
        let _ = resolve(&name, "/home/user");
    }
    let Ok(name) = std::str::from_utf8(bytes) else {
        return;
    };
    // Percent signs may stand for something else; everything else is itself.
    if name.len() < 4096 && !name.contains('%') {
        assert_eq!(file_name(written(name).as_bytes()).as_deref(), Some(name));
    }
    let encoded: String = name.bytes().map(|byte| format!("%{byte:02x}")).collect();
    if name.len() < 4096 {
        let header = format!("form-data; filename=\"x\"; filename*=utf-8'en'{encoded}");
        assert_eq!(file_name(header.as_bytes()).as_deref(), Some(name));
    }
});
