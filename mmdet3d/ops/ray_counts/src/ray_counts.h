// What the CPU and the CUDA version of ray_counts share: checks, the verdict on one ray, the order of sums, and what
// becomes of a sample. The contract is in ../ray_counts.py.
//
// Sums of float64 depend on their order, so both versions keep to one: rays are summed in blocks of kBlock, and a sum
// of any list is formed by kLanes lanes, of which lane l adds the items l, l + kLanes, ..., and by halving the lanes.
// That is the order of a warp, and it makes both versions agree in every bit, whatever the number of threads.
#pragma once

#include <ATen/ATen.h>
#include <c10/macros/Macros.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <optional>

#include "exact_math.h"

namespace mmdet3d::ray_counts {

constexpr int kLanes = 32;
constexpr int kBlock = 256;  // rays
constexpr int kThresholds = 3;
constexpr int kMaxClasses = 64;

// Rows of the counters.
enum Row { kGt = 0, kPred = 1, kTp = 2, kFlow = kTp + kThresholds, kRows = kFlow + 1 };

struct Rules {
  double thresholds[kThresholds];  // metres
  double flow_threshold;           // metres
  uint64_t moving;                 // bit c: the flow of class c counts
  int num_classes, free_label;
};

// What is known of one ray.
struct Ray {
  int gt = -1, pred = -1;  // labels; -1: the ray does not count
  bool within[kThresholds] = {false, false, false};
  bool has_flow = false, strange = false;  // strange: the predicted flow is not finite
  double flow_error = 0.0;
};

// Everything that is read, as plain pointers. Row 0 is the prediction, row 1 the ground truth.
template <typename Flow>
struct Job {
  Rules rules;
  const uint8_t* labels;    // (2, V)
  const int32_t* voxel;     // (2, R)
  const float* distance;    // (2, R)
  const Flow* pred_flow;    // (V, 2), or null: zero
  const at::Half* gt_flow;  // (V, 2), or null: zero
  int64_t num_voxels, num_rays;

  C10_HOST_DEVICE Ray ray(int64_t i) const {
    Ray ray;
    const int64_t p = voxel[i], g = voxel[num_rays + i];
    if (p < 0 || p >= num_voxels || g < 0 || g >= num_voxels) return ray;
    const int pred = labels[p], gt = labels[num_voxels + g];
    if (gt == rules.free_label || gt >= rules.num_classes || pred >= rules.num_classes) return ray;
    ray.gt = gt;
    ray.pred = pred;
    if (pred != gt) return ray;
    const double error = ::fabs(static_cast<double>(distance[i]) - static_cast<double>(distance[num_rays + i]));
    for (int t = 0; t < kThresholds; ++t) ray.within[t] = error < rules.thresholds[t];
    ray.has_flow = error < rules.flow_threshold && ((rules.moving >> gt) & 1u) != 0;
    if (ray.has_flow) compare_flow(p, g, ray);
    return ray;
  }

 private:
  C10_HOST_DEVICE void compare_flow(int64_t p, int64_t g, Ray& ray) const {
    double sum = 0.0;
    for (int axis = 0; axis < 2; ++axis) {
      const double pred = pred_flow == nullptr ? 0.0 : static_cast<double>(pred_flow[2 * p + axis]);
      const double gt = gt_flow == nullptr ? 0.0 : static_cast<double>(static_cast<float>(gt_flow[2 * g + axis]));
      ray.strange = ray.strange || !(::fabs(pred) <= DBL_MAX);
      sum += square(gt - pred);
    }
    ray.flow_error = ::sqrt(sum);
  }
};

// Counters of blocks lie in memory as (values, blocks). The values: kRows x classes counters, the number of rays whose
// predicted flow is not finite, and the largest label of prediction and ground truth.
struct Layout {
  int num_classes;

