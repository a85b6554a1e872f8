// CUDA version of oa_cross_attention. Forward: one thread for a few channels of one head of one query. Backward: one
// thread for one point of one head of one query, which owns the gradients of its offset and weight and adds to those of
// value. Both loop over the cameras, most of which do not see the query.
#include <ATen/ATen.h>
#include <ATen/AccumulateType.h>
#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "fixed_point.cuh"
#include "float_sums.cuh"
#include "oa_cross_attention.h"

namespace mmdet3d::oa_cross_attention {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 4;  // channels read at once where their number and address allow it

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

// `threads` is B * Q * M * D / Count.
template <int Count, typename T, typename Acc>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Inputs<T, Acc> in, Acc* __restrict__ out,
                                                           unsigned threads) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= threads) return;
  const Sizes& s = in.sizes;
  const unsigned vectors = s.channels / Count, row = i / vectors;  // row of (B, Q, M)
  const unsigned place = row / s.heads;                            // of (B, Q)
  Acc sum[Count];
  attend<Count>(in, place / s.queries, place % s.queries, row % s.heads, i % vectors * Count, sum);
  Vector<Acc, Count> result;
#pragma unroll
  for (int c = 0; c < Count; ++c) result.at[c] = sum[c];
  *reinterpret_cast<Vector<Acc, Count>*>(out + static_cast<int64_t>(i) * Count) = result;
}

template <typename Acc>
struct Gradients {
  const Acc* out;
  Acc *base, *slope, *attention;  // slope is (B, Q, M, P, 2): the terms of the sum over B and Q
};

// `threads` is B * Q * M * P.
template <int Count, typename T, typename Acc, typename Sums>
__global__ void __launch_bounds__(kThreads) backward_kernel(const Inputs<T, Acc> in, const Gradients<Acc> grads,
                                                            const Sums grad_value, unsigned threads) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= threads) return;
  const Sizes& s = in.sizes;
  const unsigned row = i / s.points, place = row / s.heads;  // of (B, Q, M) and of (B, Q)
  const auto add = [&](int offset, const Acc(&terms)[Count]) { grad_value.add(offset, terms); };
  const PointGradients<Acc> result = attend_backward<Count>(in, grads.out, place / s.queries, place % s.queries,
                                                            row % s.heads, i % s.points, add);
  const int64_t first = 2 * static_cast<int64_t>(i);
  grads.attention[i] = result.attention;
#pragma unroll
  for (int axis = 0; axis < 2; ++axis) {
    grads.base[first + axis] = result.base[axis];
    grads.slope[first + axis] = result.slope[axis];
  }
}

// Whether vectors of kVector elements may be read from the tensor: its first element may lie anywhere in its storage.
bool aligned(const at::Tensor& tensor) {
  const size_t bytes = std::min<size_t>(16, kVector * tensor.element_size());
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0;
}

// Calls run(std::integral_constant<int, Count>{}) for the channels that a thread takes at once.
template <typename Run>
void choose_count(bool vectors, const Run& run) {
  if (vectors) {
    run(std::integral_constant<int, kVector>{});
  } else {
    run(std::integral_constant<int, 1>{});
  }
}

at::Tensor forward(const at::Tensor& value, int64_t height, int64_t width, const at::Tensor& base,
                   const at::Tensor& slope, const at::Tensor& attention, const at::Tensor& position,
                   const at::Tensor& consistency, const at::Tensor& visibility, const at::Tensor& source) {
  const Tensors in{value, base, slope, attention, position, consistency, visibility, source};
  const Sizes sizes = check_inputs(in, height, width);
  const c10::cuda::CUDAGuard guard(value.device());
  at::Tensor out = at::empty({sizes.batch, sizes.queries, int64_t{sizes.heads} * sizes.channels}, base.options());
  if (out.numel() == 0) return out;
  const Contiguous tensors(in);
  const auto stream = at::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, value.scalar_type(), "oa_cross_attention_forward", [&] {
        using Acc = at::acc_type<scalar_t, true>;
        const auto inputs = tensors.pointers<scalar_t, Acc>(sizes);
        choose_count(sizes.channels % kVector == 0 && aligned(tensors.value), [&](auto count) {
          constexpr int Count = decltype(count)::value;
          const int64_t threads = out.numel() / Count;
          forward_kernel<Count, scalar_t, Acc><<<blocks_for(threads), kThreads, 0, stream>>>(
              inputs, out.mutable_data_ptr<Acc>(), static_cast<unsigned>(threads));
          C10_CUDA_KERNEL_LAUNCH_CHECK();
        });
      });
  return out;
}

