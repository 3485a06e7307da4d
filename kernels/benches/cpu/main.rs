//! Speed of the CPU backend: `cargo bench -p kernels --bench cpu [-- [threads] [part of a name]]`.
//!
//! Products of the demo network's shapes and of slices of DeepSeek-V3's, against the reference and against a plain
//! float32 loop; then every operation of one MoE layer of the demo network. All variants of a line take turns within one
//! run, and the best of their rounds counts, so that ratios mean something on a shared machine.

mod experts;
mod host;
mod layer;
mod products;
mod timing;

use kernels::{DType, Precision};

use crate::layer::layer;
use crate::products::product;

fn main() {
    let args: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| !a.starts_with('-'))
        .collect();
    let threads = args.iter().find_map(|a| a.parse().ok()).unwrap_or(2);
    let only = args
        .iter()
        .find(|a| a.parse::<usize>().is_err())
        .map_or("", String::as_str);
    println!("{threads} threads; us is the best of several rounds\n");
    println!(
        "{:40} {:>5} {:>10} {:>9} {:>8} {:>11} {:>8}",
        "product", "rows", "us", "GFLOP/s", "GB/s", "x reference", "x plain"
    );
    for (name, n, k) in [
        ("demo q_a|kv_a", 288, 256),
        ("demo o_proj", 256, 256),
        ("demo lm_head", 4096, 256),
        ("V3 q_a|kv_a", 2112, 7168),
        ("V3 expert down", 7168, 2048),
    ] {
        for (form, dtype, precision) in [
            ("f32", DType::F32, Precision::F32),
            ("bf16", DType::Bf16, Precision::Bf16),
            ("fp8", DType::Fp8, Precision::W8),
            ("fp8 x fp8", DType::Fp8, Precision::W8A8),
        ] {
            for rows in [1, 16, 128] {
                if !name.contains(only) {
                    continue;
                }
                product(
                    &format!("{name} {form} [{n}, {k}]"),
                    rows,
                    n,
                    k,
                    dtype,
                    precision,
                    threads,
                );
            }
        }
    }
    println!(
        "\n{:40} {:>5} {:>10} {:>12}",
        "one MoE layer of the demo network", "rows", "us", "x reference"
    );
    for (rows, context) in [(1, 256), (16, 256), (1, 4096), (256, 256)] {
        layer(rows, context, threads, only);
    }
}
