// The CPU implementations of the ops, through torch's stable ABI. What the arguments and results
// mean is written in ops/__init__.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "core.h"
#include "memory.h"

namespace {

using batchnorm::Activation;
using batchnorm::Backward;
using batchnorm::Forward;
using batchnorm::Preactivation;
using batchnorm::Problem;
using batchnorm::Type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t block_bytes = 1 << 20;

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::Double: return Type::f64;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    default: STD_TORCH_CHECK(false, "batchnorm: x must be float32, float64, bfloat16 or float16");
  }
}

Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes,
             torch::headeronly::IntHeaderOnlyArrayRef strides, ScalarType type) {
  AtenTensorHandle handle;
  int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(),
                                                         code, aoti_torch_device_type_cpu(), 0,
                                                         &handle));
  return Tensor(handle);
}

Tensor vector(int64_t size, ScalarType type) {
  const int64_t one = 1;
  return empty({&size, 1}, {&one, 1}, type);
}

// An output like x; a large one in a block of our own.
Tensor fresh_like(const Tensor& x) {
  const int64_t bytes = x.numel() * (int64_t)x.element_size();
  void* block = bytes >= block_bytes ? batchnorm::take_block(bytes) : nullptr;
  if (!block) return empty(x.sizes(), x.strides(), x.scalar_type());
  AtenTensorHandle handle;
  const int32_t code =
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(x.scalar_type()));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(
      block, x.dim(), x.sizes().data(), x.strides().data(), 0, code, aoti_torch_device_type_cpu(),
      -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
      [](void* data, void* size) { batchnorm::give_block(data, (int64_t)(intptr_t)size); },
      (void*)(intptr_t)bytes));
  return Tensor(handle);
}

bool channels_innermost(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  const int64_t rank = x.dim();
  int64_t expected = 1;
  auto matches = [&](int64_t d) {
    const bool match = sizes[d] == 1 || strides[d] == expected;
    expected *= sizes[d];
    return match;
  };
  if (!matches(1)) return false;
  for (int64_t d = rank - 1; d >= 2; --d)
    if (!matches(d)) return false;
  return matches(0);
}

// x in a layout that the kernels know, and how it is laid out.
struct Dense {
  explicit Dense(const Tensor& t) : x(t) {
    STD_TORCH_CHECK(t.dim() >= 2 && t.numel() > 0,
                    "batchnorm: x must have two or more axes and not be empty");
    last = !t.is_contiguous() && channels_innermost(t);
    if (!last && !t.is_contiguous()) x = torch::stable::contiguous(t);
    const auto sizes = x.sizes();
    shape = {sizes[0], sizes[1], 1, false};
    for (int64_t d = 2; d < x.dim(); ++d) shape.s *= sizes[d];
    if (last || shape.s == 1) shape = {shape.n * shape.s, shape.c, 1, true};
  }
  // t in the layout of x.
  Tensor align(const Tensor& t) const {
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.numel() == x.numel(),
                    "batchnorm: dy and residual must have the type and the shape of x");
    if (last ? channels_innermost(t) : t.is_contiguous()) return t;
    Tensor copy = empty(x.sizes(), x.strides(), x.scalar_type());
    torch::stable::copy_(copy, t);
    return copy;
  }
  const batchnorm::Kernels& kernels() const { return batchnorm::kernels(type_of(x)); }
  Problem problem(int64_t activation) const {
    static const batchnorm::Pool pool{
        [](int64_t count, void* context, batchnorm::Pool::Body body) {
          torch::stable::parallel_for(
              0, count, 1, [=](int64_t begin, int64_t end) { body(context, begin, end); });
        },
        1};
    Problem p{shape, type_of(x), (Activation)activation, pool};
    p.pool.threads = (int)torch::stable::get_num_threads();
    return p;
  }

  Tensor x;
  bool last;
  batchnorm::Shape shape;
};

// A channel vector of any floating type as float64.
struct Doubles {
  Doubles(const Optional& t, int64_t size) : present(t.has_value()) {
    if (!present) return;
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == size,
                    "batchnorm: a channel vector must have as many values as x has channels");
    if (t->scalar_type() == ScalarType::Double && t->stride(0) == 1) {
      data = (double*)t->data_ptr();
      return;
    }
    own.resize(size);
    data = own.data();
    const int64_t stride = t->stride(0);
    auto copy = [&](const auto* from) {
      for (int64_t i = 0; i < size; ++i) own[i] = (float)from[i * stride];
    };
    switch (t->scalar_type()) {
      case ScalarType::Float: copy((const float*)t->data_ptr()); return;
      case ScalarType::BFloat16: copy((const torch::headeronly::BFloat16*)t->data_ptr()); return;
      case ScalarType::Half: copy((const torch::headeronly::Half*)t->data_ptr()); return;
      case ScalarType::Double: {
        auto* from = (const double*)t->data_ptr();
        for (int64_t i = 0; i < size; ++i) own[i] = from[i * stride];
        return;
      }
      default: STD_TORCH_CHECK(false, "batchnorm: a channel vector must be of a floating type");
    }
  }
  double* get() const { return present ? data : nullptr; }

  bool present;
  double* data = nullptr;
  std::vector<double> own;
};

