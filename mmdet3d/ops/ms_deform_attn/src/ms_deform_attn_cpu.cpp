// CPU version of ms_deform_attn: threads over queries (forward) and heads (backward), vectors over channels.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "ms_deform_attn.h"
#include "multiversion.h"

namespace mmdet3d::ms_deform_attn {
namespace {

// The four pixels around a location, in the order (top left, top right, bottom left, bottom right).
template <typename T>
struct Taps {
  bool on_map[4];
  int64_t row[4];  // of value, counted from the first pixel of the sample
  T weight[4];
  T weight_by_x[4], weight_by_y[4];  // derivatives of weight by the location in pixels
};

// False when all four taps are off the map. NaN fails the comparison and infinities are off the map, so the
// conversion to integers is always defined.
template <typename T>
MMDET3D_INLINE bool find_taps(const Level& level, const T* location, Taps<T>& taps) {
  const T x = location[0] * level.width - T(0.5), y = location[1] * level.height - T(0.5);
  if (!(x > T(-1) && y > T(-1) && x < level.width && y < level.height)) return false;
  const auto left = static_cast<int64_t>(std::floor(x)), top = static_cast<int64_t>(std::floor(y));
  const T right_weight = x - left, left_weight = 1 - right_weight;
  const T bottom_weight = y - top, top_weight = 1 - bottom_weight;
  // The upper bounds are tested on integers: a float cannot tell neighbouring sizes beyond 2^24 apart.
  const bool has_left = left >= 0 && left < level.width, has_right = left + 1 < level.width;
  const bool has_top = top >= 0 && top < level.height, has_bottom = top + 1 < level.height;
  const int64_t first = level.start + top * level.width + left;
  taps = {{has_top && has_left, has_top && has_right, has_bottom && has_left, has_bottom && has_right},
          {first, first + 1, first + level.width, first + level.width + 1},
          {top_weight * left_weight, top_weight * right_weight, bottom_weight * left_weight,
           bottom_weight * right_weight},
          {-top_weight, top_weight, -bottom_weight, bottom_weight},
          {-left_weight, -right_weight, left_weight, right_weight}};
  return true;
}

template <typename T>
struct Args {
  const T* value;
  const T* locations;
  const T* weights;
  const Level* levels;
  Sizes sizes;
  T* out;  // forward only
  const T* grad_out;  // backward only, from here
  T* grad_value;
  T* grad_locations;
  T* grad_weights;
};

// One head of one query. `Channels` is the number of channels where it is known at compile time, else 0.
template <int Channels, typename T>
MMDET3D_INLINE void attend(const Args<T>& args, int64_t sample, int64_t query, int64_t head) {
  const Sizes& s = args.sizes;
  const int64_t channels = Channels > 0 ? Channels : s.channels;
  const int64_t stride = s.heads * channels;
  const int64_t index = (sample * s.queries + query) * s.heads + head;
  const T* value = args.value + sample * s.pixels * stride + head * channels;
  const T* location = args.locations + index * s.levels * s.points * 2;
  const T* weight = args.weights + index * s.levels * s.points;
  T* out = args.out + index * channels;
  T registers[Channels > 0 ? Channels : 1];
  T* sum = Channels > 0 ? registers : out;
  std::fill(sum, sum + channels, T(0));
  Taps<T> taps;
  for (int64_t l = 0; l < s.levels; ++l) {
    for (int64_t p = 0; p < s.points; ++p, location += 2, ++weight) {
      if (!find_taps(args.levels[l], location, taps)) continue;
      if (taps.on_map[0] && taps.on_map[3]) {  // then all are: no branch for each
        const T* first = value + taps.row[0] * stride;
        const T* second = value + taps.row[2] * stride;
        const T w0 = *weight * taps.weight[0], w1 = *weight * taps.weight[1];
        const T w2 = *weight * taps.weight[2], w3 = *weight * taps.weight[3];
        for (int64_t c = 0; c < channels; ++c) {
          sum[c] += w0 * first[c] + w1 * first[c + stride] + w2 * second[c] + w3 * second[c + stride];
        }
        continue;
      }
      for (int t = 0; t < 4; ++t) {
        if (!taps.on_map[t]) continue;
        const T tap_weight = *weight * taps.weight[t];
        const T* pixel = value + taps.row[t] * stride;
        for (int64_t c = 0; c < channels; ++c) sum[c] += tap_weight * pixel[c];
      }
    }
  }
  if (Channels > 0) std::copy(sum, sum + channels, out);
}

template <typename T>
MMDET3D_INLINE void attend_queries(const Args<T>& args, int64_t begin, int64_t end) {
  const Sizes& s = args.sizes;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t head = 0; head < s.heads; ++head) {
      if (s.channels == 12) {  // head size of the model
        attend<12>(args, row / s.queries, row % s.queries, head);
      } else {
        attend<0>(args, row / s.queries, row % s.queries, head);
      }
    }
  }
}

