// The residual add on the GPU. Memory-bound: each thread moves one group (8 elements) of a row with 16-byte loads and
// stores. What is computed, and in which order, is in residual_core.h.
//
// Launch: x over the groups of a row, y over rows, so that no index needs a division. Offsets are 64-bit.
#include <cuda_runtime.h>

#include "residual_core.h"

namespace {

using namespace sbld;

constexpr int kThreads = 256;
// backward_bias_kernel: a block has a tile of 16 groups and the lanes of a chunk. Of 80 shapes tried on one H200 this one was
// within 3 % of the best at every hidden size from 1024 to 8192.
constexpr int kTileGroups = 16;
constexpr int kRowsInFlight = 4;  // rows that a thread has loaded before it computes
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kBlocksInFlight = 2;  // of a multiprocessor, in half precision; with more there are too few registers
#else
constexpr int kBlocksInFlight = 4;
#endif

// ---------------------------------------------------------------------------------------------------------------------
// A group in registers

template <typename T>
struct Words {  // 8 elements as they are in memory
  uint4 part[sizeof(T) / 2];
};

// kStream: past the L1 cache. Not for fp32, of which two loads share a sector of 32 bytes.
template <bool kStream>
__device__ __forceinline__ uint4 load_16_bytes(const void *from) {
  uint4 words;
  if (kStream)
    asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "l"(from)
                 : "memory");
  else
    asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "l"(from)
                 : "memory");
  return words;
}

__device__ __forceinline__ void store_16_bytes(void *to, uint4 words) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words.x), "r"(words.y), "r"(words.z),
               "r"(words.w)
               : "memory");
}

__device__ __forceinline__ float element_of(const Words<float> &words, int i) {
  const uint4 &part = words.part[i / 4];
  return from_bits(i % 4 == 0 ? part.x : i % 4 == 1 ? part.y : i % 4 == 2 ? part.z : part.w);
}

template <typename T>
__device__ __forceinline__ float element_of(const Words<T> &words, int i) {
  const uint4 &part = words.part[0];
  const uint32_t pair = i / 2 == 0 ? part.x : i / 2 == 1 ? part.y : i / 2 == 2 ? part.z : part.w;
  return to_float(T{static_cast<uint16_t>(i % 2 == 0 ? pair & 0xffffu : pair >> 16)});
}

template <typename T>
__device__ __forceinline__ uint32_t pair_of(const float *values) {
  return from_float<T>(values[0]).raw | static_cast<uint32_t>(from_float<T>(values[1]).raw) << 16;
}

// One instruction for both, where from_float takes a dozen.
template <>
__device__ __forceinline__ uint32_t pair_of<bfloat16>(const float *values) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(values[1]), "f"(values[0]));
  return pair;
}

template <typename T>
struct Pack {
  static __device__ __forceinline__ Words<T> words(const float *v) {
    return {{make_uint4(pair_of<T>(v), pair_of<T>(v + 2), pair_of<T>(v + 4), pair_of<T>(v + 6))}};
  }
};

template <>
struct Pack<float> {
  static __device__ __forceinline__ Words<float> words(const float *v) {
    return {{make_uint4(bits(v[0]), bits(v[1]), bits(v[2]), bits(v[3])),
             make_uint4(bits(v[4]), bits(v[5]), bits(v[6]), bits(v[7]))}};
  }
};

// kVector: every group is whole and aligned to 16 bytes. Else `size` elements, one by one.
template <typename T, bool kVector>
struct Group {
  Words<T> words;   // if kVector
  T elements[kGroup];

  template <bool kStream = false>
  __device__ __forceinline__ void load(const T *from, int size) {
    if (kVector) {
      SBLD_UNROLL
      for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i)
        words.part[i] = load_16_bytes<kStream>(reinterpret_cast<const char *>(from) + 16 * i);
    } else {
      SBLD_UNROLL
      for (int i = 0; i < kGroup; ++i)
        if (i < size) elements[i] = from[i];
    }
  }

  __device__ __forceinline__ void store(T *to, int size) const {
    if (kVector) {
      SBLD_UNROLL
      for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i)
        store_16_bytes(reinterpret_cast<char *>(to) + 16 * i, words.part[i]);
    } else {
      SBLD_UNROLL
      for (int i = 0; i < kGroup; ++i)
        if (i < size) to[i] = elements[i];
    }
  }

  __device__ __forceinline__ float get(int i) const { return kVector ? element_of(words, i) : to_float(elements[i]); }

  __device__ __forceinline__ void set(const float *values) {
    if (kVector) {
      words = Pack<T>::words(values);
    } else {
      SBLD_UNROLL
      for (int i = 0; i < kGroup; ++i) elements[i] = from_float<T>(values[i]);
    }
  }
};

