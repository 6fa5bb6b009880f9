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
PATH=${CUDA_HOME:+$CUDA_HOME/bin:}$PATH:/usr/local/cuda/bin # nvcc and compute-sanitizer

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

driver=$(mktemp -d)/cuda_host # the CUDA kernels without Python: see python_tests/csrc/cuda_host.cu
trap 'rm -rf "$(dirname "$driver")"' EXIT
build() {
  "$PYTHON" setup.py build_ext --inplace &&
    python_tests/csrc/build_cuda_host.sh "$capability" "$driver"
}
export -f build
export PYTHON capability driver

stage "build" 80 bash -c build
stage "capabilities" 10 "$PYTHON" -m ses_kernels
poles=$("$PYTHON" -c '
import torch
from ses_kernels import rational_coefficients
c, t, w = rational_coefficients.columns(torch.float32, torch.float32)
print(c, *t, *w)
')
stage "digits" 20 "$driver" check $poles # a word a number
for tool in memcheck racecheck initcheck synccheck; do
  if command -v compute-sanitizer >/dev/null; then
    stage "$tool" 10 compute-sanitizer --tool "$tool" --error-exitcode 1 "$driver" launch $poles
  else
    echo "=== $tool skipped: compute-sanitizer is not on PATH"
  fi
done
stage "suite" 205 "$PYTHON" -m pytest -q -rs -n 8 --ignore python_tests/lab
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
