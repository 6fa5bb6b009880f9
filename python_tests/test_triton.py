"""The Triton kernels without a GPU: run by the interpreter, compiled ahead of time to cubins.

What only a GPU can show is the tensor cores' rounding and speed: the interpreter multiplies in
float32, and a cubin is not run here.
"""

import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("set TRITON_INTERPRET for interpreter_cases.py alone", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import ses_kernels.kernels
from ses_kernels.kernels import gram

HERE = Path(__file__).parent


def version(module):
    return tuple(int(part) for part in module.__version__.split(".")[:2])


@pytest.mark.skipif(
    version(triton) < (3, 7) and version(numpy) >= (2, 4),
    reason="Triton 3.6's interpreter raises with NumPy 2.4 and later",
)
def test_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(HERE / "interpreter_cases.py")],
        cwd=HERE.parent, env={**os.environ, "TRITON_INTERPRET": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, "the interpreter's cases failed; their output is above"
    assert re.search(r"\b\d+ passed", done.stdout)
    assert "skipped" not in done.stdout or "no address space" in done.stdout


# ---- ahead-of-time compilation --------------------------------------------------------------

# Shared memory one block may ask for, in KiB: T4, A100, RTX 30, RTX 40 / L4, H100, B200.
SHARED_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227}
# Every row once per generation of tensor core, and once for a half type, which changes the loads
# alone. Elsewhere the largest tiles of both sides, as they need most shared memory: sm_86 and
# sm_89 run sm_80's code, and ops.py sends sm_75 to PyTorch.
EVERY_ROW = (("fp32", 80), ("fp32", 90), ("fp32", 100), ("bf16", 80))
# A spill of a few registers is hidden; one of an accumulator is not.
MOST_STACK = 32
# Aligned pointers, strides and n, m, d, as in nearly all calls, let Triton use wide loads and
# asynchronous copies; these counts are rarely multiples of 16.
ALIGNED = [["tt.divisibility", 16]]
COUNTS = ("b", "splits", "parts")
POINTERS = {"x_ptr": None, "dx_ptr": None, "tops_ptr": "*i32"}  # None: x's dtype


def kernels():
    """Every @triton.jit function of ses_kernels.kernels, by name."""
    found = {}
    for info in pkgutil.walk_packages(ses_kernels.kernels.__path__, "ses_kernels.kernels."):
        members = vars(importlib.import_module(info.name)).items()
        found.update((name, f) for name, f in members if isinstance(f, JITFunction))
    return found


def location_rows(largest):
    tile = {"BLOCK_R": gram.LOCATION_ROWS, "BLOCK_D": gram.LOCATION_COLS, "stride_c": 1}
    options = {"num_warps": gram.LOCATION_WARPS}
    yield "parts", {**tile, "WHOLE": False}, options
    if not largest:
        none = dict.fromkeys(("anchor_ptr", "sums_ptr", "location_ptr"))
        yield "parts uncentred", {**tile, "WHOLE": False, **none}, options
        yield "whole", {**tile, "WHOLE": True, "sums_ptr": None, "tops_ptr": None}, options
        yield "whole uncentred", {**tile, "WHOLE": True, "tops_ptr": None, **none}, options


def finish_rows(largest):
    tile = {"BLOCK_D": gram.FINISH_COLS, "BLOCK_P": gram.FINISH_PARTS}
    options = {"num_warps": gram.LOCATION_WARPS}
    yield "centred", tile, options
    none = dict.fromkeys(("anchor_ptr", "sums_ptr", "location_ptr"))
    yield "uncentred", {**tile, **none}, options


def reduce_rows(largest):
    yield "", {"BLOCK": gram.REDUCE_BLOCK}, {}


