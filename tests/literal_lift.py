"""The lift as the reference implementation takes it: one matrix product after the other on float32, for all points."""

import torch


def literal_points(camera, bda, image_size, feature_size, depths):
    """[B, N, D, h, w, 3] frustum points in the augmented key-ego frame, in the dtype of ``bda``, on the CPU.

    Args:
        camera: CameraFrame of B samples of N cameras.
        bda: [B, 4, 4].
        image_size, feature_size: (H, W) and (h, w).
        depths: [D].
    """
    dtype = bda.dtype
    pose, intrinsics, post_aug = (m.to(dtype) for m in (camera.key_ego_from_camera, camera.intrinsics, camera.post_aug))
    per_camera = (*intrinsics.shape[:2], 1, 1, 1)
    v, u = (torch.linspace(0, length - 1, count, dtype=dtype)
            for length, count in zip(image_size, feature_size, strict=True))
    frustum = torch.stack(torch.meshgrid(depths.to(dtype), v, u, indexing="ij")[::-1], -1)  # [D, h, w, (u, v, d)]
    linear = torch.eye(3, dtype=dtype).repeat(*per_camera[:2], 1, 1)
    linear[..., :2, :2] = post_aug[..., :2, :2]
    offset = torch.nn.functional.pad(post_aug[..., :2, 2], (0, 1))
    points = (frustum - offset.view(*per_camera, 3))[..., None]
    points = torch.matmul(torch.inverse(linear).view(*per_camera, 3, 3), points)
    points = torch.cat([points[..., :2, :] * points[..., 2:, :], points[..., 2:, :]], -2)
    ego_from_pixel = torch.matmul(pose[..., :3, :3], torch.inverse(intrinsics[..., :3, :3]))
    points = torch.matmul(ego_from_pixel.view(*per_camera, 3, 3), points)
    points = points + pose[..., :3, 3].reshape(*per_camera, 3, 1)
    points = torch.matmul(bda[:, :3, :3].reshape(-1, 1, 1, 1, 1, 3, 3), points)
    return points[..., 0] + bda[:, :3, 3].view(-1, 1, 1, 1, 1, 3)


def literal_cells(points, grid):
    """[...] int32 flat voxel index of points [..., 3], -1 outside; coordinates are cut toward zero."""
    low, edge = (torch.tensor(values, dtype=points.dtype) for values in (grid.low, grid.cell))
    index = ((points - low) / edge).long()
    size_x, size_y, _ = grid.size_xyz
    inside = ((index >= 0) & (index < torch.tensor(grid.size_xyz))).all(-1)
    flat = (index[..., 2] * size_y + index[..., 1]) * size_x + index[..., 0]
    return torch.where(inside, flat, -1).int()
