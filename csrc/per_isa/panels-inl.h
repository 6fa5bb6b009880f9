// One matrix in panels of eight columns, and what the threads of a group do to it together.
//
// The work on a matrix is cut into parts (arrangement.h) that each have blocks of its rows. What is
// summed over the parts is summed in the order of a binary tree, and what is no part's own every
// thread computes for itself: the digits do not depend on the number of threads.
#pragma once

#include "arrangement.h"
#include "group.h"
#include "simd-inl.h"
#include "tile-inl.h"

namespace ses {
namespace SES_ISA {

// Panels that a pass over the matrix takes at a time, and the rows of their diagonal: the rows that
// a part has one after the other.
constexpr int kPassPanels = 3;
constexpr int kPartRows = kPassPanels * kPanelColumns;

// Lines between what two threads write: a processor fetches some ahead of those that it is asked
// for, and would take them from another that is about to write them.
constexpr long kApart = 32;

template <typename Pack>
struct PanelWorkspace {
  using Scalar = typename Pack::Scalar;
  static_assert(Pack::kLanes == kPanelColumns, "");

  int n, panels, packs;   // packs of poles
  int parts, part_shift;  // 2^part_shift parts
  long rows;              // n rounded up to whole panels
  long part_rows;         // of a part; odd: a row's packs would else share a few sets of the cache
  long sums, y_sums;      // panels and rows, kApart

  // at() finds its way in these.
  Pack*
      a;  // [parts, panels, part_rows] P: its lower triangle with full diagonal blocks; reflectors
  Pack* f;  // [parts, panels, part_rows] the sum over the poles, stored as P is

  // What threads tell each other; of two steps in turn, so that one that is ahead does not write
  // what others still read.
  Pack* product[2];   // [threads, sums] what each adds to A u
  Pack* last_row[2];  // [sums] the last row of the leading block
  Pack* w_column;     // [panels, 8] -W^T, the other factor of the update
  Pack* y_share;      // [threads, y_sums] what each adds to Y^T
  Pack* gram_part;    // [parts, 8] what a part adds to V^T V
  Pack* z_part;       // [parts, 8] and to V^T Y

  // Of one part each. at_row() finds its way in the first three, [parts, part_rows + kApart].
  Pack* by_row;      // partial sums of its rows
  Pack* y_row;       // Y = F V, by row
  Pack* y_column;    // Y^T, eight packs a panel
  Pack* y_part;      // [parts, y_sums] what it adds to Y^T
  Pack* column_sum;  // [parts, sums] sums over its rows

  // Of one thread each.
  Pack* vectors;  // [threads, 4, sums] u[2], q[2]
  Pack* v_rows;   // [threads, y_sums] a block of eight reflectors V, by row

  // Of the first thread, and read by all.
  Pack* pole_ratio;  // [rows, pole packs] G(k + 1, c) / G(k, c) of every pole's resolvent, c <= k
  Pack* pole_diagonal;        // [rows, pole packs] weighted diagonal of the resolvents
  Scalar *d, *e, *inverse_h;  // [rows]
  Scalar* found;              // entropy and constant
  Pack* end;

  // A workspace at null measures itself.
  PanelWorkspace(void* memory, int size, int pole_count, int threads) : n(size) {
    panels = (n + kPanelColumns - 1) / kPanelColumns;
    rows = static_cast<long>(panels) * kPanelColumns;
    packs = (pole_count + kPanelColumns - 1) / kPanelColumns;
    parts = parts_of(n);
    part_shift = 0;
    while (1 << part_shift < parts) ++part_shift;
    const long blocks = (rows + kPartRows - 1) / kPartRows;
    part_rows = (blocks + parts - 1) / parts * kPartRows + 1;
    Pack* next = static_cast<Pack*>(memory);
    auto take = [&next](long count) {
      Pack* start = next;
      next += count;
      return start;
    };
    sums = panels + kApart;
    y_sums = rows + kApart;
    a = take(parts * panels * part_rows);
    f = take(parts * panels * part_rows);
    for (Pack*& of_threads : product) of_threads = take(threads * sums);
    for (Pack*& row : last_row) row = take(sums);
    w_column = take(y_sums);
    y_share = take(threads * y_sums);
    gram_part = take(parts * kPanelColumns);
    z_part = take(parts * kPanelColumns);
    by_row = take(parts * (part_rows + kApart));
    y_row = take(parts * (part_rows + kApart));
    y_column = take(parts * (part_rows + kApart));
    y_part = take(parts * y_sums);
    column_sum = take(parts * sums);
    vectors = take(4L * threads * sums);
    v_rows = take(threads * y_sums);
    pole_ratio = take(rows * packs);
    pole_diagonal = take(rows * packs);
    d = reinterpret_cast<Scalar*>(take(panels));
    e = reinterpret_cast<Scalar*>(take(panels));
    inverse_h = reinterpret_cast<Scalar*>(take(panels));
    found = reinterpret_cast<Scalar*>(take(1));
    end = next;
  }

