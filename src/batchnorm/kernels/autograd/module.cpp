// The plain calls of ops/autograd.py, from Python's arguments to the dispatcher and back, and the
// derivative of the training forward as a node of C++: on small inputs Python takes longer over
// them than the kernels over the values. What is not plain is declined, with NotImplemented.
//
// This is torch's private API, so it is good for the torch that it was compiled against.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TensorOperators.h>
#include <ATen/TracerMode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>
#include <tuple>

namespace batchnorm {

using at::AutoDispatchBelowAutograd;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Optional = std::optional<Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

enum Activation : int64_t { none, relu, relu6, leaky_relu };

// ---- The ops, found when they are first called: Python has defined the schemas by then.

template <class Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Four training_forward(const Tensor& x, const Optional& weight, const Optional& bias,
                      const Optional& residual, double eps, int64_t activation) {
  static const auto op =
      find<Four(const Tensor&, const Optional&, const Optional&, const Optional&, double, int64_t)>(
          "batchnorm::training_forward");
  return op.call(x, weight, bias, residual, eps, activation);
}

Four training_backward(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& var,
                       const Optional& weight, const Optional& bias, const Optional& residual,
                       const Optional& gate, double eps, int64_t activation) {
  static const auto op =
      find<Four(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Optional&,
                const Optional&, const Optional&, const Optional&, double, int64_t)>(
          "batchnorm::training_backward");
  return op.call(dy, x, mean, var, weight, bias, residual, gate, eps, activation);
}

Tensor normalize(const Tensor& x, const Tensor& mean, const Tensor& var, const Optional& weight,
                 const Optional& bias, const Optional& residual, double eps, int64_t activation) {
  static const auto op =
      find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Optional&, const Optional&,
                  const Optional&, double, int64_t)>("batchnorm::normalize");
  return op.call(x, mean, var, weight, bias, residual, eps, activation);
}

void update_running(Tensor& running_mean, Tensor& running_var, const Optional& num_batches,
                    const Tensor& mean, const Tensor& var, double n,
                    std::optional<double> momentum) {
  static const auto op = find<void(Tensor&, Tensor&, const Optional&, const Tensor&, const Tensor&,
                                   double, std::optional<double>)>("batchnorm::update_running");
  op.call(running_mean, running_var, num_batches, mean, var, n, momentum);
}

// ---- The derivative, line by line that of _TrainingForward in ops/autograd.py.

Optional if_defined(const Tensor& t) { return t.defined() ? Optional(t) : std::nullopt; }

Tensor moments_backward(const Tensor& x, const Tensor& mean, const Tensor& dmean,
                        const Tensor& dvar) {
  const at::Scalar n = x.sym_numel() / x.sym_size(1);
  const Tensor weight = dvar.defined() ? dvar * 2 / n : at::zeros_like(mean);
  const Optional bias = dmean.defined() ? Optional(dmean / n) : std::nullopt;
  return normalize(x, mean, at::ones_like(mean), weight, bias, std::nullopt, 0.0, none);
}

struct TrainingForward : torch::autograd::Function<TrainingForward> {
  static variable_list forward(AutogradContext* context, const Tensor& x, const Optional& weight,
                               const Optional& bias, const Optional& residual, double eps,
                               int64_t activation) {
    const AutoDispatchBelowAutograd below;
    auto [y, mean, var, gate] = training_forward(x, weight, bias, residual, eps, activation);
    const bool has_gate = residual && activation >= relu && activation <= leaky_relu;
    const bool reads_residual = residual && activation != none && !has_gate;
    context->set_materialize_grads(false);
    context->saved_data["eps"] = eps;
    context->saved_data["activation"] = activation;
    context->saved_data["has_residual"] = residual.has_value();
    context->save_for_backward({x, mean, var, weight.value_or(Tensor()), bias.value_or(Tensor()),
                                reads_residual ? *residual : Tensor(), has_gate ? gate : Tensor()});
    return {y, mean, var, gate};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list saved = context->get_saved_variables();
    const Tensor &x = saved[0], &mean = saved[1], &var = saved[2], &weight = saved[3],
                 &bias = saved[4], &residual = saved[5], &gate = saved[6];
    const Tensor &dy = gradients[0], &dmean = gradients[1], &dvar = gradients[2];
    const double eps = context->saved_data["eps"].toDouble();
    const int64_t activation = context->saved_data["activation"].toInt();
    // What is differentiated in turn is left to Python, which takes the reference at Autograd.
    std::optional<AutoDispatchBelowAutograd> below;
    if (!at::GradMode::is_enabled() && !torch::autograd::ForwardADLevel::try_get_by_idx(0)) {
      below.emplace();
    }
    Tensor dx, dresidual, dweight, dbias;
    if (dy.defined()) {
      std::tie(dx, dresidual, dweight, dbias) =
          training_backward(dy, x, mean, var, if_defined(weight), if_defined(bias),
                            if_defined(residual), if_defined(gate), eps, activation);
      if (activation == none) dresidual = dy;
    }
    if (dmean.defined() || dvar.defined()) {
      const Tensor through_moments = moments_backward(x, mean, dmean, dvar);
      dx = dx.defined() ? dx + through_moments : through_moments;
    }
    return {dx,
            weight.defined() ? dweight : Tensor(),
            bias.defined() ? dbias : Tensor(),
            context->saved_data["has_residual"].toBool() ? dresidual : Tensor(),
            Tensor(),
            Tensor()};
  }
};

