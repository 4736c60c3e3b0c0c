//! Compiles `proto/*.proto` to Rust without protoc: protox makes the descriptor, connectrpc's
//! generator the messages and the service trait. Nothing to do without the `server` feature.

#[cfg(feature = "server")]
const SERVICES: [&str; 2] = ["process.proto", "filesystem.proto"];

#[cfg(feature = "server")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    use protox::prost::Message as _;

    println!("cargo::rerun-if-changed=proto");
    println!("cargo::rustc-check-cfg=cfg(fuzzing)");
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    let descriptor = out.join("descriptor.bin");
    let set = protox::compile(SERVICES, ["proto"])?;
    std::fs::write(&descriptor, set.encode_to_vec())?;
    connectrpc_build::Config::new()
        .descriptor_set(&descriptor)
        .files(&SERVICES)
        .gate_client_feature(true)
        .include_file("_connectrpc.rs")
        .emit_rerun_directives(false)
        .compile()?;
    // The generator's examples are of its own use, not tests of ours that somebody ignored.
    for entry in std::fs::read_dir(&out)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path)?;
            std::fs::write(&path, text.replace("```rust,ignore", "```text"))?;
        }
    }
    Ok(())
}

#[cfg(not(feature = "server"))]
fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(fuzzing)");
}
