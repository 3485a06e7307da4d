#!/usr/bin/env python3
"""Compiles every kernel to sm_90a machine code without a GPU and fails on what would be slow or wrong on one.

    pip install -r kernels/cuda/requirements.txt && python kernels/cuda/compile.py [DIR]

Fails on a compile error, a spill, a wgmma that the compiler had to serialise, a register count that setmaxnreg cannot change,
and a matrix kernel without the tensor-core instruction it is written for. With DIR, leaves the cubins there.
"""

import ctypes
import pathlib
import re
import site
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
OPTIONS = ["--gpu-architecture=sm_90a", "--std=c++20", "-default-device", "--diag-error=177", "--ptxas-options=-v"]
# The instruction that every kernel of a program must hold, but for the named ones.
EXPECTED = {"fp8_gemm": ("QGMMA", ()), "fp8_prefill": ("QGMMA", ()), "mla_decode": ("HGMMA", ()), "mla_prefill": ("HGMMA", ())}
# C7508: setmaxnreg ignored; C7510 to C7520 without C7519 (a fence was added, harmless): wgmma serialised.
BAD = re.compile(r"\(C75(08|1[0-8]|20)\)")


def find(pattern):
    """The first file of the installed wheels that matches."""
    for root in [*site.getsitepackages(), site.getusersitepackages()]:
        for path in sorted(pathlib.Path(root).glob(pattern)):
            return path
    sys.exit(f"{pattern} not found: pip install -r {HERE / 'requirements.txt'}")


def compile_program(nvrtc, source):
    """Returns (ok, log, cubin) of one source file."""
    headers = sorted(HERE.glob("*.cuh"))
    texts = (ctypes.c_char_p * len(headers))(*[h.read_bytes() for h in headers])
    names = (ctypes.c_char_p * len(headers))(*[h.name.encode() for h in headers])
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.read_bytes(), source.name.encode(), len(headers), texts, names
    )
    options = (ctypes.c_char_p * len(OPTIONS))(*[o.encode() for o in OPTIONS])
    ok = nvrtc.nvrtcCompileProgram(program, len(OPTIONS), options) == 0

    def read(what):
        size = ctypes.c_size_t()
        if getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) != 0:
            return b""
        buffer = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw

    return ok, read("ProgramLog").decode(errors="replace").strip("\0"), read("CUBIN") if ok else b""


def complaints(name, log, cubin, disassembler, directory):
    """What is wrong with a program that compiled."""
    found = [line for line in log.splitlines() if BAD.search(line)]
    kernel = "?"
    for line in log.splitlines():
        if match := re.search(r"Function properties for (\S+)", line):
            kernel = match[1]
        if re.search(r"[1-9]\d* bytes spill", line):
            found.append(f"{kernel}: {line.split('.', 1)[-1].strip()}")
    path = directory / f"{name}.cubin"
    path.write_bytes(cubin)
    if name in EXPECTED:
        wanted, exempt = EXPECTED[name]
        sass = subprocess.run([disassembler, path], capture_output=True, text=True, check=True).stdout
        for section in re.split(r"^\.text\.", sass, flags=re.M)[1:]:
            kernel = section.split(":", 1)[0]
            if wanted not in section and kernel not in exempt:
                found.append(f"{kernel}: no {wanted}")
    return found


def main():
    builtins = find("nvidia/cu13/lib/libnvrtc-builtins.so.13*")
    ctypes.CDLL(builtins, mode=ctypes.RTLD_GLOBAL)  # libnvrtc opens it by name
    nvrtc = ctypes.CDLL(find("nvidia/cu13/lib/libnvrtc.so.13"))
    disassembler = find("triton/backends/nvidia/bin/nvdisasm")
    bad = False
    with tempfile.TemporaryDirectory() as scratch:
        directory = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else scratch)
        directory.mkdir(parents=True, exist_ok=True)
        for source in sorted(HERE.glob("*.cu")):
            ok, log, cubin = compile_program(nvrtc, source)
            found = complaints(source.stem, log, cubin, disassembler, directory) if ok else [log]
            kernels = len(re.findall("Compiling entry function", log))
            print(f"{source.name}: {kernels} kernels, {len(cubin)} bytes, {'ok' if not found else 'BAD'}", flush=True)
            for line in found:
                print(f"    {line}")
            bad |= bool(found)
    sys.exit(bad)


main()
