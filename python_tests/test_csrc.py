"""The C++ and CUDA sources on their own: sanitizers, SIMD widths, and a compile for every GPU."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ses_kernels import ops, rational_coefficients

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
DRIVERS = ROOT / "python_tests" / "csrc"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.is_file())
PER_ISA_SOURCES = sorted(CSRC.glob("per_isa/*.cpp"))
CPU_SOURCES = sorted(CSRC.glob("*_cpu.cpp"))

FLAGS = [
    "-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-Wno-psabi",
    "-ffp-contract=off", "-fno-math-errno", "-pthread",
]  # fmt: skip
SANITIZERS = {
    # Without the checks of every pointer, which multiply the compile time by ten: AddressSanitizer
    # looks at the accesses themselves.
    "address": "-fsanitize=address,undefined "
    "-fno-sanitize=null,object-size,alignment,pointer-overflow -fno-sanitize-recover=all",
    "thread": "-fsanitize=thread",
}
X86_FLAGS = {
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mavx2 -mfma -mf16c",
}


def run(*command, **options):
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )


def compile_cpp(*arguments, compiler="g++"):
    """A compiler with the include paths; skips without it."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    result = run(compiler, *FLAGS, f"-I{CSRC}", f"-I{DRIVERS}", *arguments)
    assert result.returncode == 0, result.stderr[-4000:]


def compile_isa(isa, tmp_path, *flags, compiler="g++"):
    """The sources that are compiled once for each instruction set, for this one."""
    x86 = ["-DSES_X86"] if isa != "portable" else []

    def compile_one(source):
        target = tmp_path / f"{source.stem}_{isa}.o"
        define = f"-DSES_ISA={isa}"
        compile_cpp(define, *x86, *flags, "-c", source, "-o", target, compiler=compiler)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, PER_ISA_SOURCES))


def compile_host_side(tmp_path, *flags, compiler="g++"):
    """The sources that pick an instruction set and cut a call into tasks."""
    targets = [tmp_path / f"{source.stem}.o" for source in CPU_SOURCES]
    for source, target in zip(CPU_SOURCES, targets, strict=True):
        compile_cpp(*flags, "-c", source, "-o", target, compiler=compiler)
    return targets


def sanitizer_flags(name, tmp_path):
    """The flags; skips where the compiler has no runtime library for them."""
    flags = SANITIZERS[name].split()
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}")
    built = run("g++", *flags, probe, "-o", tmp_path / "probe") if shutil.which("g++") else None
    if built is None or built.returncode or run(tmp_path / "probe").returncode:
        pytest.skip(f"g++ -fsanitize={name} does not build or run a program here")
    return flags


def run_driver(program, *arguments, emulator=(), timeout=300):
    result = run(*emulator, program, *arguments, timeout=timeout)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout


def run_cpu_drivers(objects, tmp_path, *flags, compiler="g++", **options):
    """What the drivers of all CPU kernels say. Sanitizers watch the kernels, not the checks."""
    poles = {
        dtype.itemsize: rational_coefficients.columns(torch.float64, dtype)
        for dtype in (torch.float32, torch.float64)
    }
    calls = {
        "eigh_cpu": [()],
        "gram": [()],
        "rational": [(itemsize, c, *t, *w) for itemsize, (c, t, w) in poles.items()],
    }

    def compile_and_run(name):
        driver = tmp_path / f"{name}_host.o"
        define = [flag for flag in flags if flag.startswith("-D")]
        source, program = DRIVERS / f"{name}_host.cpp", tmp_path / name
        compile_cpp(*define, "-c", source, "-o", driver, compiler=compiler)
        compile_cpp(*flags, driver, *objects, "-o", program, compiler=compiler)
        return [run_driver(program, *arguments, **options).strip() for arguments in calls[name]]

    with ThreadPoolExecutor(2) as pool:
        return [line for said in pool.map(compile_and_run, calls) for line in said]


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_jacobi_has_the_same_bits_on_any_number_of_threads(sanitizer, tmp_path):
    flags = sanitizer_flags(sanitizer, tmp_path)
    compile_cpp(*flags, DRIVERS / "jacobi_host.cpp", "-o", tmp_path / "driver")
    run_driver(tmp_path / "driver")


