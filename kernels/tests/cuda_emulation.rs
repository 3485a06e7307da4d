//! Runs the CUDA kernels on the host (`kernels/cuda/emulator`) through the device program's own checks, where there is a C++
//! compiler. Ignored by default: it compiles for half a minute. `cargo test -p kernels --test cuda_emulation -- --ignored`.

use std::path::Path;
use std::process::Command;

/// A case of each kernel that is quick in emulation.
const CASES: [&str; 18] = [
    "fp8_gemm m 7 n 576",
    "fp8_gemm_r64_t64_k2_d2 m 61 n 320",
    "fp8_gemm_grouped_r128_t128 contiguous 8 groups n 512",
    "fp8_prefill_t256_n128 m 549 n 576",
    "fp8_prefill_grouped_t192_n128_tokens contiguous 8 groups n 512",
    "fp8_gemm_grouped_r128_t64 masked 8 groups n 512",
    "mla_decode heads 16 queries 4 an empty one",
    "mla_decode heads 128 queries 1 block edges",
    "mla_prefill heads 16 a tile",
    "mla_prefill broken tokens",
    "add_norm rows 7",
    "swiglu rows 96",
    "quantise",
    "rope rows 37",
    "cache_write rows 37",
    "gather scatter",
    "gate v3",
    "sample vocab 1017",
];

#[test]
#[ignore = "compiles the kernels with g++ for half a minute"]
fn kernels_are_right_in_emulation() {
    let dir = tempfile::tempdir().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda/emulator/build.sh");
    let built = Command::new("sh")
        .arg(script)
        .arg(dir.path())
        .status()
        .unwrap();
    assert!(built.success(), "the emulation did not compile");
    for case in CASES {
        let run = Command::new(env!("CARGO_BIN_EXE_device"))
            .args(["check", case])
            .env("LD_LIBRARY_PATH", dir.path())
            .output()
            .unwrap();
        let output = String::from_utf8_lossy(&run.stdout);
        assert!(
            run.status.success() && output.contains(" right"),
            "{case}:\n{output}"
        );
    }
}
