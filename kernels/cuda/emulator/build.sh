#!/bin/sh
# Builds libcuda.so and libnvrtc.so, the host emulation of the kernels, into the folder given (needs g++ with C++20):
#   sh build.sh DIR && LD_LIBRARY_PATH=DIR cargo run --release -p kernels --bin device -- check FILTER
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=$(mkdir -p "$1" && cd "$1" && pwd)
: >"$out/kernels.inc"
for header in fp8 mla; do  # a copy for each kernel's namespace
    sed '/#pragma once/d' "$here/../$header.cuh" >"$out/$header.cuh"
done
for file in "$here"/../*.cu; do
    name=$(basename "$file" .cu)
    # Dynamic shared memory is a pointer here; the clock has no meaning.
    sed -e 's/extern __shared__ __align__(1024) u8 shared\[\];/u8* shared = emulator::shared_memory();/' \
        -e 's/extern __shared__ int blocks\[\];/int* blocks = (int*)emulator::shared_memory();/' \
        -e '/^extern "C" __global__ void clock_rate/,/^}/d' -e '/#pragma once/d' "$file" >"$out/$name.cu"
    echo "namespace $name {" >>"$out/kernels.inc"
    echo "#include \"$out/$name.cu\"" >>"$out/kernels.inc"
    echo "}" >>"$out/kernels.inc"
    {
        sed -n 's/^FP8_[A-Z]*(.*, \([a-z0-9_]*\))$/\1/p' "$file"
        tr '\n' ' ' <"$out/$name.cu" | grep -o 'extern "C" __global__ void[^{]*' |
            sed -e 's/__launch_bounds__([^)]*)//' -e 's/.*void *\([a-z0-9_]*\)(.*/\1/' | grep -v NAME || true
    } | grep . | sed "s/.*/KERNEL($name, &)/" >>"$out/kernels.inc"
done
g++ -std=c++20 -O2 -w -fPIC -shared -Wno-psabi -include wgmma.cuh -I"$here" -I"$out" -o "$out/libcuda.so" "$here/emulator.cpp"
ln -sf libcuda.so "$out/libnvrtc.so"
