// Trilinear up-sampling by two with align_corners=False, along one axis: fine voxel f lies a quarter of a coarse voxel
// from the nearest coarse one and three quarters from the next; at the borders the outermost is held.
#pragma once

namespace mmdet3d::trilinear_x2 {

constexpr float kNear = 0.75f, kFar = 0.25f;  // weights of the two coarse voxels

// The coarse voxels that a fine one lies between, of `count`, and the weight of the lower one.
struct Taps {
  int low, high;
  float low_weight;
  __device__ Taps(int fine, int count)
      : low(max((fine + 1) / 2 - 1, 0)), high(min((fine + 1) / 2, count - 1)), low_weight(fine & 1 ? kNear : kFar) {}
};

}  // namespace mmdet3d::trilinear_x2
