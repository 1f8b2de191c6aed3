// slim_tokens and its gradient for torch tensors.
#include "torch/place.h"

namespace tk::bind {
namespace {

// The contiguous inputs of both passes; they must outlive the call whose struct points at them.
struct Inputs {
  Tensor x, norm_weight, norm_bias, w1, b1, w2;

  void make_rows_contiguous() {
    x = rows_contiguous(x);
    norm_weight = torch::stable::contiguous(norm_weight);
    norm_bias = torch::stable::contiguous(norm_bias);
    w1 = rows_contiguous(w1);
    b1 = torch::stable::contiguous(b1);
    w2 = rows_contiguous(w2);
  }
};

float number_in(const Tensor& tensor, const char* op) {
  check(tensor.numel() == 1, op, "scale: allowed one number");
  float value = 0;
  dispatch(dtype_of(tensor, op), [&](auto zero) {
    value = to_float(*static_cast<const decltype(zero)*>(tensor.data_ptr()));
  });
  return value;
}

void set_scale(const Place& place, const std::optional<Tensor>& tensor, double scale,
               const char* op, SlimTokens& p) {
  p.scale = static_cast<float>(scale);
  if (!tensor) return;
  if (!place.runs_cuda()) {
    p.scale = number_in(*tensor, op);
    return;
  }
  check(tensor->numel() == 1, op, "scale: allowed one number");
  p.scale_tensor = tensor->data_ptr();
  p.scale_dtype = dtype_of(*tensor, op);
}

void check_weight(const Tensor& weight, const Tensor& x, int64_t rows, int64_t cols,
                  const char* op) {
  const bool shaped = cols < 0
                          ? weight.dim() == 1 && weight.size(0) == rows
                          : weight.dim() == 2 && weight.size(0) == rows && weight.size(1) == cols;
  check(shaped && weight.scalar_type() == x.scalar_type(), op,
        "weights: allowed the dtype of x, shapes (C), (C), (H, C), (H), (M, H)");
}

SlimTokens params_of(const Place& place, Inputs& in, const std::optional<Tensor>& scale_tensor,
                     double scale, double eps, const char* op) {
  check(in.x.dim() == 3 && in.w1.dim() == 2 && in.w2.dim() == 2, op,
        "x, w1, w2: allowed 3, 2, 2 dimensions");
  in.make_rows_contiguous();
  SlimTokens p{};
  p.dtype = dtype_of(in.x, op);
  p.batch = in.x.size(0);
  p.tokens = in.x.size(1);
  p.channels = in.x.size(2);
  p.hidden = in.w1.size(0);
  p.slots = in.w2.size(0);
  check(p.tokens > 0 && p.channels > 0 && p.hidden > 0 && p.slots > 0, op,
        "x, w1, w2: allowed no empty dimension but B");
  check_weight(in.norm_weight, in.x, p.channels, -1, op);
  check_weight(in.norm_bias, in.x, p.channels, -1, op);
  check_weight(in.w1, in.x, p.hidden, p.channels, op);
  check_weight(in.b1, in.x, p.hidden, -1, op);
  check_weight(in.w2, in.x, p.slots, p.hidden, op);
  p.x = in.x.data_ptr();
  p.x_batch = in.x.stride(0);
  p.x_token = in.x.stride(1);
  p.norm_weight = in.norm_weight.data_ptr();
  p.norm_bias = in.norm_bias.data_ptr();
  p.w1 = in.w1.data_ptr();
  p.b1 = in.b1.data_ptr();
  p.w2 = in.w2.data_ptr();
  p.w1_row = in.w1.stride(0);
  p.w2_row = in.w2.stride(0);
  set_scale(place, scale_tensor, scale, op, p);
  p.eps = static_cast<float>(eps);
  return p;
}

std::tuple<Tensor, Tensor, Tensor> slim_tokens(Tensor x, Tensor norm_weight, Tensor norm_bias,
                                               Tensor w1, Tensor b1, Tensor w2,
                                               std::optional<Tensor> scale_tensor, double scale,
                                               double eps, bool keep) {
  const char* op = "slim_tokens";
  const Place place(x);
  Inputs in{x, norm_weight, norm_bias, w1, b1, w2};
  SlimTokens p = params_of(place, in, scale_tensor, scale, eps, op);
  Tensor tokens = place.empty({p.batch, p.slots, p.channels}, x.scalar_type());
  Tensor lse = place.empty({p.batch, p.slots}, ScalarType::Float);
  Tensor projected = keep ? place.empty({p.batch, p.tokens, p.hidden}, ScalarType::Float)
                          : place.empty({0}, ScalarType::Float);
  p.out = tokens.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  p.projected = keep ? static_cast<float*>(projected.data_ptr()) : nullptr;
  place.run(
      op, "",
      [&](const auto& threads) {
        Scratch scratch(slim_tokens_scratch(p, threads.threads));
        p.scratch = scratch.data();
        return tk::slim_tokens(p, threads);
      },
      [&](auto* stream) {
        const Tensor scratch = place.scratch(slim_tokens_cuda_scratch(p));
        p.scratch = scratch.data_ptr();
        return slim_tokens_cuda(p, stream);
      });
  return {tokens, lse, projected};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> slim_tokens_backward(
    Tensor grad, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor w1, Tensor b1, Tensor w2,
    std::optional<Tensor> scale_tensor, double scale, double eps, Tensor tokens, Tensor lse,
    Tensor projected) {
  const char* op = "slim_tokens_backward";
  const Place place(x);
  Inputs in{x, norm_weight, norm_bias, w1, b1, w2};
  SlimTokensBackward q{};
  SlimTokens& p = q.forward;
  p = params_of(place, in, scale_tensor, scale, eps, op);
  const ScalarType type = x.scalar_type();
  check(grad.dim() == 3 && grad.size(0) == p.batch && grad.size(1) == p.slots &&
            grad.size(2) == p.channels && grad.scalar_type() == type,
        op, "grad: allowed (B, M, C) in the dtype of x");
  check(tokens.numel() == grad.numel() && tokens.scalar_type() == type &&
            lse.numel() == p.batch * p.slots && lse.scalar_type() == ScalarType::Float,
        op, "tokens, lse: those of the forward call");
  const bool kept = projected.numel() > 0;
  check(!kept || (projected.numel() == p.batch * p.tokens * p.hidden &&
                  projected.scalar_type() == ScalarType::Float),
        op, "projected: that of the forward call");
  grad = rows_contiguous(grad);
  tokens = torch::stable::contiguous(tokens);
  lse = torch::stable::contiguous(lse);
  projected = torch::stable::contiguous(projected);
  p.out = tokens.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  p.projected = kept ? static_cast<float*>(projected.data_ptr()) : nullptr;
  q.grad_out = grad.data_ptr();
  q.grad_batch = grad.stride(0);
  q.grad_slot = grad.stride(1);
  Tensor grad_x = place.empty({p.batch, p.tokens, p.channels}, type);
  Tensor grad_norm_weight = place.empty({p.channels}, type),
         grad_norm_bias = place.empty({p.channels}, type);
  Tensor grad_w1 = place.empty({p.hidden, p.channels}, type),
         grad_b1 = place.empty({p.hidden}, type);
  Tensor grad_w2 = place.empty({p.slots, p.hidden}, type),
         grad_scale = place.empty({}, ScalarType::Float);
  q.grad_x = grad_x.data_ptr();
  q.grad_norm_weight = grad_norm_weight.data_ptr();
  q.grad_norm_bias = grad_norm_bias.data_ptr();
  q.grad_w1 = grad_w1.data_ptr();
  q.grad_b1 = grad_b1.data_ptr();
  q.grad_w2 = grad_w2.data_ptr();
  q.grad_scale = static_cast<float*>(grad_scale.data_ptr());
  place.run(
      op, "",
      [&](const auto& threads) {
        Scratch scratch(slim_tokens_backward_scratch(q, threads.threads));
        q.scratch = scratch.data();
        return tk::slim_tokens_backward(q, threads);
      },
      [&](auto* stream) {
        const Tensor scratch = place.scratch(slim_tokens_backward_cuda_scratch(q));
        q.scratch = scratch.data_ptr();
        return slim_tokens_backward_cuda(q, stream);
      });
  return {grad_x, grad_norm_weight, grad_norm_bias, grad_w1, grad_b1, grad_w2, grad_scale};
}

}  // namespace

TK_LIBRARY(CPU, m) {
  TK_IMPL(m, slim_tokens);
  TK_IMPL(m, slim_tokens_backward);
}
TK_LIBRARY(CUDA, m) {
  TK_IMPL(m, slim_tokens);
  TK_IMPL(m, slim_tokens_backward);
}

}  // namespace tk::bind
