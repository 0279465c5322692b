// The residual add as a Python extension on torch's C++ API: checks, autograd and the call of a library (residual.h) without
// Python in between. megatron_sbld/residual/extension.py builds and loads it; without it, op.py does the same in Python.
//
// `residual_skip_add` returns None for whatever it does not take, and the caller goes the way of op.py, whose messages name
// what is wrong. So nothing is refused here, and both ways refuse alike.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/custom_class.h>
#include <torch/extension.h>

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "residual.h"

namespace py = pybind11;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace {

constexpr double kThresholds = 65536.0;  // values of an element's random bits

// ---------------------------------------------------------------------------------------------------------------------
// Libraries

struct Library {
  decltype(&sbld_residual_forward) forward = nullptr;
  decltype(&sbld_residual_backward) backward = nullptr;
  decltype(&sbld_residual_forward_workspace) forward_workspace = nullptr;
  decltype(&sbld_residual_backward_workspace) backward_workspace = nullptr;
};

template <typename Function>
Function function_at(const py::handle &address) {
  return reinterpret_cast<Function>(address.cast<uintptr_t>());
}

// Which library computes on tensors of a device and dtype. Asks Python (choice.py) once for each, and again when
// MEGATRON_SBLD_RESIDUAL changes.
class Libraries {
 public:
  // choose(device type, device index, dtype) gives four addresses of functions, or None for eager torch. May raise.
  void set_choice(py::function choose) {
    choose_ = new py::function(std::move(choose));  // never freed: the interpreter may be gone by then
    found_.clear();
  }

  // Null: eager torch. Needs the GIL.
  const Library *find(const Tensor &tensor) {
    const char *setting = std::getenv("MEGATRON_SBLD_RESIDUAL");
    if (setting_ != (setting == nullptr ? "" : setting)) {
      setting_ = setting == nullptr ? "" : setting;
      found_.clear();
    }
    const Key key{tensor.device().type(), tensor.device().index(), tensor.scalar_type()};
    auto at = found_.find(key);
    if (at == found_.end()) at = found_.emplace(key, ask(tensor)).first;
    return at->second ? &*at->second : nullptr;
  }

 private:
  using Key = std::tuple<c10::DeviceType, c10::DeviceIndex, at::ScalarType>;

  std::optional<Library> ask(const Tensor &tensor) {
    const py::object answer = (*choose_)(tensor.device().str(), py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject *>(
                                                                    torch::getTHPDtype(tensor.scalar_type()))));
    if (answer.is_none()) return std::nullopt;
    const auto addresses = answer.cast<py::tuple>();
    return Library{function_at<decltype(Library::forward)>(addresses[0]), function_at<decltype(Library::backward)>(addresses[1]),
                   function_at<decltype(Library::forward_workspace)>(addresses[2]),
                   function_at<decltype(Library::backward_workspace)>(addresses[3])};
  }

  py::function *choose_ = nullptr;
  std::string setting_;
  std::map<Key, std::optional<Library>> found_;
};

Libraries &libraries() {
  static auto *const instance = new Libraries;
  return *instance;
}

// ---------------------------------------------------------------------------------------------------------------------
// A call of a library

// What forward and backward share.
struct Call {
  Library library;
  OptionalTensor index, seed;
  double multiplier = 1.0;
  int64_t threshold = 0, dim = 0;
  uintptr_t stream = 0;
};

int32_t dtype_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return SBLD_FLOAT32;
    case at::kHalf:
      return SBLD_FLOAT16;
    default:
      return SBLD_BFLOAT16;
  }
}

std::pair<int64_t, int64_t> rows_of(at::IntArrayRef shape) {
  if (shape.size() == 3) return {shape[0], shape[1]};
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) rows *= shape[i];
  return {rows, 1};
}

sbld_residual_args arguments(const Call &call, at::IntArrayRef x_shape, at::ScalarType x_dtype, const Tensor &residual) {
  sbld_residual_args args{};
  args.abi = SBLD_RESIDUAL_ABI;
  args.x_dtype = dtype_of(x_dtype);
  args.residual_dtype = dtype_of(residual.scalar_type());
  args.index_dim = static_cast<int32_t>(call.dim);
  args.device = residual.is_cuda() ? residual.get_device() : 0;
  args.drop_threshold = static_cast<uint32_t>(call.threshold);
  args.multiplier = static_cast<float>(call.multiplier);
  std::tie(args.rows0, args.rows1) = rows_of(residual.sizes());
  args.hidden = residual.size(-1);
  std::tie(args.x_rows0, args.x_rows1) = rows_of(x_shape);
  args.index_stride0 = call.dim == 0 ? 1 : 0;
  args.index_stride1 = 1 - args.index_stride0;
  if (call.index) {
    if (call.index->dim() == 2) {  // [b, k]: position i of sample j for dim 0; [s, k]: position j of row i for dim 1
      args.index_stride0 = call.dim == 0 ? 1 : call.index->size(1);
      args.index_stride1 = call.dim == 0 ? call.index->size(1) : 1;
    }
    args.index = call.index->const_data_ptr<int64_t>();
  }
  if (call.seed) args.seed = call.seed->const_data_ptr<int64_t>();
  args.stream = reinterpret_cast<void *>(call.stream);
  return args;
}

