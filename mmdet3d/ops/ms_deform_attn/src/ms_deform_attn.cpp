// Schema and argument checks of ms_deform_attn; the contract is in ms_deform_attn.py.
#include "ms_deform_attn.h"

#include <torch/library.h>

namespace mmdet3d::ms_deform_attn {

std::vector<Level> read_levels(at::IntArrayRef spatial_shapes) {
  TORCH_CHECK(spatial_shapes.size() % 2 == 0, "ms_deform_attn: spatial_shapes must be pairs (H, W), got ",
              spatial_shapes);
  std::vector<Level> levels;
  int64_t start = 0;
  for (size_t i = 0; i < spatial_shapes.size(); i += 2) {
    TORCH_CHECK(spatial_shapes[i] > 0 && spatial_shapes[i + 1] > 0,
                "ms_deform_attn: spatial_shapes must be positive, got ", spatial_shapes);
    levels.push_back({spatial_shapes[i], spatial_shapes[i + 1], start});
    start += spatial_shapes[i] * spatial_shapes[i + 1];
  }
  return levels;
}

Sizes check_inputs(const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& locations,
                   const at::Tensor& weights) {
  TORCH_CHECK(value.dim() == 4, "ms_deform_attn: value must have shape (B, S, M, D), got ", value.sizes());
  TORCH_CHECK(locations.dim() == 6 && locations.size(5) == 2,
              "ms_deform_attn: sampling_locations must have shape (B, Q, M, L, P, 2), got ", locations.sizes());
  for (const at::Tensor* tensor : {&locations, &weights}) {
    TORCH_CHECK(tensor->scalar_type() == value.scalar_type() && tensor->device() == value.device(),
                "ms_deform_attn: sampling_locations and attention_weights must be ", value.scalar_type(), " on ",
                value.device(), " like value, got ", tensor->scalar_type(), " on ", tensor->device());
  }
  const std::vector<Level> levels = read_levels(spatial_shapes);
  const Sizes sizes{value.size(0),     value.size(1),     value.size(2),    value.size(3),
                    locations.size(1), locations.size(3), locations.size(4)};
  TORCH_CHECK(locations.size(0) == sizes.batch && locations.size(2) == sizes.heads &&
                  sizes.levels == static_cast<int64_t>(levels.size()),
              "ms_deform_attn: sampling_locations must have shape (B, Q, M, L, P, 2) with B, M of value ",
              value.sizes(), " and L = ", levels.size(), ", got ", locations.sizes());
  TORCH_CHECK(weights.sizes() == locations.sizes().slice(0, 5),
              "ms_deform_attn: attention_weights must have shape ", locations.sizes().slice(0, 5), ", got ",
              weights.sizes());
  const int64_t pixels = levels.empty() ? 0 : levels.back().start + levels.back().height * levels.back().width;
  TORCH_CHECK(sizes.pixels == pixels, "ms_deform_attn: value must have ", pixels, " rows for spatial_shapes ",
              spatial_shapes, ", got ", sizes.pixels);
  return sizes;
}

void check_grad(const at::Tensor& grad_out, const at::Tensor& value, const Sizes& sizes) {
  TORCH_CHECK(grad_out.dim() == 3 && grad_out.size(0) == sizes.batch && grad_out.size(1) == sizes.queries &&
                  grad_out.size(2) == sizes.heads * sizes.channels,
              "ms_deform_attn: grad_out must have shape (B, Q, M * D) = (", sizes.batch, ", ", sizes.queries, ", ",
              sizes.heads * sizes.channels, "), got ", grad_out.sizes());
  TORCH_CHECK(grad_out.scalar_type() == value.scalar_type() && grad_out.device() == value.device(),
              "ms_deform_attn: grad_out must be ", value.scalar_type(), " on ", value.device(), ", got ",
              grad_out.scalar_type(), " on ", grad_out.device());
}

}  // namespace mmdet3d::ms_deform_attn

TORCH_LIBRARY_FRAGMENT(mmdet3d, m) {
  // spatial_shapes is flat: H_0, W_0, H_1, W_1, ...
  m.def(
      "ms_deform_attn_forward(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
      "Tensor attention_weights) -> Tensor");
  // Gradients of value, sampling_locations and attention_weights.
  m.def(
      "ms_deform_attn_backward(Tensor grad_out, Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
      "Tensor attention_weights) -> (Tensor, Tensor, Tensor)");
}