// Gradients of one head of one query; adds to grad_value, which no other thread writes for this sample and head.
template <int Channels, typename T>
MMDET3D_INLINE void attend_backward(const Args<T>& args, int64_t sample, int64_t query, int64_t head) {
  const Sizes& s = args.sizes;
  const int64_t channels = Channels > 0 ? Channels : s.channels;
  const int64_t stride = s.heads * channels;
  const int64_t index = (sample * s.queries + query) * s.heads + head;
  const int64_t first = index * s.levels * s.points, map = sample * s.pixels * stride + head * channels;
  const T* grad_out = args.grad_out + index * channels;
  Taps<T> taps;
  for (int64_t l = 0; l < s.levels; ++l) {
    for (int64_t i = first + l * s.points; i < first + (l + 1) * s.points; ++i) {
      T grad_weight = 0, grad_x = 0, grad_y = 0;
      if (find_taps(args.levels[l], args.locations + 2 * i, taps)) {
        for (int t = 0; t < 4; ++t) {
          if (!taps.on_map[t]) continue;
          const T tap_weight = args.weights[i] * taps.weight[t];
          const T* pixel = args.value + map + taps.row[t] * stride;
          T* grad_pixel = args.grad_value + map + taps.row[t] * stride;
          T dot = 0;
#pragma omp simd reduction(+ : dot)
          for (int64_t c = 0; c < channels; ++c) {
            dot += grad_out[c] * pixel[c];
            grad_pixel[c] += tap_weight * grad_out[c];
          }
          grad_weight += dot * taps.weight[t];
          grad_x += dot * taps.weight_by_x[t];
          grad_y += dot * taps.weight_by_y[t];
        }
      }
      args.grad_weights[i] = grad_weight;
      args.grad_locations[2 * i] = grad_x * args.weights[i] * args.levels[l].width;
      args.grad_locations[2 * i + 1] = grad_y * args.weights[i] * args.levels[l].height;
    }
  }
}

template <typename T>
MMDET3D_INLINE void attend_heads_backward(const Args<T>& args, int64_t begin, int64_t end) {
  const Sizes& s = args.sizes;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t query = 0; query < s.queries; ++query) {
      if (s.channels == 12) {  // head size of the model
        attend_backward<12>(args, row / s.heads, query, row % s.heads);
      } else {
        attend_backward<0>(args, row / s.heads, query, row % s.heads);
      }
    }
  }
}

MMDET3D_MULTIVERSION void run_forward(const Args<float>& args, int64_t begin, int64_t end) {
  attend_queries(args, begin, end);
}
MMDET3D_MULTIVERSION void run_forward(const Args<double>& args, int64_t begin, int64_t end) {
  attend_queries(args, begin, end);
}
MMDET3D_MULTIVERSION void run_backward(const Args<float>& args, int64_t begin, int64_t end) {
  attend_heads_backward(args, begin, end);
}
MMDET3D_MULTIVERSION void run_backward(const Args<double>& args, int64_t begin, int64_t end) {
  attend_heads_backward(args, begin, end);
}

at::Tensor forward(const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& locations,
                   const at::Tensor& weights) {
  const Sizes sizes = check_inputs(value, spatial_shapes, locations, weights);
  const auto levels = read_levels(spatial_shapes);
  at::Tensor out = at::empty({sizes.batch, sizes.queries, sizes.heads * sizes.channels}, value.options());
  const auto value_c = value.contiguous(), locations_c = locations.contiguous(), weights_c = weights.contiguous();
  AT_DISPATCH_FLOATING_TYPES(value.scalar_type(), "ms_deform_attn_forward", [&] {
    Args<scalar_t> args{value_c.const_data_ptr<scalar_t>(), locations_c.const_data_ptr<scalar_t>(),
                        weights_c.const_data_ptr<scalar_t>(), levels.data(), sizes};
    args.out = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, sizes.batch * sizes.queries, 16,
                     [&](int64_t begin, int64_t end) { run_forward(args, begin, end); });
  });
  return out;
}

// Threads share out samples and heads, not queries: then each adds to its own part of grad_value, always in the same
// order, and the result is deterministic.
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad_out, const at::Tensor& value,
                                                        at::IntArrayRef spatial_shapes, const at::Tensor& locations,
                                                        const at::Tensor& weights) {
  const Sizes sizes = check_inputs(value, spatial_shapes, locations, weights);
  check_grad(grad_out, value, sizes);
  const auto levels = read_levels(spatial_shapes);
  at::Tensor grad_value = at::zeros(value.sizes(), value.options());
  at::Tensor grad_locations = at::empty(locations.sizes(), locations.options());
  at::Tensor grad_weights = at::empty(weights.sizes(), weights.options());
  const auto value_c = value.contiguous(), locations_c = locations.contiguous(), weights_c = weights.contiguous();
  const auto grad_out_c = grad_out.contiguous();
  AT_DISPATCH_FLOATING_TYPES(value.scalar_type(), "ms_deform_attn_backward", [&] {
    Args<scalar_t> args{value_c.const_data_ptr<scalar_t>(), locations_c.const_data_ptr<scalar_t>(),
                        weights_c.const_data_ptr<scalar_t>(), levels.data(), sizes};
    args.grad_out = grad_out_c.const_data_ptr<scalar_t>();
    args.grad_value = grad_value.mutable_data_ptr<scalar_t>();
    args.grad_locations = grad_locations.mutable_data_ptr<scalar_t>();
    args.grad_weights = grad_weights.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, sizes.batch * sizes.heads, 1,
                     [&](int64_t begin, int64_t end) { run_backward(args, begin, end); });
  });
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace
}  // namespace mmdet3d::ms_deform_attn

TORCH_LIBRARY_IMPL(mmdet3d, CPU, m) {
  m.impl("ms_deform_attn_forward", &mmdet3d::ms_deform_attn::forward);
  m.impl("ms_deform_attn_backward", &mmdet3d::ms_deform_attn::backward);
}