// Everything of the backward pass but where the gradient of value is summed.
template <typename T, typename Acc>
struct BackwardPass {
  Inputs<T, Acc> inputs;
  Gradients<Acc> grads;
  int64_t threads;
  bool vectors;

  template <typename Sums>
  void run(const Sums& grad_value) const {
    choose_count(vectors, [&](auto count) {
      constexpr int Count = decltype(count)::value;
      backward_kernel<Count, T, Acc, Sums>
          <<<blocks_for(threads), kThreads, 0, at::cuda::getCurrentCUDAStream()>>>(
              inputs, grads, grad_value, static_cast<unsigned>(threads));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }
};

// No term that is added to the gradient of value is larger: gradient, three weights and shares of at most 1.
at::Tensor bound_of_terms(const at::Tensor& grad_out, const Contiguous& in) {
  using fixed_point::largest_magnitude;
  return largest_magnitude(grad_out) * largest_magnitude(in.attention) * largest_magnitude(in.consistency) *
         largest_magnitude(in.visibility);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad_out, const at::Tensor& value, int64_t height, int64_t width, const at::Tensor& base,
    const at::Tensor& slope, const at::Tensor& attention, const at::Tensor& position, const at::Tensor& consistency,
    const at::Tensor& visibility, const at::Tensor& source) {
  const Tensors in{value, base, slope, attention, position, consistency, visibility, source};
  const Sizes sizes = check_inputs(in, height, width);
  check_grad(grad_out, in, sizes);
  const c10::cuda::CUDAGuard guard(value.device());
  at::Tensor grad_value, grad_base = at::empty(base.sizes(), base.options());
  at::Tensor grad_slope = at::empty(base.sizes(), base.options());
  at::Tensor grad_attention = at::empty(attention.sizes(), attention.options());
  if (attention.numel() == 0) {
    return {at::zeros(value.sizes(), value.options()), grad_base, at::zeros(slope.sizes(), slope.options()),
            grad_attention};
  }
  const Contiguous tensors(in);
  const at::Tensor grad_out_c = grad_out.contiguous();
  const bool vectors = sizes.channels % kVector == 0 && aligned(tensors.value) && aligned(grad_out_c);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, value.scalar_type(), "oa_cross_attention_backward", [&] {
        using Acc = at::acc_type<scalar_t, true>;
        const BackwardPass<scalar_t, Acc> pass{
            tensors.pointers<scalar_t, Acc>(sizes),
            {grad_out_c.const_data_ptr<Acc>(), grad_base.mutable_data_ptr<Acc>(), grad_slope.mutable_data_ptr<Acc>(),
             grad_attention.mutable_data_ptr<Acc>()},
            attention.numel(), vectors};
        if (at::globalContext().deterministicAlgorithms()) {
          // A point adds at most once to an element.
          fixed_point::Accumulator sums(value.sizes(), bound_of_terms(grad_out_c, tensors),
                                        int64_t{sizes.queries} * sizes.points);
          pass.run(sums.sums());
          grad_value = sums.result(value.scalar_type());
        } else {
          // Sums of many terms: half precision adds them in float32.
          const at::Tensor sums = at::zeros(value.sizes(), base.options());
          pass.run(FloatSums<Acc>{sums.mutable_data_ptr<Acc>()});
          grad_value = sums.to(value.scalar_type());
        }
      });
  return {grad_value, grad_base, grad_slope.sum(at::IntArrayRef{0, 1}), grad_attention};
}

}  // namespace
}  // namespace mmdet3d::oa_cross_attention

TORCH_LIBRARY_IMPL(mmdet3d, CUDA, m) {
  m.impl("oa_cross_attention_forward", &mmdet3d::oa_cross_attention::forward);
  m.impl("oa_cross_attention_backward", &mmdet3d::oa_cross_attention::backward);
}
