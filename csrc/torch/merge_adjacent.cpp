// merge_adjacent, and the gradient of both merges, for torch tensors.
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
  check(to[0] >= 1 && to[1] >= 1 && to[2] >= 1, "merge_adjacent", "grid, window: allowed 1 …");
}

// The product of the extents; negative where it overflows.
int64_t product(const int64_t (&extents)[3]) {
  int64_t result = extents[0];
  const bool overflows = __builtin_mul_overflow(result, extents[1], &result) ||
                         __builtin_mul_overflow(result, extents[2], &result);
  return overflows ? -1 : result;
}

MergeAdjacent params_of(const Tensor& x, const std::vector<int64_t>& grid,
                        const std::vector<int64_t>& window, int64_t prefix) {
  const char* op = "merge_adjacent";
  check(x.dim() == 3, op, "x: allowed (B, P+N, C)");
  check(grid.size() == window.size(), op, "window: allowed as many entries as grid");
  MergeAdjacent p{};
  set_extents(grid, p.grid);
  set_extents(window, p.window);
  for (int axis = 0; axis < 3; ++axis) {  // a window beyond the grid is none, however far beyond
    if (p.window[axis] > p.grid[axis]) p.window[axis] = p.grid[axis] + 1;
  }
  p.prefix = prefix;
  p.x = x.data_ptr();
  p.dtype = dtype_of(x, op);
  p.batch = x.size(0);
  p.channels = x.size(2);
  p.batch_stride = x.stride(0);
  p.token_stride = x.stride(1);
  check(prefix >= 0 && prefix <= x.size(1) && product(p.grid) == x.size(1) - prefix, op,
        "x: allowed (B, P+N, C) with N = ∏ grid");
  check(product(p.window) >= 2, op, "window: allowed at least 2 tokens, fewer than 2^63");
  return p;
}

void set_counts(const std::vector<int64_t>& counts, bool dense, MergeAdjacent& p) {
  const char* op = "merge_adjacent";
  const auto size = static_cast<int64_t>(counts.size());
  check(size == 1 || (size > 1 && size == p.batch), op,
        "num_windows: allowed one int or one per image");
  p.counts = counts.data();
  p.counts_stride = size == 1 ? 0 : 1;
  int64_t windows = 1;
  for (int axis = 0; axis < 3; ++axis) windows *= p.grid[axis] / p.window[axis];
  for (const int64_t count : counts) {
    check(count >= 0 && count <= windows, op, "num_windows: allowed 0 … windows");
    check(!dense || count == counts[0], op, "num_windows: allowed one for all where dense");
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_adjacent(
    Tensor x, std::vector<int64_t> grid, std::vector<int64_t> window,
    std::optional<double> threshold, std::optional<std::vector<int64_t>> counts, bool dense,
    std::optional<Tensor> size, int64_t prefix, bool by_similarity) {
  const char* op = "merge_adjacent";
  const Place place(x);
  x = rows_contiguous(x);
  MergeAdjacent p = params_of(x, grid, window, prefix);
  const int64_t length = x.size(1), saved = product(p.window) - 1;
  set_size(size, p.batch, length, op, p);
  p.threshold = static_cast<float>(threshold.value_or(0));
  p.uniform = dense && !counts;
  p.by_similarity = by_similarity;
  p.packed = !dense;
  int64_t rows = p.batch * length, each = length;  // at most, where a threshold decides
  if (counts) {
    set_counts(*counts, dense, p);
    each -= (*counts)[0] * saved;
    for (int64_t b = 0; b < p.batch; ++b) rows -= p.counts[b * p.counts_stride] * saved;
  }
  const bool flat = !dense || !counts;
  Tensor tokens = flat ? place.empty({rows, p.channels}, x.scalar_type())
                       : place.empty({p.batch, each, p.channels}, x.scalar_type());
  Tensor sizes = flat ? place.empty({rows}, ScalarType::Float)
                      : place.empty({p.batch, each}, ScalarType::Float);
  Tensor index = place.empty({p.batch, length}, ScalarType::Long);
  Tensor offsets = place.empty({p.batch + 1}, ScalarType::Long);
  p.tokens = tokens.data_ptr();
  p.merged_size = static_cast<float*>(sizes.data_ptr());
  p.index = static_cast<int64_t*>(index.data_ptr());
  p.offsets = static_cast<int64_t*>(offsets.data_ptr());
  place.run(
      op, "num_windows: allowed 0 … windows",
      [&](const auto& threads) {
        Scratch scratch(merge_adjacent_scratch(p, threads.threads));
        p.scratch = scratch.data();
        return tk::merge_adjacent(p, threads);
      },
      [&](auto* stream) {
        const Tensor scratch = place.scratch(merge_adjacent_cuda_scratch(p));
        p.scratch = scratch.data_ptr();
        return merge_adjacent_cuda(p, stream);
      });
  if (counts) return {tokens, sizes, index, offsets};
  rows = last_of(place, offsets);
  tokens = head(tokens, rows);
  sizes = head(sizes, rows);
  if (!dense) return {tokens, sizes, index, offsets};
  if (p.batch > 0) each = rows / p.batch;
  return {torch::stable::view(tokens, {p.batch, each, p.channels}),
          torch::stable::view(sizes, {p.batch, each}), index, offsets};
}

// grad (total, C) is packed: one image of rows for all; grad (B, M, C) has its rows per image.
// merged_size has the same rows.
Tensor merge_backward(Tensor grad, Tensor index, std::optional<Tensor> size, Tensor merged_size) {
  const char* op = "merge_backward";
  const Place place(grad);
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
  Tensor grad_x = place.empty({p.batch, p.length, p.channels}, grad.scalar_type());
  p.grad_x = grad_x.data_ptr();
  place.run(
      op, "index: allowed rows of grad",
      [&](const auto& threads) { return tk::merge_backward(p, threads); },
      [&](auto* stream) { return merge_backward_cuda(p, stream); });
  return grad_x;
}

}  // namespace

TK_LIBRARY(CPU, m) {
  TK_IMPL(m, merge_adjacent);
  TK_IMPL(m, merge_backward);
}

TK_LIBRARY(CUDA, m) {
  TK_IMPL(m, merge_adjacent);
  TK_IMPL(m, merge_backward);
}

}  // namespace tk::bind
