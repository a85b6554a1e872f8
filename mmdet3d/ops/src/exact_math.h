// Arithmetic that gives the same bits on every machine.
#pragma once

#include <c10/macros/Macros.h>

namespace mmdet3d {

// A rounded square, which no compiler joins with a sum that follows to a fused multiply-add.
C10_HOST_DEVICE inline double square(double value) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(value, value);
#else
  volatile double product = value * value;
  return product;
#endif
}

}  // namespace mmdet3d
