// Compiled once for each instruction set, as eigh.cpp is and under the same rule: no inline
// function of the standard library.
#include "gram_cpu.h"
#include "simd-inl.h"
#include "tile-inl.h"

namespace ses {
namespace SES_ISA {

namespace {

constexpr long kRowsPerSum = 64;  // rows summed before their sum is added: bounds the rounding

template <typename Number>
Number inverse_power_of_two(Number largest) {
  using Traits = ScalarTraits<Number>;
  if (largest == 0) return 1;
  typename Traits::Int bits;
  __builtin_memcpy(&bits, &largest, sizeof(bits));
  constexpr int kLimit = Traits::kExponentBias - 1;  // both powers stay normal
  const int e = static_cast<int>(bits >> Traits::kMantissaBits) - kLimit;
  const int clamped = e > kLimit ? kLimit : e < -kLimit ? -kLimit : e;
  bits = static_cast<typename Traits::Int>(Traits::kExponentBias - clamped)
         << Traits::kMantissaBits;
  Number scale;
  __builtin_memcpy(&scale, &bits, sizeof(scale));
  return scale;
}

// f(Sample()) of the samples' type, around the loops that read or write them: the products between
// are compiled once.
template <typename Number, typename Function>
SES_INLINE void with_sample(SampleType type, Function f) {
  switch (type) {
    case SampleType::kFloat16:
      return f(Float16());
    case SampleType::kBfloat16:
      return f(Bfloat16());
    case SampleType::kFloat32:
      return f(float());
    case SampleType::kFloat64:
      if constexpr (sizeof(Number) == sizeof(double)) return f(double());
  }
}

template <typename Pack>
SES_INLINE Pack larger(const Pack& a, const Pack& b) {
  return select(a < b, b, a);
}

// Columns [first, first + kPacks packs) of those before `last`, all there if kWhole; returns the
// largest |x - anchor|.
template <int kPacks, bool kWhole, typename Pack, typename Sample, typename Number>
SES_INLINE Pack locate_strip(const Samples& s, const Sample* x, long first, long last,
                             const Sample* anchor, Number* location) {
  const auto read = [&](const Sample* from, int p) {
    const long column = first + p * Pack::kLanes;
    return kWhole ? load<Pack>(from + column) : load<Pack>(from + column, last - column);
  };
  const Pack zero = Pack::broadcast(0);
  Pack largest[kPacks], origin[kPacks], total[kPacks];
  for (int p = 0; p < kPacks; ++p) {
    origin[p] = anchor == nullptr ? zero : read(anchor, p);
    total[p] = largest[p] = zero;
  }
  for (long i = 0; i < s.rows; i += kRowsPerSum) {
    const long end = s.rows - i < kRowsPerSum ? s.rows : i + kRowsPerSum;
    Pack part[kPacks];
    for (Pack& value : part) value = zero;
    for (long r = i; r < end; ++r) {
      for (int p = 0; p < kPacks; ++p) {
        const Pack shifted = read(x + r * s.row_stride, p) - origin[p];
        largest[p] = larger(largest[p], abs(shifted));
        part[p] = part[p] + shifted;
      }
    }
    for (int p = 0; p < kPacks; ++p) total[p] = total[p] + part[p];
  }
  for (int p = 0; p < kPacks && anchor != nullptr; ++p) {
    const long column = first + p * Pack::kLanes;
    store(origin[p], location + column, last - column);
    store(total[p] / Pack::broadcast(static_cast<Number>(s.rows)), location + s.columns + column,
          last - column);
  }
  for (int p = 1; p < kPacks; ++p) largest[0] = larger(largest[0], largest[p]);
  return largest[0];
}

template <typename Number>
Number locate(const Samples& s, long matrix, long first, long last, const void* anchors,
              long anchor_stride, Number* location) {
  using Pack = Line<Number>;
  constexpr int kPacks = 4;
  Pack largest = Pack::broadcast(0);
  with_sample<Number>(s.type, [&](auto sample) {
    using Sample = decltype(sample);
    const Sample* x = static_cast<const Sample*>(s.x) + matrix * s.matrix_stride;
    const Sample* anchor = static_cast<const Sample*>(anchors);
    if (anchor != nullptr) anchor += matrix * anchor_stride;
    long j = first;
    for (; j + kPacks * Pack::kLanes <= last; j += kPacks * Pack::kLanes)
      largest = larger(largest, locate_strip<kPacks, true, Pack>(s, x, j, last, anchor, location));
    for (; j + Pack::kLanes <= last; j += Pack::kLanes)
      largest = larger(largest, locate_strip<1, true, Pack>(s, x, j, last, anchor, location));
    if (j < last)
      largest = larger(largest, locate_strip<1, false, Pack>(s, x, j, last, anchor, location));
  });
  Number lane[Pack::kLanes], most = 0;
  __builtin_memcpy(lane, &largest, sizeof(lane));
  for (const Number value : lane) most = most < value ? value : most;
  return most;
}

// One matrix's x, and Xs a pack of columns at a time.
template <typename Sample, typename Number>
struct Standardized {
  const Sample* x;
  long row_stride, rows, columns;
  const Number *anchor, *offset;  // null: no centring
  Number scale;

