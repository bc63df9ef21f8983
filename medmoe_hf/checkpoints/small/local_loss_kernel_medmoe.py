"""GLoRIA's local loss on a GPU: both softmaxes fused with the matrix products before them, forward and backward.

For images (B, D, M) and the words of all captions the plain formulation passes several times through scores and
probabilities of shape (B, words, M): 10 GB each in bfloat16 at B = 256, 25 words and 56x56 regions. Here a kernel
multiplies a tile of regions with a tile of words and runs both softmaxes in registers. Only the weights of regions
(and, backward, the gradient of the scores) leave it, in the dtype of the products and for a few images at a time,
through a workspace of fixed size; from there plain matrix products make contexts and gradients. Forward these are 2
products of size words x D x M for each image; backward recomputes the scores and needs 5, or 7 where contexts are
recomputed as well.
There are no atomic additions: with the same configuration results are equal bit for bit.

These products are limited by arithmetic, since D is hundreds wide: contexts of a tile would not fit into the registers
of a multiprocessor, so that fusing the second product as well would repeat the first one.

This file and `local_loss_triton_medmoe.py` need only torch and Triton. Without Triton, or on a CPU, the loss is
computed by `word_regions_medmoe.py`.
"""

# mypy: allow-untyped-calls
# Some methods of torch.Tensor are untyped.

import contextlib
import functools
import importlib.util
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

SWITCH = "MEDMOE_LOCAL_LOSS_KERNEL"
"""Environment variable: `0` never uses the kernel, `1` also on a CPU (in Triton's interpreter)."""
MAX_WORDS = 256
"""Number of words that a caption may have: all of them are in one tile."""
MAX_TEMP1 = 60.0
"""The greatest temp1: beyond it weights leave the range of float32."""

# Tiles of words, and how much longer a slot takes than in tiles of 128.
_SLOT_COSTS = {16: 4.0, 32: 2.0, 64: 1.25, 128: 1.0, 256: 1.1}
# Elements of each workspace: 256 MiB in bfloat16.
_WORKSPACE_ELEMENTS = 2**27
# Elements of contexts that are kept for the backward pass: 1 GiB in bfloat16.
_KEPT_ELEMENTS = 2**29


def uses_kernel(local_embeds: Tensor, word_mask: Tensor, temp1: float, matmul_dtype: torch.dtype) -> bool:
    """Returns whether `fused_gloria_logits` computes this loss: on CUDA with Triton, unless `SWITCH` says otherwise.

    Args:
        local_embeds: As in `fused_gloria_logits`.
        word_mask: As in `fused_gloria_logits`.
        temp1: As in `fused_gloria_logits`.
        matmul_dtype: As in `fused_gloria_logits`.

    Returns:
        False as well where the kernel was tried and failed (with a warning), for captions of more than `MAX_WORDS`
        words, for a temp1 above `MAX_TEMP1`, in `torch.compile` and in an export.
    """
    switch = os.environ.get(SWITCH, "")
    if switch == "0" or (switch != "1" and local_embeds.device.type != "cuda"):
        return False
    if local_embeds.is_meta or torch.compiler.is_compiling() or temp1 > MAX_TEMP1:
        return False
    if importlib.util.find_spec("triton") is None or not local_embeds.numel() or not word_mask.numel():
        return False
    if word_mask.shape[1] > MAX_WORDS and int(word_mask.sum(dim=1).max()) > MAX_WORDS:
        return False
    return switch == "1" or _works(local_embeds.device, matmul_dtype)


@functools.cache
def _works(device: torch.device, matmul_dtype: torch.dtype) -> bool:
    """Tries the kernel once: Triton needs a C compiler, and some cards lack a dtype."""
    try:
        with torch.enable_grad():
            maps = torch.ones(1, 16, 1, 1, device=device, requires_grad=True)
            words, mask = torch.ones(1, 1, 16, device=device), torch.ones(1, 1, dtype=torch.bool, device=device)
            fused_gloria_logits(maps, words, mask, 1.0, 1.0, 1.0, matmul_dtype, tune=False).sum().backward()
        torch.cuda.synchronize(device)
    except Exception as error:
        warnings.warn(
            f"The kernel of the local loss fails on {device} in {matmul_dtype} and is not used; set {SWITCH}=0 to "
            f"hide this warning. {type(error).__name__}: {error}",
            stacklevel=2,
        )
        return False
    return True


