// aggregate_soft and its gradients for torch tensors.
#include "torch/aggregate.h"

namespace tk::bind {
namespace {

std::tuple<Tensor, Tensor, Tensor> aggregate_soft(Tensor query, Tensor key, Tensor value,
                                                  std::optional<Tensor> bias,
                                                  std::optional<Tensor> mask,
                                                  std::optional<Tensor> scale_tensor, double scale,
                                                  bool keep_weights) {
  const char* op = "aggregate_soft";
  const Place place(value);
  query = rows_contiguous(query);
  key = rows_contiguous(key);
  value = rows_contiguous(value);
  AggregateSoft p{};
  set_operands(query, key, value, op, p);
  p.bias = bias_of(bias, p.B, p.N, op);
  p.mask = mask_of(mask, p.B, p.N, op);
  p.scale = static_cast<float>(scale);
  p.scale_tensor = number_of(scale_tensor, op);
  Tensor out = place.empty({p.B, p.M, p.C}, value.scalar_type());
  Tensor lse = place.empty({p.B, p.M}, ScalarType::Float);
  Tensor weights = keep_weights ? place.empty({p.B, p.N, p.M}, ScalarType::Float)
                                : place.empty({0}, ScalarType::Float);
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  p.weights = keep_weights ? static_cast<float*>(weights.data_ptr()) : nullptr;
  place.run(
      op, "nothing",
      [&](const auto& threads) {
        Scratch scratch(aggregate_soft_scratch(p, threads.threads));
        p.scratch = scratch.data();
        return tk::aggregate_soft(p, threads);
      },
      [&](auto* stream) {
        const Tensor scratch = place.scratch(aggregate_soft_cuda_scratch(p));
        p.scratch = scratch.data_ptr();
        return aggregate_soft_cuda(p, stream);
      });
  return {out, lse, weights};
}

// The output of a gradient: of this shape where it is wanted, else empty.
Tensor gradient_like(const Place& place, const Tensor& like, bool wanted) {
  const ScalarType type = like.scalar_type();
  if (!wanted) return place.empty({0}, type);
  if (like.dim() == 2) return place.empty({like.size(0), like.size(1)}, type);
  return place.empty({like.size(0), like.size(1), like.size(2)}, type);
}

template <class T = void>
T* pointer_if(const Tensor& tensor, bool wanted) {
  return wanted ? static_cast<T*>(tensor.data_ptr()) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> aggregate_soft_backward(
    Tensor gradient, Tensor query, Tensor key, Tensor value, std::optional<Tensor> bias,
    std::optional<Tensor> mask, std::optional<Tensor> scale_tensor, double scale, Tensor tokens,
    Tensor lse, std::optional<Tensor> weights, bool need_query, bool need_key, bool need_value,
    bool need_scale) {
  const char* op = "aggregate_soft_backward";
  const Place place(value);
  query = rows_contiguous(query);
  // An expanded query has a gradient per image; batch stride 0 would have them added up.
  if (query.dim() == 3 && query.stride(0) == 0) query = torch::stable::contiguous(query);
  key = rows_contiguous(key);
  value = rows_contiguous(value);
  AggregateSoftBackward p{};
  set_operands(query, key, value, op, p);
  if (query.dim() == 3 && p.query.batch_stride == 0)
    p.query.batch_stride = p.M * p.E;  // of one image
  set_forward(gradient, tokens, lse, op, p);
  p.bias = bias_of(bias, p.B, p.N, op);
  p.mask = mask_of(mask, p.B, p.N, op);
  p.scale = static_cast<float>(scale);
  p.scale_tensor = number_of(scale_tensor, op);
  if (weights && !need_scale) {
    weights = torch::stable::contiguous(*weights);
    check(weights->scalar_type() == ScalarType::Float && weights->numel() == p.B * p.N * p.M, op,
          "weights: those of the forward call");
    p.weights = static_cast<const float*>(weights->data_ptr());
  }
  Tensor query_grad = gradient_like(place, query, need_query);
  Tensor key_grad = gradient_like(place, key, need_key);
  Tensor value_grad = gradient_like(place, value, need_value);
  Tensor bias_grad =
      bias ? place.empty({p.B, p.N}, ScalarType::Float) : place.empty({0}, ScalarType::Float);
  Tensor scale_grad =
      need_scale ? place.empty({}, ScalarType::Float) : place.empty({0}, ScalarType::Float);
  p.query_grad = pointer_if(query_grad, need_query);
  p.key_grad = pointer_if(key_grad, need_key);
  p.value_grad = pointer_if(value_grad, need_value);
  p.bias_grad = pointer_if<float>(bias_grad, bias.has_value());
  p.scale_grad = pointer_if<float>(scale_grad, need_scale);
  place.run(
      op, "nothing",
      [&](const auto& threads) {
        Scratch scratch(aggregate_soft_backward_scratch(p, threads.threads));
        p.scratch = scratch.data();
        return tk::aggregate_soft_backward(p, threads);
      },
      [&](auto* stream) {
        const Tensor scratch = place.scratch(aggregate_soft_backward_cuda_scratch(p));
        p.scratch = scratch.data_ptr();
        return aggregate_soft_backward_cuda(p, stream);
      });
  return {query_grad, key_grad, value_grad, bias_grad, scale_grad};
}

}  // namespace

TK_LIBRARY(CPU, m) {
  TK_IMPL(m, aggregate_soft);
  TK_IMPL(m, aggregate_soft_backward);
}

TK_LIBRARY(CUDA, m) {
  TK_IMPL(m, aggregate_soft);
  TK_IMPL(m, aggregate_soft_backward);
}

}  // namespace tk::bind
