//! Compiles `proto/` without `protoc`: the messages, and the descriptors of the gRPC service for its reflection.

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(["proto/kv.proto"], ["proto"])?;
    let folder = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(folder.join("kv.fds"), files.encode_to_vec())?;
    prost_build::Config::new()
        .bytes([
            ".memkv.KeyResult.value",
            ".memkv.Entry.value",
            ".memkv.GetResponse.value",
        ])
        .btree_map(["."])
        .compile_fds(files)?;
    Ok(())
}
