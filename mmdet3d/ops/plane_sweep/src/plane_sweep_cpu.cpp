// CPU version of plane_sweep: threads over image rows, vectors over channels.
//
// The depths of one pixel are swept innermost: their positions lie along one epipolar line, so that the pixels they
// read, each a contiguous run of channels, are still in the cache.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <type_traits>
#include <vector>

#include "plane_sweep.h"

// The width of the vectors differs from version to version, which MMDET3D_MULTIVERSION cannot express.
#if defined(__x86_64__) && defined(__GNUC__)
#define MMDET3D_X86_VERSIONS 1
#define MMDET3D_TARGET(features) __attribute__((target(features)))
#endif

namespace mmdet3d::plane_sweep {
namespace {

// Channels of one step, in bytes: a cache line, one to four vectors of the processor.
constexpr int64_t kStepBytes = 64;

template <typename scalar_t>
constexpr int64_t kStep = kStepBytes / sizeof(scalar_t);

template <typename scalar_t, int64_t bytes>
struct Vector {
  typedef scalar_t type __attribute__((vector_size(bytes)));
  typedef scalar_t in_memory __attribute__((vector_size(bytes), aligned(sizeof(scalar_t)), may_alias));
  using integer_t = std::conditional_t<sizeof(scalar_t) == 4, int32_t, int64_t>;
  typedef integer_t bits __attribute__((vector_size(bytes)));
};

// Weights of the upper left, upper right, lower left and lower right pixel.
template <typename scalar_t>
struct Weights {
  scalar_t upper_left, upper_right, lower_left, lower_right;
};

template <typename scalar_t>
using Difference = scalar_t (*)(const scalar_t* current, const scalar_t* upper, const scalar_t* lower,
                                const Weights<scalar_t>& weights, int64_t channels);

// As a tree, because a chain of additions would take as long as the loop over the channels.
template <int64_t count, typename scalar_t>
MMDET3D_INLINE scalar_t add_up(const scalar_t* values) {
  if constexpr (count == 1) {
    return *values;
  } else {
    return add_up<count / 2>(values) + add_up<count / 2>(values + count / 2);
  }
}

// sum_c |current_c - interpolated_c|. `upper` and `lower` point at the left pixel of their row; the right one follows.
// `bytes` is the size of a vector register.
template <int64_t bytes, typename scalar_t>
MMDET3D_INLINE scalar_t difference_body(const scalar_t* current, const scalar_t* upper, const scalar_t* lower,
                                        const Weights<scalar_t>& weights, int64_t channels) {
  using vector = Vector<scalar_t, bytes>;
  using vector_t = typename vector::type;
  constexpr auto kAllButSign = std::numeric_limits<typename vector::integer_t>::max();
  constexpr int64_t kParts = kStepBytes / bytes, kLanes = bytes / sizeof(scalar_t);
  const auto load = [](const scalar_t* from) -> const typename vector::in_memory& {
    return *reinterpret_cast<const typename vector::in_memory*>(from);
  };
  vector_t sums[kParts] = {};
  for (int64_t step = 0; step < channels; step += kStep<scalar_t>) {
#pragma GCC unroll 4
    for (int64_t part = 0; part < kParts; ++part) {
      const int64_t c = step + part * kLanes;
      vector_t rest = load(current + c);
      rest -= weights.upper_left * load(upper + c);
      rest -= weights.upper_right * load(upper + channels + c);
      rest -= weights.lower_left * load(lower + c);
      rest -= weights.lower_right * load(lower + channels + c);
      sums[part] += (vector_t)((typename vector::bits)rest & kAllButSign);
    }
  }
  scalar_t lanes[kStep<scalar_t>];
  std::memcpy(lanes, sums, kStepBytes);
  return add_up<kStep<scalar_t>>(lanes);
}

template <typename scalar_t>
scalar_t difference_plain(const scalar_t* current, const scalar_t* upper, const scalar_t* lower,
                          const Weights<scalar_t>& weights, int64_t channels) {
  return difference_body<16>(current, upper, lower, weights, channels);
}

#ifdef MMDET3D_X86_VERSIONS
template <typename scalar_t>
MMDET3D_TARGET("avx2,fma")
scalar_t difference_avx2(const scalar_t* current, const scalar_t* upper, const scalar_t* lower,
                         const Weights<scalar_t>& weights, int64_t channels) {
  return difference_body<32>(current, upper, lower, weights, channels);
}

template <typename scalar_t>
MMDET3D_TARGET("avx512f,avx512dq")
scalar_t difference_avx512(const scalar_t* current, const scalar_t* upper, const scalar_t* lower,
                           const Weights<scalar_t>& weights, int64_t channels) {
  return difference_body<64>(current, upper, lower, weights, channels);
}
#endif

// The version for the processor this runs on, whichever one the library was compiled on.
template <typename scalar_t>
Difference<scalar_t> choose_difference() {
#ifdef MMDET3D_X86_VERSIONS
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) return difference_avx512<scalar_t>;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return difference_avx2<scalar_t>;
#endif
  return difference_plain<scalar_t>;
}

template <typename scalar_t>
Weights<scalar_t> interpolation_weights(const Position<scalar_t>& position) {
  const scalar_t right = position.right, lower = position.lower;
  return {(1 - right) * (1 - lower), right * (1 - lower), (1 - right) * lower, right * lower};
}

// Positions of one pixel of the current map at all depths.
template <typename scalar_t>
MMDET3D_INLINE void positions_body(const Lattice<scalar_t>& lattice, int64_t num_depths, int64_t camera, int64_t x,
                                   int64_t y, scalar_t* __restrict__ at_x, scalar_t* __restrict__ at_y) {
  const Lattice<scalar_t> steps = lattice;  // copies, which the results cannot overwrite
  const Camera<scalar_t> rig = lattice.cameras[camera];
  const Point<scalar_t> pixel = original_pixel(rig, steps.columns[x], steps.rows[y]);
  for (int64_t d = 0; d < num_depths; ++d) {
    const Point<scalar_t> at = older_position(steps, rig, pixel, steps.depths[d]);
    at_x[d] = at.x;
    at_y[d] = at.y;
  }
}

MMDET3D_UNFUSED MMDET3D_MULTIVERSION void find_positions(const Lattice<float>& lattice, int64_t num_depths,
                                                         int64_t camera, int64_t x, int64_t y, float* at_x,
                                                         float* at_y) {
  positions_body(lattice, num_depths, camera, x, y, at_x, at_y);
}
MMDET3D_UNFUSED MMDET3D_MULTIVERSION void find_positions(const Lattice<double>& lattice, int64_t num_depths,
                                                         int64_t camera, int64_t x, int64_t y, double* at_x,
                                                         double* at_y) {
  positions_body(lattice, num_depths, camera, x, y, at_x, at_y);
}

template <typename scalar_t>
struct Sweep {
  const scalar_t* current;    // (N, H, W, C)
  const scalar_t* reference;  // (N, H + 2, W + 2, C)
  Lattice<scalar_t> lattice;
  scalar_t* cost;  // (N, D, H, W)
  int64_t channels, num_depths, height, width;
  Options options;
  Difference<scalar_t> difference = choose_difference<scalar_t>();

