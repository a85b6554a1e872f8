"""The losses as their formulas read: one voxel and one class at a time, Python loops, no shared steps."""

import torch
import torch.nn.functional as F

FLT_MIN = 1.1754943508222875e-38
IGNORE = 255


def valid_rows(logits, target):
    """Logits [V, K] and labels [V] of the voxels that are not ignored."""
    keep = (target.reshape(-1) != IGNORE).nonzero()[:, 0]
    return logits.reshape(-1, logits.shape[-1])[keep], target.reshape(-1).long()[keep]


def literal_radial(i, j, n_x, n_y):
    def distance(a, b):
        return ((a - n_x / 2) ** 2 + (b - n_y / 2) ** 2) ** 0.5
    return 1 + distance(i, j) / max(distance(a, b) for a in range(n_x) for b in range(n_y))


def literal_focal(logits, target, class_weights, gamma=2.0, alpha=0.25):
    """Value and gradient of the focal loss from the operator's two closed forms, in the logits' precision."""
    batch, n_x, n_y, n_z, classes = logits.shape
    grad = torch.zeros_like(logits)
    total, count = 0.0, int((target != IGNORE).sum())
    floor = torch.tensor(FLT_MIN, dtype=logits.dtype)
    for b in range(batch):
        for i in range(n_x):
            for j in range(n_y):
                for z in range(n_z):
                    if target[b, i, j, z] == IGNORE:
                        continue
                    for k in range(classes):
                        p = 1 / (1 + torch.exp(-logits[b, i, j, z, k]))
                        weight = 100 / count * float(class_weights[k]) * literal_radial(i, j, n_x, n_y)
                        log_p, log_q = torch.log(torch.maximum(p, floor)), torch.log(torch.maximum(1 - p, floor))
                        if k == target[b, i, j, z]:
                            value = -alpha * (1 - p) ** gamma * log_p
                            slope = -alpha * (1 - p) ** gamma * (1 - p - gamma * p * log_p)
                        else:
                            value = -(1 - alpha) * p ** gamma * log_q
                            slope = -(1 - alpha) * p ** gamma * (gamma * (1 - p) * log_q - p)
                        total += weight * float(value)
                        grad[b, i, j, z, k] = weight * slope
    return total, grad


def literal_negative_log(x):
    while x >= 1 - 1e-5:
        x = x - 1e-5
    while x < 1e-5:
        x = x + 1e-5
    return F.binary_cross_entropy_with_logits(-torch.log(1 / x - 1), torch.ones_like(x))


def literal_semantic_affinity(logits, target):
    logits, target = valid_rows(logits, target)
    total, present = 0, 0
    for k in range(logits.shape[1] - 1):
        p, y = logits.softmax(1)[:, k], (target == k).to(logits.dtype)
        if y.sum() == 0:
            continue
        present += 1
        if p.sum() > 0:
            total = total + literal_negative_log((p * y).sum() / (p.sum() + 1e-5))
        total = total + literal_negative_log((p * y).sum() / (y.sum() + 1e-5))
        if (1 - y).sum() > 0:
            total = total + literal_negative_log(((1 - p) * (1 - y)).sum() / ((1 - y).sum() + 1e-5))
    return total / present


def literal_geometric_affinity(logits, target, empty):
    logits, target = valid_rows(logits, target)
    e, y = logits.softmax(1)[:, empty], (target != empty).to(logits.dtype)
    n = 1 - e
    return (literal_negative_log((y * n).sum() / (n.sum() + 1e-5))
            + literal_negative_log((y * n).sum() / (y.sum() + 1e-5))
            + literal_negative_log(((1 - y) * e).sum() / ((1 - y).sum() + 1e-5)))


def literal_lovasz(logits, target):
    logits, target = valid_rows(logits, target)
    losses = []
    for k in range(logits.shape[1]):
        y = (target == k).to(logits.dtype)
        if y.sum() == 0:
            continue
        errors = (y - logits.softmax(1)[:, k]).abs()
        order = sorted(range(len(errors)), key=lambda v: -errors[v].item())
        before, seen, others, loss = 0.0, 0.0, 0.0, 0
        for v in order:
            seen, others = seen + float(y[v]), others + float(1 - y[v])
            jaccard = 1 - (float(y.sum()) - seen) / (float(y.sum()) + others)
            loss, before = loss + errors[v] * (jaccard - before), jaccard
        losses.append(loss)
    return sum(losses) / len(losses)


def literal_flow(flow, target, semantics, foreground, weight=0.8):
    total = 0
    for b in range(flow.shape[0]):
        voxels = [v for v in (semantics[b].reshape(-1)).tolist()]
        rows = [r for r, label in enumerate(voxels) if label in foreground]
        if rows:
            difference = flow[b].reshape(-1, 2)[rows] - target[b].reshape(-1, 2)[rows]
            total = total + difference.abs().mean()
    return weight * total


def literal_depth_label(metres, low=1.0, step=0.5, bins=88):
    """Bin of the nearest depth of a block (0 = no point), or -1."""
    g = (metres - (low - step)) / step
    return int(g) - 1 if 0 <= g < bins + 1 else -1


def make_case(shape=(2, 5, 3, 4), classes=6, dtype=torch.float64, absent=2, ignored=0.2, seed=0, scale=2.0,
              target_dtype=torch.int64, device="cpu"):
    """Logits [B, X, Y, Z, K] and target [B, X, Y, Z] with ignored voxels and one class that no voxel carries."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(*shape, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(0, classes, shape, generator=generator)
    target[target == absent] = classes - 1
    target[torch.rand(shape, generator=generator) < ignored] = IGNORE
    return logits.to(device, dtype).requires_grad_(), target.to(device, target_dtype)
