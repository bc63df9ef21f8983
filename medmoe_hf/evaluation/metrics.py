"""Metrics of retrieval, routing and grounding, as functions of scores."""

from collections.abc import Sequence

import torch
from torch import Tensor


def recall_at_k(
    scores: Tensor, captions: Sequence[str] | None = None, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall@k of a paired set, in both directions.

    A hit is any candidate that is right within the first k. Ties count against us: a right candidate's rank is the
    number of wrong ones that score as much or more.

    Args:
        scores: (N, N), row i image i, column j caption j; i and i belong together.
        captions: the N captions, so that identical ones count as right for one another's images.
        ks: the cut-offs.

    Returns:
        `{"image_to_text_r1": ..., "text_to_image_r1": ..., ...}`, fractions of 0..1.
    """
    count = len(scores)
    if scores.shape != (count, count):
        raise ValueError(f"`scores` must be square, image i with caption i; got {tuple(scores.shape)}.")
    names = list(captions) if captions is not None else [str(index) for index in range(count)]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    group = torch.tensor([numbers[name] for name in names], device=scores.device)
    right = group[:, None] == group[None, :]
    result: dict[str, float] = {}
    for direction, table in (("image_to_text", scores), ("text_to_image", scores.t())):
        best = table.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        rank = ((table >= best) & ~right).sum(dim=1)
        result |= {f"{direction}_r{k}": (rank < k).float().mean().item() for k in ks}
    return result


def accuracy(predicted: Tensor, labels: Tensor, ignore: int = -100) -> float:
    """Fraction of right predictions among the labels that are not `ignore`; NaN if there are none.

    Args:
        predicted, labels: (N,) ids.
    """
    known = labels != ignore
    return (predicted[known] == labels[known]).float().mean().item()