  // All depths of the pixels of one row; `row` counts through the rows of all cameras. `positions` holds 2 D values.
  void row(int64_t row, scalar_t* positions) const {
    const int64_t camera = row / height, y = row % height;
    const scalar_t* map = reference + camera * (height + 2) * (width + 2) * channels;
    for (int64_t x = 0; x < width; ++x) {
      const scalar_t* features = current + (row * width + x) * channels;
      scalar_t* out = cost + (camera * num_depths * height + y) * width + x;
      find_positions(lattice, num_depths, camera, x, y, positions, positions + num_depths);
      pixel(features, map, positions, out);
    }
  }

  void pixel(const scalar_t* features, const scalar_t* map, const scalar_t* positions, scalar_t* out) const {
    scalar_t outside = 0;
    for (int64_t c = 0; c < channels; ++c) outside += std::abs(features[c]);
    const bool penalise_outside = options.invalid_by_position || options.invalid_channel >= 0;
    const scalar_t penalty = options.invalid_penalty;
    for (int64_t d = 0; d < num_depths; ++d, out += height * width) {
      const Position<scalar_t> at = locate<scalar_t>({positions[d], positions[num_depths + d]}, height, width);
      if (at.index < 0) {
        *out = penalise_outside ? outside + penalty : outside;
        continue;
      }
      const Weights<scalar_t> weights = interpolation_weights(at);
      const scalar_t* upper = map + at.index * channels;
      const scalar_t* lower = upper + (width + 2) * channels;
      *out = difference(features, upper, lower, weights, channels);
      if (options.invalid_channel >= 0 && warped(upper, lower, weights, options.invalid_channel) == 0) {
        *out += penalty;
      }
    }
  }

  scalar_t warped(const scalar_t* upper, const scalar_t* lower, const Weights<scalar_t>& weights, int64_t c) const {
    return weights.upper_left * upper[c] + weights.upper_right * upper[channels + c] +
           weights.lower_left * lower[c] + weights.lower_right * lower[channels + c];
  }
};

at::Tensor plane_sweep_cpu(const at::Tensor& current, const at::Tensor& reference,
                           const at::Tensor& pixel_from_augmented, const at::Tensor& augmentation,
                           const at::Tensor& offset, const at::Tensor& older_from_pixel,
                           const at::Tensor& translation, const at::Tensor& intrinsics, at::IntArrayRef image_size,
                           const at::Tensor& depths, std::optional<int64_t> invalid_channel, bool invalid_by_position,
                           double invalid_penalty, double min_depth) {
  const Geometry geometry{pixel_from_augmented, augmentation, offset,     older_from_pixel,
                          translation,          intrinsics,   image_size, depths};
  const Options options = check_arguments(current, reference, geometry, invalid_channel, invalid_by_position,
                                          invalid_penalty, min_depth);
  const int64_t cameras = current.size(0), height = current.size(2), width = current.size(3);
  const int64_t num_depths = depths.size(0);
  const at::ScalarType dtype = at::promote_types(current.scalar_type(), at::kFloat);
  at::Tensor cost = at::empty({cameras, num_depths, height, width}, current.options().dtype(dtype));
  if (cost.numel() == 0) return cost;
  const Steps steps = prepare_steps(geometry, height, width, dtype, min_depth);
  AT_DISPATCH_FLOATING_TYPES(dtype, "plane_sweep_cpu", [&] {
    const at::Tensor now = channels_last(current, 0, kStep<scalar_t>, dtype);
    const at::Tensor before = channels_last(reference, 1, kStep<scalar_t>, dtype);
    const Sweep<scalar_t> sweep{now.const_data_ptr<scalar_t>(), before.const_data_ptr<scalar_t>(),
                                steps.lattice<scalar_t>(),      cost.mutable_data_ptr<scalar_t>(),
                                now.size(3), num_depths, height, width, options};
    at::parallel_for(0, cameras * height, 1, [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> positions(2 * num_depths);
      for (int64_t row = begin; row < end; ++row) sweep.row(row, positions.data());
    });
  });
  return cost;
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet3d, CPU, m) { m.impl("plane_sweep", &plane_sweep_cpu); }

}  // namespace mmdet3d::plane_sweep
