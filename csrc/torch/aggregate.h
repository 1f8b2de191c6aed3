// What the bindings of the soft aggregations share: their operands as views, checked for size and
// type.
#pragma once

#include "torch/place.h"

namespace tk::bind {

inline Matrices matrices_of(const Tensor& tensor) {
  const bool batched = tensor.dim() == 3;
  return {tensor.data_ptr(), batched ? tensor.stride(0) : 0, tensor.stride(batched ? 1 : 0)};
}

inline PerToken<float> bias_of(const std::optional<Tensor>& bias, int64_t batch, int64_t tokens,
                               const char* op) {
  if (!bias) return {};
  check(bias->scalar_type() == ScalarType::Float && bias->dim() == 2 && bias->size(0) == batch &&
            bias->size(1) == tokens,
        op, "bias: allowed float32 (B, N)");
  return {static_cast<const float*>(bias->data_ptr()), bias->stride(0), bias->stride(1)};
}

inline PerToken<bool> mask_of(const std::optional<Tensor>& mask, int64_t batch, int64_t tokens,
                              const char* op) {
  if (!mask) return {};
  check(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == batch &&
            mask->size(1) == tokens,
        op, "mask: allowed bool (B, N)");
  return {static_cast<const bool*>(mask->data_ptr()), mask->stride(0), mask->stride(1)};
}

inline const float* number_of(const std::optional<Tensor>& tensor, const char* op) {
  if (!tensor) return nullptr;
  check(tensor->scalar_type() == ScalarType::Float && tensor->numel() == 1, op,
        "scale: allowed a float32 tensor of one number");
  return static_cast<const float*>(tensor->data_ptr());
}

// Query, key and value of the forward and of the backward call.
template <class Params>
void set_operands(const Tensor& query, const Tensor& key, const Tensor& value, const char* op,
                  Params& p) {
  check(key.dim() == 3 && value.dim() == 3 && (query.dim() == 2 || query.dim() == 3), op,
        "query, key, value: allowed (M, E) or (B, M, E), (B, N, E), (B, N, C)");
  p.dtype = dtype_of(value, op);
  check(dtype_of(query, op) == p.dtype && dtype_of(key, op) == p.dtype, op,
        "query, key, value: allowed one dtype");
  p.B = key.size(0);
  p.N = key.size(1);
  p.E = key.size(2);
  p.M = query.size(query.dim() - 2);
  p.C = value.size(2);
  check(value.size(0) == p.B && value.size(1) == p.N && query.size(query.dim() - 1) == p.E &&
            (query.dim() == 2 || query.size(0) == p.B),
        op, "query, key, value: allowed (M, E) or (B, M, E), (B, N, E), (B, N, C)");
  p.query = matrices_of(query);
  p.key = matrices_of(key);
  p.value = matrices_of(value);
}

// What the forward call gave, and what came back for it.
template <class Params>
void set_forward(Tensor& gradient, Tensor& tokens, Tensor& lse, const char* op, Params& p) {
  gradient = rows_contiguous(gradient);
  tokens = rows_contiguous(tokens);
  lse = torch::stable::contiguous(lse);
  for (const Tensor* tensor : {&gradient, &tokens}) {
    check(tensor->dim() == 3 && tensor->size(0) == p.B && tensor->size(1) == p.M &&
              tensor->size(2) == p.C && dtype_of(*tensor, op) == p.dtype,
          op, "gradient, tokens: allowed (B, M, C) in the dtype of value");
  }
  check(lse.scalar_type() == ScalarType::Float && lse.numel() == p.B * p.M, op,
        "lse: that of the forward call");
  p.gradient = matrices_of(gradient);
  p.tokens = matrices_of(tokens);
  p.lse = static_cast<const float*>(lse.data_ptr());
}

}  // namespace tk::bind
