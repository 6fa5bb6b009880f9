// Compiled once for each instruction set, as eigh.cpp is and under the same rule: no inline
// function of the standard library.
#include "gram_cpu.h"
#include "simd-inl.h"
#include "tile-inl.h"

namespace ses {
namespace SES_ISA {

namespace {

constexpr long kRows = 64;  // rows summed before their sum is added: bounds the rounding

template <typename L>
L inverse_power_of_two(L largest) {
  using Traits = ScalarTraits<L>;
  if (largest == 0) return 1;
  typename Traits::Int bits;
  __builtin_memcpy(&bits, &largest, sizeof(bits));
  constexpr int kLimit = Traits::kExponentBias - 1;  // both powers stay normal
  const int e = static_cast<int>(bits >> Traits::kMantissaBits) - kLimit;
  const int clamped = e > kLimit ? kLimit : e < -kLimit ? -kLimit : e;
  bits = static_cast<typename Traits::Int>(Traits::kExponentBias - clamped)
         << Traits::kMantissaBits;
  L scale;
  __builtin_memcpy(&scale, &bits, sizeof(scale));
  return scale;
}

template <typename P>
SES_INLINE P larger(const P& a, const P& b) {
  return select(a < b, b, a);
}

// Columns [first, first + kPacks packs) of those before `last`, all there if kWhole; returns the
// largest |x - anchor|.
template <int kPacks, bool kWhole, typename P, typename X, typename L>
SES_INLINE P locate_strip(const Samples<X>& s, const X* x, long first, long last, const X* anchor,
                          L* location) {
  const auto read = [&](const X* from, int p) {
    const long column = first + p * P::kLanes;
    return kWhole ? load<P>(from + column) : load<P>(from + column, last - column);
  };
  const P zero = P::broadcast(0);
  P largest[kPacks], origin[kPacks], total[kPacks];
  for (int p = 0; p < kPacks; ++p) {
    origin[p] = anchor == nullptr ? zero : read(anchor, p);
    total[p] = largest[p] = zero;
  }
  for (long i = 0; i < s.rows; i += kRows) {
    const long end = s.rows - i < kRows ? s.rows : i + kRows;
    P part[kPacks];
    for (P& value : part) value = zero;
    for (long r = i; r < end; ++r) {
      for (int p = 0; p < kPacks; ++p) {
        const P shifted = read(x + r * s.row_stride, p) - origin[p];
        largest[p] = larger(largest[p], abs(shifted));
        part[p] = part[p] + shifted;
      }
    }
    for (int p = 0; p < kPacks; ++p) total[p] = total[p] + part[p];
  }
  for (int p = 0; p < kPacks && anchor != nullptr; ++p) {
    const long column = first + p * P::kLanes;
    store(origin[p], location + column, last - column);
    store(total[p] / P::broadcast(static_cast<L>(s.rows)), location + s.columns + column,
          last - column);
  }
  for (int p = 1; p < kPacks; ++p) largest[0] = larger(largest[0], largest[p]);
  return largest[0];
}

template <typename X, typename L>
L locate(const Samples<X>& s, long matrix, long first, long last, const X* anchor, L* location) {
  using P = Pack<L, kRegisterBytes, 64 / kRegisterBytes>;
  constexpr int kPacks = 4;
  const X* x = s.x + matrix * s.matrix_stride;
  P largest = P::broadcast(0);
  long j = first;
  for (; j + kPacks * P::kLanes <= last; j += kPacks * P::kLanes)
    largest = larger(largest, locate_strip<kPacks, true, P>(s, x, j, last, anchor, location));
  for (; j + P::kLanes <= last; j += P::kLanes)
    largest = larger(largest, locate_strip<1, true, P>(s, x, j, last, anchor, location));
  if (j < last)
    largest = larger(largest, locate_strip<1, false, P>(s, x, j, last, anchor, location));
  L lane[P::kLanes], most = 0;
  __builtin_memcpy(lane, &largest, sizeof(lane));
  for (const L value : lane) most = most < value ? value : most;
  return most;
}

// One matrix's x, and Xs a pack of columns at a time.
template <typename X, typename L>
struct Standardized {
  const X* x;
  long row_stride, rows, columns;
  const L *anchor, *offset;  // null: no centring
  L scale;

