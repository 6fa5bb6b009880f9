// The only file that knows Python: checks the sizes, lets go of the GIL, passes the pointers on.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <climits>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "eigh.h"
#include "gram_cpu.h"
#include "rational_cpu.h"
#include "rational_from_samples.h"
#include "which_isa.h"

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
template <typename Function>
void with_number(int itemsize, Function f) {
  check_itemsize(itemsize);
  if (itemsize == sizeof(float))
    f(float());
  else
    f(double());
}

void check_batch(long batch) {
  // A CUDA grid has INT_MAX blocks; the CPU has no such batch in memory.
  if (batch < 0 || batch > INT_MAX)
    refuse("batch must be in [0, " + std::to_string(INT_MAX) + "], got " + std::to_string(batch));
}

void check_n(long n, int max_n, const std::string& where) {
  if (n < 1 || n > max_n)
    refuse("n must be in [1, " + std::to_string(max_n) + "] " + where + ", got " +
           std::to_string(n));
}

std::string on_cuda(int device) { return "on CUDA device " + std::to_string(device); }

void check_threads(int threads) {
  if (threads < 1) refuse("threads must be at least 1, got " + std::to_string(threads));
}

void check_not_null(const char* names, std::initializer_list<std::uintptr_t> addresses) {
  for (const std::uintptr_t address : addresses)
    if (address == 0) refuse(std::string(names) + " must not be null");
}

template <typename Pointee>
Pointee* pointer(std::uintptr_t address) {
  return reinterpret_cast<Pointee*>(address);
}

void eigh_cpu(std::uintptr_t a, std::uintptr_t w, std::uintptr_t v, long batch, int n, int itemsize,
              int threads) {
  check_batch(batch);
  check_n(n, ses::kMaxNCpu, "on the CPU");
  if (batch > 0) check_not_null("a, w and v", {a, w, v});
  check_threads(threads);
  const py::gil_scoped_release release;
  with_number(itemsize, [&](auto number) {
    using Scalar = decltype(number);
    ses::eigh_cpu(pointer<const Scalar>(a), pointer<Scalar>(w), pointer<Scalar>(v), batch, n,
                  threads);
  });
}

int max_n_cuda(int device, int itemsize) {
  check_itemsize(itemsize);
  return ses::max_n_cuda(device, static_cast<std::size_t>(itemsize));
}

void eigh_cuda(std::uintptr_t a, std::uintptr_t w, std::uintptr_t v, long batch, int n,
               int itemsize, int device, std::uintptr_t stream) {
  check_batch(batch);
  check_n(n, max_n_cuda(device, itemsize),
          on_cuda(device) + " for itemsize " + std::to_string(itemsize));
  if (batch > 0) check_not_null("a, w and v", {a, w, v});
  const py::gil_scoped_release release;
  with_number(itemsize, [&](auto number) {
    using Scalar = decltype(number);
    ses::eigh_cuda(pointer<const Scalar>(a), pointer<Scalar>(w), pointer<Scalar>(v), batch, n,
                   device, pointer<void>(stream));
  });
}

// ---- values: what operations read and write, checked when they are made ----
// From Python each comes as a tuple of its Parts: Python objects of these classes would take 0.4 us
// each to make, at every call. Poles are made once.

using Address = std::uintptr_t;
using Three = std::array<long, 3>;  // a shape or strides as torch has them

std::string to_string(const Three& shape) {
  return "(" + std::to_string(shape[0]) + ", " + std::to_string(shape[1]) + ", " +
         std::to_string(shape[2]) + ")";
}

ses::SampleType type_of(const std::string& dtype) {
  if (dtype == "float16") return ses::SampleType::kFloat16;
  if (dtype == "bfloat16") return ses::SampleType::kBfloat16;
  if (dtype == "float32") return ses::SampleType::kFloat32;
  if (dtype == "float64") return ses::SampleType::kFloat64;
  refuse("x must be float16, bfloat16, float32 or float64, got " + dtype);
}

class Samples {
 public:
  using Parts = std::tuple<Address, std::string, Three, Three>;

  Samples(Address x, const std::string& dtype, const Three& stride, const Three& shape)
      : x_(x), type_(type_of(dtype)), stride_(stride), shape_(shape) {
    if (x == 0 || shape[0] < 1 || shape[1] < 1 || shape[2] < 1)
      refuse("x must not be null and no axis empty, got " + to_string(shape));
    if (stride[2] != 1) refuse("rows must be dense, got strides " + to_string(stride));
  }

