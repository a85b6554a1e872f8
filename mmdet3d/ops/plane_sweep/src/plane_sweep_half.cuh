// Costs of a pixel for float16 features: interpolation and differences in float16, two channels at a time, sums in
// float32. Positions, and what decides on the penalty, are those of the other dtypes.
//
// The loop over depths is short enough that what surrounds the arithmetic counts, hence
// - the four pixels around a position lie in slots that follow from whether their row and column are odd, so that
//   those which the next position shares with it stay where they are; each lane finds out for its own depth what has
//   to be loaded, and the weights, and leaves them in shared memory;
// - the sums over lanes are products with a matrix of ones, which take the float16 values as they are.
#pragma once

#include <c10/util/Half.h>
#include <cuda_fp16.h>

#include "plane_sweep_lanes.cuh"

namespace mmdet3d::plane_sweep {
namespace {

constexpr int kKeep = -1;  // nothing to load into a slot

// What the lanes of a warp tell each other about their depths.
struct alignas(16) ToldDepths {
  int4 pixels[kWarp];         // what to load into the four slots: which pack of the map is the first of the pixel
  __half2 weights[kWarp][2];  // of the slots, negative; 0 for pixels that are not in the map
};

// Eight channels, two to a word.
struct HalfPack {
  uint4 bits = {0, 0, 0, 0};  // not __half2: the compiler would read four of those one by one

  __device__ __half2 operator[](int i) const {
    const unsigned word = i == 0 ? bits.x : i == 1 ? bits.y : i == 2 ? bits.z : bits.w;
    return reinterpret_cast<const __half2&>(word);
  }
};

// Returns a bit for each lane whose depth has something to load. Where a pixel is not in the map, its slot keeps what
// it holds, which a weight of 0 hides.
__device__ inline unsigned tell_depths(const LanePosition<float>& own, int width, int packs, int lane,
                                       ToldDepths& told) {
  const bool odd_row = own.index / (width + 2) & 1, odd_column = own.index % (width + 2) & 1;
  const int slot_of_first = odd_row << 1 | odd_column;
  const float left = 1 - own.right, top = 1 - own.lower;
  const float column_weight[2] = {odd_column ? own.right : left, odd_column ? left : own.right};
  const float row_weight[2] = {odd_row ? own.lower : top, odd_row ? top : own.lower};
  int pixels[4];
  float weights[4];
  bool loads = false;
#pragma unroll
  for (int slot = 0; slot < 4; ++slot) {
    const int corner = slot ^ slot_of_first;
    const bool present = own.present >> corner & 1;
    const int pixel = present ? own.upper_left + (corner >> 1) * width + (corner & 1) : kKeep;
    const int before = __shfl_up_sync(kAllLanes, pixel, 1);
    const bool load = present && (lane == 0 || pixel != before);
    pixels[slot] = load ? pixel * packs : kKeep;
    weights[slot] = present ? -row_weight[slot >> 1] * column_weight[slot & 1] : 0.f;
    loads |= load;
  }
  told.pixels[lane] = make_int4(pixels[0], pixels[1], pixels[2], pixels[3]);
  told.weights[lane][0] = __floats2half2_rn(weights[0], weights[1]);
  told.weights[lane][1] = __floats2half2_rn(weights[2], weights[3]);
  return __ballot_sync(kAllLanes, loads);
}

// Brings the slots to the next depth. `map` points at what this lane holds of the first pixel; nothing if not `mine`.
__device__ inline void renew(const uint4* map, bool mine, const int4& pixels, HalfPack (&slots)[4]) {
  const int wanted[4] = {pixels.x, pixels.y, pixels.z, pixels.w};
#pragma unroll
  for (int slot = 0; slot < 4; ++slot) {
    const uint4* from = map + wanted[slot];
    if (mine && wanted[slot] != kKeep) slots[slot].bits = __ldg(from);
  }
}

// Absolute differences of two channels each; two sums of two.
__device__ inline void differences(const HalfPack& features, const HalfPack (&slots)[4], const __half2 (&weights)[2],
                                   __half2 (&sums)[2]) {
  const __half2 weight[4] = {__low2half2(weights[0]), __high2half2(weights[0]), __low2half2(weights[1]),
                             __high2half2(weights[1])};
  __half2 rest[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    rest[i] = features[i];
#pragma unroll
    for (int slot = 0; slot < 4; ++slot) rest[i] = __hfma2(weight[slot], slots[slot][i], rest[i]);
  }
  sums[0] = __hadd2(__habs2(rest[0]), __habs2(rest[1]));
  sums[1] = __hadd2(__habs2(rest[2]), __habs2(rest[3]));
}

// The costs of a group of depths: a 16 x 8 matrix, of which this lane holds what mma.m16n8k8 gives it. Column n is a
// depth, whose cost is the sum of the column.
struct GroupSums {
  float value[4] = {0, 0, 0, 0};

