"""What a pair is contrasted with: the rest of its micro-batch, of all processes, or of the whole step.

| `negatives` | a pair is contrasted with | sent, beside gradients | memory, beside a micro-batch |
|---|---|---|---|
| `micro_batch` | the pairs of its own micro-batch | BatchNorm's sums | none |
| `ranks` | the micro-batches that all processes have at one time | + B (2 D + W D + B) numbers | B W D |
| `global` | all pairs of a step, over processes and accumulation | the same, once a step | + 4.5 MB an image |

B is the number of those pairs, W their words, D the width; the last are pyramids with their gradients, at 224 pixels.
Local maps never travel: each process compares its own with all words. With `gradient_accumulation_steps: 1`, `global`
is `ranks`. Above that it caches gradients: the towers run forward twice, the experts' layers about five times; see
`medmoe_hf.training.cached`.
"""

from typing import Any

import torch
from torch import Tensor, distributed

from medmoe_hf.model.modeling_medmoe import in_process_group


def gather_rows(rows: Tensor) -> Tensor:
    """Puts the rows of all processes together, in the order of ranks; differentiable.

    The backward pass adds what all processes have to say about a row. So where every process computes the same loss,
    the mean of their gradients (what DDP and FSDP take) is the gradient of one process with all rows.

    Args:
        rows: (b, ...), of one type everywhere; sizes may differ between processes, and rows are padded with zeros
            behind to the largest in every dimension but the first.

    Returns:
        (B, ...), B the sum of all b. `rows` themselves in a single process.
    """
    return _GatherRows.apply(rows) if in_process_group() else rows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        world = distributed.get_world_size()
        shape = torch.tensor(rows.shape, device=rows.device)
        shapes = [torch.empty_like(shape) for _ in range(world)]
        distributed.all_gather(shapes, shape)
        counts = [int(other[0]) for other in shapes]
        largest = torch.stack(shapes).amax(dim=0).tolist()
        # Booleans do not travel everywhere; bytes do.
        sent = rows.to(torch.uint8) if rows.dtype == torch.bool else rows
        padded = sent.new_zeros(largest)
        padded[tuple(slice(size) for size in rows.shape)] = sent
        parts = [torch.empty_like(padded) for _ in range(world)]
        distributed.all_gather(parts, padded)
        ctx.counts, ctx.shape = counts, rows.shape
        whole = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        return whole.to(rows.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        distributed.all_reduce(total)
        start = sum(ctx.counts[: distributed.get_rank()])
        own = total[start : start + ctx.shape[0]]
        return own[tuple(slice(size) for size in ctx.shape)]


def summed(tensors: list[Tensor]) -> list[Tensor]:
    """Each tensor's sum over all processes, in one exchange; all of one type, in the same order everywhere."""
    if not tensors or not in_process_group():
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def max_over_processes(value: int, device: torch.device) -> int:
    """The largest value of any process.

    Processes must agree on what they do next: if one stopped alone, the others would wait for it forever.

    Args:
        value: This process's.
        device: The accelerator's, on which processes communicate.
    """
    if not in_process_group():
        return value
    largest = torch.tensor([int(value)], device=device)
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
    return int(largest.item())


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Averages gradients over processes, for a model that is wrapped in nothing that does.

    Args:
        parameters: in the same order everywhere; one without a gradient counts as zero.
    """
    if not in_process_group():
        return
    buckets: list[list[Tensor]] = [[]]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if sum(gradient.numel() for gradient in buckets[-1]) >= _BUCKET:
            buckets.append([])
        buckets[-1].append(parameter.grad)
    for bucket in buckets:
        for gradient, total in zip(bucket, summed([gradient.float() for gradient in bucket]), strict=True):
            gradient.copy_(total / distributed.get_world_size())


_BUCKET = 2**23  # elements that travel at a time: 32 MiB
