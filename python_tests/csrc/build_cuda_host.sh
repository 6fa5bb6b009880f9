#!/usr/bin/env bash
# Builds cuda_host.cu with the kernels, as in
#
#   python_tests/csrc/build_cuda_host.sh 7.5 /tmp/cuda_host
#
# for compute capability 7.5; what follows are more options of nvcc. OPTIMIZE=-O1 spares a third of
# the time, most of which the host's side takes; the device's code is as fast.
set -euo pipefail
capability=$1
output=$2
shift 2
PATH=${CUDA_HOME:+$CUDA_HOME/bin:}$PATH:/usr/local/cuda/bin
root=$(cd "$(dirname "$0")/../.." && pwd)
# The host's digits must not depend on whether its compiler fuses. GCC takes a tile of which no
# thread has a part for one that is used without a value.
exec nvcc -std=c++17 "${OPTIMIZE:--O3}" -lineinfo -arch="sm_${capability/./}" --threads 2 \
  -Xcompiler -Wall,-Wextra,-Wshadow,-Wno-maybe-uninitialized,-ffp-contract=off,-march=native \
  -I"$root/csrc" "$@" -o "$output" \
  "$root"/python_tests/csrc/cuda_host.cu "$root"/csrc/{rational,eigh}_cuda.cu
