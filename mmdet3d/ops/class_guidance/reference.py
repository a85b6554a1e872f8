"""Plain PyTorch version of ``class_guidance``: what the compiled version is tested against."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .noise import gumbel_noise_reference


def class_guidance_reference(scores: Tensor, first_weight: Tensor, first_bias: Tensor, second_weight: Tensor,
                             second_bias: Tensor, *, noise_seeds: Tensor | None = None, softmax: bool = True,
                             dtype: torch.dtype = torch.float32) -> Tensor:
    """See ``class_guidance``."""
    accumulate = torch.promote_types(dtype, torch.float32)

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).to(accumulate)

    with torch.autocast(scores.device.type, enabled=False):
        scores = scores.to(accumulate)
        if noise_seeds is not None:
            scores = scores + gumbel_noise_reference(noise_seeds, scores.shape[1:])
        classes = scores.softmax(-1) if softmax else scores
        hidden = F.linear(rounded(classes), rounded(first_weight), first_bias.to(accumulate))
        out = F.linear(rounded(F.softplus(hidden)), rounded(second_weight), second_bias.to(accumulate))
        return out.to(dtype)