class Packing(NamedTuple):
    """Which slot of which tile each word has.

    Args:
        width: Number of slots of a tile.
        tiles: Number of tiles.
        longest: Number of words of the longest caption.
        starts: `(N,)` long, the slot of each caption's first word; its other words follow. 0 for one without words.
        owners: `(slots,)` long, the caption of each slot; 0 where there is none.
        segments: `(slots,)` int32, the number of the slot's caption in the order of slots; -1 where there is none.
        bounds: `(tiles + 1,)` int32, the first such number of each tile.
    """

    width: int
    tiles: int
    longest: int
    starts: Tensor
    owners: Tensor
    segments: Tensor
    bounds: Tensor


def pack(sizes: Sequence[int], device: torch.device | str = "cpu") -> Packing:
    """Packs captions of different lengths into tiles, none of which cuts a caption (best fit, longest first).

    Args:
        sizes: Number of words of each caption, at most `MAX_WORDS`.
        device: Where the tensors are needed.

    Raises:
        ValueError: A caption is too long.
    """
    longest = max([1, *sizes])
    if longest > MAX_WORDS:
        raise ValueError(f"The kernel reads captions of at most {MAX_WORDS} words, got one of {longest}.")
    order = sorted((caption for caption, size in enumerate(sizes) if size), key=lambda caption: -sizes[caption])
    layouts = {width: _tiles(sizes, order, width) for width in _SLOT_COSTS if width >= longest}
    width = min(layouts, key=lambda width: len(layouts[width]) * width * _SLOT_COSTS[width])
    tiles = layouts[width]
    ranked = torch.tensor([caption for tile in tiles for caption in tile], dtype=torch.long)
    counts = torch.tensor(list(sizes), dtype=torch.long)[ranked]
    heads = [
        index * width + sum(sizes[caption] for caption in tile[:position])
        for index, tile in enumerate(tiles)
        for position in range(len(tile))
    ]
    first = torch.tensor(heads, dtype=torch.long)
    # Slot after slot: within a caption they are adjacent.
    slots = (first - counts.cumsum(dim=0) + counts).repeat_interleave(counts) + torch.arange(int(counts.sum()))
    segments = torch.full((len(tiles) * width,), -1, dtype=torch.int32)
    segments[slots] = torch.arange(len(ranked), dtype=torch.int32).repeat_interleave(counts)
    owners = torch.zeros(len(segments), dtype=torch.long)
    owners[slots] = ranked.repeat_interleave(counts)
    starts = torch.zeros(len(sizes), dtype=torch.long)
    starts[ranked] = first
    bounds = torch.tensor([0, *(len(tile) for tile in tiles)], dtype=torch.int32).cumsum(dim=0, dtype=torch.int32)
    moved = (tensor.to(device, non_blocking=True) for tensor in (starts, owners, segments, bounds))
    return Packing(width, len(tiles), longest, *moved)


def _tiles(sizes: Sequence[int], order: Sequence[int], width: int) -> list[list[int]]:
    """Returns the captions of each tile of `width` slots; one empty tile if there are no words."""
    tiles: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(width + 1)]
    for caption in order:
        size = sizes[caption]
        room = next((room for room in range(size, width + 1) if by_room[room]), None)
        if room is None:
            room, tile = width, len(tiles)
            tiles.append([])
        else:
            tile = by_room[room].pop()
        tiles[tile].append(caption)
        by_room[room - size].append(tile)
    return tiles or [[]]


