"""What this installation can do: python -m ses_kernels."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import ses_kernels
from ses_kernels import crossover, ops


def main() -> None:
    print(f"ses_kernels {ses_kernels.__version__}")
    print(f"  python      {platform.python_version()}, {platform.machine()}")
    print(f"  torch       {torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}")
    print(f"  triton      {_version('triton')}")
    if ops.EXTENSION_MISSING:
        print(f"  extension   missing: {ops.EXTENSION_MISSING}; torch operations serve instead")
    else:
        info = ops._C.info()
        cuda = ", ".join(f"sm_{a}" for a in info["cuda_archs"]) or "built without CUDA"
        print(f"  extension   CPU {info['isa']}; CUDA {info['cuda_version'] or '-'}: {cuda}")
    _device(torch.device("cpu"), "CPU", ops.EXTENSION_MISSING, "the extension")
    if not torch.cuda.is_available():
        print("cuda        missing: torch.cuda.is_available() is False")
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        triton = "Triton (float32 and half inputs)"
        _device(torch.device("cuda", index), name, ops.triton_missing(index), triton)
    _table()


def _device(device: torch.device, name: str, missing: str | None, kernels: str) -> None:
    print(f"{device!s:11} {name}")
    print(f"  Gram        {f'torch: {missing}' if missing else kernels}")
    for dtype in (torch.float32, torch.float64):
        limit = ops.eigh_limit(device.type, device.index, dtype.itemsize)
        eigh = f"extension for n <= {limit}, above it " if limit else ""
        print(f"  {_name(dtype):11} eigh: {eigh}torch.linalg.eigh")


def _table() -> None:
    """crossover.py in words: which solver, and which eigh, for matrices of n x n."""
    print('solver="auto", n = min(B, d)')
    for device, facts in crossover.MEASURED.items():
        print(f"  {device:11} {', '.join(f'{key}: {value}' for key, value in facts.items())}")
        _rows("rational", "eigh", device, crossover.RATIONAL)
        _rows("extension's eigh", "torch.linalg.eigh", device, crossover.EIGH)


def _rows(winner: str, other: str, device: str, table: dict) -> None:
    for (row_device, dtype), rows in table.items():
        if row_device == device:
            sizes = [
                f"n <= {n}" + (f" from batch {batch} on" if batch > 1 else "")
                for n, batch in rows.items()
            ]
            won = f"{winner} for {', '.join(sizes)}, else " if rows else ""
            print(f"    {_name(dtype):9} {won}{other}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing: not installed; Gram matrices on CUDA go to torch"


if __name__ == "__main__":
    main()
