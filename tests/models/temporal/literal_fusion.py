"""The sparse temporal fusion as its steps read, with history volumes [B, T * C, Z, Y, X] and grid_sample."""

import torch
from torch.nn import functional as F


class LiteralFusion:
    """Keeps the state of one stage from call to call, with the weights of a :class:`SparseFusion`."""

    def __init__(self, module, grid):
        self.module, self.grid = module, grid
        self.history = self.bda = self.ids = None

    def __call__(self, volume, logits, occupied, ids, starts, bda, previous_from_current):
        slots = self.module.history_num
        batch, channels, *size = volume.shape
        if self.history is None:
            self.history, self.bda, self.ids = volume.repeat(1, slots, 1, 1, 1), bda.clone(), list(ids)
        history = self.history.detach()
        for b in range(batch):
            assert starts[b] or self.ids[b] == ids[b]
        # Where a sequence starts, the history is the current volume in every slot, with its gradient.
        rows = [volume[b].repeat(slots, 1, 1, 1) if starts[b] else history[b] for b in range(batch)]
        augs = torch.stack([bda[b] if starts[b] else self.bda[b] for b in range(batch)])
        self.ids = [ids[b] if starts[b] else self.ids[b] for b in range(batch)]
        sampled = self.warp(torch.stack(rows), augs, bda, previous_from_current)
        output = torch.stack([self.fuse(volume[b], sampled[b], logits[b], occupied[b]) for b in range(batch)])
        self.history = torch.cat([output, sampled[:, : (slots - 1) * channels]], 1).detach()
        self.bda = bda.clone()
        return output

    def warp(self, history, previous_bda, bda, previous_from_current):
        size_z, size_y, size_x = history.shape[2:]
        origin = torch.eye(4, dtype=torch.float64)
        for axis in range(3):
            origin[axis, axis], origin[axis, 3] = self.grid.cell[axis], self.grid.low[axis]
        warped = []
        for b in range(len(history)):
            matrix = (torch.linalg.inv(origin) @ previous_bda[b].double() @ previous_from_current[b].double()
                      @ torch.linalg.inv(bda[b].double()) @ origin)
            grid = torch.zeros(1, size_z, size_y, size_x, 3, dtype=history.dtype)
            for z in range(size_z):
                for y in range(size_y):
                    for x in range(size_x):
                        source = matrix @ torch.tensor([x, y, z, 1], dtype=torch.float64)
                        last = torch.tensor([size_x - 1, size_y - 1, size_z - 1])
                        grid[0, z, y, x] = source[:3] / last * 2 - 1
            warped.append(F.grid_sample(history[b : b + 1], grid, mode="bilinear", padding_mode="zeros",
                                        align_corners=True)[0])
        return torch.stack(warped)

    def fuse(self, volume, sampled, logits, occupied):
        module, top_k = self.module, self.module.top_k
        current = volume.flatten(1).T  # [V, C], voxel (z * Y + y) * X + x
        past = sampled.flatten(1).T
        embedding = module.occ_embedding(logits.permute(2, 1, 0, 3).flatten(0, 2))
        p = occupied.flatten()
        output = current.clone()
        for index in p.topk(top_k).indices:
            row = torch.cat([past[index], current[index], embedding[index]])
            output[index] = output[index] + module.history_fusion_linear(row)
        half = past.shape[1] // module.history_num * (module.history_num // 2)
        for index in (1 - p).topk(len(p) - top_k).indices:
            row = torch.cat([past[index, :half], current[index], embedding[index]])
            output[index] = output[index] + module.history_fusion_bg_linear(row)
        return output.T.reshape(volume.shape)
