"""The local loss over all processes: words or regions travel from process to process while a part is computed.

A process compares its images with the captions of all. Either its words or its regions visit every other process,
whichever is smaller (`ExchangePlan`): in a ring, each process hands the block that it has on to the next one, and
computes with it meanwhile. Besides what is kept for the backward pass, two blocks are in memory at a time, however
many processes there are. In the backward pass a block's gradient travels along, each process adds its share, and the
last one hands it to the owner. The similarities that the loss is computed from are those of one process with all
pairs.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from medmoe_hf.model import local_loss_kernel_medmoe, word_regions_medmoe
from medmoe_hf.model.modeling_medmoe import in_process_group
from medmoe_hf.training.negatives import gather_rows

Logits = Callable[[Tensor, Tensor, Tensor], Tensor]
_WORDS_TAG, _GRADIENTS_TAG = 1, 2


class Block(NamedTuple):
    """Sizes of what one process brings.

    Attributes:
        images: Number of images.
        height: Rows of regions of an image, after the pooling of `local_loss_regions`.
        width: Columns of regions.
        captions: Number of captions.
        words: Number of words of all captions together.
    """

    images: int
    height: int
    width: int
    captions: int
    words: int

    @property
    def regions(self) -> int:
        """Regions of all images together."""
        return self.images * self.height * self.width


class ExchangePlan(NamedTuple):
    """What travels, and for how many blocks the backward pass finds its intermediate results again.

    Attributes:
        words_travel: Words travel if they are not larger than the regions, else regions do. Sizes are those of all
            processes together, in bytes, of what is sent: the values and, in float32, their gradients. Padding is not
            sent; regions are those after the pooling of `local_loss_regions`.
        kept: Number of blocks, own one first, whose intermediate results fit into memory (512 MiB on a CPU, 1 GiB of
            bfloat16 on a GPU, as in one process). The other blocks travel again and are computed again.
    """

    words_travel: bool
    kept: int


def plan_exchange(
    blocks: Sequence[Block],
    depth: int,
    region_dtype: torch.dtype = torch.float32,
    word_dtype: torch.dtype = torch.float32,
    kernel: bool = False,
) -> ExchangePlan:
    """Decides what travels; the same in all processes, since all know all sizes.

    Args:
        blocks: Of each process, in the order of ranks.
        depth: Width of the shared space.
        region_dtype: Dtype of the regions.
        word_dtype: Dtype of the words.
        kernel: Whether the loss is computed by Triton kernels.

    Example:
        >>> from medmoe_hf.training.exchange import Block, plan_exchange
        >>> maps, pooled = Block(32, 56, 56, 32, 32 * 25), Block(32, 4, 4, 32, 32 * 25)
        >>> plan_exchange([maps] * 8, 768).words_travel, plan_exchange([pooled] * 8, 768).words_travel
        (True, False)
    """
    words = sum(block.words for block in blocks) * _sent(word_dtype)
    regions = sum(block.regions for block in blocks) * _sent(region_dtype)
    words_travel = words <= regions
    limit = (local_loss_kernel_medmoe if kernel else word_regions_medmoe)._KEPT_ELEMENTS
    saved, kept, world = [0] * len(blocks), 0, len(blocks)
    for step in range(world):
        for rank, own in enumerate(blocks):
            other = blocks[(rank - step) % world]
            shown, told = (own, other) if words_travel else (other, own)
            # Contexts; without the kernel the first softmax too, and a copy of regions of another dtype.
            saved[rank] += shown.images * told.words * (depth + (0 if kernel else shown.height * shown.width))
            saved[rank] += (other.words if words_travel else other.regions) * depth
            if not kernel and region_dtype.itemsize < 4:
                saved[rank] += shown.regions * depth
        if max(saved) > limit:
            break
        kept += 1
    return ExchangePlan(words_travel, kept)


def _sent(dtype: torch.dtype) -> int:
    """Bytes that are sent of an element: its value, and its gradient in float32 or wider."""
    return dtype.itemsize + torch.promote_types(dtype, torch.float32).itemsize


def exchanged_logits(logits: Logits, regions: Tensor, word_embeds: Tensor, word_mask: Tensor) -> Tensor:
    """Computes the similarity of the images of this process with the captions of all processes, in the order of ranks.

    Differentiable once. Each process must call it, with maps and words of the same dtypes and width; sizes may differ.
    Gradients are those of the sum of what all processes compute from the result, as with `gather_rows`.

    Args:
        logits: Maps regions `(b, D, H, W)`, words `(N, L, D)` and their mask `(N, L)` to similarities `(b, N)`, each
            computed from one image and one caption, and independent of where on the word axis the words are.
        regions: `(b, D, H, W)`, pooled to what is contrasted.
        word_embeds: `(n, L, D)`.
        word_mask: `(n, L)` bool, True where there is a word.

    Returns:
        `(b, N)`, where N is the sum of all n.
    """
    if not in_process_group() or distributed.get_world_size() == 1:
        return logits(regions, word_embeds, word_mask)
    packed, counts = word_embeds[word_mask], word_mask.sum(dim=1)
    own = torch.tensor([*regions.shape[:1], *regions.shape[2:], len(counts), len(packed)], device=regions.device)
    sizes = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(sizes, own)
    kernel = regions.is_cuda or os.environ.get(local_loss_kernel_medmoe.SWITCH) == "1"
    blocks = [Block(*size) for size in torch.stack(sizes).tolist()]
    chosen = plan_exchange(blocks, regions.shape[1], regions.dtype, packed.dtype, kernel)
    captions = [block.captions for block in blocks]
    ring = _Ring(logits, blocks, chosen, torch.split(gather_rows(counts), captions), regions.shape[1])
    if chosen.words_travel:
        result: Tensor = _Exchange.apply(ring, regions, packed)
        return result
    # Here are the own captions with all images; needed are the own images with all captions.
    columns = _Exchange.apply(ring, packed, regions)
    first = sum(block.images for block in blocks[: ring.rank])
    return gather_rows(columns.t()).t()[first : first + len(regions)]


class _Ring:
    """One exchange, seen from this process.

    Args:
        logits: As in `exchanged_logits`.
        blocks: Of each process.
        chosen: The plan.
        counts: Of each process the number of words of its captions, (n,).
        depth: Width of the shared space.
    """

    def __init__(
        self, logits: Logits, blocks: Sequence[Block], chosen: ExchangePlan, counts: Sequence[Tensor], depth: int
    ) -> None:
        self.logits, self.blocks, self.plan, self.counts, self.depth = logits, blocks, chosen, counts, depth
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        self.longest = [max([1, *count.tolist()]) for count in counts]

    def owner(self, step: int) -> int:
        """Whose block is here at a step."""
        return (self.rank - step) % self.world

    def columns(self) -> list[int]:
        """Number of columns (captions, if words travel) or rows (images) that belong to the block of each process."""
        return [block.captions if self.plan.words_travel else block.images for block in self.blocks]

    def compute(self, stay: Tensor, travelling: Tensor, owner: int) -> Tensor:
        """Similarities of own images with captions of `owner`, or of images of `owner` with own captions."""
        regions, packed = (stay, travelling) if self.plan.words_travel else (travelling, stay)
        whose = owner if self.plan.words_travel else self.rank
        counts, longest = self.counts[whose], self.longest[whose]
        mask = torch.arange(longest, device=counts.device) < counts.unsqueeze(1)
        words = packed.new_zeros(*mask.shape, self.depth).masked_scatter(mask.unsqueeze(-1), packed)
        return self.logits(regions, words, mask)

    def empty(self, owner: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Space for a block of `owner`, or for its gradient."""
        block = self.blocks[owner]
        if self.plan.words_travel:
            return like.new_empty(block.words, self.depth, dtype=dtype)
        return like.new_empty(block.images, self.depth, block.height, block.width, dtype=dtype)

    def send(self, block: Tensor, arriving: Tensor, distance: int, tag: int) -> list[Any]:
        """Begins to send to the process `distance` further on, and to receive from the one as far before."""
        ahead, behind = (self.rank + distance) % self.world, (self.rank - distance) % self.world
        # Some backends cannot send what is empty: then neither side does.
        operations = [
            distributed.P2POp(work, tensor, peer, tag=tag)
            for work, tensor, peer in (
                (distributed.isend, block, ahead),
                (distributed.irecv, arriving, behind),
            )
            if tensor.numel()
        ]
        return list(distributed.batch_isend_irecv(operations)) if operations else []


