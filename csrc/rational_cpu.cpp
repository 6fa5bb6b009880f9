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

using P = Pack<double, kRegisterBytes, 64 / kRegisterBytes>;
static_assert(P::kLanes == kLanes, "registers as many as it takes");

long workspace_bytes(Arrangement arrangement, int n, int poles) {
  return arrangement == Arrangement::kInterleaved ? LaneWorkspace<P>::bytes(n)
                                                  : PanelWorkspace<P>::bytes(n, poles);
}

void arrange(Arrangement arrangement, const double* grams, int count, int n, double* out) {
  if (arrangement == Arrangement::kInterleaved)
    interleave(grams, count, n, reinterpret_cast<P*>(out));
  else
    to_panels(grams, n, reinterpret_cast<P*>(out));
}

template <typename M>
void run(Arrangement arrangement, const GramLayer<double, M>& layer, const Poles& poles,
         void* workspace) {
  const PaddedPoles<double> padded(poles);
  const P* gram = reinterpret_cast<const P*>(layer.gram);
  if (arrangement == Arrangement::kInterleaved)
    rational(gram, layer.h, layer.m, static_cast<int>(layer.batch), layer.n, layer.center, padded,
             workspace);
  else
    rational(gram, layer.h, layer.m, layer.n, layer.center, padded, workspace);
}

}  // namespace

template <typename M>
const RationalKernel<M>& rational_kernel() {
  static constexpr RationalKernel<M> kernel = {arrange, workspace_bytes, run<M>};
  return kernel;
}
template const RationalKernel<float>& rational_kernel<float>();
template const RationalKernel<double>& rational_kernel<double>();

}  // namespace SES_ISA
}  // namespace ses
