// Sums that many threads add to by atomic additions.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace mmdet3d {

// Adds to an array of sums; their last bits depend on the order in which threads come. The address of N = 4 floats must
// be a multiple of 16 bytes.
template <typename Acc>
struct FloatSums {
  Acc* __restrict__ at;

  template <int N>
  __device__ __forceinline__ void add(int64_t offset, const Acc (&terms)[N]) const {
    Acc* address = at + offset;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && CUDART_VERSION >= 12010
    constexpr bool kTogether = std::is_same_v<Acc, float> && N == 4;
#else
    constexpr bool kTogether = false;
#endif
    if constexpr (kTogether) {
      atomicAdd(reinterpret_cast<float4*>(address), make_float4(terms[0], terms[1], terms[2], terms[3]));
    } else {
#pragma unroll
      for (int c = 0; c < N; ++c) atomicAdd(address + c, terms[c]);
    }
  }
};

}  // namespace mmdet3d
