// How the Gram matrices lie that the rational kernels of the CPU take: kLanes doubles side by side
// for SIMD, whatever the width of a register.
#pragma once

#include "measured.h"

namespace ses {

constexpr int kLanes = 8;

enum class Arrangement {
  // Matrices in groups of kLanes, one a lane: [groups, n, n, kLanes], the lower triangle.
  kInterleaved,
  // One matrix, [panels, rows, kLanes] with rows = n rounded up to whole panels: the lower triangle
  // with whole blocks on the diagonal, 0 beyond n.
  kPanels,
};

// A matrix has the same bits in every batch that is arranged alike.
static inline constexpr Arrangement arrangement_of(long n, long batch) {
  return n <= kMaxNInterleaved && batch >= kLanes / 2 ? Arrangement::kInterleaved
                                                      : Arrangement::kPanels;
}

// Matrices that a kernel takes in one call; of small ones two groups.
static inline constexpr int together(Arrangement arrangement, long n) {
  return arrangement == Arrangement::kPanels ? 1 : n <= kMaxNTwoGroups ? 2 * kLanes : kLanes;
}

static inline constexpr long arranged_doubles(Arrangement arrangement, long n) {
  const long rows = (n + kLanes - 1) / kLanes * kLanes;
  return arrangement == Arrangement::kInterleaved ? n * n * together(arrangement, n) : rows * rows;
}

}  // namespace ses
