//! Paths: what is accepted is absolute and clean, means the same when it is read again, and is what
//! a plain walk over the components gives.

#![no_main]

use envd::fuzzing::resolve;
use libfuzzer_sys::fuzz_target;

/// Component by component, as one would on paper.
fn model(text: &str, home: &str) -> String {
    let whole = if text.starts_with('/') {
        text.to_owned()
    } else if text == "~" {
        home.to_owned()
    } else {
        format!("{home}/{}", text.strip_prefix("~/").unwrap_or(text))
    };
    let mut path = Vec::new();
    for name in whole.split('/') {
        if name == ".." {
            path.pop();
        } else if !name.is_empty() && name != "." {
            path.push(name);
        }
    }
    format!("/{}", path.join("/"))
}

fuzz_target!(|input: (&str, &str)| {
    let (text, home) = input;
    let home = format!("/{home}");
    let Some(path) = resolve(text, &home) else {
        let long = text.len() + home.len() > 255;
        assert!(long || text.contains('\0') || home.contains('\0'));
        return;
    };
    assert!(path.starts_with('/') && path.len() < 4096 && !path.contains('\0'));
    let names = path[1..].split('/');
    if path != "/" {
        assert!(names.clone().all(|name| !matches!(name, "" | "." | "..") && name.len() < 256));
    }
    assert_eq!(path, model(text, &home));
    assert_eq!(resolve(&path, "/elsewhere").as_deref(), Some(path.as_str()));
});
