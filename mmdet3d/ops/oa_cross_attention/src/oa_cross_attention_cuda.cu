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
  Acc *value, *base, *slope, *attention;  // slope is (B, Q, M, P, 2): the terms of the sum over B and Q
};

template <typename Acc, int Count>
__device__ __forceinline__ void atomic_add(Acc* address, const Acc (&terms)[Count]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && CUDART_VERSION >= 12010
  constexpr bool kTogether = std::is_same_v<Acc, float> && Count == 4;
#else
  constexpr bool kTogether = false;
#endif
  if constexpr (kTogether) {
    atomicAdd(reinterpret_cast<float4*>(address), make_float4(terms[0], terms[1], terms[2], terms[3]));
  } else {
#pragma unroll
    for (int c = 0; c < Count; ++c) atomicAdd(address + c, terms[c]);
  }
}

// `threads` is B * Q * M * P.
template <int Count, typename T, typename Acc>
__global__ void __launch_bounds__(kThreads) backward_kernel(const Inputs<T, Acc> in, const Gradients<Acc> grads,
                                                            unsigned threads) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= threads) return;
  const Sizes& s = in.sizes;
  const unsigned row = i / s.points, place = row / s.heads;  // of (B, Q, M) and of (B, Q)
  const auto add = [&](int offset, const Acc(&terms)[Count]) { atomic_add(grads.value + offset, terms); };
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

// The arguments in order of memory; owns what it copied.
struct Contiguous {
  at::Tensor value, base, slope, attention, position, consistency, visibility, source;

  explicit Contiguous(const Tensors& in)
      : value(in.value.contiguous()), base(in.base.contiguous()), slope(in.slope.contiguous()),
        attention(in.attention.contiguous()), position(in.position.contiguous()),
        consistency(in.consistency.contiguous()), visibility(in.visibility.contiguous()),
        source(in.source.contiguous()) {}

  template <typename T, typename Acc>
  Inputs<T, Acc> pointers(const Sizes& sizes) const {
    return {value.const_data_ptr<T>(),        base.const_data_ptr<Acc>(),       slope.const_data_ptr<Acc>(),
            attention.const_data_ptr<Acc>(),  position.const_data_ptr<Acc>(),   consistency.const_data_ptr<Acc>(),
            visibility.const_data_ptr<Acc>(), source.const_data_ptr<int32_t>(), sizes};
  }
};

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

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad_out, const at::Tensor& value, int64_t height, int64_t width, const at::Tensor& base,
    const at::Tensor& slope, const at::Tensor& attention, const at::Tensor& position, const at::Tensor& consistency,
    const at::Tensor& visibility, const at::Tensor& source) {
  at::globalContext().alertNotDeterministic("oa_cross_attention_backward");
  const Tensors in{value, base, slope, attention, position, consistency, visibility, source};
  const Sizes sizes = check_inputs(in, height, width);
  check_grad(grad_out, in, sizes);
  const c10::cuda::CUDAGuard guard(value.device());
  // Sums of many terms: half precision adds them in float32.
  at::Tensor grad_value = at::zeros(value.sizes(), base.options());
  at::Tensor grad_base = at::empty(base.sizes(), base.options());
  at::Tensor grad_slope = at::empty(base.sizes(), base.options());
  at::Tensor grad_attention = at::empty(attention.sizes(), attention.options());
  if (attention.numel() > 0) {
    const Contiguous tensors(in);
    const at::Tensor grad_out_c = grad_out.contiguous();
    const bool vectors = sizes.channels % kVector == 0 && aligned(tensors.value) && aligned(grad_out_c);
    const auto stream = at::cuda::getCurrentCUDAStream();
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, value.scalar_type(), "oa_cross_attention_backward", [&] {
          using Acc = at::acc_type<scalar_t, true>;
          const auto inputs = tensors.pointers<scalar_t, Acc>(sizes);
          const Gradients<Acc> grads{grad_out_c.const_data_ptr<Acc>(), grad_value.mutable_data_ptr<Acc>(),
                                     grad_base.mutable_data_ptr<Acc>(), grad_slope.mutable_data_ptr<Acc>(),
                                     grad_attention.mutable_data_ptr<Acc>()};
          choose_count(vectors, [&](auto count) {
            constexpr int Count = decltype(count)::value;
            const int64_t threads = attention.numel();
            backward_kernel<Count, scalar_t, Acc><<<blocks_for(threads), kThreads, 0, stream>>>(
                inputs, grads, static_cast<unsigned>(threads));
            C10_CUDA_KERNEL_LAUNCH_CHECK();
          });
        });
  }
  return {grad_value.to(value.scalar_type()), grad_base, grad_slope.sum(at::IntArrayRef{0, 1}), grad_attention};
}

}  // namespace
}  // namespace mmdet3d::oa_cross_attention

TORCH_LIBRARY_IMPL(mmdet3d, CUDA, m) {
  m.impl("oa_cross_attention_forward", &mmdet3d::oa_cross_attention::forward);
  m.impl("oa_cross_attention_backward", &mmdet3d::oa_cross_attention::backward);
}
