// The residual add on the CPU: the kernels' arithmetic (residual_core.h) in plain loops, one thread. It lets machines
// without a GPU test what the GPU computes.
#include "residual_core.h"

namespace {

using namespace sbld;

// Calls function(x_row, row, first element of the group, number of its elements, their random bits).
template <typename Function>
const char *for_each_group(const sbld_residual_args &args, Function function) {
  const uint64_t seed = args.drop_threshold > 0 ? static_cast<uint64_t>(*args.seed) : 0;
  for (int64_t x_row = 0; x_row < num_x_rows(args); ++x_row) {
    const int64_t row = row_of(args, x_row);
    if (row < 0) return "index names a row that is not there";
    for (int64_t group = 0; group < num_groups(args); ++group) {
      const int64_t first = group * kGroup;
      const int size = static_cast<int>(args.hidden - first < kGroup ? args.hidden - first : kGroup);
      function(x_row, row, first, size, args.drop_threshold > 0 ? random_of_group(seed, row, group) : Philox{});
    }
  }
  return nullptr;
}

template <typename X, typename R>
const char *forward(const sbld_residual_args &args) {
  const X *x = static_cast<const X *>(args.x);
  const X *bias = static_cast<const X *>(args.bias);
  const R *residual = static_cast<const R *>(args.residual);
  R *y = static_cast<R *>(args.y);
  if (args.index != nullptr && args.y != args.residual)
    memcpy(y, residual, static_cast<size_t>(num_rows(args) * args.hidden) * sizeof(R));
  return for_each_group(args, [&](int64_t x_row, int64_t row, int64_t first, int size, const Philox &random) {
    for (int i = 0; i < size; ++i) {
      const int64_t column = first + i, at = row * args.hidden + column;
      float branch = to_float(x[x_row * args.hidden + column]);
      if (bias != nullptr) branch = add(branch, to_float(bias[column]));
      const bool kept = is_kept(random, i, args.drop_threshold);
      y[at] = from_float<R>(forward_element(branch, to_float(residual[at]), args.multiplier, kept));
    }
  });
}

template <typename X, typename R>
const char *backward(const sbld_residual_args &args) {
  const R *d_y = static_cast<const R *>(args.d_y);
  X *d_x = static_cast<X *>(args.d_x);
  X *d_bias = static_cast<X *>(args.d_bias);
  float *partial = static_cast<float *>(args.workspace);  // [chunks, hidden]
  float *lanes = partial + num_chunks(num_x_rows(args)) * args.hidden;  // [kLanes, hidden], of one chunk
  const int64_t x_rows = num_x_rows(args), chunks = num_chunks(x_rows), rows_of_chunk = chunk_rows(x_rows);
  const auto clear_lanes = [&] {
    for (int64_t i = 0; i < kLanes * args.hidden; ++i) lanes[i] = 0.0f;
  };
  if (d_bias != nullptr) clear_lanes();
  const char *error = for_each_group(args, [&](int64_t x_row, int64_t row, int64_t first, int size,
                                               const Philox &random) {
    for (int i = 0; i < size; ++i) {
      const int64_t column = first + i;
      const float d = backward_element(to_float(d_y[row * args.hidden + column]), args.multiplier,
                                       is_kept(random, i, args.drop_threshold));
      if (d_x != nullptr) d_x[x_row * args.hidden + column] = from_float<X>(d);
      if (d_bias == nullptr) continue;
      float &sum = lanes[x_row % rows_of_chunk % kLanes * args.hidden + column];
      sum = add(sum, d);
    }
    const bool ends_row = first + size == args.hidden;
    if (d_bias == nullptr || !ends_row || (x_row % rows_of_chunk != rows_of_chunk - 1 && x_row != x_rows - 1)) return;
    for (int64_t column = 0; column < args.hidden; ++column) {
      float sum = 0.0f;
      for (int64_t lane = 0; lane < kLanes; ++lane) sum = add(sum, lanes[lane * args.hidden + column]);
      partial[x_row / rows_of_chunk * args.hidden + column] = sum;
    }
    clear_lanes();
  });
  if (error != nullptr || d_bias == nullptr) return error;
  for (int64_t column = 0; column < args.hidden; ++column) {
    float total = 0.0f;
    for (int64_t begin = 0; begin < chunks; begin += kSectionChunks) {
      float section = 0.0f;
      for (int64_t chunk = begin; chunk < begin + kSectionChunks && chunk < chunks; ++chunk)
        section = add(section, partial[chunk * args.hidden + column]);
      total = add(total, section);
    }
    d_bias[column] = from_float<X>(total);
  }
  return nullptr;
}

}  // namespace

extern "C" {

size_t sbld_residual_forward_workspace(const sbld_residual_args *) { return 0; }

size_t sbld_residual_backward_workspace(const sbld_residual_args *args) {
  if (args->d_bias == nullptr) return 0;
  return static_cast<size_t>((num_chunks(num_x_rows(*args)) + kLanes) * args->hidden) * sizeof(float);
}

const char *sbld_residual_forward(const sbld_residual_args *args) {
  if (const char *error = check(*args)) return error;
  const bool wide = args->residual_dtype != args->x_dtype;
  switch (args->x_dtype) {
    case SBLD_FLOAT32:
      return forward<float, float>(*args);
    case SBLD_FLOAT16:
      return wide ? forward<float16, float>(*args) : forward<float16, float16>(*args);
    default:
      return wide ? forward<bfloat16, float>(*args) : forward<bfloat16, bfloat16>(*args);
  }
}

const char *sbld_residual_backward(const sbld_residual_args *args) {
  if (const char *error = check(*args)) return error;
  const bool wide = args->residual_dtype != args->x_dtype;
  switch (args->x_dtype) {
    case SBLD_FLOAT32:
      return backward<float, float>(*args);
    case SBLD_FLOAT16:
      return wide ? backward<float16, float>(*args) : backward<float16, float16>(*args);
    default:
      return wide ? backward<bfloat16, float>(*args) : backward<bfloat16, bfloat16>(*args);
  }
}

int sbld_residual_abi(void) { return SBLD_RESIDUAL_ABI; }
const char *sbld_residual_build(void) { return "cpu"; }

// For the test against the published vectors.
void sbld_philox4x32_10(const uint32_t *counter, const uint32_t *key, uint32_t *out) {
  const sbld::Philox result = sbld::philox4x32_10(counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
  for (int i = 0; i < 4; ++i) out[i] = result.word[i];
}
}