def fused_gloria_logits(
    local_embeds: Tensor,
    word_embeds: Tensor,
    word_mask: Tensor,
    temp1: float,
    temp2: float,
    temp3: float,
    matmul_dtype: torch.dtype = torch.float32,
    tune: bool = True,
) -> Tensor:
    """Computes `gloria_logits` with Triton kernels, on CUDA (or on a CPU with `TRITON_INTERPRET=1`).

    Differentiable once. Reads the number of words of the captions on the host: one synchronisation.

    Args:
        local_embeds: Local maps, `(B, D, H', W')`, of any floating dtype and memory format.
        word_embeds: Word embeddings, `(N, W, D)`.
        word_mask: `(N, W)` bool, True where there is a word; at most `MAX_WORDS` in a caption. A caption without words
            scores 0 with every image.
        temp1: Inverse temperature of the attention over regions, at most `MAX_TEMP1`.
        temp2: Inverse temperature of the aggregation over words.
        temp3: Factor of the result.
        matmul_dtype: Dtype of the factors of matrix products: float32 (TF32 if
            `torch.set_float32_matmul_precision` permits it), bfloat16 or float16. Sums are float32.
        tune: Whether tiles are chosen by measurement at the first call, and remembered on disk. Not with
            `torch.use_deterministic_algorithms`: another process may choose differently.

    Returns:
        `(B, N)` float32.

    Raises:
        ValueError: A caption has too many words, or temp1 is too large.
    """
    if temp1 > MAX_TEMP1:
        raise ValueError(f"The kernel needs a temp1 of at most {MAX_TEMP1:g}, got {temp1:g}.")
    with torch.autocast(local_embeds.device.type, enabled=False):
        counts = word_mask.sum(dim=1)
        packing = pack(counts.tolist(), word_embeds.device)
        words, contrasts = _packed(packing, word_embeds, word_mask, counts)
        if local_embeds.is_contiguous():
            regions = local_embeds.flatten(2).transpose(1, 2)
        else:  # channels-last
            regions = local_embeds.movedim(1, -1).flatten(1, 2)
        needs_grad = torch.is_grad_enabled() and (regions.requires_grad or words.requires_grad)
        settings = _Settings(packing, temp1, temp2, matmul_dtype, needs_grad, tune)
        result: Tensor = temp3 * _FusedSimilarity.apply(regions, words, contrasts.to(matmul_dtype), counts, settings)
        return result