  long batch() const { return shape_[0]; }
  long n(bool by_samples) const { return shape_[by_samples ? 1 : 2]; }

  // To be standardised by numbers of this size.
  ses::Samples view(std::size_t itemsize) const {
    if (type_ == ses::SampleType::kFloat64 && itemsize != sizeof(double))
      refuse("float64 samples are standardised in float64");
    return {
        pointer<const void>(x_), type_, stride_[0], stride_[1], shape_[0], shape_[1], shape_[2]};
  }

 private:
  Address x_;
  ses::SampleType type_;
  Three stride_, shape_;
};

class Standard {
 public:
  using Parts = std::tuple<Address, Three, Address, int>;

  Standard(Address location, const Three& stride, Address scale, int itemsize)
      : location_(location), stride_(stride), scale_(scale), itemsize_(itemsize) {
    check_itemsize(itemsize);
    check_not_null("scale", {scale});
  }

  int itemsize() const { return itemsize_; }

  template <typename Number>
  ses::Standard<Number> of() const {
    return {pointer<const Number>(location_), stride_[0], stride_[1],
            pointer<const Number>(scale_)};
  }

 private:
  Address location_;
  Three stride_;
  Address scale_;
  int itemsize_;
};

class Poles {
 public:
  Poles(double constant, std::vector<double> t, std::vector<double> w)
      : constant_(constant), t_(std::move(t)), w_(std::move(w)) {
    if (t_.empty() || t_.size() != w_.size() || t_.size() > ses::kMaxPoles || t_.size() % 12 != 0)
      refuse("t and w must have the same number of poles, a multiple of 12 of at most " +
             std::to_string(ses::kMaxPoles) + ", got " + std::to_string(t_.size()) + " and " +
             std::to_string(w_.size()));
  }

  ses::Poles view() const { return {constant_, static_cast<int>(t_.size()), t_.data(), w_.data()}; }

 private:
  double constant_;
  std::vector<double> t_, w_;
};

class GramLayer {
 public:
  using Parts = std::tuple<Address, Three, Address, Address, bool>;

  GramLayer(Address gram, const Three& shape, Address h, Address m, bool center)
      : gram_(gram), h_(h), m_(m), batch_(shape[0]), n_(shape[1]), center_(center) {
    check_not_null("gram and h", {gram, h});
    check_batch(shape[0]);
    if (shape[1] != shape[2]) refuse("Gram matrices must be square, got " + to_string(shape));
  }

  long n() const { return n_; }

  template <typename Entry, typename Result>
  ses::GramLayer<Entry, Result> of() const {
    return {pointer<const Entry>(gram_), pointer<Result>(h_),
            pointer<Result>(m_),         batch_,
            static_cast<int>(n_),        center_};
  }

 private:
  Address gram_, h_, m_;
  long batch_, n_;
  bool center_;
};

ses::Side side_of(bool samples) { return samples ? ses::Side::kSamples : ses::Side::kFeatures; }

class SampleLayer {
 public:
  using Parts = std::tuple<Samples::Parts, bool, Address, Address, Address, Address>;

  SampleLayer(const Samples::Parts& x, bool by_samples, Address location, Address scale, Address h,
              Address m)
      : x_(std::make_from_tuple<Samples>(x)),
        by_samples_(by_samples),
        location_(location),
        scale_(scale),
        h_(h),
        m_(m) {
    check_not_null("scale and h", {scale, h});
    check_batch(x_.batch());
    check_n(x_.n(by_samples), INT_MAX, "in a layer");
  }

  template <typename Scalar>
  ses::SampleLayer<Scalar> of() const {
    return {x_.view(sizeof(Scalar)),
            side_of(by_samples_),
            pointer<Scalar>(location_),
            pointer<Scalar>(scale_),
            {nullptr, pointer<Scalar>(h_), pointer<Scalar>(m_), x_.batch(),
             static_cast<int>(x_.n(by_samples_)), by_samples_ && location_ != 0}};
  }

 private:
  Samples x_;
  bool by_samples_;
  Address location_, scale_, h_, m_;
};

// ---- from samples to Gram matrices, and back to a gradient ----

