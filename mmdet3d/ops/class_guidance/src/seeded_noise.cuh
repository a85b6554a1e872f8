// The hash behind noise.py: the same bits as there.
#pragma once

#include <cstdint>

namespace mmdet3d::class_guidance {

__device__ __forceinline__ uint32_t scramble(uint32_t word) {
  word = (word ^ word >> 16) * 0x7FEB352Du;
  word = (word ^ word >> 15) * 0x846CA68Bu;
  return word ^ word >> 16;
}

// Number `index` of the sample with this seed: 24 significant bits, between 0 and 1, exclusive.
__device__ __forceinline__ float uniform(uint32_t seed, uint32_t index) {
  const uint32_t word = scramble(scramble(index + 1) ^ seed);
  return (static_cast<float>(word >> 9) + 0.5f) * (1.f / (1 << 23));
}

}  // namespace mmdet3d::class_guidance
