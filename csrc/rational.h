// The entropy of Gram matrices by partial fractions of the logarithm, log x ~ constant - sum_j
// w_j / (x + t_j), seen from every side: plain pointers and sizes; no Python, no torch, no CUDA
// header.
#pragma once

#include <cstddef>

namespace ses {

constexpr int kMaxPoles = 40;

struct Poles {
  double constant;
  int count;        // <= kMaxPoles
  const double* t;  // [count] ascending, > 0; host memory, as w
  const double* w;  // [count] > 0
};

// H = -tr(P log P) and M = dH/dK = -(log P + H I) / tr K, P = K / tr K, of symmetric positive
// semidefinite matrices K. tr K = 0 gives H = 0 and M = 0; NaN or Inf gives that matrix NaN, and no
// other.
template <typename Entry, typename Result>
struct GramLayer {
  const Entry* gram;  // [batch, n, n], contiguous
  Result* h;          // [batch]
  Result* m;          // [batch, n, n], contiguous; null: entropy alone
  long batch;
  int n;
  bool center = false;  // J M J instead of M, J = I - 11^T / n
};

// ---- CUDA: float32, 1 <= n <= max_n_rational_cuda(device); NaN for an eigenvalue < -16 t_1 tr K

// 0 where it cannot run: no CUDA build, no device, a driver too old, no code for it.
int max_n_rational_cuda(int device);

// Floats of scratch memory that rational_cuda needs for these layers.
std::size_t rational_cuda_workspace(const GramLayer<float, float>* layers, int count,
                                    const Poles& poles, int device);

// All layers, in three kernel launches (four with `center`) where they are few matrices, enqueued
// on the stream (a cudaStream_t) of the device: no allocation, no synchronisation, so that a CUDA
// graph can capture it. `workspace` is aligned to 16 bytes and read only where it was written.
// About n^3 / 2 multiply-adds a pole and matrix; the same digits at every call on one kind of
// device. Throws std::runtime_error when a launch fails or there is no CUDA build,
// std::invalid_argument for sizes out of range.
void rational_cuda(const GramLayer<float, float>* layers, int count, const Poles& poles,
                   float* workspace, int device, void* stream);

}  // namespace ses
