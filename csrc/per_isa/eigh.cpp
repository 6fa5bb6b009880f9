// The CPU kernels of one instruction set: compiled once for each, with its flags and with SES_ISA
// naming the namespace. Nothing here may call an inline function of the standard library: the
// linker keeps one copy of those, and could keep this one for a machine without the instructions.
#include "eigh.h"

#include "eigh_cpu.h"
#include "householder-inl.h"
#include "simd-inl.h"
#include "tridiagonal_ql-inl.h"

namespace ses {
namespace SES_ISA {

static_assert(kMaxNCpu < 1 << __FLT_MANT_DIG__, "indices are kept in floats");

constexpr int kHalfBytes = kRegisterBytes > 16 ? kRegisterBytes / 2 : kRegisterBytes;

// 2^exponent for a normal result
template <typename Scalar>
SES_INLINE Scalar power_of_two(int exponent) {
  using Traits = ScalarTraits<Scalar>;
  const auto bits = static_cast<typename Traits::Int>(exponent + Traits::kExponentBias)
                    << Traits::kMantissaBits;
  Scalar x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

// Bits of the largest |a_ij| of the lower triangle: as integers they order like the numbers, with
// Inf and NaN above all, so one maximum finds the scale and the matrices to refuse.
template <typename Scalar>
static typename ScalarTraits<Scalar>::Int max_bits(const Scalar* a, int n) {
  using Int = typename ScalarTraits<Scalar>::Int;
  Int largest = 0;
  for (int i = 0; i < n; ++i) {
    const Scalar* row = a + static_cast<long>(i) * n;
    for (int j = 0; j <= i; ++j) {
      Int bits;
      __builtin_memcpy(&bits, row + j, sizeof(bits));
      bits &= ~ScalarTraits<Scalar>::kSignBit;
      largest = bits > largest ? bits : largest;
    }
  }
  return largest;
}

// The matrices of one bundle, lane by lane.
template <typename Pack>
struct Bundle {
  using Scalar = typename Pack::Scalar;
  static constexpr int kLanes = Pack::kLanes;

  bool finite[kLanes];
  int exponent[kLanes];  // of the largest entry

  // Row by row, so that a row of the workspace is filled for all lanes while it is in the cache.
  // Lanes without a matrix, or with one to refuse, get zeros.
  void load(const Workspace<Pack>& work, const Scalar* a, int count, int n) {
    using Traits = ScalarTraits<Scalar>;
    const long size = static_cast<long>(n) * n;
    Scalar scale[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const auto bits = lane < count ? max_bits(a + lane * size, n) : 0;
      finite[lane] = lane < count && bits < Traits::kInfBits;
      // Scaled to near 1, squares neither overflow nor underflow. The exponent keeps to where both
      // it and its negative are normal.
      constexpr int kLimit = Traits::kExponentBias - 1;
      const int e = static_cast<int>(bits >> Traits::kMantissaBits) - Traits::kExponentBias;
      exponent[lane] = e > kLimit ? kLimit : e < -kLimit ? -kLimit : e;
      scale[lane] = power_of_two<Scalar>(-exponent[lane]);
    }
    for (int i = 0; i < n; ++i) {
      Scalar* row = reinterpret_cast<Scalar*>(work.row(i));  // [n, lanes]
      for (int lane = 0; lane < kLanes; ++lane) {
        const Scalar* in = a + lane * size + static_cast<long>(i) * n;
        if (finite[lane])
          for (int j = 0; j <= i; ++j) row[j * kLanes + lane] = in[j] * scale[lane];
        else
          for (int j = 0; j <= i; ++j) row[j * kLanes + lane] = Scalar(0);
      }
    }
  }

  // Eigenvalues from work.d, eigenvectors from work.z in the order of the columns in work.e. Adding
  // 0 turns -0 into 0: whether a lane's neighbours were still rotating shows in the sign of its
  // zeros and nowhere else.
  void store(const Workspace<Pack>& work, Scalar* w, Scalar* v, int count, int n) {
    const Scalar* d = reinterpret_cast<const Scalar*>(work.d);      // [n, lanes]
    const Scalar* order = reinterpret_cast<const Scalar*>(work.e);  // [n, lanes]
    int* offset = reinterpret_cast<int*>(work.rotation);            // [lanes, n]
    for (int lane = 0; lane < count; ++lane) {
      // QL reports a lane that did not converge by NaN.
      finite[lane] = finite[lane] && d[lane] == d[lane];
      const Scalar scale =
          finite[lane] ? power_of_two<Scalar>(exponent[lane]) : ScalarTraits<Scalar>::kNaN;
      for (int j = 0; j < n; ++j) {
        w[static_cast<long>(lane) * n + j] = d[j * kLanes + lane] * scale + Scalar(0);
        offset[lane * n + j] = static_cast<int>(order[j * kLanes + lane]) * kLanes + lane;
      }
    }
    for (int i = 0; i < n; ++i) {
      const Scalar* row = reinterpret_cast<const Scalar*>(work.row(i));  // [n, lanes]
      for (int lane = 0; lane < count; ++lane) {
        Scalar* out = v + static_cast<long>(lane) * n * n + i;  // component i of every eigenvector
        if (finite[lane])
          for (int j = 0; j < n; ++j) out[j * n] = row[offset[lane * n + j]] + Scalar(0);
        else
          for (int j = 0; j < n; ++j) out[j * n] = ScalarTraits<Scalar>::kNaN;
      }
    }
  }
};

template <typename Pack>
static void eigh_bundle(const typename Pack::Scalar* a, typename Pack::Scalar* w,
                        typename Pack::Scalar* v, int count, int n, void* memory) {
  const Workspace<Pack> work(memory, n);
  Bundle<Pack> bundle;
  bundle.load(work, a, count, n);
  tridiagonalise(work, n);
  accumulate(work, n);
  ql(work, n);
  sort_ascending(work.d, work.e, n);
  bundle.store(work, w, v, count, n);
}

template <typename Pack>
constexpr BundleKernel<typename Pack::Scalar> kernel(int unroll) {
  return {Pack::kLanes, unroll, Workspace<Pack>::bytes, eigh_bundle<Pack>};
}

template <typename Scalar>
const BundleKernels<Scalar>& bundle_kernels() {
  static constexpr BundleKernels<Scalar> kernels = {{kernel<PackOf<Scalar, kRegisterBytes, 2>>(2),
                                                     kernel<PackOf<Scalar, kRegisterBytes, 1>>(1),
                                                     kernel<PackOf<Scalar, kHalfBytes, 1>>(1)}};
  return kernels;
}
template const BundleKernels<float>& bundle_kernels<float>();
template const BundleKernels<double>& bundle_kernels<double>();

}  // namespace SES_ISA
}  // namespace ses
