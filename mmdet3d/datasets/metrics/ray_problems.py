"""Why a sample could not be counted, in words."""

from collections.abc import Sequence

from mmdet3d.ops.ray_counts import GT_LABEL, PRED_LABEL

from .inputs import label_text


def problem_text(problem: Sequence[int], token: str | None, num_classes: int) -> str | None:
    """What ``RayTotals.problem`` says.

    Args:
        problem: Its five numbers.
        token: Token of the sample that they name, if it shall be named.
        num_classes: Number of labels.

    Returns:
        A message, or None if all samples were counted.
    """
    samples, _, kind, value, of = problem
    if not samples:
        return None
    if kind in (PRED_LABEL, GT_LABEL):
        text = label_text("pred_semantics" if kind == PRED_LABEL else "gt_semantics", value, num_classes)
    else:
        text = f"pred_flow is not finite where {value} of {of} true-positive rays hit"
    more = f"; {samples - 1} more samples cannot be counted" if samples > 1 else ""
    return text if token is None else f"{text} (sample {token}{more})"