  C10_HOST_DEVICE int cell(int row, int label) const { return row * num_classes + label; }
  C10_HOST_DEVICE int strange() const { return kRows * num_classes; }
  C10_HOST_DEVICE int largest(int grid) const { return strange() + 1 + grid; }
  C10_HOST_DEVICE int size() const { return strange() + 3; }
};

constexpr int kMaxValues = kRows * kMaxClasses + 3;

// Kinds of problems, as in ../ray_counts.py.
enum Problem : int64_t { kNone = 0, kPredLabel = 1, kGtLabel = 2, kPredFlow = 3 };

// Whether a sample, whose `values` were summed over all its blocks, may count. If not, and if it is the first such
// sample, `problem` (5,) says why: how many there are, sample, kind and two numbers.
C10_HOST_DEVICE inline bool accept(const int64_t* values, Layout layout, int64_t sample, int64_t* problem) {
  const int64_t pred = values[layout.largest(0)], gt = values[layout.largest(1)], strange = values[layout.strange()];
  const int64_t kind = pred >= layout.num_classes ? kPredLabel
                       : gt >= layout.num_classes ? kGtLabel
                       : strange > 0              ? kPredFlow
                                                  : kNone;
  if (kind == kNone) return true;
  if (problem[0]++ == 0) {
    problem[1] = sample;
    problem[2] = kind;
    problem[3] = kind == kPredLabel ? pred : kind == kGtLabel ? gt : strange;
    problem[4] = 0;
    for (int c = 0; c < layout.num_classes; ++c) problem[4] += values[layout.cell(kFlow, c)];
  }
  return false;
}

inline int64_t num_blocks(int64_t num_rays) {
  return num_rays <= kBlock ? 1 : (num_rays + kBlock - 1) / kBlock;  // without rays there still are labels to look at
}

// The caller in Python checks with better messages; these keep a direct call through torch.ops inside its memory.
inline Rules check_arguments(const at::Tensor& labels, const at::Tensor& voxel, const at::Tensor& distance,
                             const std::optional<at::Tensor>& pred_flow, const std::optional<at::Tensor>& gt_flow,
                             int64_t free_label, at::IntArrayRef flow_classes, at::ArrayRef<double> thresholds,
                             double flow_threshold, const at::Tensor& counts, const at::Tensor& flow_error,
                             const at::Tensor& problem) {
  const auto check = [&](const char* name, const at::Tensor& tensor, at::ScalarType dtype, int64_t dim) {
    TORCH_CHECK(tensor.scalar_type() == dtype && tensor.dim() == dim, "ray_counts: ", name, " must be ", dtype, " with ",
                dim, " axes, got ", tensor.scalar_type(), " ", tensor.sizes());
    TORCH_CHECK(tensor.device() == labels.device(), "ray_counts: ", name, " must be on ", labels.device(), ", got ",
                tensor.device());
  };
  check("labels", labels, at::kByte, 4);
  check("voxel", voxel, at::kInt, 2);
  check("distance", distance, at::kFloat, 2);
  check("counts", counts, at::kLong, 2);
  check("flow_error", flow_error, at::kDouble, 1);
  check("problem", problem, at::kLong, 1);
  TORCH_CHECK(labels.size(0) == 2 && voxel.size(0) == 2 && distance.sizes() == voxel.sizes(),
              "ray_counts: labels, voxel and distance must have two rows, got ", labels.sizes(), " ", voxel.sizes(), " ",
              distance.sizes());
  const int64_t classes = counts.size(1);
  TORCH_CHECK(classes >= 1 && classes <= kMaxClasses, "ray_counts: 1 to ", kMaxClasses, " classes, got ", classes);
  TORCH_CHECK(counts.size(0) == kRows && flow_error.size(0) == classes && problem.size(0) == 5 &&
                  counts.is_contiguous() && flow_error.is_contiguous() && problem.is_contiguous(),
              "ray_counts: counts, flow_error and problem must be contiguous (6, K), (K,) and (5,), got ",
              counts.sizes(), " ", flow_error.sizes(), " ", problem.sizes());
  for (const auto* flow : {&pred_flow, &gt_flow}) {
    if (!flow->has_value()) continue;
    check("flow", **flow, flow == &gt_flow ? at::kHalf : (*flow)->scalar_type(), 4);
    TORCH_CHECK((*flow)->sizes().slice(0, 3) == labels.sizes().slice(1) && (*flow)->size(3) == 2,
                "ray_counts: flow must be (X, Y, Z, 2), got ", (*flow)->sizes());
  }
  TORCH_CHECK(thresholds.size() == kThresholds, "ray_counts: three thresholds, got ", thresholds.size());
  Rules rules{{thresholds[0], thresholds[1], thresholds[2]}, flow_threshold, 0, static_cast<int>(classes),
              static_cast<int>(free_label)};
  for (const int64_t label : flow_classes) {
    TORCH_CHECK(label >= 0 && label < classes, "ray_counts: flow class ", label, " of ", classes, " classes");
    rules.moving |= uint64_t{1} << label;
  }
  return rules;
}

inline at::Tensor contiguous_or_none(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? tensor->contiguous() : at::Tensor();
}

// Needs contiguous tensors; a flow may be undefined.
template <typename Flow>
Job<Flow> make_job(const Rules& rules, const at::Tensor& labels, const at::Tensor& voxel, const at::Tensor& distance,
                   const at::Tensor& pred_flow, const at::Tensor& gt_flow) {
  return {rules,
          labels.const_data_ptr<uint8_t>(),
          voxel.const_data_ptr<int32_t>(),
          distance.const_data_ptr<float>(),
          pred_flow.defined() ? pred_flow.const_data_ptr<Flow>() : nullptr,
          gt_flow.defined() ? gt_flow.const_data_ptr<at::Half>() : nullptr,
          labels.numel() / 2,
          voxel.size(1)};
}

}  // namespace mmdet3d::ray_counts
