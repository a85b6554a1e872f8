// What the CPU and the CUDA version of oa_cross_attention share: checks, and the work of one output and of one sampled
// point. The contract is in ../oa_cross_attention.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/macros/Macros.h>

#include <cmath>
#include <cstdint>

#include "multiversion.h"

#ifdef __CUDACC__
#define MMDET3D_OA_INLINE __host__ __device__ __forceinline__
#define MMDET3D_OA_UNROLL _Pragma("unroll")
#else
#define MMDET3D_OA_INLINE MMDET3D_INLINE
#define MMDET3D_OA_UNROLL
#endif

namespace mmdet3d::oa_cross_attention {

// Every tensor has fewer than 2^31 elements, so that indices are ints.
struct Sizes {
  int cameras, batch, queries, heads, points, channels;  // N, B, Q, M, P, D
  int height, width;
};

// Arguments of the operator as they come.
struct Tensors {
  const at::Tensor &value, &base, &slope, &attention, &position, &consistency, &visibility, &source;
};

// Checks dtypes, devices and shapes; the sizes.
Sizes check_inputs(const Tensors& in, int64_t height, int64_t width);

// Checks the gradient of the output (B, Q, M * D).
void check_grad(const at::Tensor& grad_out, const Tensors& in, const Sizes& sizes);

// The four pixels around a location, in the order (top left, top right, bottom left, bottom right).
template <typename Acc>
struct Taps {
  bool on_map[4];
  int pixel[4];       // row * width + column
  Acc right, bottom;  // weights of the right and bottom pixels

  MMDET3D_OA_INLINE Acc weight(int tap) const {
    return (tap & 1 ? right : 1 - right) * (tap & 2 ? bottom : 1 - bottom);
  }
  MMDET3D_OA_INLINE Acc weight_by_x(int tap) const {
    const Acc vertical = tap & 2 ? bottom : 1 - bottom;
    return tap & 1 ? vertical : -vertical;
  }
  MMDET3D_OA_INLINE Acc weight_by_y(int tap) const {
    const Acc horizontal = tap & 1 ? right : 1 - right;
    return tap & 2 ? horizontal : -horizontal;
  }
};

// False when all four taps are off the map. NaN fails the comparison and infinities are off the map, so the conversion
// to integers is always defined. The upper bounds are tested on integers too: a float cannot tell neighbouring sizes
// beyond 2^24 apart.
template <typename Acc>
MMDET3D_OA_INLINE bool find_taps(int height, int width, Acc location_x, Acc location_y, Taps<Acc>& taps) {
  const Acc x = location_x * width - Acc(0.5), y = location_y * height - Acc(0.5);
  if (!(x > -1 && y > -1 && x < width && y < height)) return false;
  const Acc left = std::floor(x), top = std::floor(y);
  const int column = static_cast<int>(left), row = static_cast<int>(top);
  taps.right = x - left;
  taps.bottom = y - top;
  const bool has_left = column >= 0 && column < width, has_right = column + 1 < width;
  const bool has_top = row >= 0 && row < height, has_bottom = row + 1 < height;
  const int first = row * width + column;
  taps.on_map[0] = has_top && has_left;
  taps.on_map[1] = has_top && has_right;
  taps.on_map[2] = has_bottom && has_left;
  taps.on_map[3] = has_bottom && has_right;
  taps.pixel[0] = first;
  taps.pixel[1] = first + 1;
  taps.pixel[2] = first + width;
  taps.pixel[3] = first + width + 1;
  return true;
}

// As much as one load instruction takes (16 bytes), or the whole vector where that is less.
template <typename T, int Count>
struct alignas(sizeof(T) * Count < 16 ? sizeof(T) * Count : 16) Vector {
  T at[Count];
};

// Count neighbouring elements; on a GPU their address must be a multiple of the vector's alignment.
template <int Count, typename T, typename Acc>
MMDET3D_OA_INLINE void read(const T* address, Acc (&to)[Count]) {
#ifdef __CUDA_ARCH__
  const Vector<T, Count> vector = *reinterpret_cast<const Vector<T, Count>*>(address);
  const T* from = vector.at;
#else
  const T* from = address;
#endif
  MMDET3D_OA_UNROLL
  for (int c = 0; c < Count; ++c) to[c] = static_cast<Acc>(from[c]);
}

template <typename T, typename Acc>
struct Inputs {
  const T* value;          // (N, B, height * width, M, D)
  const Acc* base;         // (B, Q, M, P, 2)
  const Acc* slope;        // (M, P, 2)
  const Acc* attention;    // (B, Q, M, P)
  const Acc* position;     // (N, B, Q, P, 2)
  const Acc* consistency;  // (N, B, Q, P)
  const Acc* visibility;   // (B, Q, P)
  const int32_t* source;   // (N, B, Q)
  Sizes sizes;