def product_rows(table, constants, strides, largest):
    """Both sides and every tile; without location, and with any strides, the last alone."""
    for side in ("samples", "features"):
        for tile in table[-1:] if largest else table:
            row = {"SAMPLES": side == "samples", "BLOCK_N": tile.n, "BLOCK_M": tile.m, **constants}
            # The stride along the contiguous axis of x (of dx) is 1 and becomes a constant.
            unit = dict.fromkeys((s + ("m" if side == "samples" else "n") for s in strides), 1)
            if "ONE_TILE" in row:
                row["ONE_TILE"] = tile is not table[-1]
            options = {"num_warps": tile.warps, "num_stages": tile.stages}
            yield f"{side} {tile.n}x{tile.m}", {**row, **unit}, options
        if "ONE_TILE" in row and not largest:
            yield f"{side} {tile.n}x{tile.m} one", {**row, **unit, "ONE_TILE": True}, options
    if not largest:
        yield f"{side} uncentred", {**row, **unit, "location_ptr": None}, options
        yield f"{side} strided", row, options


def gram_rows(largest):
    return product_rows(gram.GRAM_TILES, {"ONE_TILE": None}, ["stride_"], largest)


def backward_rows(largest):
    depth = {"BLOCK_K": gram.BACKWARD_DEPTH}
    return product_rows(gram.BACKWARD_TILES, depth, ["stride_", "stride_d"], largest)


# name -> the rows (label, constants, options) that the launchers can ask for
ROWS = {
    "location_partial_kernel": location_rows,
    "location_finish_kernel": finish_rows,
    "gram_kernel": gram_rows,
    "gram_reduce_kernel": reduce_rows,
    "gram_backward_kernel": backward_rows,
}


def test_no_kernel_is_left_out():
    launched = {name for name in kernels() if not name.startswith("_")}
    assert launched == set(ROWS)
    sources = {name: inspect.getsource(f.fn) for name, f in kernels().items()}
    for name, source in sources.items():
        if name not in ROWS:  # a helper: compiled inside the kernels that call it
            assert any(f"{name}(" in sources[user] for user in ROWS), f"{name} is unused"
        # Axes 1 and 2 of a grid end at 65535, and a batch may not.
        assert not re.search(r"program_id\([12]\)", source), name
        # The default precision of tl.dot is tf32.
        assert source.count("tl.dot(") == source.count("input_precision=PRECISION"), name


def compile_row(kernel, constants, options, dtype, arch, strided):
    constants = dict(constants)
    if "PRECISION" in kernel.arg_names:
        constants["PRECISION"] = gram.precision(arch // 10)
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, "*fp32") or f"*{dtype}"
        else:
            signature[name] = "i64" if strided and name.startswith("stride") else "i32"
        if name not in constants and name not in COUNTS and not strided:
            attributes[(index,)] = ALIGNED
    assert set(constants) <= set(kernel.arg_names)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(cubin):  # -> registers, bytes of stack (spills) per thread; None without the tool
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([tool, "-res-usage", file.name], text=True)
    return tuple(int(re.search(rf"{word}:(\d+)", text)[1]) for word in ("REG", "STACK"))


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("arch", SHARED_KIB)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_compiles(dtype, arch, name, tmp_path, monkeypatch):
    kernel = kernels()[name]
    if dtype != "fp32" and "x_ptr" not in kernel.arg_names:
        pytest.skip("no argument has x's dtype")
    # A cache of its own, so that the test compiles and does not look up.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for label, constants, options in ROWS[name](largest=(dtype, arch) not in EVERY_ROW):
        compiled = compile_row(kernel, constants, options, dtype, arch, "strided" in label)
        cubin, shared = compiled.asm["cubin"], compiled.metadata.shared
        registers, stack = resources(cubin)
        print(f"sm_{arch} {dtype} {name} {label}: {registers} regs, {stack} stack, {shared} smem")
        assert cubin[:4] == b"\x7fELF"
        assert shared <= SHARED_KIB[arch] * 1024
        assert stack is None or stack <= MOST_STACK, "an accumulator spills"
    assert any(tmp_path.rglob("*.cubin"))
