// Every constant that was measured, in one file. They were measured on an AMD EPYC with AVX-512 on
// 22 November 2026, and decide how a call is cut up; only kMaxNInterleaved and kMinColumnsOfAPart
// also decide the last digits. To measure one again, change it and compare the rows that its
// command prints.
//
// Included by what is compiled for each instruction set too: static, so that nothing is shared.
#pragma once

namespace ses {

// ---- which way ----

// eigh of the extension up to here. Above, LAPACK's blocked tridiagonalisation wins: a pack of
// matrices has left the L2 cache. `python -m bench.crossover`
constexpr int kMaxNCpu = 128;

// eigh: above, two registers a lane no longer fit the L2 cache, and the arithmetic hides the
// latencies. `python -m bench -k eigh`
constexpr int kMaxNTwoRegisters = 64;

// The rational solver: side by side is the faster for half the lanes and more, until the workspace
// has left the L2 cache; of small matrices, two bundles together. `python -m bench -k solver`
constexpr int kMaxNInterleaved = 96;
constexpr int kMaxNTwoBundles = 12;

// The rational solver on one matrix: a part of the work, hence a thread, for so many columns. On 28
// November 2026, with both of two cores free, two threads were 1.5 times as fast as one at n = 257,
// 1.8 at 512 and 1024. `python -m bench.crossover`, batch 1
constexpr long kMinColumnsOfAPart = 128;

// ---- nanoseconds of one thread, to share out work: `python -m bench -k "eigh or solver"` ----

// What starting a team has to be worth.
constexpr double kTeamNanoseconds = 2e4;

// eigh of one bundle: about 5 n^3 multiply-adds a register, and 60 n^2 cycles in which the QL
// recurrence waits for itself, whatever the width.
static inline constexpr double eigh_nanoseconds(double n, int registers) {
  return 0.3 * (5 * n * registers + 60) * n * n;
}

// The rational solver on one matrix: 50 picoseconds times n^3, and what does not grow so fast.
static inline constexpr double rational_nanoseconds(double n) { return (0.05 * n + 2) * n * n; }

// One matrix's product of n x n sums over `depth`, or of an n x n matrix with `depth` columns.
static inline constexpr double product_nanoseconds(double n, double depth) {
  return (0.015 * n + 0.3) * n * depth;
}

// Location and scale of one matrix.
static inline constexpr double location_nanoseconds(double rows, double columns) {
  return 0.2 * rows * columns;
}

}  // namespace ses
