//! Compiles `proto/memkv.proto` without `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto/memkv.proto");
    let files = protox::compile(["proto/memkv.proto"], ["proto"])?;
    prost_build::Config::new()
        .bytes([".memkv.KeyResult.value"])
        .btree_map(["."])
        .compile_fds(files)?;
    Ok(())
}
