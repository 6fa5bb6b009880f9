// The only file that knows Python: checks the sizes, lets go of the GIL, passes the pointers on.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <climits>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "eigh.h"
#include "gram_cpu.h"
#include "rational_cpu.h"
#include "rational_from_samples.h"

#ifndef SES_CUDA_ARCHS
#define SES_CUDA_ARCHS ""
#define SES_CUDA_VERSION ""
#endif

namespace py = pybind11;

namespace {

[[noreturn]] void refuse(const std::string& what) { throw py::value_error(what); }

void check_itemsize(int itemsize) {
  if (itemsize != sizeof(float) && itemsize != sizeof(double))
    refuse("itemsize must be 4 (float32) or 8 (float64), got " + std::to_string(itemsize));
}

// f(float()) or f(double())
template <typename F>
void with_number(int itemsize, F f) {
  check_itemsize(itemsize);
  if (itemsize == sizeof(float))
    f(float());
  else
    f(double());
}

void check_sizes(long batch, long n, int max_n, int itemsize, const std::string& where) {
  // A CUDA grid has INT_MAX blocks; the CPU has no such batch in memory.
  if (batch < 0 || batch > INT_MAX)
    refuse("batch must be in [0, " + std::to_string(INT_MAX) + "], got " + std::to_string(batch));
  if (n < 1 || n > max_n)
    refuse("n must be in [1, " + std::to_string(max_n) + "] for itemsize " +
           std::to_string(itemsize) + " on " + where + ", got " + std::to_string(n));
}

void check_threads(int threads) {
  if (threads < 1) refuse("threads must be at least 1, got " + std::to_string(threads));
}

void check_not_null(const char* names, std::initializer_list<std::uintptr_t> addresses) {
  for (const std::uintptr_t address : addresses)
    if (address == 0) refuse(std::string(names) + " must not be null");
}

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void eigh_cpu(std::uintptr_t a, std::uintptr_t w, std::uintptr_t v, long batch, int n, int itemsize,
              int threads) {
  check_sizes(batch, n, ses::kMaxNCpu, itemsize, "the CPU");
  if (batch > 0) check_not_null("a, w and v", {a, w, v});
  check_threads(threads);
  const py::gil_scoped_release release;
  with_number(itemsize, [&](auto number) {
    using T = decltype(number);
    ses::eigh_cpu(pointer<const T>(a), pointer<T>(w), pointer<T>(v), batch, n, threads);
  });
}

int max_n_cuda(int device, int itemsize) {
  check_itemsize(itemsize);
  return ses::max_n_cuda(device, static_cast<std::size_t>(itemsize));
}

void eigh_cuda(std::uintptr_t a, std::uintptr_t w, std::uintptr_t v, long batch, int n,
               int itemsize, int device, std::uintptr_t stream) {
  check_sizes(batch, n, max_n_cuda(device, itemsize), itemsize,
              "CUDA device " + std::to_string(device));
  if (batch > 0) check_not_null("a, w and v", {a, w, v});
  const py::gil_scoped_release release;
  with_number(itemsize, [&](auto number) {
    using T = decltype(number);
    ses::eigh_cuda(pointer<const T>(a), pointer<T>(w), pointer<T>(v), batch, n, device,
                   pointer<void>(stream));
  });
}

// ---- samples: x by address, strides in elements and shape ----

template <typename T>
ses::Samples<T> samples(std::uintptr_t x, long matrix_stride, long row_stride, long batch,
                        long rows, long columns) {
  if (x == 0 || batch < 1 || rows < 1 || columns < 1)
    refuse("x must not be null and no axis empty, got (" + std::to_string(batch) + ", " +
           std::to_string(rows) + ", " + std::to_string(columns) + ")");
  return {pointer<const T>(x), matrix_stride, row_stride, batch, rows, columns};
}

// f(Samples<X>, L()) for the itemsizes of the samples and of the numbers that standardise them
template <typename F>
void with_samples(std::uintptr_t x, int x_itemsize, int itemsize, long matrix_stride,
                  long row_stride, long batch, long rows, long columns, F f) {
  check_itemsize(x_itemsize);
  check_itemsize(itemsize);
  if (x_itemsize == sizeof(double)) {
    if (itemsize != sizeof(double)) refuse("float64 samples are standardised in float64");
    f(samples<double>(x, matrix_stride, row_stride, batch, rows, columns), double());
  } else if (itemsize == sizeof(double)) {
    f(samples<float>(x, matrix_stride, row_stride, batch, rows, columns), double());
  } else {
    f(samples<float>(x, matrix_stride, row_stride, batch, rows, columns), float());
  }
}

void location_scale(std::uintptr_t x, int x_itemsize, int itemsize, long matrix_stride,
                    long row_stride, long batch, long rows, long columns, std::uintptr_t anchor,
                    long anchor_stride, std::uintptr_t location, std::uintptr_t scale,
                    int threads) {
  check_threads(threads);
  check_not_null("scale", {scale});
  if (anchor != 0) check_not_null("location", {location});
  with_samples(x, x_itemsize, itemsize, matrix_stride, row_stride, batch, rows, columns,
               [&](const auto& s, auto number) {
                 using L = decltype(number);
                 using X = std::remove_const_t<std::remove_reference_t<decltype(*s.x)>>;
                 const py::gil_scoped_release release;
                 ses::location_scale_cpu(s, pointer<const X>(anchor), anchor_stride,
                                         pointer<L>(location), pointer<L>(scale), threads);
               });
}

ses::Side side_of(bool samples) { return samples ? ses::Side::kSamples : ses::Side::kFeatures; }

void gram(std::uintptr_t x, int x_itemsize, int itemsize, long matrix_stride, long row_stride,
          long batch, long rows, long columns, std::uintptr_t location, long location_stride,
          long location_row_stride, std::uintptr_t scale, bool by_samples, std::uintptr_t out,
          int out_itemsize, int threads) {
  check_threads(threads);
  check_not_null("scale", {scale});
  check_not_null("out", {out});
  with_samples(x, x_itemsize, itemsize, matrix_stride, row_stride, batch, rows, columns,
               [&](const auto& s, auto number) {
                 using L = decltype(number);
                 const ses::Standard<L> standard{pointer<const L>(location), location_stride,
                                                 location_row_stride, pointer<const L>(scale)};
                 const py::gil_scoped_release release;
                 with_number(out_itemsize, [&](auto k) {
                   ses::gram_cpu(s, standard, side_of(by_samples), pointer<decltype(k)>(out),
                                 threads);
                 });
               });
}

void gram_backward(std::uintptr_t m, std::uintptr_t x, int x_itemsize, int itemsize,
                   long matrix_stride, long row_stride, long batch, long rows, long columns,
                   std::uintptr_t location, long location_stride, long location_row_stride,
                   std::uintptr_t scale, std::uintptr_t g, long g_stride, bool by_samples,
                   std::uintptr_t out, int threads) {
  check_threads(threads);
  check_not_null("m, scale and g", {m, scale, g});
  check_not_null("out", {out});
  with_samples(x, x_itemsize, itemsize, matrix_stride, row_stride, batch, rows, columns,
               [&](const auto& s, auto number) {
                 using L = decltype(number);
                 using X = std::remove_const_t<std::remove_reference_t<decltype(*s.x)>>;
                 const ses::Standard<L> standard{pointer<const L>(location), location_stride,
                                                 location_row_stride, pointer<const L>(scale)};
                 const py::gil_scoped_release release;
                 ses::gram_backward_cpu(pointer<const L>(m), s, standard, pointer<const L>(g),
                                        g_stride, side_of(by_samples), pointer<X>(out), threads);
               });
}

// ---- the rational solver ----

// (gram, h, m or 0, batch, n, center) of one layer
using LayerTuple = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, long, int, bool>;

template <typename K, typename M>
std::vector<ses::GramLayer<K, M>> gram_layers(const std::vector<LayerTuple>& tuples, int max_n) {
  std::vector<ses::GramLayer<K, M>> layers;
  for (const auto& [gram, h, m, batch, n, center] : tuples) {
    check_not_null("gram and h", {gram, h});
    check_sizes(batch, n, max_n, sizeof(K), "this device");
    layers.push_back({pointer<const K>(gram), pointer<M>(h), pointer<M>(m), batch, n, center});
  }
  return layers;
}

// The poles live as long as the two vectors.
ses::Poles poles(double c, const std::vector<double>& t, const std::vector<double>& w) {
  if (t.empty() || t.size() != w.size() || t.size() > ses::kMaxPoles || t.size() % 12 != 0)
    refuse("t and w must have the same number of poles, a multiple of 12 of at most " +
           std::to_string(ses::kMaxPoles) + ", got " + std::to_string(t.size()) + " and " +
           std::to_string(w.size()));
  return {c, static_cast<int>(t.size()), t.data(), w.data()};
}

void rational_cpu(const std::vector<LayerTuple>& layers, int m_itemsize, double c,
                  const std::vector<double>& t, const std::vector<double>& w, int threads) {
  check_threads(threads);
  const ses::Poles set = poles(c, t, w);
  with_number(m_itemsize, [&](auto number) {
    const auto checked = gram_layers<double, decltype(number)>(layers, INT_MAX);
    const py::gil_scoped_release release;
    ses::rational_cpu(checked.data(), static_cast<int>(checked.size()), set, threads);
  });
}

// (x, matrix stride, row stride, batch, rows, columns, by samples, location or 0, scale, h, m or 0)
// of one layer
using SampleTuple = std::tuple<std::uintptr_t, long, long, long, long, long, bool, std::uintptr_t,
                               std::uintptr_t, std::uintptr_t, std::uintptr_t>;

template <typename T>
std::vector<ses::SampleLayer<T>> sample_layers(const std::vector<SampleTuple>& tuples) {
  std::vector<ses::SampleLayer<T>> layers;
  for (const auto& [x, matrix_stride, row_stride, batch, rows, columns, by_samples, location, scale,
                    h, m] : tuples) {
    check_not_null("scale and h", {scale, h});
    const long n = by_samples ? rows : columns;
    const auto of_x = samples<T>(x, matrix_stride, row_stride, batch, rows, columns);
    check_sizes(batch, n, INT_MAX, sizeof(T), "the CPU");
    layers.push_back({of_x,
                      side_of(by_samples),
                      pointer<T>(location),
                      pointer<T>(scale),
                      {nullptr, pointer<T>(h), pointer<T>(m), batch, static_cast<int>(n),
                       by_samples && location != 0}});
  }
  return layers;
}

void rational_from_samples_cpu(const std::vector<SampleTuple>& layers, int itemsize, double c,
                               const std::vector<double>& t, const std::vector<double>& w,
                               int threads) {
  check_threads(threads);
  const ses::Poles set = poles(c, t, w);
  with_number(itemsize, [&](auto number) {
    const auto checked = sample_layers<decltype(number)>(layers);
    const py::gil_scoped_release release;
    ses::rational_from_samples_cpu(checked.data(), static_cast<int>(checked.size()), set, threads);
  });
}

using CudaLayers = std::vector<ses::GramLayer<float, float>>;

// Floats of workspace that rational_cuda needs.
std::size_t rational_cuda_workspace(const std::vector<LayerTuple>& layers, double c,
                                    const std::vector<double>& t, const std::vector<double>& w,
                                    int device) {
  const CudaLayers checked = gram_layers<float, float>(layers, ses::max_n_rational_cuda(device));
  return ses::rational_cuda_workspace(checked.data(), static_cast<int>(checked.size()),
                                      poles(c, t, w), device);
}

void rational_cuda(const std::vector<LayerTuple>& layers, double c, const std::vector<double>& t,
                   const std::vector<double>& w, std::uintptr_t workspace, int device,
                   std::uintptr_t stream) {
  const CudaLayers checked = gram_layers<float, float>(layers, ses::max_n_rational_cuda(device));
  const ses::Poles set = poles(c, t, w);
  const py::gil_scoped_release release;
  ses::rational_cuda(checked.data(), static_cast<int>(checked.size()), set,
                     pointer<float>(workspace), device, pointer<void>(stream));
}

py::dict info() {
  py::list archs;
  std::string arch;
  for (const char c : std::string(SES_CUDA_ARCHS ",")) {
    if (c != ',') {
      arch += c;
    } else if (!arch.empty()) {
      archs.append(arch);
      arch.clear();
    }
  }
  py::dict facts;
  facts["cuda_archs"] = archs;
  facts["cuda_version"] = *SES_CUDA_VERSION ? py::object(py::str(SES_CUDA_VERSION)) : py::none();
  facts["simd"] = ses::simd_name();
#if defined(__clang__)
  facts["compiler"] = "clang " __clang_version__;
#else
  facts["compiler"] = "gcc " __VERSION__;
#endif
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "What ses_kernels computes outside PyTorch, on raw pointers:\n\n"
      "- eigh_cpu, eigh_cuda: symmetric eigendecomposition of small matrices;\n"
      "- location_scale, gram, gram_backward: from samples to their Gram matrices, and back to a "
      "gradient, on the CPU;\n"
      "- rational_cpu, rational_cuda with rational_cuda_workspace: from Gram matrices to H and "
      "dH/dK by partial fractions of the logarithm;\n"
      "- rational_from_samples_cpu: all of that in one call.\n\n"
      "max_n_cpu, max_n_cuda and max_n_rational_cuda say how large a matrix may be, info what was "
      "built.";
  m.def("eigh_cpu", &eigh_cpu, py::arg("a"), py::arg("w"), py::arg("v"), py::arg("batch"),
        py::arg("n"), py::arg("itemsize"), py::arg("threads"),
        "a (batch, n, n) -> w (batch, n) ascending, v (batch, n, n), eigenvectors as rows; "
        "contiguous, in CPU memory. Reads the lower triangle of a.");
  m.def("eigh_cuda", &eigh_cuda, py::arg("a"), py::arg("w"), py::arg("v"), py::arg("batch"),
        py::arg("n"), py::arg("itemsize"), py::arg("device"), py::arg("stream"),
        "As eigh_cpu, in the memory of `device`, enqueued on `stream` (a cudaStream_t).");
  m.def(
      "max_n_cpu",
      [](int itemsize) {
        check_itemsize(itemsize);
        return ses::kMaxNCpu;
      },
      py::arg("itemsize"), "The largest n eigh_cpu takes.");
  m.def("max_n_cuda", &max_n_cuda, py::arg("device"), py::arg("itemsize"),
        "The largest n eigh_cuda takes; 0 where it cannot run.");
  m.def("location_scale", &location_scale,
        "x (batch, rows, columns) of dense rows and a dense anchor row for each matrix, 0 for no "
        "centring -> location (batch, 2, columns) and scale (batch,).");
  m.def("gram", &gram, "x, location (0 for no centring) and scale -> K (batch, n, n).");
  m.def("gram_backward", &gram_backward,
        "m (batch, n, n), x, location, scale, g (batch,) -> out (batch, rows, columns).");
  m.def("rational_cpu", &rational_cpu,
        "[(gram, h, m or 0, batch, n, center)], float64 grams -> H (batch,) and M (batch, n, n).");
  m.def(
      "rational_from_samples_cpu", &rational_from_samples_cpu,
      "[(x, matrix stride, row stride, batch, rows, columns, by samples, location or 0, scale, "
      "h, m or 0)] -> location (batch, 2, columns) from the first rows, scale (batch,), H and M.");
  m.def("rational_cuda", &rational_cuda,
        "As rational_cpu for float32 in the memory of `device`, enqueued on `stream`.");
  m.def("rational_cuda_workspace", &rational_cuda_workspace, "Floats of workspace it needs.");
  m.def("max_n_rational_cuda", &ses::max_n_rational_cuda, py::arg("device"),
        "The largest n rational_cuda takes; 0 where it cannot run.");
  m.def("info", &info, "What this build contains and what it chose to run with.");
}
