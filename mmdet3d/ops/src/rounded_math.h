// Operations that are rounded one by one. CUDA's compiler would otherwise join a product with the sum that follows.
// C++ compilers may do so too, hence MMDET3D_UNFUSED for what calls these on the host.
#pragma once

#include <c10/macros/Macros.h>

#include "multiversion.h"

namespace mmdet3d {

#if defined(__CUDA_ARCH__)
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ float divide(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ double divide(double a, double b) { return __ddiv_rn(a, b); }
#else
template <typename scalar_t>
C10_HOST_DEVICE MMDET3D_INLINE scalar_t multiply(scalar_t a, scalar_t b) { return a * b; }
template <typename scalar_t>
C10_HOST_DEVICE MMDET3D_INLINE scalar_t add(scalar_t a, scalar_t b) { return a + b; }
template <typename scalar_t>
C10_HOST_DEVICE MMDET3D_INLINE scalar_t divide(scalar_t a, scalar_t b) { return a / b; }
#endif

// A row of a matrix times a vector, in the order of the columns.
template <typename scalar_t>
C10_HOST_DEVICE MMDET3D_INLINE scalar_t dot(const scalar_t (&row)[2], scalar_t x, scalar_t y) {
  return add(multiply(row[0], x), multiply(row[1], y));
}

template <typename scalar_t>
C10_HOST_DEVICE MMDET3D_INLINE scalar_t dot(const scalar_t (&row)[3], scalar_t x, scalar_t y, scalar_t z) {
  return add(add(multiply(row[0], x), multiply(row[1], y)), multiply(row[2], z));
}

}  // namespace mmdet3d