__device__ __forceinline__ int64_t group_of_thread() {
  return static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ int64_t row_of_thread() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
}

__device__ __forceinline__ int size_of_group(const sbld_residual_args &args, int64_t group) {
  const int64_t left = args.hidden - group * kGroup;
  return left < kGroup ? static_cast<int>(left) : kGroup;
}

__device__ __forceinline__ Philox random_of(const sbld_residual_args &args, int64_t row, int64_t group) {
  if (args.drop_threshold == 0) return Philox{};
  return random_of_group(static_cast<uint64_t>(*args.seed), row, group);
}

// Programmatic dependent launch (compute capability 9): the next kernel in the stream may be brought onto the device, where it
// waits in `wait_for_kernel_before` until this one has written everything.
__device__ __forceinline__ void allow_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void wait_for_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// As torch's indexing does: the error is seen at the next synchronisation.
__device__ __forceinline__ void refuse_index() { __trap(); }

// ---------------------------------------------------------------------------------------------------------------------
// Kernels

// x_row_of[row] = the row of x that is added to this row of the residual stream; the others keep their -1.
__global__ void invert_index_kernel(const sbld_residual_args args, int32_t *x_row_of) {
  const int64_t x_row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (x_row >= num_x_rows(args)) return;
  const int64_t row = row_of(args, x_row);
  if (row < 0) refuse_index();
  x_row_of[row] = static_cast<int32_t>(x_row);
}

enum class Rows {
  kAll,      // x has all rows
  kChosen,   // a thread for each row of y; x_row_of says which row of x it gets
  kInPlace,  // a thread for each row of x; the other rows of y are there already
};

template <typename X, typename R, bool kVector, Rows kRows>
__global__ void __launch_bounds__(kThreads) forward_kernel(const sbld_residual_args args, const int32_t *x_row_of) {
  const int64_t group = group_of_thread();
  int64_t row = row_of_thread(), x_row = row;
  if (group >= num_groups(args) || row >= (kRows == Rows::kInPlace ? num_x_rows(args) : num_rows(args))) return;
  if (kRows == Rows::kChosen) x_row = x_row_of[row];
  if (kRows == Rows::kInPlace) row = row_of(args, x_row);
  if (row < 0) refuse_index();

  const int size = kVector ? kGroup : size_of_group(args, group);
  const int64_t column = group * kGroup, at = row * args.hidden + column;
  R *y = static_cast<R *>(args.y) + at;
  Group<R, kVector> residual;
  residual.load(static_cast<const R *>(args.residual) + at, size);
  if (kRows == Rows::kChosen && x_row < 0) {
    residual.store(y, size);
    return;
  }
  Group<X, kVector> x, bias;
  x.load(static_cast<const X *>(args.x) + x_row * args.hidden + column, size);
  const bool has_bias = args.bias != nullptr;
  if (has_bias) bias.load(static_cast<const X *>(args.bias) + column, size);
  const Philox random = random_of(args, row, group);
  float values[kGroup];
  SBLD_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    if (!kVector && i >= size) continue;
    const float branch = has_bias ? add(x.get(i), bias.get(i)) : x.get(i);
    values[i] = forward_element(branch, residual.get(i), args.multiplier, is_kept(random, i, args.drop_threshold));
  }
  Group<R, kVector> result;
  result.set(values);
  result.store(y, size);
}

template <typename X, typename R, bool kVector>
__global__ void __launch_bounds__(kThreads) backward_kernel(const sbld_residual_args args) {
  const int64_t group = group_of_thread(), x_row = row_of_thread();
  if (group >= num_groups(args) || x_row >= num_x_rows(args)) return;
  const int64_t row = row_of(args, x_row);
  if (row < 0) refuse_index();

  const int size = kVector ? kGroup : size_of_group(args, group);
  const int64_t column = group * kGroup;
  Group<R, kVector> d_y;
  d_y.load(static_cast<const R *>(args.d_y) + row * args.hidden + column, size);
  const Philox random = random_of(args, row, group);
  float values[kGroup];
  SBLD_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    if (!kVector && i >= size) continue;
    values[i] = backward_element(d_y.get(i), args.multiplier, is_kept(random, i, args.drop_threshold));
  }
  Group<X, kVector> d_x;
  d_x.set(values);
  d_x.store(static_cast<X *>(args.d_x) + x_row * args.hidden + column, size);
}