  Standardized(const Samples& samples, const Standard<Number>& standard, long matrix)
      : x(static_cast<const Sample*>(samples.x) + matrix * samples.matrix_stride),
        row_stride(samples.row_stride),
        rows(samples.rows),
        columns(samples.columns),
        anchor(standard.location == nullptr ? nullptr
                                            : standard.location + matrix * standard.matrix_stride),
        offset(anchor == nullptr ? nullptr : anchor + standard.row_stride),
        scale(standard.scale[matrix]) {}

  // Columns [column, column + lanes) of any row; 0 beyond the last.
  template <typename Pack>
  struct Columns {
    const Sample* x;
    long row_stride, count;
    Pack anchor, offset, scale;
    Pack operator[](long row) const { return standardized<false>(x + row * row_stride); }
    // Rows [first, first + rows) to out: a branch for all of them.
    void copy(long first, long rows, Pack* out) const {
      const Sample* from = x + first * row_stride;
      if (count < Pack::kLanes)
        for (long i = 0; i < rows; ++i) out[i] = standardized<false>(from + i * row_stride);
      else
        for (long i = 0; i < rows; ++i) out[i] = standardized<true>(from + i * row_stride);
    }
    template <bool kWhole>
    Pack standardized(const Sample* from) const {
      const Pack values = kWhole ? load<Pack>(from) : load<Pack>(from, count);
      return ((values - anchor) - offset) * scale;
    }
  };
  template <typename Pack>
  Columns<Pack> at(long column) const {
    const long count = columns - column;
    const Pack zero = Pack::broadcast(0);
    return {x + column,
            row_stride,
            count,
            anchor == nullptr ? zero : load<Pack>(anchor + column, count),
            anchor == nullptr ? zero : load<Pack>(offset + column, count),
            Pack::broadcast(static_cast<typename Pack::Scalar>(scale))};
  }
};

// A batch of small matrices comes from memory faster than it is asked for in strips of eight rows:
// what the next ones need is asked for while these are worked on.
void prefetch_samples(const Samples& samples, long first, long count) {
  const long matrix = samples.matrix_stride * itemsize(samples.type);
  if (first + count <= samples.batch)
    prefetch(static_cast<const char*>(samples.x) + first * matrix, count * matrix);
}

// ---- the Gram matrix ----

// Of the contracted axis at a time: a quarter of the usual L2 cache.
long chunk(long panels) {
  const long depth = 4096 / panels / kPanelColumns * kPanelColumns;
  return depth < kPanelColumns ? kPanelColumns : depth;
}

long packed_bytes(long n) {
  const long panels = (n + kPanelColumns - 1) / kPanelColumns;
  return panels * chunk(panels) * static_cast<long>(sizeof(Line<double>));
}

// `count` of the contracted axis, from `first` on: [panels, step].
template <typename Sample, typename Number>
void pack_panels(const Standardized<Sample, Number>& xs, bool by_samples, long first, long count,
                 long step, Line<double>* packed) {
  using Pack = Line<double>;
  const long n = by_samples ? xs.rows : xs.columns;
  for (long p = 0; p * kPanelColumns < n; ++p) {
    if (!by_samples) {
      xs.template at<Pack>(p * kPanelColumns).copy(first, count, packed + p * step);
      continue;
    }
    for (long k = 0; k < count; k += kPanelColumns) {
      const auto columns = xs.template at<Pack>(first + k);
      Pack block[kPanelColumns];
      for (int i = 0; i < kPanelColumns; ++i)
        block[i] = p * kPanelColumns + i < n ? columns[p * kPanelColumns + i] : Pack::broadcast(0);
      Square<Pack>::transpose(block, packed + p * step + k);
    }
  }
}

// Rows of blocks part, part + parts, ... in panels: sums [panels, rows].
template <typename Number>
void gram_panels(const Samples& samples, const Standard<Number>& standard, Side side, long matrix,
                 int part, int parts, Line<double>* sums, Line<double>* packed) {
  using Pack = Line<double>;
  const bool by_samples = side == Side::kSamples;
  const long n = by_samples ? samples.rows : samples.columns;
  const long depth = by_samples ? samples.columns : samples.rows;
  const long panels = (n + kPanelColumns - 1) / kPanelColumns, rows = panels * kPanelColumns,
             step = chunk(panels);
  for (long first = 0; first < depth; first += step) {
    const long count = depth - first < step ? depth - first : step;
    with_sample<Number>(samples.type, [&](auto sample) {
      const Standardized<decltype(sample), Number> xs(samples, standard, matrix);
      pack_panels(xs, by_samples, first, count, step, packed);
    });
    for (long b = part; b < panels; b += parts) {
      for_widths(static_cast<int>(b) + 1, [&](int c, auto width) {
        for (int j = 0; j < kPanelColumns; j += kTileRows) {
          Pack* block = sums + c * rows + b * kPanelColumns + j;
          Pack sum[kTileRows][decltype(width)::value];
          if (first == 0)
            clear(sum);
          else
            load_tile(block, rows, sum);
          multiply_tile(count, reinterpret_cast<const double*>(packed + b * step) + j,
                        kPanelColumns, 1, packed + c * step, step, sum);
          store_tile(sum, block, rows);
        }
      });
    }
  }
}

long gram_bytes(long n) {
  const long rows = (n + kPanelColumns - 1) / kPanelColumns * kPanelColumns;
  return packed_bytes(n) + rows * rows * static_cast<long>(sizeof(double));
}

template <typename Number, typename Entry>
void gram(const Samples& samples, const Standard<Number>& standard, Side side, long matrix,
          int part, int parts, Entry* out, void* workspace) {
  const long n = side == Side::kSamples ? samples.rows : samples.columns;
  const long panels = (n + kPanelColumns - 1) / kPanelColumns, rows = panels * kPanelColumns;
  prefetch_samples(samples, matrix + 1, 1);
  Line<double>* packed =
      static_cast<Line<double>*>(workspace);  // [panels, chunk] eight of n a pack
  Line<double>* sums = packed + packed_bytes(n) / static_cast<long>(sizeof(Line<double>));
  gram_panels(samples, standard, side, matrix, part, parts, sums, packed);
  for (long b = part; b < panels; b += parts)
    for (long c = 0; c <= b; ++c)
      store_symmetric(sums + c * rows + b * kPanelColumns, static_cast<int>(b) * kPanelColumns,
                      static_cast<int>(c) * kPanelColumns, static_cast<int>(n), out);
}

// ---- the Gram matrices of a bundle at once, one a lane ----

// Entries of K summed in registers at a time: `kSumSide` rows by as many columns.
#if defined(__AVX512F__)
constexpr int kSumSide = 4;
#else
constexpr int kSumSide = 2;
#endif

// Of the contracted axis at a time: what fits the L1 cache beside the sums, in blocks of eight.
long interleaved_chunk(long rows) {
  const long depth = 512 / rows / kPanelColumns * kPanelColumns;
  return depth < kPanelColumns ? kPanelColumns : depth;
}

long padded_side(long n) { return (n + kSumSide - 1) / kSumSide * kSumSide; }

long interleaved_bytes(long n) {
  const long rows = padded_side(n);
  return rows * interleaved_chunk(rows) * static_cast<long>(sizeof(Line<double>));
}

// Xs of a bundle: entry (first_row + i, column + j) to out[i * down + j * right],
// for eight columns or those that there are.
template <bool kWhole, typename Sample, typename Number>
void interleave_samples(const Samples& samples, const Standard<Number>& standard, long first,
                        int count, long column, long first_row, long rows, Line<double>* out,
                        long down, long right) {
  using Pack = Line<double>;
  typename Standardized<Sample, Number>::template Columns<Pack> at[kBundle];
  for (int lane = 0; lane < kBundle; ++lane)
    at[lane] = Standardized<Sample, Number>(samples, standard, first + (lane < count ? lane : 0))
                   .template at<Pack>(column);
  for (long i = 0; i < rows; ++i) {
    const long row = (first_row + i) * samples.row_stride;
    Pack block[kBundle];
    for (int lane = 0; lane < kBundle; ++lane)
      block[lane] = at[lane].template standardized<kWhole>(at[lane].x + row);
    Square<Pack>::transpose(block, block);
    for (int j = 0; j < kPanelColumns; ++j)
      if (kWhole || j < at[0].count) out[i * down + j * right] = block[j];
  }
}

template <typename Number>
void gram_interleaved(const Samples& samples, const Standard<Number>& standard, Side side,
                      long first, int count, Line<double>* k, Line<double>* packed) {
  using Pack = Line<double>;
  const bool by_samples = side == Side::kSamples;
  const long n = by_samples ? samples.rows : samples.columns;
  const long depth = by_samples ? samples.columns : samples.rows;
  const long rows = padded_side(n), step = interleaved_chunk(rows);

  for (long begin = 0; begin < depth; begin += step) {
    const long length = depth - begin < step ? depth - begin : step;
    const long columns = by_samples ? length : n, down = by_samples ? 1 : rows;
    const long right = by_samples ? rows : 1;
    with_sample<Number>(samples.type, [&](auto sample) {
      using Sample = decltype(sample);
      for (long c = 0; c < columns; c += kPanelColumns) {
        const auto pack = columns - c < kPanelColumns ? interleave_samples<false, Sample, Number>
                                                      : interleave_samples<true, Sample, Number>;
        pack(samples, standard, first, count, by_samples ? begin + c : c, by_samples ? 0 : begin,
             by_samples ? n : length, packed + c * right, down, right);
      }
    });
    for (long i = 0; i < length; ++i)
      for (long r = n; r < rows; ++r) packed[i * rows + r] = Pack::broadcast(0);

    for (long i = 0; i < n; i += kSumSide) {
      for (long j = 0; j <= i; j += kSumSide) {
        Pack sum[kSumSide][kSumSide];
        clear(sum);
        if (begin > 0)
          for (int r = 0; r < kSumSide && i + r < n; ++r)
            for (int c = 0; c < kSumSide && j + c <= i + r; ++c) sum[r][c] = k[(i + r) * n + j + c];
        for (long d = 0; d < length; ++d) {
          const Pack* from = packed + d * rows;
          for (int r = 0; r < kSumSide; ++r)
            for (int c = 0; c < kSumSide; ++c) sum[r][c] = fma(from[i + r], from[j + c], sum[r][c]);
        }
        for (int r = 0; r < kSumSide && i + r < n; ++r)
          for (int c = 0; c < kSumSide && j + c <= i + r; ++c) k[(i + r) * n + j + c] = sum[r][c];
      }
    }
  }
}

// ---- in the arrangement that the rational solver takes ----

long arranged_bytes(Arrangement arrangement, long n) {
  return arrangement == Arrangement::kInterleaved ? interleaved_bytes(n) : packed_bytes(n);
}

template <typename Number>
void gram_arranged(Arrangement arrangement, const Samples& samples,
                   const Standard<Number>& standard, Side side, long first, int count,
                   double* grams, void* workspace) {
  prefetch_samples(samples, first + count, count);
  Line<double>* out = reinterpret_cast<Line<double>*>(grams);
  Line<double>* packed = static_cast<Line<double>*>(workspace);
  if (arrangement == Arrangement::kPanels)
    return gram_panels(samples, standard, side, first, 0, 1, out, packed);
  const long n = side == Side::kSamples ? samples.rows : samples.columns;
  for_bundles(count, kBundle, [&](int at, int size) {
    gram_interleaved(samples, standard, side, first + at, size, out + at / kBundle * n * n, packed);
  });
}

// ---- the product with a symmetric matrix ----

template <typename Number>
long backward_bytes(long n) {
  using Pack = Line<Number>;
  const long panels = (n + Pack::kLanes - 1) / Pack::kLanes,
             rows = (n + kPanelColumns - 1) / kPanelColumns * kPanelColumns;
  const long by_samples = (rows / Pack::kLanes + 1) * rows + kTilePanels * n;
  const long by_features = panels * n + panels * kPanelColumns;
  return (by_samples > by_features ? by_samples : by_features) * static_cast<long>(sizeof(Pack));
}

// Eight numbers in registers no wider than they are.
template <typename Number>
constexpr int kPanelRowBytes =
    kPanelColumns * sizeof(Number) < kRegisterBytes ? kPanelColumns * sizeof(Number)
                                                    : kRegisterBytes;
template <typename Number>
using PanelRow =
    PackOf<Number, kPanelRowBytes<Number>, kPanelColumns * sizeof(Number) / kPanelRowBytes<Number>>;

// A tile of sums to the samples' type, `first` on.
template <typename Pack, int kWidth>
SES_INLINE void store_rows(const Pack (&sum)[kTileRows][kWidth], void* out, SampleType type,
                           long first, long stride, long rows, long columns) {
  constexpr int kLast = kWidth - 1;  // the only one that can be cut
  with_sample<typename Pack::Scalar>(type, [&](auto sample) {
    auto* to = static_cast<decltype(sample)*>(out) + first;
    for (int r = 0; r < kTileRows && r < rows; ++r, to += stride) {
      for (int p = 0; p < kLast; ++p) store(sum[r][p], to + p * Pack::kLanes);
      store(sum[r][kLast], to + kLast * Pack::kLanes, columns - kLast * Pack::kLanes);
    }
  });
}

template <typename Number>
void backward(const Number* m, const Samples& samples, const Standard<Number>& standard,
              Number coefficient, Side side, long matrix, int part, int parts, void* out,
              void* workspace) {
  using Pack = Line<Number>;
  const Pack factor = Pack::broadcast(coefficient);
  const long rows = samples.rows, columns = samples.columns;
  const long bytes = rows * columns * itemsize(samples.type);
  if (parts == 1 && matrix + 1 < samples.batch) {
    const long square = side == Side::kSamples ? rows * rows : columns * columns;
    prefetch_samples(samples, matrix + 1, 1);
    prefetch(m + square, square);
    prefetch<kWrite>(static_cast<char*>(out) + bytes, bytes);
  }
  const long column_panels = (columns + Pack::kLanes - 1) / Pack::kLanes;
  const long row_panels = (rows + kPanelColumns - 1) / kPanelColumns;
  if (side == Side::kSamples) {
    const long n = rows;
    Pack* right = static_cast<Pack*>(workspace);  // [tile panels, n] Xs
    Number* left =
        reinterpret_cast<Number*>(right + kTilePanels * n);  // [row panels, n, 8] coefficient M
    using Row = PanelRow<Number>;
    for (long b = 0; b < row_panels; ++b)
      for (long k = 0; k < n; ++k) {
        const Row row = load<Row>(m + k * n + b * kPanelColumns, n - b * kPanelColumns);
        store(Row::broadcast(coefficient) * row, left + (b * n + k) * kPanelColumns);
      }
    const long begin = column_panels * part / parts, end = column_panels * (part + 1) / parts;
    for_widths(static_cast<int>(end - begin), [&](int c, auto width) {
      constexpr int kWidth = decltype(width)::value;
      const long column = (begin + c) * Pack::kLanes;
      with_sample<Number>(samples.type, [&](auto sample) {
        const Standardized<decltype(sample), Number> xs(samples, standard, matrix);
        for (int p = 0; p < kWidth; ++p)
          xs.template at<Pack>(column + p * Pack::kLanes).copy(0, n, right + p * n);
      });
      for (long r = 0; r < n; r += kTileRows) {
        Pack sum[kTileRows][kWidth];
        clear(sum);
        multiply_tile(n, left + r / kPanelColumns * kPanelColumns * n + r % kPanelColumns,
                      kPanelColumns, 1, right, n, sum);
        store_rows(sum, out, samples.type, r * columns + column, columns, n - r, columns - column);
      }
    });
    return;
  }
  const long n = columns, stride = column_panels * Pack::kLanes;
  Pack* right = static_cast<Pack*>(workspace);  // [column panels, n] coefficient M
  Pack* left = right + column_panels * n;       // [8, column panels] Xs
  for (long p = 0; p < column_panels; ++p)
    for (long k = 0; k < n; ++k)
      right[p * n + k] = factor * load<Pack>(m + k * n + p * Pack::kLanes, n - p * Pack::kLanes);
  for (long b = row_panels * part / parts; b < row_panels * (part + 1) / parts; ++b) {
    const long first = b * kPanelColumns,
               count = rows - first < kPanelColumns ? rows - first : kPanelColumns;
    with_sample<Number>(samples.type, [&](auto sample) {
      const Standardized<decltype(sample), Number> xs(samples, standard, matrix);
      for (long p = 0; p < column_panels; ++p) {
        const auto at = xs.template at<Pack>(p * Pack::kLanes);
        for (int i = 0; i < kPanelColumns; ++i)
          left[i * column_panels + p] = i < count ? at[first + i] : Pack::broadcast(0);
      }
    });
    for (int j = 0; j < count; j += kTileRows) {
      for_widths(static_cast<int>(column_panels), [&](int c, auto width) {
        Pack sum[kTileRows][decltype(width)::value];
        clear(sum);
        multiply_tile(n, reinterpret_cast<const Number*>(left) + j * stride, 1, stride,
                      right + c * n, n, sum);
        const long column = c * Pack::kLanes;
        store_rows(sum, out, samples.type, (first + j) * columns + column, columns, count - j,
                   columns - column);
      });
    }
  }
}

}  // namespace

template <typename Number>
const GramKernels<Number>& gram_kernels() {
  static constexpr GramKernels<Number> kernels = {
      locate<Number>,        inverse_power_of_two<Number>, gram_bytes,
      gram<Number, double>,  gram<Number, float>,          arranged_bytes,
      gram_arranged<Number>, backward_bytes<Number>,       backward<Number>,
  };
  return kernels;
}
template const GramKernels<float>& gram_kernels<float>();
template const GramKernels<double>& gram_kernels<double>();

}  // namespace SES_ISA
}  // namespace ses
