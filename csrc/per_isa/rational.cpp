// Compiled once for each instruction set, as eigh.cpp is and under the same rule: no inline
// function of the standard library.
#include "householder-inl.h"
#include "poles-inl.h"
#include "rational_cpu.h"
#include "rational_lanes-inl.h"
#include "rational_panels-inl.h"
#include "simd-inl.h"
#include "tile-inl.h"

namespace ses {
namespace SES_ISA {

namespace {

using P = Pack<double, kRegisterBytes, 64 / kRegisterBytes>;
static_assert(P::kLanes == kLanes, "registers as many as it takes");
// Two groups hide each other's latencies. Where a group is several registers, they do that already.
#if defined(__AVX512F__)
using Pair = Pack<double, kRegisterBytes, 2>;
#else
using Pair = P;
#endif

long workspace_bytes(Arrangement arrangement, int n, int poles) {
  if (arrangement == Arrangement::kPanels) return PanelWorkspace<P>::bytes(n, poles);
  return together(arrangement, n) > kLanes ? LaneWorkspace<Pair>::bytes(n)
                                           : LaneWorkspace<P>::bytes(n);
}

void arrange(Arrangement arrangement, const double* grams, int count, int n, double* out) {
  if (arrangement == Arrangement::kPanels) return to_panels(grams, n, reinterpret_cast<P*>(out));
  const long size = static_cast<long>(n) * n;
  for_groups(count, kLanes, [&](int first, int together) {
    interleave(grams + first * size, together, n,
               reinterpret_cast<P*>(out) + first / kLanes * size);
  });
}

template <typename Lanes, typename M>
void run_interleaved(const GramLayer<double, M>& layer, const PaddedPoles<double>& poles,
                     void* workspace) {
  const long size = static_cast<long>(layer.n) * layer.n;
  for_groups(static_cast<int>(layer.batch), Lanes::kLanes, [&](int first, int count) {
    rational<Lanes>(reinterpret_cast<const P*>(layer.gram) + first / kLanes * size, layer.h + first,
                    layer.m == nullptr ? nullptr : layer.m + first * size, count, layer.n,
                    layer.center, poles, workspace);
  });
}

template <typename M>
void run(Arrangement arrangement, const GramLayer<double, M>& layer, const Poles& poles,
         void* workspace) {
  const PaddedPoles<double> padded(poles);
  if (arrangement == Arrangement::kPanels)
    rational(reinterpret_cast<const P*>(layer.gram), layer.h, layer.m, layer.n, layer.center,
             padded, workspace);
  else if (layer.batch > kLanes)
    run_interleaved<Pair>(layer, padded, workspace);
  else
    run_interleaved<P>(layer, padded, workspace);
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
