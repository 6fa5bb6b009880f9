// From samples to entropy and M = dH/dK in one call, so that no Gram matrix goes to memory and
// back. CPU only.
#pragma once

#include "gram_cpu.h"
#include "rational_cpu.h"

namespace ses {

template <typename Scalar>
struct SampleLayer {
  Samples x;
  Side side;
  Scalar* location;                  // [batch, 2, columns]; null: no centring
  Scalar* scale;                     // [batch]
  GramLayer<double, Scalar> result;  // its gram is null
};

// location_scale_cpu with the first row of each matrix for its anchor, gram_cpu in double and
// rational_cpu, to the same bits.
template <typename Scalar>
void rational_from_samples_cpu(const SampleLayer<Scalar>* layers, int count, const Poles& poles,
                               int threads);

}  // namespace ses