void location_scale(const Samples::Parts& x_parts, Address anchor, long anchor_stride,
                    Address location, Address scale, int itemsize, int threads) {
  const auto x = std::make_from_tuple<Samples>(x_parts);
  check_threads(threads);
  check_not_null("scale", {scale});
  if (anchor != 0) check_not_null("location", {location});
  with_number(itemsize, [&](auto number) {
    using Number = decltype(number);
    const ses::Samples samples = x.view(sizeof(Number));
    const py::gil_scoped_release release;
    ses::location_scale_cpu(samples, pointer<const void>(anchor), anchor_stride,
                            pointer<Number>(location), pointer<Number>(scale), threads);
  });
}

void gram(const Samples::Parts& x_parts, const Standard::Parts& standard_parts, bool by_samples,
          Address out, int out_itemsize, int threads) {
  const auto x = std::make_from_tuple<Samples>(x_parts);
  const auto standard = std::make_from_tuple<Standard>(standard_parts);
  check_threads(threads);
  check_not_null("out", {out});
  with_number(standard.itemsize(), [&](auto number) {
    const ses::Samples samples = x.view(sizeof(number));
    with_number(out_itemsize, [&](auto of_out) {
      const py::gil_scoped_release release;
      ses::gram_cpu(samples, standard.of<decltype(number)>(), side_of(by_samples),
                    pointer<decltype(of_out)>(out), threads);
    });
  });
}

void gram_backward(Address m, const Samples::Parts& x_parts, const Standard::Parts& standard_parts,
                   Address g, long g_stride, bool by_samples, Address out, int threads) {
  const auto x = std::make_from_tuple<Samples>(x_parts);
  const auto standard = std::make_from_tuple<Standard>(standard_parts);
  check_threads(threads);
  check_not_null("m and g", {m, g});
  check_not_null("out", {out});
  with_number(standard.itemsize(), [&](auto number) {
    using Number = decltype(number);
    const ses::Samples samples = x.view(sizeof(Number));
    const py::gil_scoped_release release;
    ses::gram_backward_cpu(pointer<const Number>(m), samples, standard.of<Number>(),
                           pointer<const Number>(g), g_stride, side_of(by_samples),
                           pointer<void>(out), threads);
  });
}

// ---- the rational solver ----

using GramLayers = std::vector<GramLayer::Parts>;

template <typename Entry, typename Result>
std::vector<ses::GramLayer<Entry, Result>> typed(const GramLayers& layers, int max_n,
                                                 const std::string& where) {
  std::vector<ses::GramLayer<Entry, Result>> result;
  for (const auto& parts : layers) {
    const auto layer = std::make_from_tuple<GramLayer>(parts);
    check_n(layer.n(), max_n, where);
    result.push_back(layer.of<Entry, Result>());
  }
  return result;
}

void rational_cpu(const GramLayers& layers, int itemsize, const Poles& poles, int threads) {
  check_threads(threads);
  with_number(itemsize, [&](auto number) {
    const auto checked = typed<double, decltype(number)>(layers, INT_MAX, "on the CPU");
    const py::gil_scoped_release release;
    ses::rational_cpu(checked.data(), static_cast<int>(checked.size()), poles.view(), threads);
  });
}

void rational_from_samples_cpu(const std::vector<SampleLayer::Parts>& layers, int itemsize,
                               const Poles& poles, int threads) {
  check_threads(threads);
  with_number(itemsize, [&](auto number) {
    using Scalar = decltype(number);
    std::vector<ses::SampleLayer<Scalar>> checked;
    for (const auto& parts : layers)
      checked.push_back(std::make_from_tuple<SampleLayer>(parts).template of<Scalar>());
    const py::gil_scoped_release release;
    ses::rational_from_samples_cpu(checked.data(), static_cast<int>(checked.size()), poles.view(),
                                   threads);
  });
}

std::vector<ses::GramLayer<float, float>> for_cuda(const GramLayers& layers, int device) {
  return typed<float, float>(layers, ses::max_n_rational_cuda(device), on_cuda(device));
}

// Floats of workspace that rational_cuda needs.
std::size_t rational_cuda_workspace(const GramLayers& layers, const Poles& poles, int device) {
  const auto checked = for_cuda(layers, device);
  return ses::rational_cuda_workspace(checked.data(), static_cast<int>(checked.size()),
                                      poles.view(), device);
}

