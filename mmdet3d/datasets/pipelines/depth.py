"""Lidar points, and what they say about the depth of image pixels: the supervision of the depth network."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mmdet3d.datasets.infos import DataError, resolve_path
from mmdet3d.datasets.pipelines.compose import require, sample_error
from mmdet3d.registry import PIPELINES


@PIPELINES.register_module()
class LoadPointsFromFile:
    """Pipeline step: ``points``, a [P, use_dim] float32 tensor in the frame of the lidar, metres.

    Args:
        coord_type: "LIDAR", the only frame there is.
        load_dim: Numbers per point in the file, little-endian float32.
        use_dim: How many of them to keep, from the first.
        file_client_args: ``dict(backend="disk")``, the only backend there is.
        missing_ok: A sample without a lidar file gets no points instead of an error, for test time, when the model
            does not read them. Training without lidar leaves this step, ``PointToMultiViewDepth`` and the key
            ``gt_depth`` out of the pipeline.

    Raises:
        ValueError: an option has another value.
    """

    def __init__(self, coord_type: str = "LIDAR", load_dim: int = 5, use_dim: int = 3,
                 file_client_args: Mapping | None = None, *, missing_ok: bool = False) -> None:
        if coord_type != "LIDAR":
            raise ValueError(f"coord_type: only 'LIDAR' is supported, got {coord_type!r}")
        if file_client_args is not None and dict(file_client_args) != {"backend": "disk"}:
            raise ValueError(f"file_client_args: only dict(backend='disk') is supported, got {file_client_args!r}")
        if not (isinstance(load_dim, int) and isinstance(use_dim, int) and 3 <= use_dim <= load_dim):
            raise ValueError(f"expected 3 <= use_dim <= load_dim, got use_dim={use_dim!r}, load_dim={load_dim!r}")
        self.load_dim, self.use_dim, self.missing_ok = load_dim, use_dim, missing_ok

    def __call__(self, results: dict) -> dict:
        """Add the points of ``pts_filename``.

        Raises:
            DataError: the file is missing, or its size is not that of whole points.
        """
        name = results.get("pts_filename")
        try:
            if name is None:
                raise DataError("the info record has no lidar_path")
            path = resolve_path(name, results.get("info_file"))
        except DataError as error:
            if not self.missing_ok:
                raise sample_error(self, results, str(error)) from None
            results["points"] = torch.zeros(0, self.use_dim)
            return results
        try:
            values = np.fromfile(path, "<f4")
            size = path.stat().st_size
        except OSError as error:
            raise sample_error(self, results, f"cannot read lidar file {name}: {error}") from error
        if size == 0 or size % (4 * self.load_dim):
            raise sample_error(self, results, f"lidar file {name} has {size} bytes; expected whole points of "
                                              f"{self.load_dim} float32 numbers")
        points = values.reshape(-1, self.load_dim)[:, : self.use_dim].astype(np.float32)
        results["points"] = torch.from_numpy(np.ascontiguousarray(points))
        return results


def depth_map(points: Tensor, size: tuple[int, int], depth_range: tuple[float, float], downsample: int = 1,
              nearest: bool = False) -> Tensor:
    """Depths of projected points as a map.

    Args:
        points: [P, 3] float32: column and row in pixels, depth in metres.
        size: (H, W) of the image.
        depth_range: Depths from the first up to, but without, the second are kept.
        downsample: Pixels of the image per pixel of the map, along both axes.
        nearest: Where several points meet in one pixel keep the nearest. Otherwise keep the first after a sort by
            ``pixel + depth / 100`` in float32 with ``torch.argsort``, as the published data has it: that key has steps
            of up to 1.6 m in the lower rows, and the order of equal keys is that of the sort.

    Returns:
        [H // downsample, W // downsample] float32, 0 where there is no point.
    """
    height, width = (n // downsample for n in size)
    coordinates = torch.round(points[:, :2] / downsample)  # half to even
    depth = points[:, 2]
    kept = ((coordinates[:, 0] >= 0) & (coordinates[:, 0] < width) & (coordinates[:, 1] >= 0)
            & (coordinates[:, 1] < height) & (depth >= depth_range[0]) & (depth < depth_range[1]))
    coordinates, depth = coordinates[kept], depth[kept]
    rank = coordinates[:, 0] + coordinates[:, 1] * width
    if nearest:
        result = torch.full((height * width,), torch.inf)
        result.scatter_reduce_(0, rank.long(), depth, "amin")
        return torch.where(result.isinf(), 0, result).view(height, width)
    order = (rank + depth / 100.0).argsort()
    rank, depth = rank[order], depth[order]
    first = torch.ones(len(rank), dtype=torch.bool)
    first[1:] = rank[1:] != rank[:-1]
    result = torch.zeros(height * width)
    result[rank[first].long()] = depth[first]
    return result.view(height, width)


def project(points: Tensor, lidar2img: Tensor, nearest_depth: float) -> Tensor:
    """[P', 3] float32 column, row and depth of those of [P, 3] points that are ``nearest_depth`` away or more.

    Args:
        points: [P, 3] in the frame of the lidar.
        lidar2img: [4, 4] matrix to pixels times depth.
        nearest_depth: Smallest depth in metres.
    """
    projected = points @ lidar2img[:3, :3].T + lidar2img[:3, 3]
    projected = projected[projected[:, 2] >= nearest_depth]
    return torch.cat([projected[:, :2] / projected[:, 2:3], projected[:, 2:3]], 1)


@PIPELINES.register_module()
class PointToMultiViewDepth:
    """Pipeline step: ``gt_depth``, the depth of the lidar points in every camera.

    Args:
        grid_config: ``depth`` = (near, far, step) in metres is read.
        downsample: Pixels of the image per pixel of the map.
        nearest: Keep the nearest of the points of a pixel, see :func:`depth_map`.

    Raises:
        ValueError: ``grid_config`` has no depth limits, or ``downsample`` is not a positive whole number.
    """

    def __init__(self, grid_config: Mapping, downsample: int = 1, *, nearest: bool = False) -> None:
        depth = grid_config.get("depth", ())
        if len(depth) != 3 or not 0 < depth[0] < depth[1]:
            raise ValueError(f"grid_config: expected depth=[near, far, step] with 0 < near < far, got {depth!r}")
        if not isinstance(downsample, int) or downsample < 1:
            raise ValueError(f"downsample: expected a positive whole number, got {downsample!r}")
        self.depth_range = (float(depth[0]), float(depth[1]))
        self.downsample, self.nearest = downsample, nearest

    def __call__(self, results: dict) -> dict:
        """Add ``gt_depth``, [N, H // downsample, W // downsample] float32, by the order of ``cam_names``.

        Args:
            results: ``points`` [P, 3 or more], ``lidar2img`` [N, 4, 4] and ``img_inputs``, whose images have the size.

        Raises:
            DataError: a step that loads them is missing.
        """
        require(self, results, "points", "lidar2img", "img_inputs")
        size = tuple(results["img_inputs"][0].shape[-2:])
        points = results["points"][:, :3]
        results["gt_depth"] = torch.stack([
            depth_map(project(points, matrix, self.depth_range[0]), size, self.depth_range, self.downsample,
                      self.nearest)
            for matrix in results["lidar2img"]])
        return results
