// What a warp does with 16 rows of scores: softmax, and two linear layers on tensor cores.
//
// A tile of a matrix product lies in the registers of a warp as the instruction mma.m16n8k16 wants it. Lane 4 g + t has,
// of 16 rows, rows g and g + 8, and of every 8 columns, columns 2t and 2t + 1. What the first layer leaves in a lane's
// registers is what the second one wants there, and a row's softmax is a matter of four lanes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "fast_math.cuh"
#include "seeded_noise.cuh"
#include "tensor_cores.cuh"

namespace mmdet3d::class_guidance {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kRows = 16;               // of a tile
constexpr int kStep = 16;               // terms of a sum that one instruction adds
constexpr int kClassSteps = 2;          // of the first layer: up to 32 classes

// Values of a lane: rows g and g + 8, of every eight classes two.
template <int kGroups>
struct Values {
  float of[2][kGroups][2];
};

struct Lane {
  int row, pair;  // g and t
  __device__ explicit Lane(int lane) : row(lane / 4), pair(lane % 4) {}
  __device__ int index() const { return 4 * row + pair; }
};

__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

// A weight or a bias as the caller stores it.
enum class Kind : int { kFloat, kHalf, kBFloat16 };
struct Numbers {
  const void* data;
  Kind kind;
  __device__ float at(int i) const {
    if (kind == Kind::kHalf) return widen(static_cast<const __half*>(data)[i]);
    if (kind == Kind::kBFloat16) return widen(static_cast<const __nv_bfloat16*>(data)[i]);
    return static_cast<const float*>(data)[i];
  }
};

struct Parameters {
  Numbers first_weight, first_bias, second_weight, second_bias;
  int classes, hidden, outputs;
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 800
// Half number `which` of a packed word.
template <typename T>
__device__ __forceinline__ float unpack(uint32_t word, int which) {
  const uint16_t bits = static_cast<uint16_t>(which ? word >> 16 : word);
  T value;
  memcpy(&value, &bits, sizeof(bits));
  return widen(value);
}
#endif

// Adds a (16 x 16) times b (16 x 8) to sum (16 x 8).
template <typename T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint2 b, Lane lane) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  mmdet3d::multiply_add<T>(sum, a, b.x, b.y);
#else
  // Older GPUs lack the instruction: the same layout, term by term.
  for (int k = 0; k < kStep; ++k) {
    const int upper = k / 8, pair = k % 8 / 2, which = k % 2;
    const uint32_t rows[2] = {__shfl_sync(kFullMask, a[2 * upper], 4 * lane.row + pair),
                              __shfl_sync(kFullMask, a[2 * upper + 1], 4 * lane.row + pair)};
    for (int column = 0; column < 2; ++column) {
      const uint32_t word = __shfl_sync(kFullMask, upper ? b.y : b.x, 4 * (2 * lane.pair + column) + pair);
      for (int row = 0; row < 2; ++row) {
        sum[2 * row + column] += unpack<T>(rows[row], which) * unpack<T>(word, which);
      }
    }
  }
#endif
}

// Both layers in the order in which lanes read them; zero past their sizes. kTiles: of 16 hidden values or outputs.
template <int kTiles>
struct alignas(16) Layers {
  uint2 first[kClassSteps][2 * kTiles][kWarp];
  uint2 second[kTiles][2 * kTiles][kWarp];
  float first_bias[16 * kTiles];
  float second_bias[16 * kTiles];
};

// Output that column `column` of tile `tile` of the second layer yields. A lane's columns of two tiles are neighbours,
// so that it writes four numbers at once, and four lanes a whole sector of memory.
__device__ __forceinline__ int output_of(int tile, int column) {
  return 16 * (tile / 2) + 4 * (column / 2) + 2 * (tile % 2) + column % 2;
}

// Words of matrix [rows, columns], transposed, for one lane: terms `term` and term + 8, each with the next one.
template <typename T>
__device__ __forceinline__ uint2 fragment(const Numbers& matrix, int row, int rows, int term, int columns) {
  float value[4];
  for (int i = 0; i < 4; ++i) {
    const int column = term + 8 * (i / 2) + i % 2;
    value[i] = row < rows && column < columns ? matrix.at(row * columns + column) : 0.f;
  }
  return {pack<T>(value[0], value[1]), pack<T>(value[2], value[3])};
}

