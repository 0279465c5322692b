// The arithmetic of the residual add, compiled by nvcc for the GPU and by a C++ compiler for the CPU.
//
// Both do the same operations in the same order, in fp32 and without contraction, so that they agree bit for bit with
// each other and with megatron_sbld/residual/eager.py, but for the bits of a NaN. (nvcc would fuse a * b + c; the intrinsics
// forbid it.)
//
// The unit of work is a group: 8 neighbouring elements of a row, for which one Philox block gives 16 random bits each.
#ifndef MEGATRON_SBLD_RESIDUAL_CORE_H_
#define MEGATRON_SBLD_RESIDUAL_CORE_H_

#include <stdint.h>
#include <string.h>

#include "residual.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define SBLD_INLINE __host__ __device__ __forceinline__
#define SBLD_UNROLL _Pragma("unroll")
#else
#define SBLD_INLINE inline
#define SBLD_UNROLL
#endif

namespace sbld {

constexpr int kGroup = 8;

// ---------------------------------------------------------------------------------------------------------------------
// Numbers

SBLD_INLINE uint32_t bits(float value) {
  uint32_t result;
  memcpy(&result, &value, sizeof(result));
  return result;
}

SBLD_INLINE float from_bits(uint32_t value) {
  float result;
  memcpy(&result, &value, sizeof(result));
  return result;
}

SBLD_INLINE float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

SBLD_INLINE float add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

struct float16 {
  uint16_t raw;
};
struct bfloat16 {
  uint16_t raw;
};

SBLD_INLINE float to_float(float value) { return value; }

SBLD_INLINE float to_float(bfloat16 value) { return from_bits(static_cast<uint32_t>(value.raw) << 16); }

SBLD_INLINE float to_float(float16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.raw));
#else
  const uint32_t sign = static_cast<uint32_t>(value.raw & 0x8000u) << 16;
  const uint32_t rest = value.raw & 0x7fffu;
  if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // infinity or NaN
  if (rest >= 0x0400u) return from_bits(sign | ((rest << 13) + 0x38000000u));
  const float subnormal = static_cast<float>(rest) * 5.9604644775390625e-8f;  // 2^-24, exact
  return from_bits(sign | bits(subnormal));
#endif
}

// Rounding is to the nearest, ties to even, as torch's.
template <typename T>
SBLD_INLINE T from_float(float value);

template <>
SBLD_INLINE float from_float<float>(float value) {
  return value;
}

template <>
SBLD_INLINE bfloat16 from_float<bfloat16>(float value) {
  const uint32_t raw = bits(value);
  if ((raw & 0x7fffffffu) > 0x7f800000u) return bfloat16{0x7fc0u};  // NaN
  return bfloat16{static_cast<uint16_t>((raw + 0x7fffu + (raw >> 16 & 1u)) >> 16)};
}

