// C interface of the residual add: what megatron_sbld/residual/native.py calls in either library.
//
//   forward   y = residual, and for each row of x:  y[row] += multiplier * mask * (x[row] + bias)
//   backward  d_x[row] = multiplier * mask * d_y[row],  d_bias = sum of d_x over the rows in fp32
//
// residual, y and d_y are [rows0, rows1, hidden], x and d_x [x_rows0, x_rows1, hidden], all contiguous. Without an index
// the rows of x are those of residual, in order. With one, row (i, j) of x belongs to row (index[.], j) if index_dim is 0, and to
// (i, index[.]) if it is 1, where [.] is i * index_stride0 + j * index_stride1. No row may be named twice.
//
// Pointers are to the memory of the library's device: the GPU for the CUDA library, the host for the other.
#ifndef MEGATRON_SBLD_RESIDUAL_H_
#define MEGATRON_SBLD_RESIDUAL_H_

#include <stddef.h>
#include <stdint.h>

#define SBLD_RESIDUAL_ABI 2  // counts up with every change of this file

#ifdef __cplusplus
extern "C" {
#endif

enum sbld_dtype { SBLD_FLOAT32 = 0, SBLD_FLOAT16 = 1, SBLD_BFLOAT16 = 2 };

struct sbld_residual_args {
  int32_t abi;             // SBLD_RESIDUAL_ABI of the caller
  int32_t x_dtype;         // enum sbld_dtype, of x, bias, d_x and d_bias
  int32_t residual_dtype;  // enum sbld_dtype, of residual, y and d_y: that of x, or SBLD_FLOAT32
  int32_t index_dim;       // 0 or 1; without an index it does not matter
  int32_t device;          // number of the GPU that holds everything
  uint32_t drop_threshold;  // an element is dropped where its 16 random bits are below: 0 .. 65535
  float multiplier;         // scale / (1 - drop_threshold / 65536)
  int32_t reserved;         // 0
  int64_t rows0, rows1, hidden;
  int64_t x_rows0, x_rows1;
  int64_t index_stride0, index_stride1;
  const void *x;         // forward only
  const void *bias;      // [hidden], or null; forward only
  const void *residual;  // forward only
  void *y;               // forward: written; may be residual itself
  const void *d_y;       // backward only
  void *d_x;             // backward: written, or null
  void *d_bias;          // backward: [hidden] written, or null
  const int64_t *index;  // or null
  const int64_t *seed;   // one number; read only if drop_threshold > 0
  void *workspace;       // of as many bytes as the functions below say, aligned to 16
  void *stream;          // cudaStream_t; the CPU library ignores it
};

// Bytes of workspace that a call needs; the same for equal shapes.
size_t sbld_residual_forward_workspace(const struct sbld_residual_args *args);
size_t sbld_residual_backward_workspace(const struct sbld_residual_args *args);

// Null, or what is wrong (a static string; for CUDA errors the runtime's name of it). Asynchronous on a GPU.
const char *sbld_residual_forward(const struct sbld_residual_args *args);
const char *sbld_residual_backward(const struct sbld_residual_args *args);

int sbld_residual_abi(void);
// "cuda 13.0; sm_80 sm_90 sm_100 compute_100" or "cpu": what this library was built for.
const char *sbld_residual_build(void);

#ifdef __cplusplus
}
#endif
#endif  // MEGATRON_SBLD_RESIDUAL_H_