  Standardized(const Samples<X>& samples, const Standard<L>& standard, long matrix)
      : x(samples.x + matrix * samples.matrix_stride),
        row_stride(samples.row_stride),
        rows(samples.rows),
        columns(samples.columns),
        anchor(standard.location == nullptr ? nullptr
                                            : standard.location + matrix * standard.matrix_stride),
        offset(anchor == nullptr ? nullptr : anchor + standard.row_stride),
        scale(standard.scale[matrix]) {}

  // Columns [column, column + lanes) of any row; 0 beyond the last.
  template <typename P>
  struct Columns {
    const X* x;
    long row_stride, count;
    P anchor, offset, scale;
    P operator[](long row) const { return standardized<false>(x + row * row_stride); }
    // Rows [first, first + rows) to out: a branch for all of them.
    void copy(long first, long rows, P* out) const {
      const X* from = x + first * row_stride;
      if (count < P::kLanes)
        for (long i = 0; i < rows; ++i) out[i] = standardized<false>(from + i * row_stride);
      else
        for (long i = 0; i < rows; ++i) out[i] = standardized<true>(from + i * row_stride);
    }
    template <bool kWhole>
    P standardized(const X* from) const {
      const P values = kWhole ? load<P>(from) : load<P>(from, count);
      return ((values - anchor) - offset) * scale;
    }
  };
  template <typename P>
  Columns<P> at(long column) const {
    const long count = columns - column;
    const P zero = P::broadcast(0);
    return {x + column,
            row_stride,
            count,
            anchor == nullptr ? zero : load<P>(anchor + column, count),
            anchor == nullptr ? zero : load<P>(offset + column, count),
            P::broadcast(static_cast<typename P::Scalar>(scale))};
  }
};

// A batch of small matrices comes from memory faster than it is asked for in strips of eight rows:
// what the next ones need is asked for while these are worked on.
template <typename X>
void prefetch_samples(const Samples<X>& samples, long first, long count) {
  if (first + count <= samples.batch)
    prefetch(samples.x + first * samples.matrix_stride, count * samples.matrix_stride);
}

// ---- the Gram matrix ----

using Panel = Pack<double, kRegisterBytes, 64 / kRegisterBytes>;

// Of the contracted axis at a time: a quarter of the usual L2 cache.
long chunk(long panels) {
  const long depth = 4096 / panels / kPanel * kPanel;
  return depth < kPanel ? kPanel : depth;
}

long packed_bytes(long n) {
  const long panels = (n + kPanel - 1) / kPanel;
  return panels * chunk(panels) * static_cast<long>(sizeof(Panel));
}

// Rows of blocks part, part + parts, ... in panels: sums [panels, rows].
template <typename X, typename L>
void gram_panels(const Samples<X>& samples, const Standard<L>& standard, Side side, long matrix,
                 int part, int parts, Panel* sums, Panel* packed) {
  using P = Panel;
  const Standardized<X, L> xs(samples, standard, matrix);
  const bool by_samples = side == Side::kSamples;
  const long n = by_samples ? xs.rows : xs.columns, depth = by_samples ? xs.columns : xs.rows;
  const long panels = (n + kPanel - 1) / kPanel, rows = panels * kPanel, step = chunk(panels);
  for (long first = 0; first < depth; first += step) {
    const long count = depth - first < step ? depth - first : step;
    if (by_samples) {
      for (long p = 0; p < panels; ++p) {
        for (long k = 0; k < count; k += kPanel) {
          const auto columns = xs.template at<P>(first + k);
          P block[kPanel];
          for (int i = 0; i < kPanel; ++i)
            block[i] = p * kPanel + i < n ? columns[p * kPanel + i] : P::broadcast(0);
          Square<P>::transpose(block, packed + p * step + k);
        }
      }
    } else {
      for (long p = 0; p < panels; ++p)
        xs.template at<P>(p * kPanel).copy(first, count, packed + p * step);
    }
    for (long b = part; b < panels; b += parts) {
      for_widths(static_cast<int>(b) + 1, [&](int c, auto width) {
        for (int j = 0; j < kPanel; j += kTileRows) {
          P* block = sums + c * rows + b * kPanel + j;
          P sum[kTileRows][decltype(width)::value];
          if (first == 0)
            clear(sum);
          else
            load_tile(block, rows, sum);
          multiply_tile(count, reinterpret_cast<const double*>(packed + b * step) + j, kPanel, 1,
                        packed + c * step, step, sum);
          store_tile(sum, block, rows);
        }
      });
    }
  }
}

long gram_bytes(long n) {
  const long rows = (n + kPanel - 1) / kPanel * kPanel;
  return packed_bytes(n) + rows * rows * static_cast<long>(sizeof(double));
}

template <typename X, typename L, typename K>
void gram(const Samples<X>& samples, const Standard<L>& standard, Side side, long matrix, int part,
          int parts, K* out, void* workspace) {
  const long n = side == Side::kSamples ? samples.rows : samples.columns;
  const long panels = (n + kPanel - 1) / kPanel, rows = panels * kPanel;
  prefetch_samples(samples, matrix + 1, 1);
  Panel* packed = static_cast<Panel*>(workspace);  // [panels, chunk] eight of n a pack
  Panel* sums = packed + packed_bytes(n) / static_cast<long>(sizeof(Panel));
  gram_panels(samples, standard, side, matrix, part, parts, sums, packed);
  for (long b = part; b < panels; b += parts)
    for (long c = 0; c <= b; ++c)
      store_symmetric(sums + c * rows + b * kPanel, static_cast<int>(b) * kPanel,
                      static_cast<int>(c) * kPanel, static_cast<int>(n), out);
}

// ---- the Gram matrices of eight small matrices at once, one a lane ----

// Entries of K summed in registers at a time: `kSide` rows by as many columns.
#if defined(__AVX512F__)
constexpr int kSide = 4;
#else
constexpr int kSide = 2;
#endif

// Of the contracted axis at a time: what fits the L1 cache beside the sums, in blocks of eight.
long lanes_chunk(long rows) {
  const long depth = 512 / rows / kPanel * kPanel;
  return depth < kPanel ? kPanel : depth;
}

long padded_side(long n) { return (n + kSide - 1) / kSide * kSide; }

long lanes_bytes(long n) {
  const long rows = padded_side(n);
  return rows * lanes_chunk(rows) * static_cast<long>(sizeof(Panel));
}

// Xs of eight matrices, one a lane: entry (first_row + i, column + j) to out[i * down + j * right],
// for eight columns or those that there are.
template <bool kWhole, typename X, typename L>
void pack_lanes(const Samples<X>& samples, const Standard<L>& standard, long first, int count,
                long column, long first_row, long rows, Panel* out, long down, long right) {
  using P = Panel;
  typename Standardized<X, L>::template Columns<P> at[kPanel];
  for (int lane = 0; lane < kPanel; ++lane)
    at[lane] = Standardized<X, L>(samples, standard, first + (lane < count ? lane : 0))
                   .template at<P>(column);
  for (long i = 0; i < rows; ++i) {
    const long row = (first_row + i) * samples.row_stride;
    P block[kPanel];
    for (int lane = 0; lane < kPanel; ++lane)
      block[lane] = at[lane].template standardized<kWhole>(at[lane].x + row);
    Square<P>::transpose(block, block);
    for (int j = 0; j < kPanel; ++j)
      if (kWhole || j < at[0].count) out[i * down + j * right] = block[j];
  }
}

template <typename X, typename L>
void gram_lanes(const Samples<X>& samples, const Standard<L>& standard, Side side, long first,
                int count, Panel* k, Panel* packed) {
  using P = Panel;
  const bool by_samples = side == Side::kSamples;
  const long n = by_samples ? samples.rows : samples.columns;
  const long depth = by_samples ? samples.columns : samples.rows;
  const long rows = padded_side(n), step = lanes_chunk(rows);

  for (long begin = 0; begin < depth; begin += step) {
    const long length = depth - begin < step ? depth - begin : step;
    const long columns = by_samples ? length : n, down = by_samples ? 1 : rows;
    const long right = by_samples ? rows : 1;
    for (long c = 0; c < columns; c += kPanel) {
      const auto pack = columns - c < kPanel ? pack_lanes<false, X, L> : pack_lanes<true, X, L>;
      pack(samples, standard, first, count, by_samples ? begin + c : c, by_samples ? 0 : begin,
           by_samples ? n : length, packed + c * right, down, right);
    }
    for (long i = 0; i < length; ++i)
      for (long r = n; r < rows; ++r) packed[i * rows + r] = P::broadcast(0);

    for (long i = 0; i < n; i += kSide) {
      for (long j = 0; j <= i; j += kSide) {
        P sum[kSide][kSide];
        clear(sum);
        if (begin > 0)
          for (int r = 0; r < kSide && i + r < n; ++r)
            for (int c = 0; c < kSide && j + c <= i + r; ++c) sum[r][c] = k[(i + r) * n + j + c];
        for (long d = 0; d < length; ++d) {
          const P* from = packed + d * rows;
          for (int r = 0; r < kSide; ++r)
            for (int c = 0; c < kSide; ++c) sum[r][c] = fma(from[i + r], from[j + c], sum[r][c]);
        }
        for (int r = 0; r < kSide && i + r < n; ++r)
          for (int c = 0; c < kSide && j + c <= i + r; ++c) k[(i + r) * n + j + c] = sum[r][c];
      }
    }
  }
}

// ---- in the arrangement that the rational solver takes ----

long arranged_bytes(Arrangement arrangement, long n) {
  return arrangement == Arrangement::kInterleaved ? lanes_bytes(n) : packed_bytes(n);
}

template <typename X, typename L>
void gram_arranged(Arrangement arrangement, const Samples<X>& samples, const Standard<L>& standard,
                   Side side, long first, int count, double* grams, void* workspace) {
  prefetch_samples(samples, first + count, count);
  Panel* out = reinterpret_cast<Panel*>(grams);
  Panel* packed = static_cast<Panel*>(workspace);
  if (arrangement == Arrangement::kPanels)
    return gram_panels(samples, standard, side, first, 0, 1, out, packed);
  const long n = side == Side::kSamples ? samples.rows : samples.columns;
  for_groups(count, kLanes, [&](int group, int size) {
    gram_lanes(samples, standard, side, first + group, size, out + group / kLanes * n * n, packed);
  });
}

// ---- the product with a symmetric matrix ----

template <typename L>
using Row = Pack<L, kRegisterBytes, 64 / kRegisterBytes>;

template <typename L>
long backward_bytes(long n) {
  using P = Row<L>;
  const long panels = (n + P::kLanes - 1) / P::kLanes, rows = (n + kPanel - 1) / kPanel * kPanel;
  const long by_samples = (rows / P::kLanes + 1) * rows + kTilePanels * n;
  const long by_features = panels * n + panels * kPanel;
  return (by_samples > by_features ? by_samples : by_features) * static_cast<long>(sizeof(P));
}

template <typename P, typename X, int kWidth>
SES_INLINE void store_rows(const P (&sum)[kTileRows][kWidth], X* out, long stride, long rows,
                           long columns) {
  constexpr int kLast = kWidth - 1;  // the only one that can be cut
  for (int r = 0; r < kTileRows && r < rows; ++r) {
    for (int p = 0; p < kLast; ++p) store(sum[r][p], out + r * stride + p * P::kLanes);
    store(sum[r][kLast], out + r * stride + kLast * P::kLanes, columns - kLast * P::kLanes);
  }
}

template <typename X, typename L>
void backward(const L* m, const Samples<X>& samples, const Standard<L>& standard, L coefficient,
              Side side, long matrix, int part, int parts, X* out, void* workspace) {
  using P = Row<L>;
  const Standardized<X, L> xs(samples, standard, matrix);
  const P factor = P::broadcast(coefficient);
  const long rows = xs.rows, columns = xs.columns;
  if (parts == 1 && matrix + 1 < samples.batch) {
    const long square = side == Side::kSamples ? rows * rows : columns * columns;
    prefetch_samples(samples, matrix + 1, 1);
    prefetch(m + square, square);
    prefetch<kWrite>(out + rows * columns, rows * columns);
  }
  const long column_panels = (columns + P::kLanes - 1) / P::kLanes;
  const long row_panels = (rows + kPanel - 1) / kPanel;
  if (side == Side::kSamples) {
    const long n = rows;
    P* right = static_cast<P*>(workspace);                    // [tile panels, n] Xs
    L* left = reinterpret_cast<L*>(right + kTilePanels * n);  // [row panels, n, 8] coefficient M
    for (long b = 0; b < row_panels; ++b) {
      const long inside = n - b * kPanel;
      for (long k = 0; k < n; ++k) {
        const L* from = m + k * n + b * kPanel;
        L row[kPanel] = {};  // a copy: from and to might overlap, as far as the compiler knows
        if (inside >= kPanel)
          __builtin_memcpy(row, from, sizeof(row));
        else
          for (int i = 0; i < inside; ++i) row[i] = from[i];
        for (L& value : row) value *= coefficient;
        __builtin_memcpy(left + (b * n + k) * kPanel, row, sizeof(row));
      }
    }
    const long begin = column_panels * part / parts, end = column_panels * (part + 1) / parts;
    for_widths(static_cast<int>(end - begin), [&](int c, auto width) {
      constexpr int kWidth = decltype(width)::value;
      const long column = (begin + c) * P::kLanes;
      for (int p = 0; p < kWidth; ++p)
        xs.template at<P>(column + p * P::kLanes).copy(0, n, right + p * n);
      for (long r = 0; r < n; r += kTileRows) {
        P sum[kTileRows][kWidth];
        clear(sum);
        multiply_tile(n, left + r / kPanel * kPanel * n + r % kPanel, kPanel, 1, right, n, sum);
        store_rows(sum, out + r * columns + column, columns, n - r, columns - column);
      }
    });
    return;
  }
  const long n = columns, stride = column_panels * P::kLanes;
  P* right = static_cast<P*>(workspace);  // [column panels, n] coefficient M
  P* left = right + column_panels * n;    // [8, column panels] Xs
  for (long p = 0; p < column_panels; ++p)
    for (long k = 0; k < n; ++k)
      right[p * n + k] = factor * load<P>(m + k * n + p * P::kLanes, n - p * P::kLanes);
  for (long b = row_panels * part / parts; b < row_panels * (part + 1) / parts; ++b) {
    const long first = b * kPanel, count = rows - first < kPanel ? rows - first : kPanel;
    for (long p = 0; p < column_panels; ++p) {
      const auto at = xs.template at<P>(p * P::kLanes);
      for (int i = 0; i < kPanel; ++i)
        left[i * column_panels + p] = i < count ? at[first + i] : P::broadcast(0);
    }
    for (int j = 0; j < count; j += kTileRows) {
      for_widths(static_cast<int>(column_panels), [&](int c, auto width) {
        P sum[kTileRows][decltype(width)::value];
        clear(sum);
        multiply_tile(n, reinterpret_cast<const L*>(left) + j * stride, 1, stride, right + c * n, n,
                      sum);
        const long column = c * P::kLanes;
        store_rows(sum, out + (first + j) * columns + column, columns, count - j, columns - column);
      });
    }
  }
}

}  // namespace

template <typename X, typename L>
const GramKernels<X, L>& gram_kernels() {
  static constexpr GramKernels<X, L> kernels = {
      locate<X, L>,        inverse_power_of_two<L>, gram_bytes,
      gram<X, L, double>,  gram<X, L, float>,       arranged_bytes,
      gram_arranged<X, L>, backward_bytes<L>,       backward<X, L>,
  };
  return kernels;
}
template const GramKernels<float, float>& gram_kernels<float, float>();
template const GramKernels<float, double>& gram_kernels<float, double>();
template const GramKernels<double, double>& gram_kernels<double, double>();

}  // namespace SES_ISA
}  // namespace ses
