// merge_adjacent, and the gradient of both merges, for torch tensors on the CPU.
#include "torch/merge.h"

namespace tk::bind {
namespace {

// An image (H, W) is the grid {H, 1, W}, a sequence (N) is {N, 1, 1}; the same for windows.
void set_extents(const std::vector<int64_t>& from, int64_t (&to)[3]) {
  check(!from.empty() && from.size() <= 3, "merge_adjacent",
        "grid, window: allowed 1, 2 or 3 ints");
  to[0] = from.front();
  to[1] = from.size() == 3 ? from[1] : 1;
  to[2] = from.size() == 1 ? 1 : from.back();
  for (const int64_t extent : to)
    check(extent >= 1, "merge_adjacent", "grid, window: allowed extents of at least 1");
}

MergeAdjacent params_of(const Tensor& x, const std::vector<int64_t>& grid,
                        const std::vector<int64_t>& window, int64_t prefix) {
  const char* op = "merge_adjacent";
  check(x.dim() == 3, op, "x: allowed (B, P+N, C)");
  check(grid.size() == window.size(), op, "window: allowed as many entries as grid");
  MergeAdjacent p{};
  set_extents(grid, p.grid);
  set_extents(window, p.window);
  p.prefix = prefix;
  p.x = x.data_ptr();
  p.dtype = dtype_of(x, op);
  p.batch = x.size(0);
  p.channels = x.size(2);
  p.batch_stride = x.stride(0);
  p.token_stride = x.stride(1);
  check(prefix >= 0 && prefix + p.grid[0] * p.grid[1] * p.grid[2] == x.size(1), op,
        "x: allowed (B, P+N, C) with N = ∏ grid");
  check(p.window[0] * p.window[1] * p.window[2] >= 2, op, "window: allowed at least 2 tokens");
  return p;
}

// Rows that the output has, or at most has where a threshold decides.
int64_t rows_at_most(const MergeAdjacent& p, int64_t length, int64_t members) {
  int64_t saved = 0;
  for (int64_t image = 0; p.counts != nullptr && image < p.batch; ++image)
    saved += p.counts[image * p.counts_stride];
  return p.batch * length - saved * (members - 1);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_adjacent_cpu(
    Tensor x, std::vector<int64_t> grid, std::vector<int64_t> window,
    std::optional<double> threshold, std::vector<int64_t> counts, bool dense,
    std::optional<Tensor> size, int64_t prefix, std::string order) {
  const char* op = "merge_adjacent";
  x = rows_contiguous(x);
  MergeAdjacent p = params_of(x, grid, window, prefix);
  const int64_t length = x.size(1), members = p.window[0] * p.window[1] * p.window[2];
  set_size(size, p.batch, length, op, p);
  if (!threshold) {
    check(counts.size() == 1 || static_cast<int64_t>(counts.size()) == p.batch, op,
          "num_windows: allowed one int or one per image");
    const int64_t windows =
        (p.grid[0] / p.window[0]) * (p.grid[1] / p.window[1]) * (p.grid[2] / p.window[2]);
    for (const int64_t count : counts)
      check(count >= 0 && count <= windows, op, "num_windows: allowed 0 … windows");
    p.counts = counts.data();
    p.counts_stride = counts.size() == 1 ? 0 : 1;
  }
  p.threshold = static_cast<float>(threshold.value_or(0));
  p.uniform = dense && threshold;
  p.by_similarity = order == "similarity";
  p.packed = !dense;
  const int64_t at_most = rows_at_most(p, length, members);
  Tensor tokens = empty({at_most, p.channels}, x.scalar_type()),
         sizes = empty({at_most}, ScalarType::Float);
  Tensor index = empty({p.batch, length}, ScalarType::Long),
         offsets = empty({p.batch + 1}, ScalarType::Long);
  p.tokens = tokens.data_ptr();
  p.merged_size = static_cast<float*>(sizes.data_ptr());
  p.index = static_cast<int64_t*>(index.data_ptr());
  p.offsets = static_cast<int64_t*>(offsets.data_ptr());
  const Pool threads = pool();
  Scratch scratch(merge_adjacent_scratch(p, threads.threads));
  p.scratch = scratch.data();
  check(merge_adjacent(p, threads), op, "num_windows: allowed 0 … windows");
  const int64_t rows = p.offsets[p.batch];
  tokens = head(tokens, rows);
  sizes = head(sizes, rows);
  if (dense) {
    const int64_t each =
        p.batch > 0 ? rows / p.batch : length - (threshold ? 0 : counts[0] * (members - 1));
    tokens = torch::stable::view(tokens, {p.batch, each, p.channels});
    sizes = torch::stable::view(sizes, {p.batch, each});
  }
  return {tokens, sizes, index, offsets};
}

// grad (total, C) is packed: one image of rows for all; grad (B, M, C) has its rows per image.
// merged_size has the same rows.
Tensor merge_backward_cpu(Tensor grad, Tensor index, std::optional<Tensor> size,
                          Tensor merged_size) {
  const char* op = "merge_backward";
  check(grad.dim() == 2 || grad.dim() == 3, op, "grad: allowed (total, C) or (B, M, C)");
  check(index.dim() == 2 && index.scalar_type() == ScalarType::Long, op,
        "index: allowed int64 (B, P+N)");
  const bool packed = grad.dim() == 2;
  grad = rows_contiguous(grad);
  index = torch::stable::contiguous(index);
  merged_size = torch::stable::contiguous(merged_size);
  MergeBackward p{};
  p.grad = grad.data_ptr();
  p.dtype = dtype_of(grad, op);
  p.batch = index.size(0);
  p.length = index.size(1);
  p.rows = grad.size(grad.dim() - 2);
  p.channels = grad.size(grad.dim() - 1);
  p.batch_stride = packed ? 0 : grad.stride(0);
  p.token_stride = grad.stride(grad.dim() - 2);
  check(packed || grad.size(0) == p.batch, op, "grad: allowed the batch of index");
  check(merged_size.scalar_type() == ScalarType::Float &&
            merged_size.numel() == (packed ? 1 : p.batch) * p.rows,
        op, "merged_size: allowed float32, one per row of grad");
  p.merged_size = static_cast<const float*>(merged_size.data_ptr());
  p.merged_batch_stride = packed ? 0 : p.rows;
  p.index = static_cast<const int64_t*>(index.data_ptr());
  set_size(size, p.batch, p.length, op, p);
  Tensor grad_x = empty({p.batch, p.length, p.channels}, grad.scalar_type());
  p.grad_x = grad_x.data_ptr();
  check(merge_backward(p, pool()), op, "index: allowed rows of grad");
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenkernels, CPU, m) {
  m.impl("merge_adjacent", TORCH_BOX(&merge_adjacent_cpu));
  m.impl("merge_backward", TORCH_BOX(&merge_backward_cpu));
}

}  // namespace tk::bind
