//! `protoc` as build scripts call it, by the crate `protox`.
//!
//! Arguments are those that prost-build passes: include paths, files, and the path for the descriptor
//! set. `.cargo/config.toml` makes `PROTOC` point to `protoc.sh`, which builds and runs this program,
//! so that a build needs Rust and a C compiler only. Google's well-known types are built in.

use std::path::PathBuf;
use std::process::ExitCode;
use std::{env, fs};

/// Command line of one run.
#[derive(Default)]
struct Arguments {
    files: Vec<PathBuf>,
    includes: Vec<PathBuf>,
    output: Option<PathBuf>,
    include_imports: bool,
    include_source_info: bool,
}

fn main() -> ExitCode {
    match parse(env::args().skip(1)).and_then(|arguments| compile(&arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("protoc (carport's own, by protox): {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Arguments, String> {
    let mut arguments = Arguments::default();
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{word} needs a value"));
        match word.as_str() {
            "--include_imports" => arguments.include_imports = true,
            "--include_source_info" => arguments.include_source_info = true,
            // Always on in protox.
            "--experimental_allow_proto3_optional" => {}
            "-o" => arguments.output = Some(value()?.into()),
            "-I" => arguments.includes.push(value()?.into()),
            option if option.starts_with('-') => {
                return Err(format!(
                    "unknown option {option}; set PROTOC to a full protocol buffer compiler"
                ));
            }
            file => arguments.files.push(file.into()),
        }
    }
    Ok(arguments)
}

fn compile(arguments: &Arguments) -> Result<(), String> {
    let output = arguments.output.as_ref().ok_or("no -o: nothing to write")?;
    let mut compiler =
        protox::Compiler::new(&arguments.includes).map_err(|error| error.to_string())?;
    compiler.include_imports(arguments.include_imports);
    compiler.include_source_info(arguments.include_source_info);
    for file in &arguments.files {
        // `Debug` has the file and the line, `Display` the message alone.
        compiler.open_file(file).map_err(|error| format!("{error}: {error:?}"))?;
    }
    fs::write(output, compiler.encode_file_descriptor_set())
        .map_err(|error| format!("write {}: {error}", output.display()))
}