// ---- The calls.

using Arguments = PyObject* const*;

const Tensor& tensor(PyObject* value) { return THPVariable_Unpack(value); }

Optional optional_tensor(PyObject* value) {
  return value == Py_None ? std::nullopt : Optional(tensor(value));
}

bool is_number(PyObject* value) { return PyFloat_CheckExact(value) || PyLong_CheckExact(value); }

double number(PyObject* value) {
  const double result = PyFloat_AsDouble(value);
  if (result == -1 && PyErr_Occurred()) throw python_error();
  return result;
}

int64_t integer(PyObject* value) {
  const int64_t result = PyLong_AsLongLong(value);
  if (result == -1 && PyErr_Occurred()) throw python_error();
  return result;
}

// Whether nobody but autograd and the dispatcher has a say in a call, and its arguments are of
// their kinds: t(ensor), n(umber), i(nteger), and in capitals the same or None. A subclass of one
// of them may mean something else.
bool is_plain(Arguments arguments, Py_ssize_t count, std::string_view kinds) {
  if (at::impl::torch_function_mode_enabled() || at::tracer::impl::is_dispatch_enabled() ||
      count != (Py_ssize_t)kinds.size()) {
    return false;
  }
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* value = arguments[i];
    bool fits = false;
    switch (kinds[i]) {
      case 'T': fits = value == Py_None || THPVariable_CheckExact(value); break;
      case 't': fits = THPVariable_CheckExact(value); break;
      case 'N': fits = value == Py_None || is_number(value); break;
      case 'n': fits = is_number(value); break;
      case 'i': fits = PyLong_CheckExact(value); break;
    }
    if (!fits) return false;
  }
  return true;
}

bool requires_grad(Arguments arguments, Py_ssize_t count) {
  return at::GradMode::is_enabled() && std::any_of(arguments, arguments + count, [](PyObject* v) {
           return THPVariable_CheckExact(v) && tensor(v).requires_grad();
         });
}

PyObject* call_training_forward(PyObject*, Arguments arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (!is_plain(arguments, count, "tTTTni")) Py_RETURN_NOTIMPLEMENTED;
  const Tensor& x = tensor(arguments[0]);
  const Optional weight = optional_tensor(arguments[1]), bias = optional_tensor(arguments[2]),
                 residual = optional_tensor(arguments[3]);
  const double eps = number(arguments[4]);
  const int64_t activation = integer(arguments[5]);
  const bool watched = requires_grad(arguments, count);
  std::array<Tensor, 4> results;
  {
    const pybind11::gil_scoped_release released;
    if (watched) {
      auto list = TrainingForward::apply(x, weight, bias, residual, eps, activation);
      std::move(list.begin(), list.end(), results.begin());
    } else {
      const AutoDispatchBelowAutograd below;
      std::tie(results[0], results[1], results[2], results[3]) =
          training_forward(x, weight, bias, residual, eps, activation);
    }
  }
  THPObjectPtr tuple(PyTuple_New(results.size()));
  if (!tuple) throw python_error();
  for (size_t i = 0; i < results.size(); ++i) {
    PyTuple_SET_ITEM(tuple.get(), i, THPVariable_Wrap(std::move(results[i])));
  }
  return tuple.release();
  END_HANDLE_TH_ERRORS
}

PyObject* call_normalize(PyObject*, Arguments arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (!is_plain(arguments, count, "tttTTTni") || requires_grad(arguments, count)) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  const Tensor &x = tensor(arguments[0]), &mean = tensor(arguments[1]),
               &var = tensor(arguments[2]);
  const Optional weight = optional_tensor(arguments[3]), bias = optional_tensor(arguments[4]),
                 residual = optional_tensor(arguments[5]);
  const double eps = number(arguments[6]);
  const int64_t activation = integer(arguments[7]);
  Tensor y;
  {
    const pybind11::gil_scoped_release released;
    const AutoDispatchBelowAutograd below;
    y = normalize(x, mean, var, weight, bias, residual, eps, activation);
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

PyObject* call_update_running(PyObject*, Arguments arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (!is_plain(arguments, count, "ttTttnN")) Py_RETURN_NOTIMPLEMENTED;
  std::array<Tensor, 2> running = {tensor(arguments[0]), tensor(arguments[1])};
  const Optional num_batches = optional_tensor(arguments[2]);
  const Tensor &mean = tensor(arguments[3]), &var = tensor(arguments[4]);
  const double n = number(arguments[5]);
  std::optional<double> momentum;
  if (arguments[6] != Py_None) momentum = number(arguments[6]);
  {
    const pybind11::gil_scoped_release released;
    const AutoDispatchBelowAutograd below;
    update_running(running[0], running[1], num_batches, mean, var, n, momentum);
  }
  // A kernel writes past autograd, which is to notice where it saved the statistics. Tensors of
  // inference mode have no version.
  for (const Tensor& statistics : running) {
    if (!statistics.is_inference()) torch::autograd::impl::bump_version(statistics);
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

template <PyObject* (*call)(PyObject*, Arguments, Py_ssize_t)>
PyMethodDef method(const char* name) {
  return {name, (PyCFunction)(void (*)())call, METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {
    method<call_training_forward>("training_forward"),
    method<call_normalize>("normalize"),
    method<call_update_running>("update_running"),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_autograd", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace batchnorm

PyMODINIT_FUNC PyInit__autograd() { return PyModule_Create(&batchnorm::definition); }
