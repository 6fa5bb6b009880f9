"""Builds ses_kernels._C: CUDA and CPU, CPU only, or not at all, said in one line; never fails.

The metadata is in pyproject.toml. Needs no torch. SES_KERNELS_CUDA=0 builds without CUDA;
TORCH_CUDA_ARCH_LIST ("7.5;8.0+PTX"), CUDA_HOME and CXX mean what they mean elsewhere.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).resolve().parent / "csrc"

# T4, A100, A10 / RTX 30, L4 / RTX 40, H100, B200, RTX 50; those this nvcc knows.
DEFAULT_ARCHS = ("75", "80", "86", "89", "90", "100", "120")

# Every file says itself where it fuses multiply and add: a matrix then has the same digits in
# whatever width of SIMD its batch is solved. -fno-math-errno makes sqrt one instruction.
CXX_FLAGS = (
    "-std=c++17 -O3 -DNDEBUG -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno "
    "-Wall -Wextra -Wshadow -Wno-psabi"
)
ISA_FLAGS = {"portable": ""}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = "-mavx2 -mfma -mf16c"
    ISA_FLAGS["avx512"] = (
        "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mavx2 -mfma -mf16c -mprefer-vector-width=512"
    )
# GCC, from 12 on, copies two registers of 32 bytes by 16 without it, and then waits to read them.
MOVE_BY_32 = "-mmove-max=256"


class UnavailableError(Exception):
    """Why a part cannot be built."""


def run(command, **options):
    """Standard output; the first error line of a failure becomes the reason."""
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if result.returncode:
        lines = [line.strip() for line in (result.stdout + result.stderr).splitlines()]
        errors = [line for line in lines if re.search(r"error|fatal|not found", line, re.I)]
        raise UnavailableError((errors or lines or [f"{command[0]} failed"])[0])
    return result.stdout


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    candidates += [Path(found)] if (found := shutil.which("nvcc")) else []
    candidates += [Path("/usr/local/cuda/bin/nvcc")]
    for nvcc in candidates:
        if nvcc.is_file():
            return str(nvcc)
    raise UnavailableError("no nvcc in CUDA_HOME or on PATH")


def cuda_version(nvcc):
    found = re.search(r"release (\d+\.\d+)", run([nvcc, "--version"]))
    if not found:
        raise UnavailableError(f"{nvcc} --version names no release")
    return found[1]


def cuda_archs(nvcc):
    """The architectures to compile for, as "75" or "120+PTX"."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if not asked:
        known = run([nvcc, "--list-gpu-code"]).split()
        archs = [arch for arch in DEFAULT_ARCHS if f"sm_{arch}" in known]
        if not archs:
            raise UnavailableError(f"{nvcc} knows none of sm_{', sm_'.join(DEFAULT_ARCHS)}")
        return [*archs[:-1], archs[-1] + "+PTX"]
    archs = []
    for item in re.split(r"[;,\s]+", asked):
        found = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", item)
        if not found:
            raise UnavailableError(
                f"TORCH_CUDA_ARCH_LIST={asked!r}: {item!r} is not like 8.0 or 8.0+PTX"
            )
        archs.append(found[1] + found[2] + (found[3] or ""))
    return archs


def gencode(archs):
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX")
        flags.append(f"-gencode arch=compute_{number},code=sm_{number}")
        if number != arch:
            flags.append(f"-gencode arch=compute_{number},code=compute_{number}")
    return " ".join(flags)


def find_cxx():
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    raise UnavailableError("no C++ compiler")


