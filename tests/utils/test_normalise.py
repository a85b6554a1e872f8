"""Images that travel as bytes and are normalised on the device: bit for bit those that are normalised by the loader."""

import sys
from pathlib import Path

import pytest
import torch
from mmcv.parallel import collate

import mmdet3d.datasets.builder  # noqa: F401  (registers the pipeline steps)
from mmdet3d.datasets.nuscenes_occupancy import NuScenesOccupancyDataset
from mmdet3d.datasets.pipelines.images import normalise
from mmdet3d.utils.normalise import normalise_images

sys.path.append(str(Path(__file__).parents[1] / "datasets"))
import data_world  # noqa: E402


def test_every_value_in_every_channel(device):
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    images = torch.stack([torch.cat([values, values.flip(1), values.flip(2)])] * 2)  # (2, 3, 16, 16)
    result = normalise_images(images.to(device))
    assert result.dtype == torch.float32 and result.device.type == device
    for image, got in zip(images, result.cpu(), strict=True):
        rgb = image.flip(0).permute(1, 2, 0).numpy()
        assert torch.equal(got, torch.from_numpy(normalise(rgb)))


def test_other_inputs(device):
    floats = torch.ones(2, 3, 4, 4, device=device)
    assert normalise_images(floats) is floats
    strided = torch.randint(0, 256, (4, 6, 3), dtype=torch.uint8, device=device).permute(2, 0, 1)
    assert torch.equal(normalise_images(strided), normalise_images(strided.contiguous()))
    with pytest.raises(ValueError, match=r"expected images \[..., 3, H, W\], got shape \(2, 4, 4\)"):
        normalise_images(torch.zeros(2, 4, 4, dtype=torch.uint8, device=device))
    with pytest.raises(TypeError, match="images must be uint8 pixels or normalised floats, got torch.int64"):
        normalise_images(torch.zeros(3, 4, 4, dtype=torch.int64, device=device))


@pytest.mark.parametrize("training", [True, False])
def test_batches_are_equal(tmp_path, training):
    path = data_world.make_world(tmp_path / "data", lengths=(3,))
    batches = []
    for ship_uint8 in (False, True):
        steps = data_world.train_steps() if training else data_world.test_steps()
        steps[0] = {**steps[0], "ship_uint8": ship_uint8}
        dataset = NuScenesOccupancyDataset(path, steps, dataset_name="occ3d")
        dataset.seed(2)
        batches.append(collate([dataset[1], dataset[2]], samples_per_gpu=2))
    floats, shipped = (batch["img_inputs"] if training else batch["img_inputs"][0] for batch in batches)
    assert floats[0].dtype == torch.float32 and shipped[0].dtype == torch.uint8 and len(shipped) == 6
    assert torch.equal(normalise_images(shipped[0]), floats[0])
    assert all(torch.equal(a, b) for a, b in zip(floats[1:], shipped[1:], strict=True))