bool gated(int64_t activation) {
  const auto a = (Activation)activation;
  return a == Activation::relu || a == Activation::relu6 || a == Activation::leaky_relu;
}

// The gate's rows and the bytes of each.
std::pair<int64_t, int64_t> gate_sizes(const batchnorm::Shape& shape) {
  const bool together = shape.columns || shape.s < batchnorm::short_run;
  const int64_t row = together ? shape.c * shape.s : shape.s;
  return {shape.numel() / row, (row + 7) / 8};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> training_forward(const Tensor& x, const Optional& weight,
                                                            const Optional& bias,
                                                            const Optional& residual, double eps,
                                                            int64_t activation) {
  const Dense in(x);
  const int64_t c = in.shape.c;
  const Doubles w(weight, c), b(bias, c);
  Tensor y = fresh_like(in.x), mean = vector(c, ScalarType::Double),
         var = vector(c, ScalarType::Double);
  Optional added;
  Tensor gate;
  if (residual && gated(activation)) {
    const auto [rows, bytes] = gate_sizes(in.shape);
    const int64_t sizes[2] = {rows, bytes}, strides[2] = {bytes, 1};
    gate = empty({sizes, 2}, {strides, 2}, ScalarType::Byte);
  } else {
    gate = vector(0, ScalarType::Byte);
  }
  if (residual) added = in.align(*residual);
  in.kernels().forward(
      in.problem(activation),
      {in.x.data_ptr(), added ? added->data_ptr() : nullptr,
       {(double*)mean.data_ptr(), (double*)var.data_ptr()},
       {w.get(), b.get(), eps},
       y.data_ptr(),
       residual && gated(activation) ? (uint8_t*)gate.data_ptr() : nullptr});
  return {y, mean, var, gate};
}

std::tuple<Tensor, Tensor> moments(const Tensor& x) {
  const Dense in(x);
  Tensor mean = vector(in.shape.c, ScalarType::Double), var = vector(in.shape.c, ScalarType::Double);
  in.kernels().moments(in.problem(0), in.x.data_ptr(),
                               {(double*)mean.data_ptr(), (double*)var.data_ptr()});
  return {mean, var};
}

Tensor normalize(const Tensor& x, const Tensor& mean, const Tensor& var, const Optional& weight,
                 const Optional& bias, const Optional& residual, double eps, int64_t activation) {
  const Dense in(x);
  const int64_t c = in.shape.c;
  const Doubles m(mean, c), v(var, c), w(weight, c), b(bias, c);
  Tensor y = fresh_like(in.x);
  Optional added;
  if (residual) added = in.align(*residual);
  in.kernels().normalize(in.problem(activation),
                                 {in.x.data_ptr(), added ? added->data_ptr() : nullptr,
                                  {m.get(), v.get()}, {w.get(), b.get(), eps}, y.data_ptr(),
                                  nullptr});
  return y;
}

// The arguments that every backward shares, kept alive together.
struct Gradient {
  Gradient(const Tensor& dy_, const Tensor& x_, const Tensor& mean_, const Tensor& var_,
           const Optional& weight_, const Optional& bias_, const Optional& residual_,
           const Optional& gate_, double eps, int64_t activation)
      : in(x_), dy(in.align(dy_)), mean(mean_, in.shape.c), var(var_, in.shape.c),
        weight(weight_, in.shape.c), bias(bias_, in.shape.c) {
    args.dy = dy.data_ptr();
    args.x = in.x.data_ptr();
    args.statistics = {mean.get(), var.get()};
    args.affine = {weight.get(), bias.get(), eps};
    args.preactivation = Preactivation::from_x;
    if (activation == 0) return;
    if (gate_ && gated(activation)) {
      gate = *gate_;
      const auto [rows, bytes] = gate_sizes(in.shape);
      STD_TORCH_CHECK(gate->scalar_type() == ScalarType::Byte && gate->is_contiguous() &&
                          gate->numel() == rows * bytes,
                      "batchnorm: gate must be what training_forward returned for this x, ", rows,
                      " x ", bytes, " uint8, or None; it has ", gate->numel(), " values");
      args.preactivation = Preactivation::from_gate;
      args.gate = (const uint8_t*)gate->data_ptr();
    } else if (residual_) {
      residual = in.align(*residual_);
      args.preactivation = Preactivation::from_residual;
      args.residual = residual->data_ptr();
    }
  }
  // The gradient of z is an output of its own where a residual needs it.
  Tensor new_dz() {
    if (args.preactivation == Preactivation::from_x) return vector(0, in.x.scalar_type());
    Tensor dz = fresh_like(in.x);
    args.dz = dz.data_ptr();
    return dz;
  }

  Dense in;
  Tensor dy;
  Doubles mean, var, weight, bias;
  Optional residual, gate;
  Backward args{};
};

std::tuple<Tensor, Tensor, Tensor, Tensor> training_backward(
    const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& var,
    const Optional& weight, const Optional& bias, const Optional& residual, const Optional& gate,
    double eps, int64_t activation) {
  Gradient g(dy, x, mean, var, weight, bias, residual, gate, eps, activation);
  const int64_t c = g.in.shape.c;
  Tensor dx = fresh_like(g.in.x), dz = g.new_dz();
  g.args.dx = dx.data_ptr();
  const bool wide = g.in.x.scalar_type() == ScalarType::Double;
  const ScalarType type = wide ? ScalarType::Double : ScalarType::Float;
  Tensor dweight = vector(c, type), dbias = vector(c, type);
  std::vector<double> sums(wide ? 0 : 2 * c);
  g.args.sum_dz = wide ? (double*)dbias.data_ptr() : sums.data();
  g.args.sum_dz_xhat = wide ? (double*)dweight.data_ptr() : sums.data() + c;
  g.in.kernels().backward(g.in.problem(activation), g.args);
  if (!wide)
    for (int64_t i = 0; i < c; ++i) {
      ((float*)dbias.data_ptr())[i] = (float)sums[i];
      ((float*)dweight.data_ptr())[i] = (float)sums[c + i];
    }
  return {dx, dz, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> backward_sums(const Tensor& dy, const Tensor& x,
                                                 const Tensor& mean, const Tensor& var,
                                                 const Optional& weight, const Optional& bias,
                                                 const Optional& residual, const Optional& gate,
                                                 double eps, int64_t activation) {
  Gradient g(dy, x, mean, var, weight, bias, residual, gate, eps, activation);
  Tensor sum_dz = vector(g.in.shape.c, ScalarType::Double),
         sum_dz_xhat = vector(g.in.shape.c, ScalarType::Double), dz = g.new_dz();
  g.args.sum_dz = (double*)sum_dz.data_ptr();
  g.args.sum_dz_xhat = (double*)sum_dz_xhat.data_ptr();
  g.in.kernels().backward_sums(g.in.problem(activation), g.args);
  return {sum_dz, sum_dz_xhat, dz};
}

Tensor backward_apply(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& var,
                      const Optional& weight, const Optional& bias, const Optional& mean_dz,
                      const Optional& mean_dz_xhat, double eps, int64_t activation) {
  Gradient g(dy, x, mean, var, weight, bias, std::nullopt, std::nullopt, eps, activation);
  const Doubles first(mean_dz, g.in.shape.c), second(mean_dz_xhat, g.in.shape.c);
  Tensor dx = fresh_like(g.in.x);
  g.args.dx = dx.data_ptr();
  g.in.kernels().backward_apply(g.in.problem(activation), g.args, {first.get(), second.get()});
  return dx;
}

void update_running(Tensor running_mean, Tensor running_var, Optional num_batches,
                    const Tensor& mean, const Tensor& var, double n,
                    std::optional<double> momentum) {
  const int64_t c = running_mean.numel();
  const Doubles m(mean, c), v(var, c);
  STD_TORCH_CHECK(running_var.numel() == c, "batchnorm: the running statistics differ in size");
  double weight = momentum.value_or(0);
  if (num_batches) {
    auto* count = (int64_t*)num_batches->data_ptr();
    STD_TORCH_CHECK(num_batches->scalar_type() == ScalarType::Long && num_batches->numel() == 1,
                    "batchnorm: num_batches must be one int64");
    ++*count;
    if (!momentum) weight = 1 / (double)*count;
  }
  auto move = [&](const Tensor& running, const double* batch, double scale) {
    auto each = [&](auto* to) {
      const int64_t stride = running.stride(0);
      for (int64_t i = 0; i < c; ++i) {
        const double now = to[i * stride];
        to[i * stride] = now + weight * (batch[i] * scale - now);
      }
    };
    switch (running.scalar_type()) {
      case ScalarType::Float: return each((float*)running.data_ptr());
      case ScalarType::Double: return each((double*)running.data_ptr());
      default: STD_TORCH_CHECK(false, "batchnorm: running statistics must be float32 or float64");
    }
  };
  move(running_mean, m.get(), 1);
  move(running_var, v.get(), n / (n - 1));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CPU, library) {
  library.impl("training_forward", TORCH_BOX(&training_forward));
  library.impl("training_backward", TORCH_BOX(&training_backward));
  library.impl("moments", TORCH_BOX(&moments));
  library.impl("normalize", TORCH_BOX(&normalize));
  library.impl("backward_sums", TORCH_BOX(&backward_sums));
  library.impl("backward_apply", TORCH_BOX(&backward_apply));
  library.impl("update_running", TORCH_BOX(&update_running));
}

extern "C" __attribute__((visibility("default"))) const char* batchnorm_cpu_instruction_set() { return batchnorm::kernels(batchnorm::Type::f32).name; }
