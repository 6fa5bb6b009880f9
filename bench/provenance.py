"""Where and with what a row was measured."""

from __future__ import annotations

import argparse
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

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
