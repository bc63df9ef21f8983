"""Negatives of a pair: the rest of its micro-batch, of all processes, or of the entire step.

| `negatives` | a pair is contrasted with | communication besides gradients | memory besides a micro-batch |
|---|---|---|---|
| `micro_batch` | the pairs of its own micro-batch | BatchNorm's sums | none |
| `ranks` | the current micro-batches of all processes | + B (2 D + X + B) numbers | see `medmoe_hf.training.memory` |
| `global` | all pairs of a step, over processes and accumulation | the same per micro-batch | + 4.5 MB per image |

B is the number of pairs, D the embedding size, X the words or the regions of a pair, whichever is smaller (see
`medmoe_hf.training.exchange`); 4.5 MB are one pyramid with gradients at 224 pixels. With
`gradient_accumulation_steps: 1`, `global` is the same as `ranks`. With more, it caches gradients: the towers run
forward twice, the experts' layers about five times; see `medmoe_hf.training.cached`.
"""

from typing import Any

import torch
from torch import Tensor, distributed

from medmoe_hf.model.modeling_medmoe import in_process_group


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenates the rows of all processes in the order of ranks; differentiable.

    The backward pass sums the gradients of a row over all processes. So if every process computes the same loss, the
    mean of their gradients (as DDP and FSDP compute it) is the gradient of a single process with all rows.

    Args:
        rows: (b, ...), with the same dtype in all processes. Sizes may differ; every dimension except the first is
            padded with trailing zeros to the largest size.

    Returns:
        (B, ...), where B is the sum of all b; `rows` itself in a single process.
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
        # Some backends cannot send booleans.
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
    """Sums each tensor over all processes, in one exchange.

    Args:
        tensors: All of one dtype, in the same order in all processes.
    """
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
    """Averages gradients over processes, for a model without a wrapper that does so.

    Args:
        parameters: In the same order in all processes; a missing gradient counts as zero.
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


_BUCKET = 2**23  # elements per exchange: 32 MiB