def accepts(cxx, flag):
    command = [*cxx.split(), flag, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def escape(path):
    return re.sub(r"([$: ])", r"$\1", str(path))


def ninja_file(output, nvcc, archs):
    """The text of build.ninja: one object a line, each instruction set of the CPU its own."""
    import pybind11

    cxx = find_cxx()
    includes = f"-isystem {sysconfig.get_path('include')} -isystem {pybind11.get_include()}"
    facts = ""
    if nvcc:
        facts = f'-DSES_CUDA_ARCHS=\\"{",".join(archs)}\\" '
        facts += f'-DSES_CUDA_VERSION=\\"{cuda_version(nvcc)}\\"'
    shared = "-shared -s -pthread -ldl"
    if sys.platform == "darwin":
        shared = "-bundle -undefined dynamic_lookup"
    lines = [
        "rule cxx",
        f"  command = {cxx} {CXX_FLAGS} -I{escape(CSRC)} -pthread $flags -MMD -MF $out.d "
        "-c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {cxx} {shared} $in -o $out $libraries",
    ]
    if nvcc:
        host = f"-ccbin {cxx}" if os.environ.get("CXX") else ""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        lines += [
            "rule nvcc",
            f"  command = {nvcc} {host} -std=c++17 -O3 -DNDEBUG --threads {cores} {gencode(archs)} "
            "-Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wshadow -MD -MF $out.d "
            "-c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule nvlink",
            f"  command = {nvcc} {host} -shared --cudart static -Xcompiler -pthread -Xlinker -s "
            "$in -o $out -ldl -lrt",
        ]
    objects = []

    def compile_(rule, source, name, flags=""):
        lines.append(f"build {name}.o: {rule} {escape(CSRC / source)}")
        lines.append(f"  flags = {flags}")
        objects.append(f"{name}.o")

    # The longest first.
    if nvcc:
        for source in ("rational_cuda", "eigh_cuda"):
            compile_("nvcc", f"{source}.cu", source)
    x86 = "-DSES_X86" if len(ISA_FLAGS) > 1 else ""
    for isa, flags in ISA_FLAGS.items():
        if isa == "avx2" and accepts(cxx, MOVE_BY_32):
            flags = f"{flags} {MOVE_BY_32}"
        for name in ("eigh", "gram", "rational"):
            define = f"-DSES_ISA={isa} {x86}"
            compile_("cxx", f"per_isa/{name}.cpp", f"{name}_{isa}", f"{define} {flags}")
    compile_("cxx", "bindings.cpp", "bindings", f"{includes} {facts} {x86}")
    for name in ("eigh_cpu", "gram_cpu", "rational_cpu"):
        compile_("cxx", f"{name}.cpp", name, x86)
    if not nvcc:
        compile_("cxx", "eigh_cuda_none.cpp", "eigh_cuda_none")
    lines.append(f"build {escape(output)}: {'nvlink' if nvcc else 'link'} {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """Writes build.ninja and lets ninja compile what changed."""

    def build_extension(self, ext):
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            decision = self.with_cuda(output)
        except UnavailableError as why_cpu:
            try:
                self.compile(output, None, ())
                decision = f"CPU only ({why_cpu})"
            except (UnavailableError, ImportError, OSError) as why:
                output.unlink(missing_ok=True)
                decision = f"no extension ({why}); the package runs on PyTorch alone"
        print(f"ses_kernels: {decision}", flush=True)

    def with_cuda(self, output):
        if os.environ.get("SES_KERNELS_CUDA") == "0":
            raise UnavailableError("SES_KERNELS_CUDA=0")
        try:
            nvcc = find_nvcc()
            archs = cuda_archs(nvcc)
            self.compile(output, nvcc, archs)
        except (ImportError, OSError) as error:
            raise UnavailableError(error) from error
        return f"CUDA {cuda_version(nvcc)} ({' '.join(archs)}) and CPU"

    def compile(self, output, nvcc, archs):
        import ninja

        build = Path(self.build_temp).resolve() / ("cuda" if nvcc else "cpu")
        build.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(output, nvcc, archs))
        run([str(Path(ninja.BIN_DIR) / "ninja")], cwd=build)


setup(
    # Optional: copying to the source tree for an editable install then accepts a missing one.
    ext_modules=[Extension("ses_kernels._C", sources=[], optional=True)],
    cmdclass={"build_ext": NinjaBuild},
)
