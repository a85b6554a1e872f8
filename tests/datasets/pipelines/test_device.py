"""Images that travel as bytes and are normalised on the device: bit for bit those that are normalised by the loader."""

import data_world
import pytest
import torch
from mmcv.parallel import collate

from mmdet3d.datasets.nuscenes_occupancy import NuScenesOccupancyDataset
from mmdet3d.datasets.pipelines.device import normalise_batch, normalise_on_device
from mmdet3d.datasets.pipelines.images import normalise


def test_every_value_in_every_channel(device):
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    images = torch.stack([torch.cat([values, values.flip(1), values.flip(2)])] * 2)  # (2, 3, 16, 16)
    result = normalise_on_device(images.to(device))
    assert result.dtype == torch.float32 and result.device.type == device
    for image, got in zip(images, result.cpu(), strict=True):
        rgb = image.flip(0).permute(1, 2, 0).numpy()
        assert torch.equal(got, torch.from_numpy(normalise(rgb)))


def test_other_inputs(device):
    floats = torch.ones(2, 3, 4, 4, device=device)
    assert normalise_on_device(floats) is floats
    strided = torch.randint(0, 256, (4, 6, 3), dtype=torch.uint8, device=device).permute(2, 0, 1)
    assert torch.equal(normalise_on_device(strided), normalise_on_device(strided.contiguous()))
    with pytest.raises(ValueError, match=r"expected images \[..., 3, H, W\], got shape \(2, 4, 4\)"):
        normalise_on_device(torch.zeros(2, 4, 4, dtype=torch.uint8, device=device))


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
    inputs = [normalise_batch(batch)["img_inputs"] for batch in batches]
    shipped = batches[1]["img_inputs"]
    if not training:
        inputs, shipped = [entry[0] for entry in inputs], shipped[0]
    assert shipped[0].dtype == torch.uint8 and len(inputs[1]) == 6
    assert all(torch.equal(a, b) for a, b in zip(*inputs, strict=True))