Tensor workspace(sbld_residual_args &args, size_t num_bytes, const Tensor &like) {
  if (num_bytes == 0) return {};
  Tensor memory = at::empty({static_cast<int64_t>(num_bytes)}, like.options().dtype(at::kByte));
  args.workspace = memory.mutable_data_ptr();
  return memory;
}

void check(const char *error, const char *direction) {
  TORCH_CHECK(error == nullptr, "residual add, ", direction, ": ", error);
}

// All contiguous; `out` may be the residual.
void run_forward(const Call &call, const Tensor &x, const Tensor &residual, const OptionalTensor &bias, const Tensor &out) {
  sbld_residual_args args = arguments(call, x.sizes(), x.scalar_type(), residual);
  args.x = x.const_data_ptr();
  args.residual = residual.const_data_ptr();
  args.y = out.mutable_data_ptr();
  if (bias) args.bias = bias->const_data_ptr();
  // Kept until the call is queued; torch's allocator keeps the stream's order afterwards.
  const Tensor memory = call.index ? workspace(args, call.library.forward_workspace(&args), x) : Tensor();
  check(call.library.forward(&args), "forward");
}

void run_backward(const Call &call, const Tensor &d_y, at::IntArrayRef x_shape, at::ScalarType x_dtype, const Tensor &d_x,
                  const Tensor &d_bias) {
  sbld_residual_args args = arguments(call, x_shape, x_dtype, d_y);
  args.d_y = d_y.const_data_ptr();
  if (d_x.defined()) args.d_x = d_x.mutable_data_ptr();
  if (d_bias.defined()) args.d_bias = d_bias.mutable_data_ptr();
  const Tensor memory = d_bias.defined() ? workspace(args, call.library.backward_workspace(&args), d_y) : Tensor();
  check(call.library.backward(&args), "backward");
}

// ---------------------------------------------------------------------------------------------------------------------
// Who else wants to see the call

bool is_watched() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// Whether it is no tensor of a subclass, which may have no memory to take the address of.
bool has_memory(const Tensor &tensor) {
  return tensor.has_storage() && !tensor.key_set().has_any(c10::python_ks) && !tensor.is_neg() && !tensor.is_conj();
}

// ---------------------------------------------------------------------------------------------------------------------
// Autograd

// Identity, of which a derivative raises: with it a gradient can be differentiated no further.
struct DifferentiatedOnce : torch::autograd::Function<DifferentiatedOnce> {
  static Tensor forward(torch::autograd::AutogradContext *, const Tensor &gradient) { return gradient.detach(); }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *, const torch::autograd::variable_list &) {
    TORCH_CHECK(false, "trying to differentiate twice a function that was marked with @once_differentiable");
  }
};

// What the backward pass needs to know besides index and seed.
struct Saved : torch::CustomClassHolder {
  Call call;
  c10::SmallVector<int64_t, 4> x_shape;
  at::ScalarType x_dtype = at::kFloat;
  bool has_bias = false, plain_sum = false;
};

std::pair<Tensor, Tensor> gradients_of_operator(const Call &call, const Saved &saved, const Tensor &d_y, bool with_x,
                                                bool with_bias) {
  static const auto handle =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("megatron_sbld::residual_skip_add_backward", "")
          .typed<std::tuple<Tensor, Tensor>(const Tensor &, const OptionalTensor &, const OptionalTensor &, double, int64_t,
                                            int64_t, c10::SymIntArrayRef, at::ScalarType, bool, bool)>();
  auto [d_x, d_bias] = handle.call(d_y, call.index, call.seed, call.multiplier, call.threshold, call.dim,
                                   c10::fromIntArrayRefSlow(saved.x_shape), saved.x_dtype, with_x, with_bias);
  return {std::move(d_x), std::move(d_bias)};
}

