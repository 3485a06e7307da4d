#!/usr/bin/env python3
"""Writes wgmma.cuh: one overload per tensor-core shape the kernels use. Run it again after adding a shape."""

SS_FP8 = [16, 32, 48, 64, 80, 96, 112, 128, 192]
SS_BF16 = [64, 128]
SS_BF16_N = [256]  # B with n contiguous (V), A from shared memory
RS_BF16_N = [128, 256]  # B with n contiguous (V), A from registers


def accumulators(n):
    return ", ".join(f'"+f"(d[{i}])' for i in range(n // 2))


def braces(n):
    return "{" + ",".join(f"%{i}" for i in range(n // 2)) + "}"


def emit(name, shape, types, n, regs, extra):
    at = n // 2
    if regs:
        a, params, inputs = "{" + ",".join(f"%{at + i}" for i in range(4)) + "}", "const u32 (&a)[4]", ", ".join(f'"r"(a[{i}])' for i in range(4))
        b = at + 4
    else:
        a, params, inputs = f"%{at}", "u64 a", '"l"(a)'
        b = at + 1
    return f"""template <>
struct {name}<{n}> {{
    static DEVICE void mma(float (&d)[{at}], {params}, u64 b, u32 add) {{
        asm volatile(
            "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{b + 1}, 0;\\n"
            "wgmma.mma_async.sync.aligned.m64n{n}{shape}.f32.{types} "
            "{braces(n)}, {a}, %{b}, p{extra};\\n}}"
            : {accumulators(n)}
            : {inputs}, "l"(b), "r"(add));
    }}
}};
"""


def main():
    out = ["""// Written by wgmma.py. d += a * b on the tensor cores of one warpgroup, D in registers: m64, n as named; `add` = 0 starts d
// from zero. Thread t of the warpgroup holds of row 16 * (t / 32) + t % 32 / 4 (+ 8) the columns 8 j + 2 (t % 4) (+ 1) in
// d[4 j + {0, 1}] (row + 8: {2, 3}).
#pragma once
#include "ptx.cuh"

// E4M3 x E4M3, k = 32, both operands K-major in shared memory.
template <int N>
struct Fp8;
// BF16, k = 16, both operands K-major in shared memory.
template <int N>
struct Bf16;
// BF16, k = 16, A K-major in shared memory, B with n contiguous.
template <int N>
struct Bf16N;
// BF16, k = 16, A in registers, B with n contiguous.
template <int N>
struct Bf16RegN;
"""]
    out += [emit("Fp8", "k32", "e4m3.e4m3", n, False, ", 1, 1") for n in SS_FP8]
    out += [emit("Bf16", "k16", "bf16.bf16", n, False, ", 1, 1, 0, 0") for n in SS_BF16]
    out += [emit("Bf16N", "k16", "bf16.bf16", n, False, ", 1, 1, 0, 1") for n in SS_BF16_N]
    out += [emit("Bf16RegN", "k16", "bf16.bf16", n, True, ", 1, 1, 1") for n in RS_BF16_N]
    with open(__file__.replace("wgmma.py", "wgmma.cuh"), "w") as f:
        f.write("\n".join(out))


main()
