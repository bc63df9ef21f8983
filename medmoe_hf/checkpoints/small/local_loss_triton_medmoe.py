"""Triton kernels of GLoRIA's local loss; `local_loss_kernel_medmoe.py` says what they compute together.

Words are laid out in tiles of BLOCK_W slots, each with whole captions; `segments` holds the number of the caption of
each slot, or -1, and the captions of tile t are numbered `bounds[t]` to `bounds[t + 1] - 1`. Both softmaxes run on a
tile of regions and words in registers: neither scores nor probabilities are ever written.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, disable-error-code="untyped-decorator"

import os

# transformers refuses to load a checkpoint whose files import a missing package outside of `try`. This file is part of
# every checkpoint, and only imported where Triton is installed.
try:
    import triton
    import triton.language as tl
except ImportError:
    raise

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the kernels of this process run in Triton's interpreter, on a CPU."""


@triton.jit
def _caption_sums(values, segment, first, last):
    """Sums over the words of each caption, (regions, words); 0 where there is no word."""
    sums = tl.zeros_like(values)
    for caption in range(first, last):
        own = (segment == caption)[None, :]
        total = tl.sum(tl.where(own, values, 0.0), axis=1)
        sums = tl.where(own, total[:, None], sums)
    return sums


@triton.jit
def _attention(scores, segment, first, last, inside, temp1, shift):
    """The softmax over the words of each caption, and the weights of regions without their normaliser.

    A cosine does not see the length of a context. `shift` and one half keep weights within the range of float16.
    """
    top = tl.zeros_like(scores)
    for caption in range(first, last):
        own = (segment == caption)[None, :]
        highest = tl.max(tl.where(own, scores, float("-inf")), axis=1)
        top = tl.where(own, highest[:, None], top)
    word = (segment >= 0)[None, :]
    exponentials = tl.where(word, tl.exp(scores - top), 0.0)
    sums = _caption_sums(exponentials, segment, first, last)
    probs = exponentials / tl.where(word, sums, 1.0)
    weights = tl.where(word & inside[:, None], tl.exp(temp1 * (probs - 0.5) - shift), 0.0)
    return probs, weights


