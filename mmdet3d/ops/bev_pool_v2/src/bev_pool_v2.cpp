// Schema and argument checks of bev_pool_v2; the contract is in bev_pool_v2.py.
#include "bev_pool_v2.h"

#include <torch/library.h>

#include <limits>

namespace mmdet3d::bev_pool_v2 {

Sizes check_inputs(const at::Tensor& depth, const at::Tensor& context, const at::Tensor& cell_index, int64_t cells) {
  TORCH_CHECK(depth.dim() == 5, "bev_pool_v2: depth must have shape (B, N, D, H, W), got ", depth.sizes());
  TORCH_CHECK(context.dim() == 5, "bev_pool_v2: context must have shape (B, N, H, W, C), got ", context.sizes());
  TORCH_CHECK(context.scalar_type() == depth.scalar_type(), "bev_pool_v2: context must be ", depth.scalar_type(),
              " like depth, got ", context.scalar_type());
  TORCH_CHECK(context.device() == depth.device(), "bev_pool_v2: context must be on ", depth.device(), ", got ",
              context.device());
  TORCH_CHECK(cell_index.device() == depth.device(), "bev_pool_v2: cell_index must be on ", depth.device(), ", got ",
              cell_index.device());
  TORCH_CHECK(cell_index.sizes() == depth.sizes(), "bev_pool_v2: cell_index must have the shape ", depth.sizes(),
              " of depth, got ", cell_index.sizes());
  TORCH_CHECK(context.size(0) == depth.size(0) && context.size(1) == depth.size(1) &&
                  context.size(2) == depth.size(3) && context.size(3) == depth.size(4),
              "bev_pool_v2: context must start with the (B, N, H, W) of depth ", depth.sizes(), ", got ",
              context.sizes());
  Sizes sizes{depth.size(0), depth.size(1), depth.size(2), depth.size(3) * depth.size(4), context.size(4), cells};
  TORCH_CHECK(sizes.points() < std::numeric_limits<int32_t>::max() &&
                  sizes.voxels() < std::numeric_limits<int32_t>::max(),
              "bev_pool_v2: more points or voxels than int32 can count");
  return sizes;
}

int64_t count_cells(at::IntArrayRef grid_size) {
  TORCH_CHECK(grid_size.size() == 3 && grid_size[0] > 0 && grid_size[1] > 0 && grid_size[2] > 0,
              "bev_pool_v2: grid_size must be three positive integers (Z, Y, X), got ", grid_size);
  return grid_size[0] * grid_size[1] * grid_size[2];
}

void check_order(const at::Tensor& points, const at::Tensor& starts, const at::Tensor& depth, const Sizes& sizes) {
  TORCH_CHECK(points.scalar_type() == at::kInt && starts.scalar_type() == at::kInt,
              "bev_pool_v2: points and starts must be int32, got ", points.scalar_type(), " and ",
              starts.scalar_type());
  TORCH_CHECK(points.device() == depth.device() && starts.device() == depth.device(),
              "bev_pool_v2: points and starts must be on ", depth.device(), ", got ", points.device(), " and ",
              starts.device());
  TORCH_CHECK(points.dim() == 1 && points.size(0) == sizes.points(), "bev_pool_v2: points must have shape (",
              sizes.points(), "), got ", points.sizes());
  TORCH_CHECK(starts.dim() == 1 && starts.size(0) == sizes.voxels() + 1, "bev_pool_v2: starts must have shape (",
              sizes.voxels() + 1, "), got ", starts.sizes());
}

int64_t check_grad(const at::Tensor& grad_volume, const at::Tensor& context) {
  TORCH_CHECK(grad_volume.dim() == 5 && context.dim() == 5 && grad_volume.size(0) == context.size(0) &&
                  grad_volume.size(1) == context.size(4),
              "bev_pool_v2: grad_volume must have shape (B, C, Z, Y, X) for context ", context.sizes(), ", got ",
              grad_volume.sizes());
  TORCH_CHECK(grad_volume.scalar_type() == context.scalar_type() && grad_volume.device() == context.device(),
              "bev_pool_v2: grad_volume must be ", context.scalar_type(), " on ", context.device(), ", got ",
              grad_volume.scalar_type(), " on ", grad_volume.device());
  return count_cells(grad_volume.sizes().slice(2));
}

}  // namespace mmdet3d::bev_pool_v2

TORCH_LIBRARY_FRAGMENT(mmdet3d, m) {
  // Stable counting sort of the points by voxel: (points, starts).
  m.def("bev_pool_v2_sort(Tensor cell_index, SymInt num_cells) -> (Tensor, Tensor)");
  // cell_index is not read by the forward pass; it is an argument because the backward pass gathers by it.
  m.def(
      "bev_pool_v2_forward(Tensor depth, Tensor context, Tensor cell_index, Tensor points, Tensor starts, "
      "SymInt[3] grid_size) -> Tensor");
  // On CUDA: what `frames` samples pool as one volume, channels last, (B / frames, Z, Y, X, frames * C) in `dtype`.
  m.def(
      "bev_pool_v2_stacked(Tensor depth, Tensor context, Tensor points, Tensor starts, SymInt[3] grid_size, "
      "SymInt frames, ScalarType dtype) -> Tensor");
  // Gradients of depth and context.
  m.def(
      "bev_pool_v2_backward(Tensor grad_volume, Tensor depth, Tensor context, Tensor cell_index) "
      "-> (Tensor, Tensor)");
}