// Sums a tile of a chunk's rows into partial [chunks, hidden]; d_x may be null. The grid is over tiles, then chunks, so that
// blocks that run at the same time read neighbouring memory. Without an index x_row is the row, which saves a tenth of the
// time where the mask takes most of the instructions.
template <typename X, typename R, bool kVector, bool kDropout, bool kIndex>
__global__ void __launch_bounds__(kTileGroups *kLanes, kVector && sizeof(R) == 2 ? kBlocksInFlight : 2)
    backward_bias_kernel(const sbld_residual_args args, float *partial) {
  __shared__ float lanes[kLanes][kTileGroups * kGroup];
  const int64_t x_rows = num_x_rows(args), rows_of_chunk = chunk_rows(x_rows), chunk = blockIdx.y;
  const int64_t end = min((chunk + 1) * rows_of_chunk, x_rows);
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kTileGroups * kGroup;
  const int64_t column = first_column + threadIdx.x * kGroup, group = column / kGroup;
  const int size = kVector ? kGroup : size_of_group(args, group);
  const uint64_t seed = kDropout ? static_cast<uint64_t>(*args.seed) : 0;

  float sums[kGroup] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
  for (int64_t first = column < args.hidden ? chunk * rows_of_chunk + threadIdx.y : end; first < end;
       first += kRowsInFlight * kLanes) {
    int64_t rows[kRowsInFlight];
    SBLD_UNROLL
    for (int k = 0; k < kRowsInFlight; ++k) {
      rows[k] = first + k * kLanes;
      if (kIndex) rows[k] = rows[k] < end ? row_of(args, rows[k]) : 0;
    }
    Group<R, kVector> d_y[kRowsInFlight];
    SBLD_UNROLL
    for (int k = 0; k < kRowsInFlight; ++k) {
      if (kIndex && rows[k] < 0) refuse_index();
      if (first + k * kLanes < end)
        d_y[k].template load<sizeof(R) == 2>(static_cast<const R *>(args.d_y) + rows[k] * args.hidden + column, size);
    }
    SBLD_UNROLL
    for (int k = 0; k < kRowsInFlight; ++k) {
      const int64_t x_row = first + k * kLanes;
      if (x_row >= end) break;
      const Philox random = kDropout ? random_of_group(seed, rows[k], group) : Philox{};
      float values[kGroup];
      SBLD_UNROLL
      for (int i = 0; i < kGroup; ++i) {
        if (!kVector && i >= size) continue;
        values[i] = backward_element(d_y[k].get(i), args.multiplier,
                                     !kDropout || is_kept(random, i, args.drop_threshold));
        sums[i] = add(sums[i], values[i]);
      }
      if (args.d_x == nullptr) continue;
      Group<X, kVector> d_x;
      d_x.set(values);
      d_x.store(static_cast<X *>(args.d_x) + x_row * args.hidden + column, size);
    }
  }
  allow_next_kernel();
  SBLD_UNROLL
  for (int i = 0; i < kGroup; ++i) lanes[threadIdx.y][threadIdx.x * kGroup + i] = sums[i];
  __syncthreads();
  const int64_t own = threadIdx.y * kTileGroups + threadIdx.x;  // one thread a column
  if (own >= kTileGroups * kGroup || first_column + own >= args.hidden) return;
  float sum = 0.0f;
  SBLD_UNROLL
  for (int lane = 0; lane < kLanes; ++lane) sum = add(sum, lanes[lane][own]);
  partial[chunk * args.hidden + first_column + own] = sum;
}

// partial [chunks, hidden] -> d_bias: a warp's lanes take columns, its block's rows take sections.
template <typename X>
__global__ void sum_chunks_kernel(const sbld_residual_args args, const float *partial, int64_t chunks) {
  constexpr int kSections = kMaxChunks / kSectionChunks;
  __shared__ float sections[kSections][32];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  const int64_t begin = threadIdx.y * kSectionChunks, end = min(begin + kSectionChunks, chunks);
  float section = 0.0f;
  wait_for_kernel_before();
  if (column < args.hidden) {
    float sums[kSectionChunks];
    SBLD_UNROLL
    for (int k = 0; k < kSectionChunks; ++k)
      if (begin + k < end) sums[k] = partial[(begin + k) * args.hidden + column];
    SBLD_UNROLL
    for (int k = 0; k < kSectionChunks; ++k)
      if (begin + k < end) section = add(section, sums[k]);
  }
  sections[threadIdx.y][threadIdx.x] = section;
  __syncthreads();
  if (threadIdx.y != 0 || column >= args.hidden) return;
  float total = 0.0f;
  SBLD_UNROLL
  for (int k = 0; k < kSections; ++k)
    if (k * kSectionChunks < chunks) total = add(total, sections[k][threadIdx.x]);
  static_cast<X *>(args.d_bias)[column] = from_float<X>(total);
}

