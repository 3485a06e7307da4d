//! Checks and times the CUDA kernels: `device check [filter]`, `device bench [filter]`, `device compile DIR`.
//!
//! Built without a GPU, run where one is. `check` compares every kernel with float64 arithmetic on the host and prints one
//! row a case; `bench` prints one row a case beside the best public kernel's time on the same device type; `compile` writes
//! every program's machine code to a directory, for disassembly (kernels/cuda/compile.py).

mod bench;
mod check;
mod harness;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use harness::Harness;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match words[..] {
        ["check"] => run(|h, f| Ok(check::run(h, f)), ""),
        ["check", filter] => run(|h, f| Ok(check::run(h, f)), filter),
        ["bench"] => run(bench::run, ""),
        ["bench", filter] => run(bench::run, filter),
        ["compile", dir] => compile(Path::new(dir)),
        _ => Err("usage: device check [filter] | bench [filter] | compile DIR".into()),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("device: {error}");
            ExitCode::from(2)
        }
    }
}

type Outcome = Result<bool, Box<dyn std::error::Error>>;

fn run(what: fn(&Harness, &str) -> Outcome, filter: &str) -> Outcome {
    let cache = std::env::var_os("HADAL_KERNEL_CACHE").map(PathBuf::from);
    what(&Harness::open(cache)?, filter)
}

fn compile(dir: &Path) -> Outcome {
    for &program in kernels::cuda::Program::ALL {
        let code = kernels::cuda::compile(program, Some(dir))?;
        println!("{}: {} bytes", program.name, code.len());
    }
    Ok(true)
}
