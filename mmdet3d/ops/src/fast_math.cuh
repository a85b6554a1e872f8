// Exponential and logarithm as the GPU's special function units give them, without the steps around them that save
// denormal numbers: relative errors of some 1e-7, and absolute ones for logarithms near 0.
#pragma once

namespace mmdet3d {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float fast_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ float fast_log2(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ float fast_reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// ln(1 + e^x) = max(x, 0) + ln(1 + e^-|x|), with absolute errors of some 1e-7. Of what is not a number, fmaxf would make
// one: the sum keeps it.
__device__ __forceinline__ float fast_softplus(float x) {
  return fmaxf(x, 0.f) + kLn2 * fast_log2(1.f + fast_exp2(-kLog2E * fabsf(x)));
}

}  // namespace mmdet3d