std::pair<Tensor, Tensor> gradients(const Call &call, const Saved &saved, const Tensor &d_y, bool with_x, bool with_bias) {
  if (is_watched() || !has_memory(d_y)) return gradients_of_operator(call, saved, d_y, with_x, with_bias);
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Tensor contiguous = d_y.contiguous();
  const auto options = d_y.options().dtype(saved.x_dtype);
  const Tensor d_x = with_x ? at::empty(saved.x_shape, options) : Tensor();
  const Tensor d_bias = with_bias ? at::empty({saved.x_shape.back()}, options) : Tensor();
  run_backward(call, contiguous, saved.x_shape, saved.x_dtype, d_x, d_bias);
  return {d_x, d_bias};
}

struct ResidualSkipAdd : torch::autograd::Function<ResidualSkipAdd> {
  static Tensor forward(torch::autograd::AutogradContext *ctx, const Tensor &x, const Tensor &residual, const OptionalTensor &bias,
                        Call &call) {
    if (ctx != nullptr) ctx->set_materialize_grads(false);
    const Tensor contiguous = residual.contiguous();
    Tensor y = at::empty_like(contiguous);
    run_forward(call, x.contiguous(), contiguous, bias ? OptionalTensor(bias->contiguous()) : std::nullopt, y);
    auto saved = c10::make_intrusive<Saved>();
    saved->x_shape.assign(x.sizes().begin(), x.sizes().end());
    saved->x_dtype = x.scalar_type();
    saved->has_bias = bias.has_value();
    saved->plain_sum = !call.index && call.threshold == 0 && call.multiplier == 1.0 && x.scalar_type() == residual.scalar_type();
    if (call.index || call.seed)
      ctx->save_for_backward({call.index.value_or(Tensor()), call.seed.value_or(Tensor())});
    saved->call = std::move(call);
    saved->call.index.reset();
    saved->call.seed.reset();
    ctx->saved_data.emplace("saved", c10::IValue::make_capsule(std::move(saved)));
    return y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *ctx, torch::autograd::variable_list d_outputs) {
    torch::autograd::variable_list result(4);
    const Tensor d_y = d_outputs[0];
    if (!d_y.defined()) return result;
    const auto holder = ctx->saved_data.at("saved").toCapsule();
    const Saved &saved = static_cast<const Saved &>(*holder);
    const bool asked_x = ctx->needs_input_grad(0), with_bias = saved.has_bias && ctx->needs_input_grad(2);
    const bool with_x = asked_x && !saved.plain_sum;
    result[1] = d_y;
    if (asked_x && saved.plain_sum) result[0] = d_y;  // the same tensor for both operands, as of torch's own sum
    if (with_x || with_bias) {
      Call call = saved.call;
      const auto tensors = ctx->get_saved_variables();
      if (!tensors.empty() && tensors[0].defined()) call.index = tensors[0];
      if (!tensors.empty() && tensors[1].defined()) call.seed = tensors[1];
      auto [d_x, d_bias] = gradients(call, saved, d_y, with_x, with_bias);
      if (with_x) result[0] = std::move(d_x);
      if (with_bias) result[2] = std::move(d_bias);
    }
    if (!at::GradMode::is_enabled()) return result;
    for (Tensor &value : result)
      if (value.defined()) value = DifferentiatedOnce::apply(value.detach().set_requires_grad(true));
    return result;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// The call from Python

// The tensor, or an undefined one if it is none that this file takes.
bool take(const py::handle &object, Tensor &tensor) {
  if (!THPVariable_CheckExact(object.ptr())) return false;
  tensor = THPVariable_Unpack(object.ptr());
  return has_memory(tensor) && !tensor._fw_grad(0).defined();
}

bool take_optional(const py::handle &object, OptionalTensor &tensor) {
  if (object.is_none()) return true;
  Tensor taken;
  if (!take(object, taken)) return false;
  tensor = std::move(taken);
  return true;
}

bool take_number(const py::handle &object, double &number) {
  if (!PyFloat_CheckExact(object.ptr()) && !PyLong_CheckExact(object.ptr())) return false;
  number = PyFloat_AsDouble(object.ptr());
  if (number == -1.0 && PyErr_Occurred() != nullptr) {  // an integer that is too large
    PyErr_Clear();
    return false;
  }
  return true;
}

bool fits_index(const Tensor &x, const Tensor &residual, const Tensor &index, int64_t dim) {
  if (index.scalar_type() != at::kLong || index.device() != x.device()) return false;
  if (x.dim() != 3 || residual.dim() != 3 || (index.dim() != 1 && index.dim() != 2)) return false;
  const int64_t chosen = index.size(-1), others = residual.size(1 - dim);
  if (chosen > residual.size(dim) || (index.dim() == 2 && index.size(0) != others)) return false;
  return x.size(dim) == chosen && x.size(1 - dim) == others && x.size(2) == residual.size(2);
}

// Of an index on a CPU, where it costs no synchronisation: in range, and no position twice.
bool has_distinct_positions(const Tensor &index, int64_t positions) {
  const int64_t rows = index.dim() == 2 ? index.size(0) : 1, chosen = index.size(-1);
  const int64_t *at = index.const_data_ptr<int64_t>();
  std::vector<char> seen(static_cast<size_t>(positions));
  for (int64_t row = 0; row < rows; ++row, at += chosen) {
    std::fill(seen.begin(), seen.end(), 0);
    for (int64_t i = 0; i < chosen; ++i) {
      if (at[i] < 0 || at[i] >= positions || seen[static_cast<size_t>(at[i])]) return false;
      seen[static_cast<size_t>(at[i])] = 1;
    }
  }
  return true;
}

bool fits(const Tensor &x, const Tensor &residual, const OptionalTensor &bias, const OptionalTensor &index, int64_t dim) {
  const at::ScalarType dtype = x.scalar_type();
  if (dtype != at::kFloat && dtype != at::kHalf && dtype != at::kBFloat16) return false;
  if (x.dim() < 1 || x.numel() == 0 || residual.device() != x.device()) return false;
  if (residual.scalar_type() != dtype && residual.scalar_type() != at::kFloat) return false;
  if (bias && (bias->dim() != 1 || bias->size(0) != x.size(-1) || bias->scalar_type() != dtype || bias->device() != x.device()))
    return false;
  if (dim != 0 && dim != 1) return false;
  return index ? fits_index(x, residual, *index, dim) : x.sizes() == residual.sizes();
}

// The arguments are those of megatron_sbld.residual.residual_skip_add, and the address of the stream of x's device.
py::object residual_skip_add(const py::handle &x_, const py::handle &residual_, const py::handle &bias_,
                             const py::handle &dropout_prob_, const py::handle &scale_, const py::handle &index_,
                             const py::handle &dim_, const py::handle &training_, uintptr_t stream) {
  Tensor x, residual;
  OptionalTensor bias;
  Call call;
  double dropout_prob = 0.0, scale = 1.0, dim = 0.0;
  if (is_watched() || !take(x_, x) || !take(residual_, residual) || !take_optional(bias_, bias) ||
      !take_optional(index_, call.index) || !take_number(dropout_prob_, dropout_prob) || !take_number(scale_, scale) ||
      !PyLong_CheckExact(dim_.ptr()) || !take_number(dim_, dim) || (training_.ptr() != Py_True && training_.ptr() != Py_False))
    return py::none();
  call.dim = static_cast<int64_t>(dim);
  if (!fits(x, residual, bias, call.index, call.dim) || !(dropout_prob >= 0.0 && dropout_prob < 1.0)) return py::none();
  const double threshold = std::nearbyint(dropout_prob * kThresholds);
  if (threshold == kThresholds) return py::none();
  call.threshold = training_.ptr() == Py_True ? static_cast<int64_t>(threshold) : 0;
  call.multiplier = scale / (1.0 - static_cast<double>(call.threshold) / kThresholds);
  call.stream = stream;
  const Library *library = libraries().find(x);
  if (library == nullptr) return py::none();
  call.library = *library;
  if (call.index) {
    *call.index = call.index->contiguous();
    if (call.index->is_cpu() && !has_distinct_positions(*call.index, residual.size(call.dim))) return py::none();
  }
  Tensor y;
  {
    const py::gil_scoped_release released;
    RECORD_FUNCTION("megatron_sbld::residual_skip_add", c10::ArrayRef<const c10::IValue>{});
    if (call.threshold > 0) call.seed = at::randint(std::numeric_limits<int64_t>::max(), {1}, x.options().dtype(at::kLong));
    y = ResidualSkipAdd::apply(x, residual, bias, call);
  }
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(y));
}

}  // namespace

PYBIND11_MODULE(_residual_bindings, module) {
  module.attr("torch_version") = TORCH_VERSION;
  module.attr("abi") = SBLD_RESIDUAL_ABI;
  module.def("set_choice", [](py::function choose) { libraries().set_choice(std::move(choose)); });
  // What a hook of saved tensors raises has to pass through as it is.
  module.def("residual_skip_add", torch::wrap_pybind_function(residual_skip_add));
}
