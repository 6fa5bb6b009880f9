#!/usr/bin/env bash
# Everything that needs a GPU, in one command of less than nine minutes and no network:
#
#   PYTHON=python3 bench/gpu.sh
#
# Uses the environment of $PYTHON: torch >= 2.11, nvcc, and the extra "test" of pyproject.toml; CuPy
# and JAX join the benchmarks where they are installed. A stage that fails or runs out of its time
# does not stop the rest; the exit code is the number of such stages. Rows, table and plot:
# bench/results/<device>.* and <device>-training.*; which solver is taken where:
# ses_kernels/crossover.py
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

if ! capability=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>&1); then
  echo "bench/gpu.sh needs a CUDA GPU that PyTorch can use; $PYTHON found none: ${capability##*$'\n'}" >&2
  exit 64
fi
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability}
export XLA_PYTHON_CLIENT_PREALLOCATE=false # JAX would take most of the memory at its first call

failed=()
stage() { # name, seconds, command...
  local name=$1 seconds=$2 start=$SECONDS
  shift 2
  echo "=== $name, at most $seconds s: $*" | cut -c 1-200
  # SIGINT, so that pytest still writes what it has measured.
  timeout --signal=INT --kill-after=10 "$seconds" "$@" || failed+=("$name (exit code $?)")
  echo "=== $name took $((SECONDS - start)) s"
}

small_run='
import torch, ses_kernels
for shape in [(3, 5, 7), (4, 33, 16), (2, 64, 96), (1, 130, 70), (1, 200, 300), (1, 300, 400)]:
    x = torch.randn(shape, device="cuda", requires_grad=True)
    ses_kernels.spectral_entropy(x).sum().backward()
    ses_kernels.spectral_entropy(x, solver="rational").sum().backward()
    ses_kernels.linalg.eigh(x.detach() @ x.detach().mT)
    assert x.grad.isfinite().all()
torch.cuda.synchronize()
'

stage "build" 80 "$PYTHON" setup.py build_ext --inplace
stage "capabilities" 10 "$PYTHON" -m ses_kernels
stage "suite" 205 "$PYTHON" -m pytest -q -rs -n 8 --ignore python_tests/lab
for tool in memcheck racecheck; do
  if command -v compute-sanitizer >/dev/null; then
    # Without the caching allocator, an access past a tensor is one past its allocation.
    stage "$tool" 30 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" -c "$small_run"
  else
    echo "=== $tool skipped: compute-sanitizer is not on PATH"
  fi
done
stage "benchmarks" 90 "$PYTHON" -m bench --budget 0.05 -k "(float32 or ResNet-18) and not training"
device=$("$PYTHON" -c 'from bench.provenance import file_stem; print(file_stem("cuda"))')
stage "training" 55 "$PYTHON" -m bench --budget 0.05 -k "training and torch.float16" \
  --output "bench/results/$device-training.json"
# Last, so that the rows above belong to what is committed. If it decides otherwise than the table
# that they were measured with, commit the new one and run all of this again.
stage "crossover" 40 "$PYTHON" -m bench.crossover --budget 0.02

if ((${#failed[@]})); then
  printf 'FAILED: %s\n' "${failed[@]}"
else
  echo "All stages passed."
fi
exit "${#failed[@]}"
