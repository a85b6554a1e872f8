// CPU version of oa_cross_attention: threads over queries (forward) and heads (backward), vectors over channels.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "oa_cross_attention.h"

namespace mmdet3d::oa_cross_attention {
namespace {

constexpr int kHead = 12;  // head size of the model

template <typename T>
struct Job {
  Inputs<T, T> in;
  T* out;             // forward only, (B, Q, M, D)
  const T* grad_out;  // backward only, from here
  T* grad_value;
  T* grad_base;
  T* grad_slope;  // (B, M, P, 2)
  T* grad_attention;
};

template <int Count, typename T>
MMDET3D_INLINE void attend_head(const Job<T>& job, int sample, int query, int head) {
  const Sizes& s = job.in.sizes;
  T* out = job.out + ((sample * s.queries + query) * s.heads + head) * s.channels;
  for (int channel = 0; channel < s.channels; channel += Count) {
    T sum[Count];
    attend<Count>(job.in, sample, query, head, channel, sum);
    for (int c = 0; c < Count; ++c) out[channel + c] = sum[c];
  }
}

template <typename T>
MMDET3D_INLINE void attend_queries(const Job<T>& job, int64_t begin, int64_t end) {
  const Sizes& s = job.in.sizes;
  for (int64_t row = begin; row < end; ++row) {
    const int sample = static_cast<int>(row / s.queries), query = static_cast<int>(row % s.queries);
    for (int head = 0; head < s.heads; ++head) {
      if (s.channels == kHead) {
        attend_head<kHead>(job, sample, query, head);
      } else {
        attend_head<1>(job, sample, query, head);
      }
    }
  }
}

template <int Count, typename T>
MMDET3D_INLINE void attend_head_backward(const Job<T>& job, int sample, int head) {
  const Sizes& s = job.in.sizes;
  const auto add = [&](int offset, const T(&terms)[Count]) {
    for (int c = 0; c < Count; ++c) job.grad_value[offset + c] += terms[c];
  };
  T* slope = job.grad_slope + (sample * s.heads + head) * s.points * 2;
  for (int query = 0; query < s.queries; ++query) {
    for (int point = 0; point < s.points; ++point) {
      const auto grads = attend_backward<Count>(job.in, job.grad_out, sample, query, head, point, add);
      const int64_t place = ((sample * s.queries + query) * s.heads + head) * s.points + point;
      job.grad_attention[place] = grads.attention;
      for (int axis = 0; axis < 2; ++axis) {
        job.grad_base[2 * place + axis] = grads.base[axis];
        slope[2 * point + axis] += grads.slope[axis];
      }
    }
  }
}

template <typename T>
MMDET3D_INLINE void attend_heads_backward(const Job<T>& job, int64_t begin, int64_t end) {
  const Sizes& s = job.in.sizes;
  for (int64_t row = begin; row < end; ++row) {
    const int sample = static_cast<int>(row / s.heads), head = static_cast<int>(row % s.heads);
    if (s.channels == kHead) {
      attend_head_backward<kHead>(job, sample, head);
    } else {
      attend_head_backward<1>(job, sample, head);
    }
  }
}

MMDET3D_MULTIVERSION void run_forward(const Job<float>& job, int64_t begin, int64_t end) {
  attend_queries(job, begin, end);
}
MMDET3D_MULTIVERSION void run_forward(const Job<double>& job, int64_t begin, int64_t end) {
  attend_queries(job, begin, end);
}
MMDET3D_MULTIVERSION void run_backward(const Job<float>& job, int64_t begin, int64_t end) {
  attend_heads_backward(job, begin, end);
}
MMDET3D_MULTIVERSION void run_backward(const Job<double>& job, int64_t begin, int64_t end) {
  attend_heads_backward(job, begin, end);
}

at::Tensor forward(const at::Tensor& value, int64_t height, int64_t width, const at::Tensor& base,
                   const at::Tensor& slope, const at::Tensor& attention, const at::Tensor& position,
                   const at::Tensor& consistency, const at::Tensor& visibility, const at::Tensor& source) {
  const Tensors in{value, base, slope, attention, position, consistency, visibility, source};
  const Sizes sizes = check_inputs(in, height, width);
  const Contiguous tensors(in);
  at::Tensor out = at::empty({sizes.batch, sizes.queries, int64_t{sizes.heads} * sizes.channels}, value.options());
  AT_DISPATCH_FLOATING_TYPES(value.scalar_type(), "oa_cross_attention_forward", [&] {
    Job<scalar_t> job{tensors.pointers<scalar_t, scalar_t>(sizes)};
    job.out = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, int64_t{sizes.batch} * sizes.queries, 16,
                     [&](int64_t begin, int64_t end) { run_forward(job, begin, end); });
  });
  return out;
}

// Threads share out samples and heads, not queries: then each adds to its own part of grad_value, always in the same
// order, and the result is deterministic.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad_out, const at::Tensor& value, int64_t height, int64_t width, const at::Tensor& base,
    const at::Tensor& slope, const at::Tensor& attention, const at::Tensor& position, const at::Tensor& consistency,
    const at::Tensor& visibility, const at::Tensor& source) {
  const Tensors in{value, base, slope, attention, position, consistency, visibility, source};
  const Sizes sizes = check_inputs(in, height, width);
  check_grad(grad_out, in, sizes);
  const Contiguous tensors(in);
  const at::Tensor grads = grad_out.contiguous();
  at::Tensor grad_value = at::zeros(value.sizes(), value.options());
  at::Tensor grad_base = at::empty(base.sizes(), base.options());
  at::Tensor grad_attention = at::empty(attention.sizes(), attention.options());
  at::Tensor grad_slope = at::zeros({sizes.batch, sizes.heads, sizes.points, 2}, slope.options());
  AT_DISPATCH_FLOATING_TYPES(value.scalar_type(), "oa_cross_attention_backward", [&] {
    Job<scalar_t> job{tensors.pointers<scalar_t, scalar_t>(sizes)};
    job.grad_out = grads.const_data_ptr<scalar_t>();
    job.grad_value = grad_value.mutable_data_ptr<scalar_t>();
    job.grad_base = grad_base.mutable_data_ptr<scalar_t>();
    job.grad_slope = grad_slope.mutable_data_ptr<scalar_t>();
    job.grad_attention = grad_attention.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, int64_t{sizes.batch} * sizes.heads, 1,
                     [&](int64_t begin, int64_t end) { run_backward(job, begin, end); });
  });
  return {grad_value, grad_base, grad_slope.sum(0), grad_attention};
}

}  // namespace
}  // namespace mmdet3d::oa_cross_attention

TORCH_LIBRARY_IMPL(mmdet3d, CPU, m) {
  m.impl("oa_cross_attention_forward", &mmdet3d::oa_cross_attention::forward);
  m.impl("oa_cross_attention_backward", &mmdet3d::oa_cross_attention::backward);
}