def _packed(packing: Packing, word_embeds: Tensor, word_mask: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the words of all slots, (slots, D) float32, and without the mean of their caption; 0 in other slots.

    A softmax over the words of a caption is invariant to what they share; rounding is not.
    """
    slots = len(packing.segments)
    # Places of the word axis without a word share one more slot, which is cut off.
    places = (packing.starts.unsqueeze(1) + word_mask.cumsum(dim=1) - 1).masked_fill(~word_mask, slots).flatten()
    source = places.new_zeros(slots + 1).index_copy_(0, places, torch.arange(len(places), device=places.device))
    empty = (packing.segments < 0).unsqueeze(1)
    words = word_embeds.flatten(0, 1).index_select(0, source[:slots]).float().masked_fill(empty, 0.0)
    index, inside = _members(packing, counts)
    totals = (words.detach()[index] * inside.unsqueeze(-1)).sum(dim=1)
    means = totals / counts.clamp_min(1).unsqueeze(1)
    return words, (words.detach() - means[packing.owners]).masked_fill_(empty, 0.0)


def _members(packing: Packing, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the slots of the words of each caption, (N, longest), and whether there is such a word."""
    number = torch.arange(packing.longest, device=counts.device)
    inside = number < counts.unsqueeze(1)
    return (packing.starts.unsqueeze(1) + number) * inside, inside


class _Settings(NamedTuple):
    packing: Packing
    temp1: float
    temp2: float
    matmul_dtype: torch.dtype
    needs_grad: bool
    tune: bool


class _Shape(NamedTuple):
    """How the work is cut: `images` at a time, and words in parts of `slots`, of which there usually is one."""

    images: int
    slots: int
    kept: int


def _cut(images: int, positions: int, depth: int, packing: Packing) -> _Shape:
    slots = packing.width * packing.tiles
    tiles = max(1, min(packing.tiles, _WORKSPACE_ELEMENTS // (2 * packing.width * positions)))
    part = tiles * packing.width
    largest = max(2 * part * positions, 2 * part * depth, positions * depth)
    step = max(1, min(images, _WORKSPACE_ELEMENTS // largest))
    kept = min(images, _KEPT_ELEMENTS // (slots * depth)) if part == slots else 0
    return _Shape(step, part, images if kept == images else kept // step * step)


def kernel_bytes(
    images: int,
    positions: int,
    depth: int,
    sizes: Sequence[int],
    matmul_dtype: torch.dtype = torch.bfloat16,
    region_dtype: torch.dtype = torch.float32,
) -> int:
    """Computes the memory that both passes of `fused_gloria_logits` need at their peak, beyond their inputs.

    Args:
        images: B.
        positions: Number of regions M of an image.
        depth: Width D.
        sizes: Number of words of each caption.
        matmul_dtype: As in `fused_gloria_logits`.
        region_dtype: Dtype of the local maps, and so of their gradient.

    Returns:
        Bytes, with the gradients of regions and words.

    Example:
        >>> import torch
        >>> from medmoe_hf.model.local_loss_kernel_medmoe import kernel_bytes
        >>> kernel_bytes(256, 56 * 56, 768, [25] * 256, region_dtype=torch.bfloat16) / 2**30 < 4
        True
    """
    packing = pack(sizes)
    step, part, kept = _cut(images, positions, depth, packing)
    slots, size = packing.width * packing.tiles, matmul_dtype.itemsize
    gradients = images * positions * depth * region_dtype.itemsize + 2 * slots * depth * 4
    # Words, words of length 1 and contrasts; cosines, lengths, slopes and their copies.
    inputs = slots * depth * (8 + size)
    scalars = 6 * images * slots * 4
    # Maps and their gradient, [weights, gradient of scores], [gradient of contexts, words]; contexts.
    chunk = step * (2 * positions * depth + 2 * positions * part + 2 * part * depth) * size
    contexts = (kept + (0 if kept == images else step)) * part * depth * size
    # The gradient of a part of the words before it is added.
    words = part * depth * (2 * size + 16)
    return int(gradients + inputs + scalars + chunk + contexts + words)


@contextlib.contextmanager
def _float32_sums() -> Iterator[None]:
    """Forbids cuBLAS to add up partial sums in half precision."""
    flags = torch.backends.cuda.matmul
    names = "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"
    saved = [getattr(flags, name) for name in names]
    try:
        for name in names:
            setattr(flags, name, False)
        yield
    finally:
        for name, value in zip(names, saved, strict=True):
            setattr(flags, name, value)


class _Launcher:
    """Calls the kernels for words of one packing, with tensors of a chunk."""

    def __init__(self, settings: _Settings, positions: int, depth: int) -> None:
        from .local_loss_triton_medmoe import FIXED, INTERPRETED, KERNELS, TUNED

        self.kernels, self.tuned, self.fixed = KERNELS, TUNED, FIXED
        self.positions, self.depth = positions, depth
        self.width, self.temp1 = settings.packing.width, settings.temp1
        # So that the length of a context depends little on the number of regions.
        self.shift = 0.5 * math.log(positions)
        precise = torch.get_float32_matmul_precision() == "highest"
        self.precision = "ieee" if precise or settings.matmul_dtype != torch.float32 else "tf32"
        # The interpreter multiplies the bits of bfloat16.
        self.upcast = INTERPRETED and settings.matmul_dtype != torch.float32
        self.tune = settings.tune and not INTERPRETED and not torch.are_deterministic_algorithms_enabled()
        # Each row of D elements at once.
        self.row = {"BLOCK_D": 2 ** max(4, (depth - 1).bit_length())}

    def _tiles(self, name: str, images: int, slots: int, *arguments: Any) -> None:
        def grid(meta: dict[str, Any]) -> tuple[int, int, int]:
            return -(-self.positions // meta["BLOCK_M"]), slots // self.width, images

        constants: dict[str, Any] = {"BLOCK_W": self.width, "PRECISION": self.precision, "UPCAST": self.upcast}
        if self.tune:
            self.tuned[name][grid](*arguments, self.temp1, self.shift, **constants)
            return
        constants |= self.fixed | {"EVEN_D": self.depth % self.fixed["BLOCK_D"] == 0}
        self.kernels[name][grid(self.fixed)](*arguments, self.temp1, self.shift, **constants)

    def weights(self, maps: Tensor, contrasts: Tensor, segments: Tensor, bounds: Tensor, out: Tensor) -> None:
        sizes = self.positions, self.depth, out.shape[2]
        self._tiles("weights", len(maps), len(contrasts), maps, contrasts, segments, bounds, out, *sizes)

    def slopes(
        self, maps: Tensor, contrasts: Tensor, factors: Tensor, segments: Tensor, bounds: Tensor, out: Tensor
    ) -> None:
        sizes = self.positions, self.depth, len(contrasts)
        self._tiles("slopes", len(maps), len(contrasts), maps, contrasts, factors, segments, bounds, out, *sizes)

    def cosines(self, contexts: Tensor, unit_words: Tensor, cosines: Tensor, inverses: Tensor) -> None:
        images, slots, depth = contexts.shape
        self.kernels["cosines"][(slots, images)](
            contexts, unit_words, cosines, inverses, depth, slots, cosines.stride(0), **self.row
        )

    def pulls(self, contexts: Tensor, unit_words: Tensor, scalars: Sequence[Tensor], out: Tensor) -> Tensor:
        images, slots, depth = contexts.shape
        towards = torch.empty_like(unit_words)
        self.kernels["pulls"][(slots,)](contexts, unit_words, *scalars, out, towards, images, depth, slots, **self.row)
        return towards


class _FusedSimilarity(torch.autograd.Function):
    """log Σ_i exp(temp2 * cos(c_i, t_i)) of every image and caption.

    Saved for the backward pass are cosines, and contexts as long as they fit into `_KEPT_ELEMENTS`.
    """

    @staticmethod
    def forward(
        ctx: Any, regions: Tensor, words: Tensor, contrasts: Tensor, counts: Tensor, settings: _Settings
    ) -> Tensor:
        """Computes the similarities.

        Args:
            ctx: The context of autograd.
            regions: `(B, M, D)`, with any strides.
            words: `(slots, D)` float32, 0 where there is no word.
            contrasts: `(slots, D)` in the dtype of products, without the mean of each caption.
            counts: `(N,)`, number of words of each caption.
            settings: See `_Settings`.

        Returns:
            `(B, N)` float32.
        """
        packing, dtype = settings.packing, settings.matmul_dtype
        images, positions, depth = regions.shape
        slots = len(words)
        shape = _cut(images, positions, depth, packing)
        kept = shape.kept if settings.needs_grad else 0
        launcher = _Launcher(settings, positions, depth)
        unit_words = _unit(words)
        contexts = regions.new_empty(kept, slots, depth, dtype=dtype)
        spare = regions.new_empty(0 if kept == images else shape.images, shape.slots, depth, dtype=dtype).flatten()
        workspace = regions.new_empty(shape.images * positions * shape.slots, dtype=dtype)
        map_space = regions.new_empty(shape.images, positions, depth, dtype=dtype)
        cosines, inverses = (regions.new_empty(images, slots, dtype=torch.float32) for _ in range(2))
        with _float32_sums():
            for rows in _slices(images, shape.images):
                maps = map_space[: rows.stop - rows.start].copy_(regions[rows])
                for part in _slices(slots, shape.slots):
                    weights = _shaped(workspace, len(maps), positions, part.stop - part.start)
                    launcher.weights(maps, contrasts[part], *_of_part(packing, part), weights)
                    context = _contexts(rows, part, contexts, spare, depth)
                    torch.bmm(weights.transpose(1, 2), maps, out=context)
                    launcher.cosines(context, unit_words[part], cosines[rows, part], inverses[rows, part])
        index, inside = _members(packing, counts)
        logits = (settings.temp2 * cosines)[:, index].masked_fill_(~inside, -torch.inf)
        similarity = logits.logsumexp(dim=-1).masked_fill_(counts == 0, 0.0)
        if settings.needs_grad:
            ctx.save_for_backward(regions, words, contrasts, cosines, inverses, similarity, contexts)
            ctx.settings = settings
        return similarity

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        regions, words, contrasts, cosines, inverses, similarity, contexts = ctx.saved_tensors
        wants_regions, wants_words = ctx.needs_input_grad[:2]
        settings = ctx.settings
        packing, temp1, dtype = settings.packing, settings.temp1, settings.matmul_dtype
        images, positions, depth = regions.shape
        slots = len(words)
        shape = _cut(images, positions, depth, packing)
        launcher = _Launcher(settings, positions, depth)
        unit_words = _unit(words)
        # d similarity / d cos is temp2 times the softmax over a caption's words.
        slopes = (settings.temp2 * cosines - similarity[:, packing.owners]).exp_()
        slopes = slopes.mul_(settings.temp2 * gradient[:, packing.owners]).masked_fill_(packing.segments < 0, 0.0)
        grad_regions = regions.new_empty(images, positions, depth) if wants_regions else None
        grad_words = torch.zeros_like(words) if wants_words else None
        spare_images = 0 if len(contexts) == images else shape.images
        spare = regions.new_empty(spare_images * shape.slots * depth, dtype=dtype)
        workspace = regions.new_empty(2 * shape.images * positions * shape.slots, dtype=dtype)
        map_space = regions.new_empty(shape.images, positions, depth, dtype=dtype)
        products = torch.empty_like(map_space) if wants_regions else None
        factor_space = regions.new_empty(2 * shape.images * shape.slots * depth, dtype=dtype)
        with torch.autocast(regions.device.type, enabled=False), _float32_sums():
            for rows in _slices(images, shape.images):
                maps = map_space[: rows.stop - rows.start].copy_(regions[rows])
                for part in _slices(slots, shape.slots):
                    number = part.stop - part.start
                    terms = _shaped(workspace, len(maps), positions, 2 * number)
                    factors = _shaped(factor_space, len(maps), 2 * number, depth)
                    tiles = _of_part(packing, part)
                    context = _contexts(rows, part, contexts, spare, depth)
                    if rows.stop > len(contexts):
                        launcher.weights(maps, contrasts[part], *tiles, terms)
                        torch.bmm(terms[:, :, :number].transpose(1, 2), maps, out=context)
                    # A power of 2 that brings the largest gradient near 1, for the range of float16.
                    largest = (slopes[rows, part] * inverses[rows, part]).abs().amax()
                    exponent = torch.frexp(largest).exponent.clamp(-100, 100)
                    scale, unscale = (torch.ldexp(torch.ones_like(largest), sign * exponent) for sign in (-1, 1))
                    scalars = slopes[rows, part] * scale, cosines[rows, part], inverses[rows, part]
                    towards = launcher.pulls(
                        context, unit_words[part], [scalar.contiguous() for scalar in scalars], factors
                    )
                    factors[:, number:] = temp1 * contrasts[part]
                    launcher.slopes(maps, contrasts[part], factors, *tiles, terms)
                    if grad_words is not None:
                        by_scores = terms.flatten(0, 1)[:, number:].t() @ maps.flatten(0, 1)
                        towards.mul_(_inverse_length(words[part])).add_(by_scores, alpha=temp1)
                        grad_words[part] += towards.mul_(unscale)
                    if grad_regions is not None and products is not None:
                        # [weights, gradient of scores] [gradient of contexts; temp1 * words]
                        product, target = products[: len(maps)], grad_regions[rows]
                        torch.bmm(terms, factors, out=product)
                        if part.start == 0:
                            target.copy_(product).mul_(unscale)
                        else:
                            target.add_(product.to(target.dtype).mul_(unscale))
        return grad_regions, grad_words, None, None, None


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _shaped(buffer: Tensor, *shape: int) -> Tensor:
    return buffer[: math.prod(shape)].view(shape)


def _of_part(packing: Packing, part: slice) -> tuple[Tensor, Tensor]:
    tiles = slice(part.start // packing.width, part.stop // packing.width + 1)
    return packing.segments[part], packing.bounds[tiles]


def _contexts(rows: slice, part: slice, kept: Tensor, spare: Tensor, depth: int) -> Tensor:
    """Returns where the contexts of a chunk are or belong: (b, slots, D), contiguous."""
    if rows.stop <= len(kept):
        return kept[rows]
    return _shaped(spare, rows.stop - rows.start, part.stop - part.start, depth)


def _inverse_length(vectors: Tensor) -> Tensor:
    """Returns 1 / |v|, (..., D) to (..., 1); 0 for a zero vector, so that it has no direction and no gradient."""
    length = vectors.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, 1 / length, 0.0)


def _unit(vectors: Tensor) -> Tensor:
    return vectors * _inverse_length(vectors)
