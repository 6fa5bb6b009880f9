// From samples to entropy and M = dH/dK in one call, so that no Gram matrix goes to memory and
// back. CPU only.
#pragma once

#include "gram_cpu.h"
#include "rational_cpu.h"

namespace ses {

template <typename T>
struct SampleLayer {
  Samples<T> x;
  Side side;
  T* location;                  // [batch, 2, columns]; null: no centring
  T* scale;                     // [batch]
  GramLayer<double, T> result;  // its gram is null
};

// location_scale_cpu with the first row of each matrix for its anchor, gram_cpu in double and
// rational_cpu, to the same bits.
template <typename T>
void rational_from_samples_cpu(const SampleLayer<T>* layers, int count, const Poles& poles,
                               int threads);

}  // namespace ses