// ---------------------------------------------------------------------------------------------------------------------
// Launches

struct Launch {
  dim3 grid, block;
};

// Threads of a block over the groups of a row: the multiple of a warp that leaves the fewest of them idle.
Launch launch_over(int64_t groups, int64_t rows) {
  int64_t width = 32, padded = INT64_MAX;
  for (int64_t candidate = kThreads; candidate >= 32; candidate -= 32) {
    const int64_t total = (groups + candidate - 1) / candidate * candidate;
    if (total < padded) {
      padded = total;
      width = candidate;
    }
  }
  const int64_t height = kThreads / width;
  return {dim3(static_cast<unsigned>((rows + height - 1) / height), static_cast<unsigned>(padded / width)),
          dim3(static_cast<unsigned>(width), static_cast<unsigned>(height))};
}

bool is_aligned(const void *pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename X, typename R, bool kVector>
void launch_forward(const sbld_residual_args &args, cudaStream_t stream) {
  const bool in_place = args.y == args.residual;
  if (args.index == nullptr) {
    const Launch launch = launch_over(num_groups(args), num_rows(args));
    forward_kernel<X, R, kVector, Rows::kAll><<<launch.grid, launch.block, 0, stream>>>(args, nullptr);
  } else if (in_place) {
    if (num_x_rows(args) == 0) return;
    const Launch launch = launch_over(num_groups(args), num_x_rows(args));
    forward_kernel<X, R, kVector, Rows::kInPlace><<<launch.grid, launch.block, 0, stream>>>(args, nullptr);
  } else {
    int32_t *x_row_of = static_cast<int32_t *>(args.workspace);
    cudaMemsetAsync(x_row_of, 0xff, static_cast<size_t>(num_rows(args)) * sizeof(int32_t), stream);
    const unsigned blocks = static_cast<unsigned>((num_x_rows(args) + kThreads - 1) / kThreads);
    if (blocks > 0) invert_index_kernel<<<blocks, kThreads, 0, stream>>>(args, x_row_of);
    const Launch launch = launch_over(num_groups(args), num_rows(args));
    forward_kernel<X, R, kVector, Rows::kChosen><<<launch.grid, launch.block, 0, stream>>>(args, x_row_of);
  }
}

// Whether sum_chunks_kernel may be launched before the kernel in front of it has ended: on a GPU that can, if it was compiled
// to wait (PTX of an older architecture does not). Not while a graph is captured: drivers before CUDA 12.3 refuse it there.
template <typename X>
bool may_overlap(const sbld_residual_args &args, cudaStream_t stream) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &capture) != cudaSuccess || capture != cudaStreamCaptureStatusNone) return false;
  int major = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, args.device) != cudaSuccess || major < 9)
    return false;
  static const bool waits = [] {
    cudaFuncAttributes compiled = {};
    return cudaFuncGetAttributes(&compiled, sum_chunks_kernel<X>) == cudaSuccess && compiled.ptxVersion >= 90;
  }();
  return waits;
}

template <typename X, typename R, bool kVector>
void launch_backward(const sbld_residual_args &args, cudaStream_t stream) {
  const int64_t x_rows = num_x_rows(args);
  if (args.d_bias == nullptr) {
    if (args.d_x == nullptr) return;
    const Launch launch = launch_over(num_groups(args), x_rows);
    backward_kernel<X, R, kVector><<<launch.grid, launch.block, 0, stream>>>(args);
    return;
  }
  float *partial = static_cast<float *>(args.workspace);
  const int64_t chunks = num_chunks(x_rows);
  const dim3 grid(static_cast<unsigned>((num_groups(args) + kTileGroups - 1) / kTileGroups),
                  static_cast<unsigned>(chunks));
  const dim3 block(kTileGroups, kLanes);
  constexpr bool kAlwaysIndex = !kVector;  // slow anyway: one kernel for both
  const bool index = kAlwaysIndex || args.index != nullptr;
  const auto kernel = args.drop_threshold > 0
                          ? (index ? backward_bias_kernel<X, R, kVector, true, true>
                                   : backward_bias_kernel<X, R, kVector, true, kAlwaysIndex>)
                          : (index ? backward_bias_kernel<X, R, kVector, false, true>
                                   : backward_bias_kernel<X, R, kVector, false, kAlwaysIndex>);
  kernel<<<grid, block, 0, stream>>>(args, partial);

  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>((args.hidden + 31) / 32));
  config.blockDim = dim3(32, kMaxChunks / kSectionChunks);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = may_overlap<X>(args, stream) ? 1 : 0;
  cudaLaunchKernelEx(&config, sum_chunks_kernel<X>, args, static_cast<const float *>(partial), chunks);
}

