// Calls the CPU library, compiled with it, on heap blocks of exactly the size that each tensor has, so that the sanitizers
// see every access beyond them. Prints the number of calls.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/residual.h"

namespace {

size_t size_of(int dtype) { return dtype == SBLD_FLOAT32 ? 4 : 2; }

// Random bits: every number of a type, NaN and infinities among them.
std::unique_ptr<uint8_t[]> random_bytes(std::mt19937 &rng, size_t bytes) {
  std::unique_ptr<uint8_t[]> block(new uint8_t[bytes]);
  for (size_t i = 0; i < bytes; ++i) block[i] = static_cast<uint8_t>(rng());
  return block;
}

void fail(const char *what) {
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

}  // namespace

int main() {
  std::mt19937 rng(1234);
  auto between = [&](int low, int high) { return low + static_cast<int>(rng() % (high - low + 1)); };
  int calls = 0;
  for (int round = 0; round < 2000; ++round) {
    sbld_residual_args args = {};
    args.abi = SBLD_RESIDUAL_ABI;
    args.x_dtype = between(0, 2);
    args.residual_dtype = between(0, 1) ? args.x_dtype : SBLD_FLOAT32;
    args.index_dim = between(0, 1);
    args.rows0 = args.x_rows0 = between(1, 70);
    args.rows1 = args.x_rows1 = between(1, 6);
    args.hidden = between(1, 40);
    args.multiplier = 1.25f;
    args.drop_threshold = between(0, 1) ? 0 : static_cast<uint32_t>(between(1, 65535));
    const int64_t seed = static_cast<int64_t>(rng()) << 32 | rng();
    args.seed = &seed;
    std::vector<int64_t> index;
    if (between(0, 2) > 0) {
      int64_t &kept = args.index_dim == 0 ? args.x_rows0 : args.x_rows1;
      const int64_t others = args.index_dim == 0 ? args.x_rows1 : args.x_rows0;
      const int64_t size = kept;
      const bool each = between(0, 1);
      kept = between(1, static_cast<int>(size));
      for (int64_t row = 0; row < (each ? others : 1); ++row) {
        std::vector<int64_t> all(static_cast<size_t>(size));
        for (int64_t i = 0; i < size; ++i) all[static_cast<size_t>(i)] = i;
        std::shuffle(all.begin(), all.end(), rng);
        index.insert(index.end(), all.begin(), all.begin() + kept);
      }
      const int64_t stride = each ? kept : 0;
      args.index_stride0 = args.index_dim == 0 ? 1 : stride;
      args.index_stride1 = args.index_dim == 0 ? stride : 1;
      index.shrink_to_fit();
      args.index = index.data();
    }
    const size_t stream = static_cast<size_t>(args.rows0 * args.rows1 * args.hidden) * size_of(args.residual_dtype);
    const size_t branch = static_cast<size_t>(args.x_rows0 * args.x_rows1 * args.hidden) * size_of(args.x_dtype);
    const size_t bias_bytes = static_cast<size_t>(args.hidden) * size_of(args.x_dtype);
    auto x = random_bytes(rng, branch), residual = random_bytes(rng, stream), y = random_bytes(rng, stream);
    auto bias = random_bytes(rng, bias_bytes), d_x = random_bytes(rng, branch), d_bias = random_bytes(rng, bias_bytes);
    args.x = x.get();
    args.residual = residual.get();
    args.y = between(0, 1) ? y.get() : residual.get();
    args.bias = between(0, 1) ? bias.get() : nullptr;
    args.d_y = y.get();
    args.d_x = between(0, 3) ? d_x.get() : nullptr;
    args.d_bias = between(0, 1) ? d_bias.get() : nullptr;
    auto workspace = random_bytes(rng, sbld_residual_forward_workspace(&args));
    args.workspace = workspace.get();
    if (const char *error = sbld_residual_forward(&args)) fail(error);
    workspace = random_bytes(rng, sbld_residual_backward_workspace(&args));
    args.workspace = workspace.get();
    if (const char *error = sbld_residual_backward(&args)) fail(error);
    calls += 2;

    sbld_residual_args wrong = args;
    wrong.abi += 1;
    if (sbld_residual_forward(&wrong) == nullptr) fail("another ABI is accepted");
    if (args.index != nullptr) {
      std::vector<int64_t> outside(index.size(), 70);
      wrong = args;
      wrong.index = outside.data();
      if (sbld_residual_backward(&wrong) == nullptr) fail("an index out of range is accepted");
    }
  }
  std::printf("%d calls\n", calls);
  return 0;
}