def test_thread_sanitizer_finds_a_missing_barrier(tmp_path):
    flags = sanitizer_flags("thread", tmp_path)
    compile_cpp(*flags, "-DSES_DROP_SYNC", DRIVERS / "jacobi_host.cpp", "-o", tmp_path / "driver")
    options = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    result = run(tmp_path / "driver", timeout=300, env=options)
    assert result.returncode != 0
    assert "data race" in result.stderr


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_cpu_kernels_under_sanitizers(sanitizer, tmp_path):
    # The portable build only: the others are the same templates on wider registers, for which a
    # sanitizer takes minutes.
    flags = sanitizer_flags(sanitizer, tmp_path)
    objects = compile_isa("portable", tmp_path, *flags)
    objects += compile_host_side(tmp_path, *flags)
    said = run_cpu_drivers(objects, tmp_path, "-DSES_FEW_SIZES", *flags)
    assert said == ["portable", "gram is right", "rational is right", "rational is right"]


@pytest.mark.slow
def test_cpu_kernels_on_aarch64(tmp_path):
    """Cross-compiled with NEON and emulated: Debian's g++-aarch64-linux-gnu and qemu-user."""
    compiler, emulator = "aarch64-linux-gnu-g++", shutil.which("qemu-aarch64")
    if emulator is None:
        pytest.skip("no qemu-aarch64")
    flags = ["-O2", "-static"]
    objects = compile_isa("portable", tmp_path, *flags, compiler=compiler)
    objects += compile_host_side(tmp_path, *flags, compiler=compiler)
    said = run_cpu_drivers(
        objects, tmp_path, *flags, compiler=compiler, emulator=[emulator], timeout=1200
    )
    assert said == ["portable", "gram is right", "rational is right", "rational is right"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set")
def test_instruction_sets_agree_and_stay_apart(tmp_path):
    objects = []
    for isa, flags in {"portable": "", **X86_FLAGS}.items():
        built = compile_isa(isa, tmp_path, *flags.split())
        objects += built
        # An inline function shared between builds would be linked once, perhaps for AVX-512.
        for unit in built:
            symbols = run("nm", "--defined-only", "--extern-only", "-C", unit).stdout
            functions = re.findall(r"^\S+ [TWVu] (.*)$", symbols, re.M)
            assert functions
            assert all(f"ses::{isa}::" in function for function in functions), symbols
    objects += compile_host_side(tmp_path, "-DSES_X86")
    assert all(run_cpu_drivers(objects, tmp_path, "-DSES_X86"))


@pytest.mark.parametrize(
    ("source", "functions"),
    [("gram.cpp", {"gram_arranged", "backward"}), ("rational.cpp", {"rational"})],
)
def test_prefetches_are_not_left_out(source, functions, tmp_path):
    """A function of nothing else is pure to the compiler, which then drops the calls of it."""
    if platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("the instruction's name is not known here")
    assembly = tmp_path / "code.s"
    compile_cpp("-DSES_ISA=portable", "-O3", "-g0", "-S", CSRC / "per_isa" / source, "-o", assembly)
    # label, body, label, body, ..
    _, *parts = re.split(r"^(_Z[\w.]+):$", assembly.read_text(), flags=re.M)
    prefetching = [
        label
        for label, body in zip(parts[::2], parts[1::2], strict=True)
        if re.search(r"^\s+(prefetch|prfm)", body, re.M)
    ]
    for function in functions:
        assert any(function in label for label in prefetching), (function, prefetching)


@pytest.fixture(scope="module")
def cuobjdump():
    """(option) -> what it says of the CUDA code in the extension: of all GPUs it is built for."""
    if ops.EXTENSION_MISSING or not ops._C.info()["cuda_archs"]:
        pytest.skip("no extension built with CUDA")
    tool = shutil.which("cuobjdump")
    if tool is None and (triton := importlib.util.find_spec("triton")):
        tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if tool is None or not Path(tool).exists():
        pytest.skip("no cuobjdump: it comes with Triton and with CUDA toolkits")
    return lambda option: run(tool, option, ops._C.__file__).stdout


def test_no_cuda_kernel_spills(cuobjdump):
    text = cuobjdump("-res-usage")
    built = {str(arch).removesuffix("+PTX") for arch in ops._C.info()["cuda_archs"]}
    kernels = {}  # mangled name, with that of its file -> the GPUs it is compiled for
    for part in re.split(r"^arch = sm_", text, flags=re.M)[1:]:
        arch = re.match(r"\w+", part)[0]
        for name, registers, stack, shared, local in re.findall(
            r"^ Function (\S+):\n\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", part, re.M
        ):
            print(f"sm_{arch:4} {registers:>3} registers, {shared:>5} bytes static shared, {name}")
            assert stack == local == "0", (name, arch)  # spills lie in the stack frame
            kernels.setdefault(name, set()).add(arch)
    assert all(archs == built for archs in kernels.values()), (kernels, built)
    for source in CSRC.glob("*.cu"):
        assert any(f"_{source.stem}_cu_" in name for name in kernels), source.name


def test_no_cuda_kernel_moves_single_bytes(cuobjdump):
    """A copy whose alignment the compiler has lost: right, and several times slower."""
    if not any(str(arch).endswith("+PTX") for arch in ops._C.info()["cuda_archs"]):
        pytest.skip("built without PTX")
    accesses = re.findall(r"^\s*((?:ld|st)\.\S+)", cuobjdump("-ptx"), re.M)
    memory = {access for access in accesses if not access.startswith("ld.param")}
    assert not [access for access in memory if access.endswith("8")]
    for space in ("global", "shared"):  # as the rational solver copies its tiles
        assert {f"ld.{space}.v4.f32", f"st.{space}.v4.f32"} <= memory


@pytest.fixture(scope="module")
def cuda_driver(tmp_path_factory):
    """(mode) -> the completed process of cuda_host.cu: the CUDA kernels without torch."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (7, 5)
    driver = tmp_path_factory.mktemp("cuda") / "driver"
    result = run(
        DRIVERS / "build_cuda_host.sh", f"{major}.{minor}", driver,
        "-Werror", "all-warnings", "-Xcompiler", "-Werror", env={**os.environ, "OPTIMIZE": "-O1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    c, t, w = rational_coefficients.columns(torch.float32, torch.float32)
    return lambda mode: run(driver, mode, c, *t, *w, timeout=300)


@pytest.mark.skipif(torch.cuda.is_available(), reason="only without a device")
def test_cuda_driver_says_that_there_is_no_device(cuda_driver):
    result = cuda_driver("check")
    assert result.returncode == 77, result.stdout + result.stderr
    assert result.stdout.strip() == "no CUDA device"


@pytest.mark.cuda
def test_cuda_digits_are_those_of_the_host(cuda_driver):
    result = cuda_driver("check")
    print(result.stdout)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]


def test_no_torch_header():
    for path in SOURCES:
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path.name


@pytest.mark.parametrize(
    "header",
    [path for path in SOURCES if path.suffix == ".h" and "cuda" not in path.name],
    ids=lambda path: path.name,
)
def test_a_header_includes_what_it_needs(header):
    compile_cpp("-DSES_ISA=portable", "-fsyntax-only", "-include", header, "-x", "c++", os.devnull)


def test_types_are_spelled():
    """A letter is mathematics, and not also a type."""
    declares = r"\b(?:typename|class|struct|using) ([A-Za-z])\b"
    assert re.findall(declares, "template <typename P> using T = int;") == ["P", "T"]
    letters = [
        (path.name, name) for path in SOURCES for name in re.findall(declares, path.read_text())
    ]
    assert letters == []


def test_module_docstring_names_every_function():
    text = (CSRC / "bindings.cpp").read_text()
    docstring = re.search(r"m\.doc\(\) =(.*?);\n", text, re.S)[1]
    functions = re.findall(r'm\.def\(\s*"(\w+)"', text)
    assert functions
    assert [name for name in functions if not re.search(rf"\b{name}\b", docstring)] == []


def test_limits_are_typed_once():
    texts = {path: path.read_text() for path in [*SOURCES, *(ROOT / "ses_kernels").rglob("*.py")]}
    names = {name for text in texts.values() for name in re.findall(r"\bkMaxN[A-Za-z]+", text)}
    assert names
    for name in names:
        typed = [path.name for path, text in texts.items() if re.search(rf"\b{name}\s*=[^=]", text)]
        assert len(typed) == 1, (name, typed)
