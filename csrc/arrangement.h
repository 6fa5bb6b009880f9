// How the Gram matrices lie that the rational kernels of the CPU take: eight doubles side by side
// for SIMD, whatever the width of a register.
#pragma once

#include "measured.h"

namespace ses {

constexpr int kBundle = 8;        // matrices that lie interleaved, one a lane
constexpr int kPanelColumns = 8;  // of a matrix that lies in panels; and the side of its blocks

enum class Arrangement {
  // Matrices in bundles: [bundles, n, n, kBundle], the lower triangle.
  kInterleaved,
  // One matrix, [panels, rows, kPanelColumns] with rows = n rounded up to whole panels: the lower
  // triangle with whole blocks on the diagonal, 0 beyond n.
  kPanels,
};

// A matrix has the same bits in every batch that is arranged alike.
static inline constexpr Arrangement arrangement_of(long n, long batch) {
  return n <= kMaxNInterleaved && batch >= kBundle / 2 ? Arrangement::kInterleaved
                                                       : Arrangement::kPanels;
}

// Matrices that a kernel takes in one call; of small ones two bundles.
static inline constexpr int together(Arrangement arrangement, long n) {
  return arrangement == Arrangement::kPanels ? 1 : n <= kMaxNTwoBundles ? 2 * kBundle : kBundle;
}

static inline constexpr long arranged_doubles(Arrangement arrangement, long n) {
  const long rows = (n + kPanelColumns - 1) / kPanelColumns * kPanelColumns;
  return arrangement == Arrangement::kInterleaved ? n * n * together(arrangement, n) : rows * rows;
}

// Parts that the work on a matrix in panels is cut into, for as many threads or fewer. A power of
// two, and of n alone: it decides the order of sums.
constexpr int kMaxParts = 16;
static inline constexpr int parts_of(long n) {
  int parts = 1;
  while (parts < kMaxParts && n >= 2 * parts * kMinColumnsOfAPart) parts *= 2;
  return parts;
}

}  // namespace ses
