// Compiled once for each instruction set, as eigh.cpp is and under the same rule: no inline
// function of the standard library.
#include "householder-inl.h"
#include "poles-inl.h"
#include "rational_cpu.h"
#include "rational_interleaved-inl.h"
#include "rational_panels-inl.h"
#include "simd-inl.h"
#include "tile-inl.h"

namespace ses {
namespace SES_ISA {

namespace {

static_assert(Line<double>::kLanes == kBundle && Line<double>::kLanes == kPanelColumns,
              "registers as many as it takes");
// Two bundles hide each other's latencies. Where one is several registers, they do that already.
#if defined(__AVX512F__)
using TwoBundles = PackOf<double, kRegisterBytes, 2>;
#else
using TwoBundles = Line<double>;
#endif

long workspace_bytes(Arrangement arrangement, int n, int pole_count, int threads) {
  if (arrangement == Arrangement::kPanels)
    return PanelWorkspace<Line<double>>::bytes(n, pole_count, threads);
  return together(arrangement, n) > kBundle ? InterleavedWorkspace<TwoBundles>::bytes(n)
                                            : InterleavedWorkspace<Line<double>>::bytes(n);
}

void arrange(Arrangement arrangement, const double* grams, int count, int n, double* out,
             const CpuGroup& group) {
  if (arrangement == Arrangement::kPanels)
    return to_panels(grams, n, reinterpret_cast<Line<double>*>(out), group);
  const long square = static_cast<long>(n) * n;
  for_bundles(count, kBundle, [&](int first, int size) {
    interleave(grams + first * square, size, n,
               reinterpret_cast<Line<double>*>(out) + first / kBundle * square);
  });
}

template <typename Pack, typename Result>
void run_interleaved(const GramLayer<double, Result>& layer, const PaddedPoles<double>& poles,
                     void* workspace) {
  const long size = static_cast<long>(layer.n) * layer.n;
  for_bundles(static_cast<int>(layer.batch), Pack::kLanes, [&](int first, int count) {
    rational<Pack>(reinterpret_cast<const Line<double>*>(layer.gram) + first / kBundle * size,
                   layer.h + first, layer.m == nullptr ? nullptr : layer.m + first * size, count,
                   layer.n, layer.center, poles, workspace);
  });
}

template <typename Result>
void run(Arrangement arrangement, const GramLayer<double, Result>& layer, const Poles& poles,
         void* workspace, CpuGroup& group) {
  const PaddedPoles<double> padded(poles);
  if (arrangement == Arrangement::kPanels)
    rational(reinterpret_cast<const Line<double>*>(layer.gram), layer.h, layer.m, layer.n,
             layer.center, padded, workspace, group);
  else if (layer.batch > kBundle)
    run_interleaved<TwoBundles>(layer, padded, workspace);
  else
    run_interleaved<Line<double>>(layer, padded, workspace);
}

}  // namespace

template <typename Result>
const RationalKernel<Result>& rational_kernel() {
  static constexpr RationalKernel<Result> kernel = {arrange, workspace_bytes, run<Result>};
  return kernel;
}
template const RationalKernel<float>& rational_kernel<float>();
template const RationalKernel<double>& rational_kernel<double>();

}  // namespace SES_ISA
}  // namespace ses
