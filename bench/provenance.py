"""Where and with what a row was measured."""

from __future__ import annotations

import argparse
import json
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from pytest_benchmark.utils import get_commit_info

from ses_kernels import ops

_PACKAGES = ("torch", "triton", "ses_kernels", "numpy", "vendi-score", "cupy-cuda12x", "jax")


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def file_stem(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def isa() -> str | None:
    """The instruction set that the CPU kernels run with; None without the extension."""
    return None if ops.EXTENSION_MISSING else ops._C.info()["isa"]


def add_isa(parser: argparse.ArgumentParser) -> None:
    """The option --isa, in force as soon as it is parsed."""

    def use(name: str) -> str:
        try:
            if ops.EXTENSION_MISSING:
                raise ValueError(ops.EXTENSION_MISSING)
            ops._C.use_isa(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return name

    parser.add_argument(
        "--isa", type=use, help="instruction set of the CPU kernels; the best of this machine"
    )


def provenance(device: str) -> dict[str, object]:
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "device": device_name(device),
        "isa": isa() if device == "cpu" else None,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


# ---- of commands that take their rows themselves, and not by pytest-benchmark ----


def with_commit(device: str) -> dict[str, object]:
    commit = get_commit_info()
    return {"commit": commit["id"], "dirty": commit["dirty"], **provenance(device)}


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, help="JSON rows, each with its provenance")


def write(rows: list[dict], output: Path | None) -> None:
    if output:
        output.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