template <typename X, typename R>
void forward(const sbld_residual_args &args, cudaStream_t stream) {
  if (num_rows(args) == 0) return;
  const bool vector = args.hidden % kGroup == 0 && is_aligned(args.x) && is_aligned(args.bias) &&
                      is_aligned(args.residual) && is_aligned(args.y);
  vector ? launch_forward<X, R, true>(args, stream) : launch_forward<X, R, false>(args, stream);
}

template <typename X, typename R>
void backward(const sbld_residual_args &args, cudaStream_t stream) {
  if (num_x_rows(args) == 0) {
    if (args.d_bias != nullptr) cudaMemsetAsync(args.d_bias, 0, static_cast<size_t>(args.hidden) * sizeof(X), stream);
    return;
  }
  const bool vector = args.hidden % kGroup == 0 && is_aligned(args.d_y) && is_aligned(args.d_x);
  vector ? launch_backward<X, R, true>(args, stream) : launch_backward<X, R, false>(args, stream);
}

// The library has a CUDA runtime of its own, which does not see the device that torch's has made current.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status_ = cudaGetDevice(&previous_);
    if (status_ != cudaSuccess || previous_ == device) return;
    status_ = cudaSetDevice(device);
    changed_ = status_ == cudaSuccess;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }

  cudaError_t status() const { return status_; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t status_;
};

using Function = void (*)(const sbld_residual_args &, cudaStream_t);

const char *run(const sbld_residual_args &args, Function fp32, Function fp16, Function fp16_wide, Function bf16,
                Function bf16_wide) {
  if (const char *error = check(args)) return error;
  const bool wide = args.residual_dtype != args.x_dtype;
  const DeviceGuard guard(args.device);
  if (guard.status() != cudaSuccess) {
    cudaGetLastError();  // which the next call would report as its own
    return cudaGetErrorString(guard.status());
  }
  const Function function = args.x_dtype == SBLD_FLOAT32   ? fp32
                            : args.x_dtype == SBLD_FLOAT16 ? (wide ? fp16_wide : fp16)
                                                           : (wide ? bf16_wide : bf16);
  function(args, static_cast<cudaStream_t>(args.stream));
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace

#define SBLD_TEXT(x) #x
#define SBLD_TEXT_OF(x) SBLD_TEXT(x)
#ifndef SBLD_ARCHITECTURES  // setup.py passes the list
#define SBLD_ARCHITECTURES unknown architectures
#endif

extern "C" {

size_t sbld_residual_forward_workspace(const sbld_residual_args *args) {
  return args->index == nullptr || args->y == args->residual
             ? 0
             : static_cast<size_t>(num_rows(*args)) * sizeof(int32_t);
}

size_t sbld_residual_backward_workspace(const sbld_residual_args *args) {
  if (args->d_bias == nullptr) return 0;
  return static_cast<size_t>(num_chunks(num_x_rows(*args)) * args->hidden) * sizeof(float);
}

const char *sbld_residual_forward(const sbld_residual_args *args) {
  return run(*args, forward<float, float>, forward<float16, float16>, forward<float16, float>,
             forward<bfloat16, bfloat16>, forward<bfloat16, float>);
}

const char *sbld_residual_backward(const sbld_residual_args *args) {
  return run(*args, backward<float, float>, backward<float16, float16>, backward<float16, float>,
             backward<bfloat16, bfloat16>, backward<bfloat16, float>);
}

int sbld_residual_abi(void) { return SBLD_RESIDUAL_ABI; }

const char *sbld_residual_build(void) {
  return "cuda " SBLD_TEXT_OF(__CUDACC_VER_MAJOR__) "." SBLD_TEXT_OF(__CUDACC_VER_MINOR__) "; " SBLD_TEXT_OF(
      SBLD_ARCHITECTURES);
}
}
