// Sums that many threads add to in any order and that still have the same bits in every run: the terms are rounded to
// multiples of a power of two and added as 64-bit integers, whose sum does not depend on the order.
//
// The unit follows from a bound of all terms and from their number, so that no sum can overflow: with 2^n terms of at
// most 2^e each it is 2^(e + n - 61). Each term is rounded by at most half a unit, which is 2^(n - 62) of the largest
// possible term; float32 itself keeps 2^-24 of a number. If the bound is infinite or NaN, every sum is NaN.
#pragma once

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>

#include <cstdint>

namespace mmdet3d::fixed_point {

constexpr int kBits = 61;

// Adds to an array of sums; `scale` is the number of units in 1.
struct Sums {
  unsigned long long* at;
  const double* scale;

  template <typename Acc, int N>
  __device__ __forceinline__ void add(int64_t offset, const Acc (&terms)[N]) const {
    const double units = *scale;
#pragma unroll
    for (int c = 0; c < N; ++c) {
      // Two's complement: the unsigned sum is the signed one.
      const long long term = __double2ll_rn(static_cast<double>(terms[c]) * units);
      atomicAdd(at + offset + c, static_cast<unsigned long long>(term));
    }
  }
};

namespace {

// scales = (units in 1, size of a unit)
__global__ void find_scales(const double* bound, int log2_terms, double* scales) {
  int exponent = 0;  // bound <= 2^exponent
  frexp(*bound, &exponent);
  const int shift = *bound > 0 ? min(kBits - log2_terms - exponent, 1000) : 0;
  const double invalid = isfinite(*bound) ? 0 : nan("");
  scales[0] = ldexp(1.0, shift) + invalid;
  scales[1] = ldexp(1.0, -shift) + invalid;
}

}  // namespace

// The arrays of a sum: made before the kernel that adds, read after it. Nothing waits for the device.
class Accumulator {
 public:
  // `bound`: one double on the device, at least as large as the magnitude of each of at most `terms` terms of a sum.
  Accumulator(at::IntArrayRef sizes, const at::Tensor& bound, int64_t terms)
      : sums_(at::zeros(sizes, bound.options().dtype(at::kLong))), scales_(at::empty({2}, bound.options())) {
    int log2_terms = 0;
    while ((int64_t{1} << log2_terms) < terms) ++log2_terms;
    find_scales<<<1, 1, 0, at::cuda::getCurrentCUDAStream()>>>(bound.const_data_ptr<double>(), log2_terms,
                                                               scales_.mutable_data_ptr<double>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  Sums sums() {
    return {reinterpret_cast<unsigned long long*>(sums_.mutable_data_ptr<int64_t>()), scales_.const_data_ptr<double>()};
  }

  at::Tensor result(at::ScalarType type) const { return sums_.to(at::kDouble).mul_(scales_[1]).to(type); }

 private:
  at::Tensor sums_, scales_;
};

// Largest magnitude in a tensor as a double on the device; 0 if it is empty.
inline at::Tensor largest_magnitude(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return at::zeros({}, tensor.options().dtype(at::kDouble));
  return tensor.abs().amax().to(at::kDouble);
}

}  // namespace mmdet3d::fixed_point