  // A byte for each depth of the group: the upper one of float16's 1 for the depth whose column of the second factor
  // this lane holds, else 0. Depth i has column 2 (i % 4) + i / 4: then `total` is its cost in lanes i modulo kGroup.
  static __device__ uint2 column_of_lane(int lane) {
    const int column = lane / 4;
    const unsigned one = 0x3cu << 8 * (column / 2);
    return column % 2 == 0 ? make_uint2(one, 0) : make_uint2(0, one);
  }

  // Adds the sums of all lanes to the column of depth `i`: a product with a matrix that is 1 there, else 0.
  __device__ void add(const __half2 (&sums)[2], uint2 column_of_lane, int i) {
    unsigned ones;
    // volatile: worked out each time, as eight of these would take eight registers.
    asm volatile("prmt.b32 %0, %1, 0, %2;"
                 : "=r"(ones) : "r"(i < 4 ? column_of_lane.x : column_of_lane.y), "r"(0x0404 | (i & 3) * 0x1010));
    const unsigned first = reinterpret_cast<const unsigned&>(sums[0]);
    const unsigned second = reinterpret_cast<const unsigned&>(sums[1]);
#if __CUDA_ARCH__ >= 750  // see has_half_sums
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(value[0]), "+f"(value[1]), "+f"(value[2]), "+f"(value[3])
        : "r"(first), "r"(second), "r"(ones));
#endif
  }

  __device__ float total(int lane) const {
    const float even = value[0] + value[2], odd = value[1] + value[3];
    const bool upper = lane & 4;
    float sum = (upper ? odd : even) + __shfl_xor_sync(kAllLanes, upper ? even : odd, 4);
    sum += __shfl_xor_sync(kAllLanes, sum, 8);
    return sum + __shfl_xor_sync(kAllLanes, sum, 16);
  }
};

// Cost of one pixel at depth `first_depth + lane`, computed by the whole warp.
__device__ inline float warp_cost(const Maps<at::Half>& maps, int64_t camera, int64_t pixel, int64_t first_depth,
                                  int lane) {
  static_assert(kGroup == 8, "the columns of the products are the depths of a group");
  __shared__ ToldDepths told_by_warp[kWarps];
  ToldDepths& told = told_by_warp[threadIdx.x / kWarp];
  const at::Half* map = maps.reference + camera * maps.height * maps.width * maps.channels;
  const at::Half* here = maps.current + (camera * maps.height * maps.width + pixel) * maps.channels;
  const int packs = static_cast<int>(maps.channels / 8), width = static_cast<int>(maps.width);
  const int count = static_cast<int>(min(static_cast<int64_t>(kWarp), maps.num_depths - first_depth));
  const auto own = lane_position<at::Half, float>(maps, camera, pixel, first_depth, count, lane);
  float total = lane_penalty<at::Half, float>(maps, map, own);
  __syncwarp();  // no lane still reads what was told before
  const unsigned loads = tell_depths(own, width, packs, lane, told);
  __syncwarp();
  const uint2 column_of_lane = GroupSums::column_of_lane(lane);
  for (int first = 0; first < packs; first += kWarp) {
    const bool mine = first + lane < packs;
    const uint4* map_of_lane = reinterpret_cast<const uint4*>(map) + first + lane;
    asm("" : "+l"(map_of_lane));  // one pointer, to which the compiler may not add the three terms again at each use
    HalfPack features, slots[4];
    if (mine) features.bits = reinterpret_cast<const uint4*>(here)[first + lane];
    for (int group = 0; group * kGroup < count; ++group) {
      const unsigned loads_of_group = loads >> group * kGroup;
      GroupSums sums;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const int depth = group * kGroup + i;
        if (loads_of_group >> i & 1) renew(map_of_lane, mine, told.pixels[depth], slots);
        __half2 pairs[2];
        differences(features, slots, told.weights[depth], pairs);
        sums.add(pairs, column_of_lane, i);
      }
      const float sum = sums.total(lane);
      if (lane / kGroup == group) total += sum;
    }
  }
  return total;
}

}  // namespace
}  // namespace mmdet3d::plane_sweep
