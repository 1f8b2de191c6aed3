// score_attention for torch tensors.
#include <cmath>

#include "torch/place.h"

namespace tk::bind {
namespace {

using Heads = ScoreAttention::Heads;
constexpr const char* kOp = "score_attention";

// A small tensor of the call, if it came: its pointer and its strides.
template <class T, size_t Rank>
const T* view(const std::optional<Tensor>& tensor, const int64_t (&shape)[Rank], ScalarType type,
              const char* name, int64_t* strides) {
  if (!tensor) return nullptr;
  bool good = tensor->scalar_type() == type && tensor->dim() == static_cast<int64_t>(Rank);
  for (size_t i = 0; good && i < Rank; ++i) {
    good = tensor->size(static_cast<int64_t>(i)) == shape[i];
    strides[i] = tensor->stride(static_cast<int64_t>(i));
  }
  check(good, kOp, std::string(name) + ": wrong shape or dtype");
  return static_cast<const T*>(tensor->data_ptr());
}

void set_tokens(const Tensor& query, const Tensor& key, ScoreAttention& p) {
  check(query.dim() == 4 && key.dim() == 4 && query.scalar_type() == key.scalar_type(), kOp,
        "query, key: allowed (B, H, R, D) and (B, G, N, D) of one dtype");
  p.query = query.data_ptr();
  p.key = key.data_ptr();
  p.dtype = dtype_of(query, kOp);
  for (int i = 0; i < 3; ++i) {
    p.query_strides[i] = query.stride(i);
    p.key_strides[i] = key.stride(i);
  }
  p.batch = query.size(0);
  p.heads = query.size(1);
  p.rows = query.size(2);
  p.dim = query.size(3);
  p.key_heads = key.size(1);
  p.keys = key.size(2);
  check(key.size(0) == p.batch && key.size(3) == p.dim && p.key_heads > 0 && p.heads > 0 &&
            p.heads % p.key_heads == 0 && p.rows > 0 && p.keys > 0 && p.dim > 0,
        kOp,
        "query, key: allowed (B, H, R, D) and (B, G, N, D), H a multiple of G, none of H, G, R, N, "
        "D zero");
}

// (B, N') for the mean over heads, else (B, G | H, N'); sum and maximum one behind the other.
Tensor output(const Place& place, const ScoreAttention& p) {
  const int64_t columns = p.end_column - p.first_column;
  const int64_t heads = p.reduce_heads == Heads::kGroup ? p.key_heads : p.heads;
  const bool mean = p.reduce_heads == Heads::kMean, both = p.sum && p.max;
  if (both && mean) return place.empty({2, p.batch, columns}, ScalarType::Float);
  if (both) return place.empty({2, p.batch, heads, columns}, ScalarType::Float);
  if (mean) return place.empty({p.batch, columns}, ScalarType::Float);
  return place.empty({p.batch, heads, columns}, ScalarType::Float);
}

Tensor score_attention(Tensor query, Tensor key, std::optional<double> scale, bool causal,
                       std::optional<Tensor> query_positions, std::optional<Tensor> key_lengths,
                       std::optional<Tensor> lse, std::optional<Tensor> row_weights,
                       int64_t first_column, int64_t end_column, std::string heads, bool sum,
                       bool max, int64_t pool_size) {
  const Place place(query);
  ScoreAttention p{};
  query = rows_contiguous(query);
  key = rows_contiguous(key);
  set_tokens(query, key, p);
  p.scale = static_cast<float>(scale ? *scale : 1.0 / std::sqrt(static_cast<double>(p.dim)));
  p.causal = causal;
  p.positions = view<int64_t>(query_positions, {p.batch, p.rows}, ScalarType::Long,
                              "query_positions", p.position_strides);
  p.key_lengths =
      view<int64_t>(key_lengths, {p.batch}, ScalarType::Long, "key_lengths", &p.length_stride);
  p.lse = view<float>(lse, {p.batch, p.heads, p.rows}, ScalarType::Float, "lse", p.lse_strides);
  p.row_weights = view<float>(row_weights, {p.batch, p.rows}, ScalarType::Float, "row_weights",
                              p.weight_strides);
  p.first_column = first_column;
  p.end_column = end_column;
  p.reduce_heads = heads == "mean" ? Heads::kMean : heads == "group" ? Heads::kGroup : Heads::kNone;
  p.sum = sum;
  p.max = max;
  p.pool = pool_size;
  check(first_column >= 0 && first_column <= end_column && end_column <= p.keys, kOp,
        "columns: allowed 0 ≤ first ≤ end ≤ N");
  check(sum || max, kOp, "reduce: allowed sum, max or both");
  check(pool_size >= 1 && pool_size % 2 == 1 && pool_size <= kMaxPool, kOp,
        "pool: allowed odd, 1 … 1023");
  Tensor out = output(place, p);
  p.out = static_cast<float*>(out.data_ptr());
  place.run(
      kOp, "key_lengths, query_positions: allowed 0 … N and at least -1",
      [&](const auto& threads) {
        Scratch scratch(score_attention_scratch(p, threads.threads));
        p.scratch = scratch.data();
        return tk::score_attention(p, threads);
      },
      [&](auto* stream) {
        const Tensor scratch = place.scratch(score_attention_cuda_scratch(p));
        p.scratch = scratch.data_ptr();
        return score_attention_cuda(p, stream);
      });
  return out;
}

}  // namespace

TK_LIBRARY(CPU, m) { TK_IMPL(m, score_attention); }
TK_LIBRARY(CUDA, m) { TK_IMPL(m, score_attention); }

}  // namespace tk::bind