template <>
SBLD_INLINE float16 from_float<float16>(float value) {
#if defined(__CUDA_ARCH__)
  return float16{__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t raw = bits(value);
  const uint16_t sign = static_cast<uint16_t>(raw >> 16 & 0x8000u);
  const uint32_t rest = raw & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (rest >= 0x47800000u) {
    half = 0x7c00u;  // 2^16 and more: infinity. (What rounds up to 2^16 carries into it below.)
  } else if (rest >= 0x38800000u) {
    half = (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13;
  } else {
    // Below 2^-14: adding 1/2 leaves the multiple of 2^-24 in the low bits, rounded as the sum is.
    half = bits(from_bits(rest) + 0.5f) - 0x3f000000u;
  }
  return float16{static_cast<uint16_t>(sign | half)};
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")

struct Philox {
  uint32_t word[4];
};

SBLD_INLINE Philox philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t key0, uint32_t key1) {
  SBLD_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return Philox{{c0, c1, c2, c3}};
}

// The random bits of a group. They depend on the seed and on the elements' place in the residual stream alone, not on the
// index, the launch or the element type.
SBLD_INLINE Philox random_of_group(uint64_t seed, int64_t row, int64_t group) {
  return philox4x32_10(static_cast<uint32_t>(group), static_cast<uint32_t>(row),
                       static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32), 0u, static_cast<uint32_t>(seed),
                       static_cast<uint32_t>(seed >> 32));
}

// Whether dropout keeps element i of a group.
SBLD_INLINE bool is_kept(const Philox &random, int i, uint32_t threshold) {
  return (i % 2 == 0 ? random.word[i / 2] & 0xffffu : random.word[i / 2] >> 16) >= threshold;
}

// ---------------------------------------------------------------------------------------------------------------------
// One element

// branch is x, or x + bias.
SBLD_INLINE float forward_element(float branch, float residual, float multiplier, bool kept) {
  return add(residual, kept ? multiply(branch, multiplier) : 0.0f);
}

SBLD_INLINE float backward_element(float d_y, float multiplier, bool kept) {
  return kept ? multiply(d_y, multiplier) : 0.0f;
}

// ---------------------------------------------------------------------------------------------------------------------
// Shapes

// Row of the residual stream that row x_row of x belongs to; -1 if the index is out of range.
SBLD_INLINE int64_t row_of(const sbld_residual_args &args, int64_t x_row) {
  if (args.index == nullptr) return x_row;
  int64_t i, j;
  if (x_row <= 0xffffffffll && args.x_rows1 <= 0xffffffffll) {  // a 64-bit division is many times as slow
    const uint32_t columns = static_cast<uint32_t>(args.x_rows1);
    i = static_cast<uint32_t>(x_row) / columns;
    j = static_cast<uint32_t>(x_row) - static_cast<uint32_t>(i) * columns;
  } else {
    i = x_row / args.x_rows1;
    j = x_row - i * args.x_rows1;
  }
  const int64_t position = args.index[i * args.index_stride0 + j * args.index_stride1];
  const int64_t size = args.index_dim == 0 ? args.rows0 : args.rows1;
  if (position < 0 || position >= size) return -1;
  return args.index_dim == 0 ? position * args.rows1 + j : i * args.rows1 + position;
}

SBLD_INLINE int64_t num_rows(const sbld_residual_args &args) { return args.rows0 * args.rows1; }
SBLD_INLINE int64_t num_x_rows(const sbld_residual_args &args) { return args.x_rows0 * args.x_rows1; }
SBLD_INLINE int64_t num_groups(const sbld_residual_args &args) { return (args.hidden + kGroup - 1) / kGroup; }

// d_bias is summed in an order that the number of rows alone decides, each sum from the first to the last, starting at +0: a
// lane of a chunk takes every kLanes-th of the chunk's rows; then the lanes of a chunk, the chunks of a section, the sections.
constexpr int kLanes = 16;
constexpr int64_t kMinLaneRows = 4;
constexpr int64_t kMaxChunks = 256;
constexpr int64_t kSectionChunks = 16;

SBLD_INLINE int64_t chunk_rows(int64_t x_rows) {
  const int64_t lane_rows = (x_rows + kMaxChunks * kLanes - 1) / (kMaxChunks * kLanes);
  return kLanes * (lane_rows < kMinLaneRows ? kMinLaneRows : lane_rows);
}

SBLD_INLINE int64_t num_chunks(int64_t x_rows) { return (x_rows + chunk_rows(x_rows) - 1) / chunk_rows(x_rows); }

// ---------------------------------------------------------------------------------------------------------------------
// What both launchers refuse before they compute

inline const char *check(const sbld_residual_args &args) {
  if (args.abi != SBLD_RESIDUAL_ABI) return "the caller and the library were built from different versions of residual.h";
  if (args.x_dtype < SBLD_FLOAT32 || args.x_dtype > SBLD_BFLOAT16) return "x has an unknown dtype";
  if (args.residual_dtype != args.x_dtype && args.residual_dtype != SBLD_FLOAT32)
    return "residual must have the dtype of x or float32";
  if (args.rows0 < 0 || args.rows1 < 0 || args.x_rows0 < 0 || args.x_rows1 < 0 || args.hidden < 1)
    return "a size is negative, or hidden is 0";
  if (args.index == nullptr && (args.x_rows0 != args.rows0 || args.x_rows1 != args.rows1))
    return "without an index x must have the rows of residual";
  if (args.index_dim != 0 && args.index_dim != 1) return "index_dim must be 0 or 1";
  if (args.index_dim == 0 ? args.x_rows0 > args.rows0 || args.x_rows1 != args.rows1
                          : args.x_rows1 > args.rows1 || args.x_rows0 != args.rows0)
    return "x must have no more rows than residual along index_dim, and as many along the other";
  if (args.drop_threshold > 65535u) return "drop_threshold must be at most 65535";
  if (args.drop_threshold > 0 && args.seed == nullptr) return "dropout needs a seed";
  if (num_rows(args) > 0x7fffffffll) return "there are more than 2^31 - 1 rows";
  return nullptr;
}

}  // namespace sbld

#endif  // MEGATRON_SBLD_RESIDUAL_CORE_H_
