// Schemas and argument checks of oa_cross_attention and what prepares its inputs; the contracts are in the Python files.
#include "oa_cross_attention.h"

#include <ATen/AccumulateType.h>
#include <torch/library.h>

#include <limits>
#include <utility>

namespace mmdet3d::oa_cross_attention {
namespace {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

void check(const char* name, const at::Tensor& tensor, at::ScalarType dtype, at::Device device,
           at::IntArrayRef expected) {
  TORCH_CHECK(tensor.scalar_type() == dtype && tensor.device() == device, "oa_cross_attention: ", name, " must be ",
              dtype, " on ", device, ", got ", tensor.scalar_type(), " on ", tensor.device());
  TORCH_CHECK(tensor.sizes() == expected, "oa_cross_attention: ", name, " must have shape ", expected, ", got ",
              tensor.sizes());
  TORCH_CHECK(tensor.numel() <= kMost, "oa_cross_attention: ", name, " must have fewer than 2^31 elements, got shape ",
              tensor.sizes());
}

}  // namespace

Sizes check_inputs(const Tensors& in, int64_t height, int64_t width) {
  TORCH_CHECK(in.value.dim() == 5, "oa_cross_attention: value must have shape (N, B, S, M, D), got ",
              in.value.sizes());
  TORCH_CHECK(in.base.dim() == 5, "oa_cross_attention: base_offsets must have shape (B, Q, M, P, 2), got ",
              in.base.sizes());
  const int64_t cameras = in.value.size(0), batch = in.value.size(1), heads = in.value.size(3);
  const int64_t channels = in.value.size(4), queries = in.base.size(1), points = in.base.size(3);
  TORCH_CHECK(height > 0 && width > 0 && height <= kMost && width <= kMost,
              "oa_cross_attention: the size of the maps must be positive, got ", height, " x ", width);
  const auto dtype = at::toAccumulateType(in.value.scalar_type(), /*is_cuda=*/true);
  const auto device = in.value.device();
  check("value", in.value, in.value.scalar_type(), device, {cameras, batch, height * width, heads, channels});
  check("base_offsets", in.base, dtype, device, {batch, queries, heads, points, 2});
  check("offset_slope", in.slope, dtype, device, {heads, points, 2});
  check("attention_weights", in.attention, dtype, device, {batch, queries, heads, points});
  check("position", in.position, dtype, device, {cameras, batch, queries, points, 2});
  check("consistency", in.consistency, dtype, device, {cameras, batch, queries, points});
  check("visibility", in.visibility, dtype, device, {batch, queries, points});
  check("source", in.source, at::kInt, device, {cameras, batch, queries});
  TORCH_CHECK(batch * queries * heads * channels <= kMost,
              "oa_cross_attention: the result must have fewer than 2^31 elements");
  const auto narrow = [](int64_t number) { return static_cast<int>(number); };
  return {narrow(cameras), narrow(batch),    narrow(queries), narrow(heads),
          narrow(points),  narrow(channels), narrow(height),  narrow(width)};
}

void check_grad(const at::Tensor& grad_out, const Tensors& in, const Sizes& sizes) {
  check("grad_out", grad_out, in.base.scalar_type(), in.base.device(),
        {sizes.batch, sizes.queries, int64_t{sizes.heads} * sizes.channels});
}

}  // namespace mmdet3d::oa_cross_attention

TORCH_LIBRARY_FRAGMENT(mmdet3d, m) {
  // position, depth and valid
  m.def(
      "oa_project_points(Tensor points, Tensor image_from_points, float span_x, float span_y, float min_depth) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("oa_assign_queries(Tensor seen) -> Tensor");
  // depth is (B, N, h * w, D): the bins of a pixel side by side.
  m.def(
      "oa_depth_consistency(Tensor position, Tensor anchor_depth, Tensor valid, Tensor depth, SymInt height, "
      "SymInt width, float first, float step, float sigma, bool squared_sigma, bool distance_to_neighbours, "
      "bool softmax_depth) -> Tensor");
  m.def(
      "oa_cross_attention_forward(Tensor value, SymInt height, SymInt width, Tensor base_offsets, "
      "Tensor offset_slope, Tensor attention_weights, Tensor position, Tensor consistency, Tensor visibility, "
      "Tensor source) -> Tensor");
  // Gradients of value, base_offsets, offset_slope and attention_weights.
  m.def(
      "oa_cross_attention_backward(Tensor grad_out, Tensor value, SymInt height, SymInt width, Tensor base_offsets, "
      "Tensor offset_slope, Tensor attention_weights, Tensor position, Tensor consistency, Tensor visibility, "
      "Tensor source) -> (Tensor, Tensor, Tensor, Tensor)");
}
