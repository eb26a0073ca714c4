//! Compiles `proto/` into `OUT_DIR`: messages, client, server trait and the descriptor set that reflection serves.
//! protox parses the files in-process, so nobody needs a `protoc` on the machine.

use std::{env, error::Error, fs, path::PathBuf};

const ROOT: &str = "proto";
const FILES: [&str; 2] = ["dataqueue/v1/data_queue.proto", "dataqueue/v1/queue_admin.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    for file in FILES {
        println!("cargo:rerun-if-changed={ROOT}/{file}");
    }
    println!("cargo:rerun-if-changed=build.rs");

    let mut compiler = protox::Compiler::new([ROOT])?;
    compiler.include_source_info(true).include_imports(true).open_files(FILES)?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo did not set OUT_DIR")?);
    fs::write(out.join("descriptor_set.bin"), compiler.encode_file_descriptor_set())?;

    // Maps are ordered, so that encoding a message twice gives the same bytes: the server compares retried requests so.
    let builder = tonic_prost_build::configure().btree_map(".").bytes(".").codec_path("crate::Codec");
    builder.compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}