  // Query whose visibility counts for a query in a camera; whether the camera attends at all.
  MMDET3D_OA_INLINE bool find_source(int camera, int sample, int query, int& found) const {
    found = source[(camera * sizes.batch + sample) * sizes.queries + query];
    return found >= 0 && found < sizes.queries;
  }
  MMDET3D_OA_INLINE int count_cameras(int sample, int query) const {
    int count = 0, found = 0;
    for (int camera = 0; camera < sizes.cameras; ++camera) count += find_source(camera, sample, query, found);
    return count;
  }
  MMDET3D_OA_INLINE Acc mean_visibility(const Acc* visible) const {
    Acc sum = 0;
    for (int point = 0; point < sizes.points; ++point) sum += visible[point];
    return sum / sizes.points;
  }
  // Taps of a point; `row` counts (N, B, Q), `place` counts (B, Q, M, P).
  MMDET3D_OA_INLINE bool find_point(int row, int place, int head, int point, Acc mean, Taps<Acc>& taps) const {
    const Acc* at = position + (row * sizes.points + point) * 2;
    const Acc* by_mean = slope + (head * sizes.points + point) * 2;
    const Acc x = at[0] + (base[2 * place] + mean * by_mean[0]) / sizes.width;
    const Acc y = at[1] + (base[2 * place + 1] + mean * by_mean[1]) / sizes.height;
    return find_taps<Acc>(sizes.height, sizes.width, x, y, taps);
  }
  // Offset in value of a head of the first pixel of a map.
  MMDET3D_OA_INLINE int find_map(int camera, int sample, int head) const {
    return ((camera * sizes.batch + sample) * sizes.height * sizes.width * sizes.heads + head) * sizes.channels;
  }
};

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

// Count channels of one head of one query.
template <int Count, typename T, typename Acc>
MMDET3D_OA_INLINE void attend(const Inputs<T, Acc>& in, int sample, int query, int head, int channel,
                              Acc (&sum)[Count]) {
  const Sizes& s = in.sizes;
  const int stride = s.heads * s.channels, first = ((sample * s.queries + query) * s.heads + head) * s.points;
  MMDET3D_OA_UNROLL
  for (int c = 0; c < Count; ++c) sum[c] = 0;
  int count = 0;
  for (int camera = 0; camera < s.cameras; ++camera) {
    int source;
    if (!in.find_source(camera, sample, query, source)) continue;
    ++count;
    const int row = (camera * s.batch + sample) * s.queries + query;
    const Acc* visible = in.visibility + (sample * s.queries + source) * s.points;
    const Acc mean = in.mean_visibility(visible);
    const T* map = in.value + in.find_map(camera, sample, head) + channel;
    for (int point = 0; point < s.points; ++point) {
      Taps<Acc> taps;
      if (!in.find_point(row, first + point, head, point, mean, taps)) continue;
      const Acc weight = in.attention[first + point] * (in.consistency[row * s.points + point] * visible[point]);
      MMDET3D_OA_UNROLL
      for (int tap = 0; tap < 4; ++tap) {
        if (!taps.on_map[tap]) continue;
        Acc pixel[Count];
        read<Count>(map + taps.pixel[tap] * stride, pixel);
        const Acc tap_weight = weight * taps.weight(tap);
        MMDET3D_OA_UNROLL
        for (int c = 0; c < Count; ++c) sum[c] += tap_weight * pixel[c];
      }
    }
  }
  if (count < 2) return;
  MMDET3D_OA_UNROLL
  for (int c = 0; c < Count; ++c) sum[c] /= count;
}

// Gradients of what belongs to one point of one head of one query.
template <typename Acc>
struct PointGradients {
  Acc attention = 0, base[2] = {0, 0}, slope[2] = {0, 0};
};

// Gradients of one point; `add(offset, terms)` adds Count terms to the gradient of value.
template <int Count, typename T, typename Acc, typename Add>
MMDET3D_OA_INLINE PointGradients<Acc> attend_backward(const Inputs<T, Acc>& in, const Acc* grad_out, int sample,
                                                      int query, int head, int point, const Add& add) {
  const Sizes& s = in.sizes;
  const int stride = s.heads * s.channels, place = ((sample * s.queries + query) * s.heads + head) * s.points + point;
  const Acc* grad = grad_out + ((sample * s.queries + query) * s.heads + head) * s.channels;
  PointGradients<Acc> result;
  const int count = in.count_cameras(sample, query);
  for (int camera = 0; camera < s.cameras; ++camera) {
    int source;
    if (!in.find_source(camera, sample, query, source)) continue;
    const int row = (camera * s.batch + sample) * s.queries + query;
    const Acc* visible = in.visibility + (sample * s.queries + source) * s.points;
    const Acc mean = in.mean_visibility(visible);
    Taps<Acc> taps;
    if (!in.find_point(row, place, head, point, mean, taps)) continue;
    const Acc share = in.consistency[row * s.points + point] * visible[point] / count;
    const Acc weight = in.attention[place] * share;
    const int map = in.find_map(camera, sample, head);
    Acc dot[4] = {0, 0, 0, 0};
    for (int channel = 0; channel < s.channels; channel += Count) {
      Acc grads[Count];
      read<Count>(grad + channel, grads);
      MMDET3D_OA_UNROLL
      for (int tap = 0; tap < 4; ++tap) {
        if (!taps.on_map[tap]) continue;
        const int offset = map + taps.pixel[tap] * stride + channel;
        const Acc tap_weight = weight * taps.weight(tap);
        Acc pixel[Count], terms[Count];
        read<Count>(in.value + offset, pixel);
        MMDET3D_OA_UNROLL
        for (int c = 0; c < Count; ++c) {
          dot[tap] += grads[c] * pixel[c];
          terms[c] = tap_weight * grads[c];
        }
        add(offset, terms);
      }
    }
    // A pixel of offset is a pixel of the map: the division by the size of the map cancels.
    Acc by_x = 0, by_y = 0;
    MMDET3D_OA_UNROLL
    for (int tap = 0; tap < 4; ++tap) {
      result.attention += share * dot[tap] * taps.weight(tap);
      by_x += weight * dot[tap] * taps.weight_by_x(tap);
      by_y += weight * dot[tap] * taps.weight_by_y(tap);
    }
    result.base[0] += by_x;
    result.base[1] += by_y;
    result.slope[0] += mean * by_x;
    result.slope[1] += mean * by_y;
  }
  return result;
}

}  // namespace mmdet3d::oa_cross_attention
