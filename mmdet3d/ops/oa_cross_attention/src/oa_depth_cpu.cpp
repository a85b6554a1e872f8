// CPU version of oa_depth_consistency: threads over queries, vectors over depth bins.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "oa_depth.h"

namespace mmdet3d::oa_depth {
namespace {

// The distribution around a location, from a map (height * width, D).
template <typename T>
MMDET3D_INLINE void sample(const Sizes& sizes, const T* map, const Taps<T>& taps, T* bins) {
  std::fill(bins, bins + sizes.bins, T(0));
  for (int tap = 0; tap < 4; ++tap) {
    if (!taps.on_map[tap]) continue;
    const T* pixel = map + taps.pixel[tap] * sizes.bins;
    const T weight = taps.weight(tap);
    for (int bin = 0; bin < sizes.bins; ++bin) bins[bin] += weight * pixel[bin];
  }
}

// First of the largest bins; with `softmax`, of those that a softmax makes equal.
template <typename T>
MMDET3D_INLINE int most_probable(const T* bins, int count, bool softmax) {
  T most = bins[0];
  for (int bin = 1; bin < count; ++bin) most = bins[bin] > most ? bins[bin] : most;
  int first = 0;
  while (first + 1 < count && !(bins[first] >= most)) ++first;
  if (!softmax) return first;
  int near = 0;
  while (near < first && !(bins[near] >= most - tie_margin<T>())) ++near;
  if (near == first) return first;
  T sum = 0;
  for (int bin = 0; bin < count; ++bin) sum += std::exp(bins[bin] - most);
  while (near < first && std::exp(bins[near] - most) / sum < 1 / sum) ++near;
  return near;
}

template <typename T>
MMDET3D_INLINE void fit_queries(const Inputs<T>& in, T* out, int64_t begin, int64_t end) {
  const Sizes& s = in.sizes;
  std::vector<T> bins(s.bins);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = row * s.points;
    if (std::none_of(in.valid + first, in.valid + first + s.points, [](bool valid) { return valid; })) {
      std::fill(out + first, out + first + s.points, T(0));
      continue;
    }
    const T* map = in.depth + in.find_map(static_cast<int>(row));
    for (int64_t i = first; i < first + s.points; ++i) {
      Taps<T> taps;
      int bin = 0;
      if (find_taps<T>(s.height, s.width, in.position[2 * i], in.position[2 * i + 1], taps)) {
        sample(s, map, taps, bins.data());
        bin = most_probable(bins.data(), s.bins, in.options.softmax_depth);
      }
      out[i] = fit<T>(in.options, bin, in.anchor_depth[i]);
    }
  }
}

MMDET3D_MULTIVERSION void run(const Inputs<float>& in, float* out, int64_t begin, int64_t end) {
  fit_queries(in, out, begin, end);
}
MMDET3D_MULTIVERSION void run(const Inputs<double>& in, double* out, int64_t begin, int64_t end) {
  fit_queries(in, out, begin, end);
}

at::Tensor depth_consistency(const at::Tensor& position, const at::Tensor& anchor_depth, const at::Tensor& valid,
                             const at::Tensor& depth, int64_t height, int64_t width, double first, double step,
                             double sigma, bool squared_sigma, bool distance_to_neighbours, bool softmax_depth) {
  const Sizes sizes = check_inputs(position, anchor_depth, valid, depth, height, width);
  const Options options{first, step, sigma, squared_sigma, distance_to_neighbours, softmax_depth};
  const auto position_c = position.contiguous(), anchor_depth_c = anchor_depth.contiguous();
  const auto valid_c = valid.contiguous(), depth_c = depth.contiguous();
  const at::Tensor out = at::empty(anchor_depth.sizes(), anchor_depth.options());
  AT_DISPATCH_FLOATING_TYPES(position.scalar_type(), "oa_depth_consistency", [&] {
    const Inputs<scalar_t> in{position_c.const_data_ptr<scalar_t>(), anchor_depth_c.const_data_ptr<scalar_t>(),
                              valid_c.const_data_ptr<bool>(), depth_c.const_data_ptr<scalar_t>(), sizes, options};
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, int64_t{sizes.cameras} * sizes.batch * sizes.queries, 64,
                     [&](int64_t begin, int64_t end) { run(in, to, begin, end); });
  });
  return out;
}

}  // namespace
}  // namespace mmdet3d::oa_depth

TORCH_LIBRARY_IMPL(mmdet3d, CPU, m) { m.impl("oa_depth_consistency", &mmdet3d::oa_depth::depth_consistency); }
