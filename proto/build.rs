//! Compiles `proto/hadal/v1/*.proto` with protox (no protoc needed) and keeps the descriptor set for reflection.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    let files = ["common", "worker", "transfer", "inference"]
        .map(|name| format!("proto/hadal/v1/{name}.proto"));
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(files, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("hadal.v1.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        // Payloads decode to `Bytes`: a view of the receive buffer, not a copy.
        .bytes(".hadal.v1.Piece.payload")
        .codec_path("crate::Codec")
        .compile_fds(descriptors)?;
    Ok(())
}
