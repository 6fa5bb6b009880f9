// Compiled once for each instruction set, as eigh_cpu.cpp is and under the same rule: no inline
// function of the standard library.
#include "rational_cpu.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace ses {
namespace SES_ISA {

// clang-format off: each builds on the one before
#include "simd.h"
#include "tile.h"
#include "poles.h"
#include "householder.h"
#include "rational_lanes.h"
#include "rational_panels.h"
// clang-format on

namespace {

using P = Pack<double, kRegisterBytes, 64 / kRegisterBytes>;  // eight lanes, whatever it takes

long workspace_bytes(int n, int poles) {
  return n <= kMaxNLanes ? LaneWorkspace<P>::bytes(n) : PanelWorkspace<P>::bytes(n, poles);
}

template <typename M>
void run(const GramLayer<double, M>& layer, long first, const Poles& poles, void* workspace) {
  const PaddedPoles<double> padded(poles);
  const long size = static_cast<long>(layer.n) * layer.n;
  const double* gram = layer.gram + first * size;
  double* h = layer.h + first;
  M* m = layer.m == nullptr ? nullptr : layer.m + first * size;
  if (layer.n > kMaxNLanes) {
    rational<P>(gram, h, m, layer.n, layer.center, padded, workspace);
  } else {
    const long left = layer.batch - first;
    const int count = left < P::kLanes ? static_cast<int>(left) : P::kLanes;
    rational<P>(gram, h, m, count, layer.n, layer.center, padded, workspace);
  }
}

}  // namespace

template <typename M>
const RationalKernel<M>& rational_kernel() {
  static constexpr RationalKernel<M> kernel = {P::kLanes, workspace_bytes, run<M>};
  return kernel;
}
template const RationalKernel<float>& rational_kernel<float>();
template const RationalKernel<double>& rational_kernel<double>();

}  // namespace SES_ISA
}  // namespace ses
