"""How long a frame, its parts, and a training iteration take."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmdet3d.core.cuda_graphs.engine import EAGER_CALLS
from mmdet3d.core.cuda_graphs.steps import StepGraph
from mmdet3d.core.predictor import Predictor
from mmdet3d.datasets.synthetic.stream import Drive

GIB = 2**30


def synchronise(device: torch.device) -> None:
    """Wait until the device has nothing to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, tenth and ninetieth percentile in milliseconds, and the number of values."""
    values = sorted(1000 * value for value in seconds)
    tenth = statistics.quantiles(values, n=10) if len(values) > 1 else [values[0]] * 9
    return {"median_ms": statistics.median(values), "p10_ms": tenth[0], "p90_ms": tenth[-1], "count": len(values)}


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """Fills in the most memory of a GPU that was taken in the block: ``gib`` by tensors, ``reserved_gib`` by PyTorch.

    The memory of a CUDA graph is reserved, but belongs to no tensor. Both are 0 on a CPU.
    """
    record = {"gib": 0.0, "reserved_gib": 0.0}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    yield record
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        record["gib"] = torch.cuda.max_memory_allocated(device) / GIB
        record["reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """In page-locked memory, as a loader delivers it for a GPU."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def drive_samples(drive: Drive, count: int, device: torch.device, reuse: bool = True
                  ) -> list[tuple[list[Tensor], list[dict]]]:
    """The first ``count`` samples of a drive; without ``reuse`` they do not say which pictures they share."""
    samples = []
    for index in range(count):
        inputs, metas = drive.sample(index)
        inputs[0] = pinned(inputs[0], device)
        if not reuse:
            metas = [{key: value for key, value in meta.items() if key != "image_keys"} for meta in metas]
        samples.append((inputs, metas))
    return samples


def time_frames(predictor: Predictor, samples: Sequence[tuple[Sequence[Tensor], Sequence[Mapping]]], *, warmup: int = 8
                ) -> dict[str, Any]:
    """Latency and throughput of evaluation, frame after frame of one sequence.

    The latency of a frame is the wall time from the samples in (page-locked) host memory to the finished prediction on
    the device: preparation on the host, transfer of the pictures as bytes, network. The throughput lets the host run
    ahead of the device.

    Args:
        predictor: What is timed.
        samples: Consecutive samples, the first one starts a sequence.
        warmup: Samples at the beginning that do not count.
    """
    device = predictor.runner.device
    memory, seconds = None, []
    for inputs, metas in samples[:warmup]:
        *_, memory = predictor(inputs, metas, memory)
    with peak_memory(device) as peak:
        for inputs, metas in samples[warmup:]:
            synchronise(device)
            start = time.perf_counter()
            *_, memory = predictor(inputs, metas, memory)
            synchronise(device)
            seconds.append(time.perf_counter() - start)
    # Once more without waiting in between, from the memory of the middle of the drive.
    memory = None
    for inputs, metas in samples[:warmup]:
        *_, memory = predictor(inputs, metas, memory)
    synchronise(device)
    start = time.perf_counter()
    for inputs, metas in samples[warmup:]:
        *_, memory = predictor(inputs, metas, memory)
    synchronise(device)
    rate = len(seconds) * len(samples[0][1]) / (time.perf_counter() - start)
    return {"latency": spread(seconds), "samples_per_second": rate, "peak_gib": peak["gib"],
            "graphs": predictor.runner.graphs}


def time_stages(predictor: Predictor, samples: Sequence[tuple[Sequence[Tensor], Sequence[Mapping]]], *, warmup: int = 4
                ) -> dict[str, float]:
    """Milliseconds a frame in the parts of the network, each waited for; the predictor must do without graphs."""
    device = predictor.runner.device
    totals: dict[str, float] = defaultdict(float)
    running: dict[str, float] = {}

    def begin(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            synchronise(device)
            running[name] = time.perf_counter()
        return hook

    def end(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            synchronise(device)
            totals[name] += time.perf_counter() - running[name]
        return hook

    hooks = [hook for name, module in stage_modules(predictor.model).items()
             for hook in (module.register_forward_pre_hook(begin(name)), module.register_forward_hook(end(name)))]
    memory = None
    try:
        for position, (inputs, metas) in enumerate(samples):
            if position == warmup:
                totals.clear()
            *_, memory = predictor(inputs, metas, memory)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: 1000 * total / max(1, len(samples) - warmup) for name, total in totals.items()}


def stage_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The parts that :func:`time_stages` tells apart."""
    forward = model.forward_projection
    transform = forward.img_view_transformer
    parts = {"forward projection": forward, "  neck": forward.img_neck, "  depth net": transform.depth_net,
             "  3D encoder": forward.img_bev_encoder_backbone}
    for name, modules in (("backward projection", model.backward_projection_list),
                          ("temporal fusion", model.temporal_fusion_list)):
        parts.update({f"{name}, stage {s}": modules[s] for s in reversed(range(len(modules)))})
    parts["occupancy head"] = model.occupancy_head
    if model.flow_head is not None:
        parts["flow head"] = model.flow_head
    return parts


def time_training(model: nn.Module, drive: Drive, *, iterations: int = 20, warmup: int = 5, bf16: bool = False,
                  max_norm: float = 5.0, graphs: bool = False) -> dict[str, Any]:
    """Wall time and peak memory of a training iteration: forward, backward, clipping and AdamW, inputs on the device.

    Sequences start with the first iteration and go on, as nineteen of twenty do in training.

    Args:
        model: The detector on its device.
        drive: Where the samples come from.
        iterations: Those that count.
        warmup: Those before; with graphs at least those that begin, run kernel by kernel and are recorded, one from
            each side.
        bf16: Mixed precision.
        max_norm: Of clipping.
        graphs: Replay CUDA graphs, see :class:`mmdet3d.core.cuda_graphs.steps.StepGraph`.
    """
    device = next(model.parameters()).device
    grid = model.grids[0].size_xyz
    size = tuple(2 * n for n in grid)
    classes = model.occupancy_head.num_classes
    targets = {name: value.to(device) for name, value in drive.targets(size, model.num_stage, classes).items()}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6, weight_decay=1e-2, fused=device.type == "cuda")
    model.train()
    model.reset_memory()
    replayed = StepGraph(model, "bf16" if bf16 else "fp32") if graphs else None
    warmup = max(warmup, EAGER_CALLS + 3) if graphs else warmup
    samples = [drive.sample(index) for index in range(warmup + iterations)]
    seconds, losses = [], []
    with peak_memory(device) as peak:
        for position, (inputs, metas) in enumerate(samples):
            images = inputs[0].to(device)  # not before, so that the memory is that of one iteration
            synchronise(device)
            start = time.perf_counter()
            batch = {"img_inputs": [images, *inputs[1:]], "img_metas": metas, **targets}
            if replayed is not None:
                outputs = replayed.step(batch)
            else:
                optimizer.zero_grad()
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    outputs = model.train_step(batch, optimizer)
                outputs["loss"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            synchronise(device)
            if position >= warmup:
                seconds.append(time.perf_counter() - start)
            losses.append(float(outputs["log_vars"]["loss"]))
    model.reset_memory()
    return {"iteration": spread(seconds), "peak_gib": peak["gib"], "reserved_gib": peak["reserved_gib"],
            "graphs": replayed is not None and replayed.graphs, "losses": losses}
