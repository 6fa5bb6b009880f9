"""What this installation can do: python -m ses_kernels."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import ses_kernels
from ses_kernels import ops, solvers

_SIZES = (8, 32, 64, 128, 256, 512)


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
        print(f"  extension   CPU {info['simd']}; CUDA {info['cuda_version'] or '-'}: {cuda}")
    _device(torch.device("cpu"), "CPU", None)
    if not torch.cuda.is_available():
        print("cuda        missing: torch.cuda.is_available() is False")
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        _device(torch.device("cuda", index), name, ops.triton_missing(index))


def _device(device: torch.device, name: str, triton_missing: str | None) -> None:
    kernels = "torch (BLAS)" if device.type == "cpu" else "Triton (float32 and half inputs)"
    print(f"{device!s:11} {name}")
    print(f"  Gram        {f'torch: {triton_missing}' if triton_missing else kernels}")
    for dtype in (torch.float32, torch.float64):
        limit = ops.eigh_limit(device.type, device.index, dtype.itemsize)
        eigh = f"extension for n <= {limit}, above it " if limit else ""
        chosen = ", ".join(f"{n}: {solvers.choose(device, dtype, n)}" for n in _SIZES)
        print(f"  {str(dtype).removeprefix('torch.')}     eigh: {eigh}torch.linalg.eigh")
        print(f"              solver='auto' by n: {chosen}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing: not installed; Gram matrices on CUDA go to torch"


if __name__ == "__main__":
    main()