def _wait(works: list[Any]) -> None:
    for work in works:
        work.wait()


class _Exchange(torch.autograd.Function):
    """Similarities of what stays here with the travelling blocks of all processes."""

    @staticmethod
    def forward(ctx: Any, ring: _Ring, stay: Tensor, travelling: Tensor) -> Tensor:
        """Computes block after block, while the next one arrives.

        Args:
            ctx: The context of autograd.
            ring: See `_Ring`.
            stay: Own regions (b, D, H, W), if words travel; otherwise own words (P, D), one caption after the other.
            travelling: The other ones.

        Returns:
            (b, N) if words travel, otherwise (B, n).
        """
        needs_grad = any(ctx.needs_input_grad)
        own = travelling.detach().contiguous()
        block, works = own, []
        results: list[Tensor] = [own] * ring.world
        ctx.kept = []
        for step in range(ring.world):
            owner = ring.owner(step)
            arriving = block
            if step + 1 < ring.world:
                arriving = ring.empty(ring.owner(step + 1), own)
                works = ring.send(block, arriving, 1, _WORDS_TAG)
            if needs_grad and step < ring.plan.kept:
                ctx.kept.append(_Part(ctx, ring, stay, block, owner))
                results[owner] = ctx.kept[-1].value.detach()
            else:
                results[owner] = ring.compute(stay.detach(), block, owner)
            _wait(works)
            block, works = arriving, []
        ctx.ring = ring
        ctx.save_for_backward(stay, own)
        return torch.cat(results, dim=1 if ring.plan.words_travel else 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ring, kept = ctx.ring, ctx.kept
        stay, own = ctx.saved_tensors
        stays_wanted, travelling_wanted = ctx.needs_input_grad[1:]
        upstream = torch.split(gradient, ring.columns(), dim=1 if ring.plan.words_travel else 0)
        exact = torch.promote_types(own.dtype, torch.float32)
        of_stay: Tensor | None = None
        block, carried = own, own
        works: list[Any] = []
        carrying: list[Any] = []
        if 0 < len(kept) < ring.world:
            block = ring.empty(ring.owner(len(kept)), own)
            works = ring.send(own, block, len(kept), _WORDS_TAG)
        for step in range(ring.world):
            owner = ring.owner(step)
            arriving = block
            if step < len(kept):
                part = kept[step]
                kept[step] = None  # its memory is free after this step
            else:
                _wait(works)
                if step + 1 < ring.world:
                    arriving = ring.empty(ring.owner(step + 1), own)
                    works = ring.send(block, arriving, 1, _WORDS_TAG)
                part = _Part(ctx, ring, stay, block, owner)
            shares = part.gradients(upstream[owner])
            del part
            if stays_wanted:
                share = shares.pop(0)
                of_stay = share.to(exact) if of_stay is None else of_stay.add_(share)
                del share
            if travelling_wanted:
                share = shares.pop(0).to(exact)
                _wait(carrying)
                # What arrived is the sum over the processes that had this block before.
                total = share if step == 0 else share.add_(carried)
                carried = ring.empty(ring.owner(step + 1), own, exact)
                carrying = ring.send(total.contiguous(), carried, 1, _GRADIENTS_TAG)
            block = arriving
        _wait(carrying)
        of_stay = None if of_stay is None else of_stay.to(stay.dtype)
        return None, of_stay, carried.to(own.dtype) if travelling_wanted else None


class _Part:
    """The similarities with one block, with their graph."""

    def __init__(self, ctx: Any, ring: _Ring, stay: Tensor, travelling: Tensor, owner: int) -> None:
        stays_wanted, travelling_wanted = ctx.needs_input_grad[1:]
        own, block = stay.detach().requires_grad_(stays_wanted), travelling.detach().requires_grad_(travelling_wanted)
        self.leaves = [leaf for leaf in (own, block) if leaf.requires_grad]
        with torch.enable_grad():
            self.value = ring.compute(own, block, owner)

    def gradients(self, upstream: Tensor) -> list[Tensor]:
        """Of the leaves, zero where the similarities do not depend on one."""
        found: Sequence[Tensor | None] = [None] * len(self.leaves)
        if self.value.requires_grad:
            found = torch.autograd.grad(self.value, self.leaves, upstream.to(self.value.dtype), allow_unused=True)
        return [
            torch.zeros_like(leaf) if share is None else share for leaf, share in zip(self.leaves, found, strict=True)
        ]