  // Entry (row, 8 panel) of a or f. The rows that a part has one after the other follow it; the
  // next panel is part_rows away. Rows of different parts lie apart, as kApart says.
  Pack* at(Pack* matrix, int panel, int row) const {
    return matrix + (static_cast<long>(part_of(row)) * panels + panel) * part_rows + in_part(row);
  }
  // The same of by_row, y_row and y_column.
  Pack* at_row(Pack* of_rows, int row) const {
    return of_rows + part_of(row) * (part_rows + kApart) + in_part(row);
  }
  int part_of(int row) const { return row / kPartRows & (parts - 1); }
  long in_part(int row) const {
    return static_cast<long>(row / kPartRows >> part_shift) * kPartRows + row % kPartRows;
  }

  static long bytes(int n, int pole_count, int threads) {
    const PanelWorkspace at_null(nullptr, n, pole_count, threads);
    return static_cast<long>(reinterpret_cast<char*>(at_null.end) - static_cast<char*>(nullptr));
  }
};

// f(part) for those of this thread. There are as many threads as parts or fewer, and both are
// powers of two, so that a branch of the tree is of one thread.
template <typename Function>
SES_INLINE void for_own_parts(const CpuGroup& group, int parts, Function f) {
  for (int part = group.thread_rank(); part < parts; part += group.num_threads()) f(part);
}

// f(begin, end) for the rows of a part within [first, last).
template <typename Function>
SES_INLINE void for_rows(int part, int parts, int first, int last, Function f) {
  const int block = first / kPartRows;
  const int step = parts * kPartRows;
  for (int r = (block + ((part - block) & (parts - 1))) * kPartRows; r < last; r += step)
    f(r < first ? first : r, r + kPartRows < last ? r + kPartRows : last);
}

// f(panel) for the panels below `last` whose diagonal blocks are in the rows of a part.
template <typename Function>
SES_INLINE void for_panels(int part, int parts, int last, Function f) {
  for (int first = part * kPassPanels; first < last; first += parts * kPassPanels)
    for (int c = first; c < first + kPassPanels && c < last; ++c) f(c);
}

// sum[i] = x[i] + x[i + stride] + .. of `count`, a power of two: the first and the one in the
// middle, the next two, and so on, then the same of these sums.
template <int kCount, typename Pack>
SES_INLINE void add_up(const Pack* x, long stride, int length, Pack* sum) {
  for (int i = 0; i < length; ++i) {
    Pack part[kCount];
    for (int p = 0; p < kCount; ++p) part[p] = x[p * stride + i];
    for (int half = kCount / 2; half > 0; half /= 2)
      for (int p = 0; p < half; ++p) part[p] = part[p] + part[p + half];
    sum[i] = part[0];
  }
}
template <typename Pack>
SES_INLINE void add_up(int count, const Pack* x, long stride, int length, Pack* sum) {
  static_assert(kMaxParts == 16, "");
  if (count == 1) return add_up<1>(x, stride, length, sum);
  if (count == 2) return add_up<2>(x, stride, length, sum);
  if (count == 4) return add_up<4>(x, stride, length, sum);
  if (count == 8) return add_up<8>(x, stride, length, sum);
  add_up<16>(x, stride, length, sum);
}

}  // namespace SES_ISA
}  // namespace ses
