// Stands in for eigh_cuda.cu and rational_cuda.cu in a build without CUDA.
#include <stdexcept>

#include "eigh.h"
#include "rational.h"

namespace ses {

int max_n_cuda(int, std::size_t) { return 0; }

template <typename Scalar>
void eigh_cuda(const Scalar*, Scalar*, Scalar*, long, int, int, void*) {
  throw std::runtime_error("eigh_cuda: this build has no CUDA kernels");
}

template void eigh_cuda(const float*, float*, float*, long, int, int, void*);
template void eigh_cuda(const double*, double*, double*, long, int, int, void*);

int max_n_rational_cuda(int) { return 0; }

std::size_t rational_cuda_workspace(const GramLayer<float, float>*, int, const Poles&, int) {
  return 0;
}

void rational_cuda(const GramLayer<float, float>*, int, const Poles&, float*, int, void*) {
  throw std::runtime_error("rational_cuda: this build has no CUDA kernels");
}

}  // namespace ses