@triton.jit
def weights_kernel(
    maps,
    contrasts,
    segments,
    bounds,
    weights,
    positions,
    depth,
    row,
    temp1,
    shift,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Writes the weights of regions: maps (b, M, D) and contrasts (slots, D) to weights (b, M, row)."""
    tile = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    regions = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    slots = tile * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = regions < positions
    map_rows = maps + image * positions * depth + regions[:, None] * depth
    word_columns = contrasts + slots[None, :] * depth
    scores = tl.zeros((BLOCK_M, BLOCK_W), dtype=tl.float32)
    for start in range(0, depth, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        if EVEN_D:
            region = tl.load(map_rows + columns[None, :], mask=inside[:, None], other=0.0)
            word = tl.load(word_columns + columns[:, None])
        else:
            fits = columns < depth
            region = tl.load(map_rows + columns[None, :], mask=inside[:, None] & fits[None, :], other=0.0)
            word = tl.load(word_columns + columns[:, None], mask=fits[:, None], other=0.0)
        if UPCAST:
            region = region.to(tl.float32)
            word = word.to(tl.float32)
        scores = tl.dot(region, word, scores, input_precision=PRECISION)
    segment = tl.load(segments + slots)
    _, weight = _attention(scores, segment, tl.load(bounds + tile), tl.load(bounds + tile + 1), inside, temp1, shift)
    target = weights + image * positions * row + regions[:, None] * row + slots[None, :]
    tl.store(target, weight.to(weights.dtype.element_ty), mask=inside[:, None])


@triton.jit
def slopes_kernel(
    maps,
    contrasts,
    pulls,
    segments,
    bounds,
    gradients,
    positions,
    depth,
    slots_of_part,
    temp1,
    shift,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Writes the weights of regions and the gradient of the scores, divided by temp1, side by side: (b, M, 2 slots).

    `pulls` (b, 2 slots, D) begins with the gradient of the contexts (slots, D) of each image.
    """
    tile = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    regions = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    slots = tile * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = regions < positions
    map_rows = maps + image * positions * depth + regions[:, None] * depth
    word_columns = contrasts + slots[None, :] * depth
    pull_columns = pulls + image * 2 * slots_of_part * depth + slots[None, :] * depth
    scores = tl.zeros((BLOCK_M, BLOCK_W), dtype=tl.float32)
    upstream = tl.zeros((BLOCK_M, BLOCK_W), dtype=tl.float32)
    for start in range(0, depth, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        if EVEN_D:
            region = tl.load(map_rows + columns[None, :], mask=inside[:, None], other=0.0)
            word = tl.load(word_columns + columns[:, None])
            pull = tl.load(pull_columns + columns[:, None])
        else:
            fits = columns < depth
            region = tl.load(map_rows + columns[None, :], mask=inside[:, None] & fits[None, :], other=0.0)
            word = tl.load(word_columns + columns[:, None], mask=fits[:, None], other=0.0)
            pull = tl.load(pull_columns + columns[:, None], mask=fits[:, None], other=0.0)
        if UPCAST:
            region = region.to(tl.float32)
            word = word.to(tl.float32)
            pull = pull.to(tl.float32)
        scores = tl.dot(region, word, scores, input_precision=PRECISION)
        upstream = tl.dot(region, pull, upstream, input_precision=PRECISION)
    segment = tl.load(segments + slots)
    first = tl.load(bounds + tile)
    last = tl.load(bounds + tile + 1)
    probs, weight = _attention(scores, segment, first, last, inside, temp1, shift)
    # Back through the softmax over regions (without a normaliser), then through the one over words.
    upstream = upstream * probs * weight
    slopes = upstream - probs * _caption_sums(upstream, segment, first, last)
    row = 2 * slots_of_part
    target = gradients + image * positions * row + regions[:, None] * row + slots[None, :]
    tl.store(target, weight.to(gradients.dtype.element_ty), mask=inside[:, None])
    tl.store(target + slots_of_part, slopes.to(gradients.dtype.element_ty), mask=inside[:, None])


@triton.jit
def cosines_kernel(contexts, unit_words, cosines, inverses, depth, slots_of_part, row, BLOCK_D: tl.constexpr):
    """Writes cos(c, t) and 1 / |c| of contexts (b, slots, D), or 0 where |c| is 0, to rows of length `row`."""
    slot = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    fits = columns < depth
    context = tl.load(contexts + (image * slots_of_part + slot) * depth + columns, mask=fits, other=0.0)
    context = context.to(tl.float32)
    word = tl.load(unit_words + slot * depth + columns, mask=fits, other=0.0)
    length = tl.sqrt(tl.sum(context * context, axis=0))
    inverse = tl.where(length > 0, 1.0 / tl.where(length > 0, length, 1.0), 0.0)
    tl.store(cosines + image * row + slot, tl.sum(context * word, axis=0) * inverse)
    tl.store(inverses + image * row + slot, inverse)


@triton.jit
def pulls_kernel(
    contexts,
    unit_words,
    slopes,
    cosines,
    inverses,
    pulls,
    towards,
    images,
    depth,
    slots_of_part,
    BLOCK_D: tl.constexpr,
):
    """Writes the gradient of the contexts to `pulls` (b, 2 slots, D), and |t| times that of the words to `towards`.

    Each program owns one word and adds up images in order, so that results do not depend on timing.
    """
    slot = tl.program_id(0)
    columns = tl.arange(0, BLOCK_D)
    fits = columns < depth
    word = tl.load(unit_words + slot * depth + columns, mask=fits, other=0.0)
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for image in range(images):
        entry = image * slots_of_part + slot
        slope = tl.load(slopes + entry)
        cosine = tl.load(cosines + entry)
        inverse = tl.load(inverses + entry)
        pull = slope * inverse
        context = tl.load(contexts + entry.to(tl.int64) * depth + columns, mask=fits, other=0.0).to(tl.float32)
        found = pull * word - cosine * pull * inverse * context
        target = pulls + (entry + image * slots_of_part).to(tl.int64) * depth + columns
        tl.store(target, found.to(pulls.dtype.element_ty), mask=fits)
        total += pull * context - slope * cosine * word
    tl.store(towards + slot * depth + columns, total, mask=fits)


# Tiles of regions and widths of the steps through D; the last one fits into the memory of small cards.
CONFIGS = [
    triton.Config({"BLOCK_M": 128, "BLOCK_D": 64}, num_warps=8, num_stages=3),
    triton.Config({"BLOCK_M": 64, "BLOCK_D": 64}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_M": 64, "BLOCK_D": 64}, num_warps=8, num_stages=4),
    triton.Config({"BLOCK_M": 128, "BLOCK_D": 32}, num_warps=8, num_stages=4),
    triton.Config({"BLOCK_M": 64, "BLOCK_D": 32}, num_warps=8, num_stages=3),
    triton.Config({"BLOCK_M": 32, "BLOCK_D": 16}, num_warps=4, num_stages=2),
]


def _tuned(kernel):
    """Chooses a configuration by measurement for each width, tile and dtype, and remembers it on disk."""
    heuristics = triton.heuristics({"EVEN_D": lambda given: given["depth"] % given["BLOCK_D"] == 0})
    return triton.autotune(CONFIGS, key=["depth", "BLOCK_W"], cache_results=True)(heuristics(kernel))


KERNELS = {
    "weights": weights_kernel,
    "slopes": slopes_kernel,
    "cosines": cosines_kernel,
    "pulls": pulls_kernel,
}
TUNED = {} if INTERPRETED else {"weights": _tuned(weights_kernel), "slopes": _tuned(slopes_kernel)}
FIXED: dict[str, int] = (
    {"BLOCK_M": 16, "BLOCK_D": 16} if INTERPRETED else {"BLOCK_M": 64, "BLOCK_D": 32, "num_warps": 8, "num_stages": 2}
)
"""The configuration where nothing is tuned."""