// A block's part of the work is shared out over its threads; they meet before anybody reads.
template <typename T, int kTiles>
__device__ void arrange(const Parameters& given, Layers<kTiles>& layers, int thread, int threads) {
  for (int i = thread; i < kClassSteps * 2 * kTiles * kWarp; i += threads) {
    const Lane lane(i % kWarp);
    const int tile = i / kWarp % (2 * kTiles), step = i / kWarp / (2 * kTiles);
    layers.first[step][tile][lane.index()] = fragment<T>(given.first_weight, 8 * tile + lane.row, given.hidden,
                                                         kStep * step + 2 * lane.pair, given.classes);
  }
  for (int i = thread; i < kTiles * 2 * kTiles * kWarp; i += threads) {
    const Lane lane(i % kWarp);
    const int tile = i / kWarp % (2 * kTiles), step = i / kWarp / (2 * kTiles);
    layers.second[step][tile][lane.index()] = fragment<T>(
        given.second_weight, output_of(tile, lane.row), given.outputs, kStep * step + 2 * lane.pair, given.hidden);
  }
  for (int i = thread; i < 16 * kTiles; i += threads) {
    layers.first_bias[i] = i < given.hidden ? given.first_bias.at(i) : 0.f;
    layers.second_bias[i] = i < given.outputs ? given.second_bias.at(i) : 0.f;
  }
}

__device__ __forceinline__ float largest_of_row(float value) {
  value = fmaxf(value, __shfl_xor_sync(kFullMask, value, 1));
  return fmaxf(value, __shfl_xor_sync(kFullMask, value, 2));
}

__device__ __forceinline__ float sum_of_row(float value) {
  value += __shfl_xor_sync(kFullMask, value, 1);
  return value + __shfl_xor_sync(kFullMask, value, 2);
}

// Logits, -inf past the classes, become probabilities. `start` has, for both rows, the index in the sample of the lane's
// first number. Noise -log(y) with y = -log(u) is not added: a division of e^logit by y is the same.
template <bool kSeeded, int kGroups>
__device__ __forceinline__ void softmax(Values<kGroups>& value, uint32_t seed, const uint32_t (&start)[2]) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float largest = value.of[row][0][0];
#pragma unroll
    for (int i = 1; i < 2 * kGroups; ++i) largest = fmaxf(largest, value.of[row][i / 2][i % 2]);
    largest = largest_of_row(largest);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i) {
      float& number = value.of[row][i / 2][i % 2];
      number = fast_exp2(number * kLog2E - largest * kLog2E);
      // The slow logarithm: where u is close to 1, the fast one has lost all digits.
      if (kSeeded) number *= fast_reciprocal(-logf(uniform(seed, start[row] + 8 * (i / 2) + i % 2)));
      sum += number;
    }
    const float factor = fast_reciprocal(sum_of_row(sum));
#pragma unroll
    for (int i = 0; i < 2 * kGroups; ++i) value.of[row][i / 2][i % 2] *= factor;
  }
}

// Both layers: store(column, row, words) gets four neighbouring outputs, for row 0 (g) or 1 (g + 8).
template <typename T, int kTiles, int kGroups, typename Store>
__device__ __forceinline__ void apply_layers(const Layers<kTiles>& layers, const Values<kGroups>& value, Lane lane,
                                             const Store& store) {
  uint32_t probability[kClassSteps][4] = {}, hidden[kTiles][4];
#pragma unroll
  for (int i = 0; i < 2 * kGroups; ++i) {
    probability[i / 4][i % 4] = pack<T>(value.of[i % 2][i / 2][0], value.of[i % 2][i / 2][1]);
  }
#pragma unroll
  for (int tile = 0; tile < 2 * kTiles; ++tile) {
    const float2 bias = reinterpret_cast<const float2*>(layers.first_bias)[4 * tile + lane.pair];
    float sum[4] = {bias.x, bias.y, bias.x, bias.y};
#pragma unroll
    for (int step = 0; step < kClassSteps; ++step) {
      multiply_add<T>(sum, probability[step], layers.first[step][tile][lane.index()], lane);
    }
    hidden[tile / 2][2 * (tile % 2)] = pack<T>(fast_softplus(sum[0]), fast_softplus(sum[1]));
    hidden[tile / 2][2 * (tile % 2) + 1] = pack<T>(fast_softplus(sum[2]), fast_softplus(sum[3]));
  }
#pragma unroll
  for (int pair = 0; pair < kTiles; ++pair) {
    const float4 bias = reinterpret_cast<const float4*>(layers.second_bias)[4 * pair + lane.pair];
    float low[4] = {bias.x, bias.y, bias.x, bias.y}, high[4] = {bias.z, bias.w, bias.z, bias.w};
#pragma unroll
    for (int step = 0; step < kTiles; ++step) {
      multiply_add<T>(low, hidden[step], layers.second[step][2 * pair][lane.index()], lane);
      multiply_add<T>(high, hidden[step], layers.second[step][2 * pair + 1][lane.index()], lane);
    }
    const int column = 16 * pair + 4 * lane.pair;
    store(column, 0, uint2{pack<T>(low[0], low[1]), pack<T>(high[0], high[1])});
    store(column, 1, uint2{pack<T>(low[2], low[3]), pack<T>(high[2], high[3])});
  }
}

}  // namespace mmdet3d::class_guidance
