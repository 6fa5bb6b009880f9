// The only file that knows Python: checks the sizes, lets go of the GIL, passes the pointers on.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <climits>
#include <cstdint>
#include <string>

#include "eigh.h"
#include "standardize.h"

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

void check_sizes(std::uintptr_t a, std::uintptr_t w, std::uintptr_t v, long batch, int n,
                 int itemsize, int max_n, const std::string& where) {
  check_itemsize(itemsize);
  // A CUDA grid has INT_MAX blocks; the CPU has no such batch in memory.
  if (batch < 0 || batch > INT_MAX)
    refuse("batch must be in [0, " + std::to_string(INT_MAX) + "], got " + std::to_string(batch));
  if (n < 1 || n > max_n)
    refuse("n must be in [1, " + std::to_string(max_n) + "] for itemsize " +
           std::to_string(itemsize) + " on " + where + ", got " + std::to_string(n));
  if (batch > 0 && (a == 0 || w == 0 || v == 0)) refuse("a, w and v must not be null");
}

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void eigh_cpu(std::uintptr_t a, std::uintptr_t w, std::uintptr_t v, long batch, int n, int itemsize,
              int threads) {
  check_sizes(a, w, v, batch, n, itemsize, ses::kMaxNCpu, "the CPU");
  if (threads < 1) refuse("threads must be at least 1, got " + std::to_string(threads));
  const py::gil_scoped_release release;
  if (itemsize == sizeof(float))
    ses::eigh_cpu(pointer<const float>(a), pointer<float>(w), pointer<float>(v), batch, n, threads);
  else
    ses::eigh_cpu(pointer<const double>(a), pointer<double>(w), pointer<double>(v), batch, n,
                  threads);
}

int max_n_cuda(int device, int itemsize) {
  check_itemsize(itemsize);
  return ses::max_n_cuda(device, static_cast<std::size_t>(itemsize));
}

void eigh_cuda(std::uintptr_t a, std::uintptr_t w, std::uintptr_t v, long batch, int n,
               int itemsize, int device, std::uintptr_t stream) {
  check_sizes(a, w, v, batch, n, itemsize, max_n_cuda(device, itemsize),
              "CUDA device " + std::to_string(device));
  const py::gil_scoped_release release;
  if (itemsize == sizeof(float))
    ses::eigh_cuda(pointer<const float>(a), pointer<float>(w), pointer<float>(v), batch, n, device,
                   pointer<void>(stream));
  else
    ses::eigh_cuda(pointer<const double>(a), pointer<double>(w), pointer<double>(v), batch, n,
                   device, pointer<void>(stream));
}

template <typename T>
ses::Samples<T> samples(std::uintptr_t x, long matrix_stride, long row_stride, long batch,
                        long rows, long columns) {
  if (x == 0 || batch < 1 || rows < 1 || columns < 1)
    refuse("x must not be null and no axis empty, got (" + std::to_string(batch) + ", " +
           std::to_string(rows) + ", " + std::to_string(columns) + ")");
  return {pointer<const T>(x), matrix_stride, row_stride, batch, rows, columns};
}

template <typename T>
void location_scale(std::uintptr_t x, long matrix_stride, long row_stride, long batch, long rows,
                    long columns, std::uintptr_t location, std::uintptr_t scale) {
  const auto s = samples<T>(x, matrix_stride, row_stride, batch, rows, columns);
  const py::gil_scoped_release release;
  ses::standardize_kernels<T>().location_scale(s, pointer<T>(location), pointer<T>(scale));
}

template <typename T>
void standardize(std::uintptr_t x, long matrix_stride, long row_stride, long batch, long rows,
                 long columns, std::uintptr_t location, long location_matrix_stride,
                 long location_row_stride, std::uintptr_t scale, std::uintptr_t out) {
  const auto s = samples<T>(x, matrix_stride, row_stride, batch, rows, columns);
  const py::gil_scoped_release release;
  ses::standardize_kernels<T>().standardize(s, pointer<const T>(location), location_matrix_stride,
                                            location_row_stride, pointer<const T>(scale),
                                            pointer<T>(out));
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
  m.doc() = "Batched symmetric eigendecomposition of small matrices, on raw pointers.";
  m.def("eigh_cpu", &eigh_cpu, py::arg("a"), py::arg("w"), py::arg("v"), py::arg("batch"),
        py::arg("n"), py::arg("itemsize"), py::arg("threads"),
        "a (batch, n, n) -> w (batch, n) ascending, v (batch, n, n), eigenvectors as rows; "
        "contiguous, "
        "in CPU memory. "
        "Reads the lower triangle of a.");
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
  constexpr const char* kLocationScale =
      "x (batch, rows, columns) of dense rows, strides in elements -> location (batch, 2, "
      "columns), "
      "or 0 for no centring, and scale (batch,).";
  m.def("location_scale_float32", &location_scale<float>, kLocationScale);
  m.def("location_scale_float64", &location_scale<double>, kLocationScale);
  constexpr const char* kStandardize =
      "x, location (0 for no centring) and scale -> out (batch, rows, columns), contiguous.";
  m.def("standardize_float32", &standardize<float>, kStandardize);
  m.def("standardize_float64", &standardize<double>, kStandardize);
  m.def("info", &info, "What this build contains and what it chose to run with.");
}