void rational_cuda(const GramLayers& layers, const Poles& poles, Address workspace, int device,
                   Address stream) {
  const auto checked = for_cuda(layers, device);
  const py::gil_scoped_release release;
  ses::rational_cuda(checked.data(), static_cast<int>(checked.size()), poles.view(),
                     pointer<float>(workspace), device, pointer<void>(stream));
}

// The names of those that this machine has, the best first.
std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const ses::Isa isa : ses::kIsas)
    if (ses::runs_here(isa)) names.insert(names.begin(), ses::isa_name(isa));
  return names;
}

void use_isa(const std::string& name) {
  for (const ses::Isa isa : ses::kIsas)
    if (ses::runs_here(isa) && name == ses::isa_name(isa)) {
      ses::isa_in_use() = isa;
      return;
    }
  std::string available;
  for (const std::string& isa : isas()) available += (available.empty() ? "" : ", ") + isa;
  refuse("isa must be one that this machine has, of " + available + ", got " + name);
}

py::dict info() {
  py::list archs;
  std::string arch;
  for (const char letter : std::string(SES_CUDA_ARCHS ",")) {
    if (letter != ',') {
      arch += letter;
    } else if (!arch.empty()) {
      archs.append(arch);
      arch.clear();
    }
  }
  py::dict facts;
  facts["cuda_archs"] = archs;
  facts["cuda_version"] = *SES_CUDA_VERSION ? py::object(py::str(SES_CUDA_VERSION)) : py::none();
  facts["isa"] = ses::isa_name(ses::isa_in_use());
  facts["isas"] = isas();
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
      "built, and use_isa takes another instruction set of this CPU.";
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
  py::class_<Poles>(m, "Poles", "log x ~ constant - sum_j w_j / (x + t_j).")
      .def(py::init<double, std::vector<double>, std::vector<double>>(), py::arg("constant"),
           py::arg("t"), py::arg("w"));
  m.def("location_scale", &location_scale, py::arg("x"), py::arg("anchor"),
        py::arg("anchor_stride"), py::arg("location"), py::arg("scale"), py::arg("itemsize"),
        py::arg("threads"),
        "x (address, dtype, stride, shape) of (batch, rows, columns) with dense rows, and a "
        "dense anchor row of that dtype for each matrix, 0 for no centring -> location (batch, 2, "
        "columns) and scale (batch,).");
  m.def("gram", &gram, py::arg("x"), py::arg("standard"), py::arg("by_samples"), py::arg("out"),
        py::arg("out_itemsize"), py::arg("threads"),
        "x by a standard (location or 0, its stride, scale, itemsize) -> K (batch, n, n).");
  m.def("gram_backward", &gram_backward, py::arg("m"), py::arg("x"), py::arg("standard"),
        py::arg("g"), py::arg("g_stride"), py::arg("by_samples"), py::arg("out"),
        py::arg("threads"),
        "m (batch, n, n), x and standard as of gram, g (batch,) -> out (batch, rows, columns) of "
        "x's dtype.");
  m.def("rational_cpu", &rational_cpu, py::arg("layers"), py::arg("itemsize"), py::arg("poles"),
        py::arg("threads"),
        "[(gram, shape, h, m or 0, center)], float64 grams -> h (batch,) and m (batch, n, n) of "
        "`itemsize`.");
  m.def(
      "rational_from_samples_cpu", &rational_from_samples_cpu, py::arg("layers"),
      py::arg("itemsize"), py::arg("poles"), py::arg("threads"),
      "[(x, by samples, location or 0, scale, h, m or 0)] -> location from the first rows, scale, "
      "h and m of `itemsize`.");
  m.def("rational_cuda", &rational_cuda, py::arg("layers"), py::arg("poles"), py::arg("workspace"),
        py::arg("device"), py::arg("stream"),
        "As rational_cpu for float32 in the memory of `device`, enqueued on `stream`.");
  m.def("rational_cuda_workspace", &rational_cuda_workspace, py::arg("layers"), py::arg("poles"),
        py::arg("device"), "Floats of workspace it needs.");
  m.def("max_n_rational_cuda", &ses::max_n_rational_cuda, py::arg("device"),
        "The largest n rational_cuda takes; 0 where it cannot run.");
  m.def("use_isa", &use_isa, py::arg("isa"),
        "The CPU kernels run with this instruction set from now on, in every thread: for tests and "
        "benchmarks. info() names those that this machine has.");
  m.def("info", &info, "What this build contains, and which instruction set it runs with.");
}
