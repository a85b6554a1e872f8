"""The attentions as their formulas read: one query, head, camera and point at a time, sampling by grid_sample."""

import torch
from torch.nn import functional as F


def sample(image, location):
    """[C] bilinear sample of an image [C, H, W] at (x, y) in [0, 1] from border to border; zeros outside."""
    grid = (2 * location - 1).view(1, 1, 1, 2)
    return F.grid_sample(image[None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0, :, 0, 0]


def heads_of(values, num_heads, size):
    """[heads, C / heads, H, W] images of a token sequence [H * W, C]."""
    return values.T.unflatten(0, (num_heads, -1)).unflatten(-1, size)


def temporal_attention(module, query, query_pos, values, references, visibility, bev_size, scrambled=True,
                       interleaved=True):
    batch, num_query, channels = query.shape
    heads, points, (size_y, size_x) = module.num_heads, module.num_points, bev_size
    guide_history = values[:batch] if interleaved else values[0::2]
    guide = torch.cat([guide_history, query + query_pos], 2)
    offsets = module.sampling_offsets(torch.cat([guide, visibility.mean(2, keepdim=True)], 2))
    offsets = offsets.view(batch, num_query, heads, 2, points, 2)
    weights = module.attention_weights(guide).view(batch, num_query, heads, 2, points).softmax(-1)
    output = query.new_zeros(2 * batch, num_query, channels)
    for b in range(batch):
        for entry in range(2):
            row = 2 * b + entry
            images = heads_of(module.value_proj(values[row]), heads, bev_size)
            for q in range(num_query):
                for head in range(heads):
                    span = slice(head * channels // heads, (head + 1) * channels // heads)
                    for p in range(points):
                        shift = offsets[b, q, head, entry, p] / query.new_tensor([size_x, size_y])
                        weight = weights[b, q, head, entry, p] * visibility[b, q, p]
                        output[row, q, span] += weight * sample(images[head], references[row, q] + shift)
    mean = query.new_zeros(batch, num_query, channels)
    flat = output.flatten()
    for b in range(batch):
        for q in range(num_query):
            for c in range(channels):
                m = (q * channels + c) * batch + b
                both = flat[2 * m : 2 * m + 2] if scrambled else output[2 * b : 2 * b + 2, q, c]
                mean[b, q, c] = both.mean()
    return module.output_proj(mean) + query


def depth_weight(position, anchor_depth, depth, depth_range, sigma=2.0, squared=True, neighbours=True, softmax=True):
    """Weight of one anchor for the depth distribution [D, h, w] of its camera."""
    start, _, step = depth_range
    distribution = sample(depth, position)
    if softmax:
        distribution = distribution.softmax(0)
    likely = start + step * int(distribution.argmax())
    if neighbours:
        mu = min(abs(float(anchor_depth) - (likely - step)), abs(float(anchor_depth) - (likely + step)))
    else:
        mu = abs(float(anchor_depth) - likely)
    exponent = -mu ** 2 / 2 * sigma ** 2 if squared else -mu ** 2 / (2 * sigma ** 2)
    return torch.exp(torch.tensor(exponent, dtype=depth.dtype))


def shared_buffers(lists, visibility):
    """Per sample the buffer that the cameras overwrite one after the other; ``lists[n][b]`` holds query indices."""
    buffers = []
    for b in range(visibility.shape[0]):
        buffer = {}
        for per_camera in lists:
            for j, q in enumerate(per_camera[b]):
                buffer[j] = visibility[b, q]
        buffers.append(buffer)
    return buffers


def cross_attention(module, query, query_pos, tokens, anchors, mask, visibility, depth, shared=True):
    """``mask`` [N, B, Q, Z]: the anchors that count."""
    inner = module.deformable_attention
    batch, num_query, channels = query.shape
    cams, heads, points = len(mask), inner.num_heads, inner.num_points
    size_y, size_x = size = depth.shape[-2:]
    lists = [[[q for q in range(num_query) if mask[n, b, q].any()] for b in range(batch)] for n in range(cams)]
    buffers = shared_buffers(lists, visibility)
    slots = torch.zeros_like(query)
    for b in range(batch):
        for n in range(cams):
            images = heads_of(inner.value_proj(tokens[n, b]), heads, size)
            for j, q in enumerate(lists[n][b]):
                visible = buffers[b][j] if shared else visibility[b, q]
                guide = query[b, q] + query_pos[b, q]
                offsets = inner.sampling_offsets(torch.cat([guide, visible.mean()[None]])).view(heads, points, 2)
                weights = inner.attention_weights(guide).view(heads, points).softmax(-1)
                for k in range(points):
                    at = anchors.position[n, b, q, k]
                    close = depth_weight(at, anchors.depth[n, b, q, k], depth[b, n], module.depth_range)
                    for head in range(heads):
                        span = slice(head * channels // heads, (head + 1) * channels // heads)
                        location = at + offsets[head, k] / query.new_tensor([size_x, size_y])
                        slots[b, q, span] += weights[head, k] * close * visible[k] * sample(images[head], location)
    count = torch.tensor([[max(1, sum(q in lists[n][b] for n in range(cams))) for q in range(num_query)]
                          for b in range(batch)])
    return module.output_proj(slots / count[..., None]) + query
