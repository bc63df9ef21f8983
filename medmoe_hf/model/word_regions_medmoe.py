"""Word-region similarity of MedMoE (arXiv 2506.08356, section 4.4): GLoRIA's kernel and the paper's printed formula.

Shapes: B images, N captions, W word slots per caption, P words of all captions, D the width of the shared space,
M = H/4 * W/4 regions.
Everything is computed in float32, whatever the dtype of the embeddings and any autocast context.
"""

# mypy: allow-untyped-calls
# Some methods of torch.Tensor are untyped.

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Elements of the largest intermediate tensor: small enough for the caches and the allocator, large enough that small
# problems run in one chunk.
_CHUNK_ELEMENTS = 2**20
# The same limit for work that is done caption by caption.
_SECTION_ELEMENTS = 2**19
# Maximum number of elements that GLoRIA's similarity saves for its backward pass: 512 MiB.
_KEPT_ELEMENTS = 2**27


def device_type(tensor: Tensor) -> str:
    """Returns the device type for `torch.autocast`, which does not support the meta device."""
    return "cpu" if tensor.is_meta else tensor.device.type


def of_any_size(tensor: Tensor) -> bool:
    """Returns whether no step may depend on tensor values: in an exported graph, and on the meta device."""
    # Before torch 2.7 an export cannot be told apart from a compilation.
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    return tensor.is_meta or exporting()


def _regions(local_embeds: Tensor) -> Tensor:
    """Returns the regions (B, D, M) of local maps (B, D, H', W'), float32.

    A channels-last map is not copied, and its gradient comes back channels-last: an expert's backward pass is several
    times as fast in one format as in two.
    """
    maps = local_embeds.float()
    if maps.is_contiguous():
        return maps.flatten(2)
    return maps.movedim(1, -1).flatten(1, 2).transpose(1, 2)


def _region_chunks(local_embeds: Tensor, words: Tensor) -> tuple[Tensor, ...]:
    """Splits the images into chunks (b, D, M) whose word-region scores (b, N, W, M) have a bounded size."""
    regions = _regions(local_embeds)
    if of_any_size(regions):
        return (regions,)
    per_image = words.shape[0] * words.shape[1] * regions.shape[2]
    chunks: tuple[Tensor, ...] = regions.split(max(1, _CHUNK_ELEMENTS // max(per_image, 1)))
    return chunks


def _without_empty_slots(word_embeds: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Truncates the word axis after the last slot that any caption uses; texts are padded much further."""
    if of_any_size(word_mask):
        return word_embeds.float(), word_mask
    used = word_mask.any(dim=0).nonzero()
    width = int(used.max()) + 1 if len(used) else 1
    return word_embeds[:, :width].float(), word_mask[:, :width]


def word_log_odds(regions: Tensor, words: Tensor, word_mask: Tensor) -> Tensor:
    """Computes how much more a region resembles one word than the other words of its text.

    This is the logit of GLoRIA's first softmax. With t_i·v_j = s_ij it is s_ij - log Σ_{k≠i} exp s_kj: what all words
    of a text share, above all its modality, cancels out. A text with a single word has no other words; there it is
    s_ij alone.

    Args:
        regions: Region embeddings, `(B, D, M)`.
        words: Word embeddings, `(B, W, D)`; text i belongs to image i.
        word_mask: `(B, W)` bool, True where there is a word.

    Returns:
        `(B, W, M)` float32, 0 where there is no word.
    """
    with torch.autocast(device_type(regions), enabled=False):
        scores = words.float() @ regions.float()
        others = word_mask.unsqueeze(1) & ~torch.eye(words.shape[1], dtype=torch.bool, device=words.device)
        # One row of rivals at a time: a tensor of (W, W, M) would waste memory.
        rows = []
        for index in range(words.shape[1]):
            rivals = scores.masked_fill(~others[:, index].unsqueeze(-1), -torch.inf).logsumexp(dim=1)
            rows.append(scores[:, index] - rivals.masked_fill(rivals == -torch.inf, 0.0))
        return torch.stack(rows, dim=1).masked_fill(~word_mask.unsqueeze(-1), 0.0)


def word_contributions(regions: Tensor, words: Tensor, word_mask: Tensor, reference: Tensor | None = None) -> Tensor:
    """Computes how much more a region adds to the similarity through one word than through a reference.

    Where v_g is the mean of the regions and t_g the mean of the words, v_g·t_g is the mean over regions j and words i
    of s_ij = t_i·v_j: an exact class-activation map, per word, of the contrast that `contrastive_loss` trains.
    With a reference r (for example the embedding of reports without the finding) the result is (t_i - r)·v_j: evidence
    for the word and against the reference. Without one, what all words of a text share, above all its modality, is
    subtracted: s_ij - mean_{k≠i} s_kj. A text with a single word has no other words; there it is s_ij alone.

    Args:
        regions: Region embeddings, `(B, D, M)`, in the space of the global embeddings.
        words: Word embeddings, `(B, W, D)`, in the same space; text i belongs to image i.
        word_mask: `(B, W)` bool, True where there is a word.
        reference: Reference embedding, `(B, D)` or `(D,)`, or None.

    Returns:
        `(B, W, M)` float32, 0 where there is no word.
    """
    with torch.autocast(device_type(regions), enabled=False):
        if reference is not None:
            scores = (words.float() - reference.float().unsqueeze(-2)) @ regions.float()
            return scores.masked_fill(~word_mask.unsqueeze(-1), 0.0)
        scores = (words.float() @ regions.float()).masked_fill(~word_mask.unsqueeze(-1), 0.0)
        rivals = (word_mask.sum(dim=1) - 1).clamp_min(1).view(-1, 1, 1)
        others = (scores.sum(dim=1, keepdim=True) - scores) / rivals
        return (scores - others).masked_fill(~word_mask.unsqueeze(-1), 0.0)


def gloria_logits(
    local_embeds: Tensor,
    word_embeds: Tensor,
    word_mask: Tensor,
    temp1: float,
    temp2: float,
    temp3: float,
    matmul_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Computes GLoRIA's similarity of every image with every caption: temp3 * log Σ_i exp(temp2 * cos(c_i, t_i)).

    The reading of Huang et al. (ICCV 2021), which the official code runs: c_i averages the regions under a softmax
    over words, times temp1, then a softmax over regions. Differentiable once; neither direction allocates a tensor of
    shape (B, N, W, M) unless it is small.

    Args:
        local_embeds: Local maps, `(B, D, H', W')`.
        word_embeds: Word embeddings, `(N, W, D)`.
        word_mask: `(N, W)` bool, True where there is a word. A caption without words scores 0 with every image.
        temp1: Inverse temperature of the attention over regions.
        temp2: Inverse temperature of the aggregation over words.
        temp3: Factor of the result, the inverse temperature of the contrast.
        matmul_dtype: The dtype of matrix products. With bfloat16 the factors and the result of each product are
            rounded to it; its sums and everything between the products stay float32.

    Returns:
        `(B, N)` float32.
    """
    with torch.autocast(device_type(local_embeds), enabled=False):
        if of_any_size(local_embeds):
            return temp3 * _padded_gloria(local_embeds, word_embeds, word_mask, temp1, temp2)
        counts = word_mask.sum(dim=1)
        # Sorted by the number of words, so that captions of equal length are adjacent and no words are padded.
        order = counts.argsort(stable=True)
        words = word_embeds.float()[order][word_mask[order]]
        sizes = [size for size in counts[order].tolist() if size]
        regions = _regions(local_embeds)
        needs_grad = torch.is_grad_enabled() and (regions.requires_grad or words.requires_grad)
        similarity = _GloriaSimilarity.apply(regions, words, sizes, temp1, temp2, matmul_dtype, needs_grad)
        # Captions without words come first in that order, and score 0.
        similarity = nn.functional.pad(temp3 * similarity, (len(counts) - len(sizes), 0))
        return similarity[:, order.argsort()]


def _padded_gloria(local_embeds: Tensor, word_embeds: Tensor, word_mask: Tensor, temp1: float, temp2: float) -> Tensor:
    """Computes the same as `_GloriaSimilarity` with tensors (B, N, W, M), whose size no word count changes."""
    regions, words, mask = local_embeds.float().flatten(2), word_embeds.float(), word_mask.unsqueeze(-1)
    mean = (words * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp_min(1)
    scores = torch.einsum("nwd,bdm->bnwm", words - mean, regions)
    probs = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=2)
    contexts = torch.einsum("bnwm,bdm->bnwd", (temp1 * probs).softmax(dim=-1), regions)
    cosines = (_unit(contexts) * _unit(words)).sum(dim=-1).masked_fill(~word_mask, -torch.inf)
    worded = word_mask.any(dim=1)
    # A caption without words scores 0 instead of the logarithm of an empty sum.
    return (temp2 * cosines.masked_fill(~worded.unsqueeze(-1), 0.0)).logsumexp(dim=-1).masked_fill(~worded, 0.0)


class _GloriaSimilarity(torch.autograd.Function):
    """log Σ_i exp(temp2 * cos(c_i, t_i)) of every image and caption, with a custom backward pass.

    Autograd would keep six tensors of shape (B, P, M). Here one image at a time, or one chunk of small images, runs
    through all steps in the same few buffers. Saved for the backward pass are the contexts c_i (B, P, D) and the first
    softmax (B, P, M), as long as they fit into `_KEPT_ELEMENTS`. Recomputing the softmax adds a sixth matrix product
    to the five of both passes, recomputing the contexts too adds a seventh.
    """

    @staticmethod
    def forward(
        ctx: Any,
        regions: Tensor,
        words: Tensor,
        sizes: list[int],
        temp1: float,
        temp2: float,
        matmul_dtype: torch.dtype,
        needs_grad: bool,
    ) -> Tensor:
        """Computes the similarities.

        Args:
            ctx: The context of autograd.
            regions: `(B, D, M)` float32.
            words: `(P, D)` float32, the words of one caption after the other.
            sizes: Number of words of each of the G captions, ascending.
            temp1: See `gloria_logits`.
            temp2: See `gloria_logits`.
            matmul_dtype: See `gloria_logits`.
            needs_grad: Whether a backward pass may follow.

        Returns:
            `(B, G)` float32.
        """
        images, depth, positions = regions.shape
        everything = images, len(words)
        keeps_contexts = needs_grad and images * len(words) * depth <= _KEPT_ELEMENTS
        keeps_probs = keeps_contexts and images * len(words) * (depth + positions) <= _KEPT_ELEMENTS
        chunks, most = _chunks(regions, sizes)
        contexts = regions.new_empty(*(everything if keeps_contexts else most), depth, dtype=matmul_dtype)
        probs = regions.new_empty(*(everything if keeps_probs else most), positions)
        weights = regions.new_empty(*most, positions, dtype=matmul_dtype)
        cosines = regions.new_empty(everything)
        unit_words, contrasts = _unit(words), _contrasts(words, sizes).to(matmul_dtype)
        for chunk, first, chunk_sizes in chunks:
            maps, part = regions[chunk[0]].to(matmul_dtype), chunk[1]
            context = contexts[chunk if keeps_contexts else first]
            prob, weight = probs[chunk if keeps_probs else first], weights[first]
            _word_softmax_(contrasts[part], maps, chunk_sizes, weight, prob)
            _region_weights_(prob, chunk_sizes, temp1, weight)
            torch.bmm(weight, maps.transpose(1, 2), out=context)
            cosines[chunk] = (_unit(context.float()) * unit_words[part]).sum(dim=-1)
        similarity = _by_caption(lambda values: values.logsumexp(dim=-1), temp2 * cosines, sizes)
        kept = contexts if keeps_contexts else None, probs if keeps_probs else None
        ctx.save_for_backward(regions, words, *kept, cosines, similarity)
        ctx.sizes, ctx.temp1, ctx.temp2, ctx.matmul_dtype = sizes, temp1, temp2, matmul_dtype
        return similarity

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        regions, words, contexts, probs, cosines, similarity = ctx.saved_tensors
        wants_regions, wants_words = ctx.needs_input_grad[:2]
        _, depth, positions = regions.shape
        with torch.autocast(device_type(regions), enabled=False):
            # d similarity / d cos is temp2 times the softmax over a caption's words.
            sizes = torch.tensor(ctx.sizes, dtype=torch.long, device=words.device)
            spread = [part.repeat_interleave(sizes, dim=1) for part in (gradient * ctx.temp2, similarity)]
            grad_cosines = spread[0] * (ctx.temp2 * cosines - spread[1]).exp()
            unit_words, contrasts = _unit(words), _contrasts(words, ctx.sizes).to(ctx.matmul_dtype)
            grad_regions = torch.empty_like(regions) if wants_regions else None
            grad_words = torch.zeros_like(words) if wants_words else None
            chunks, (images, length) = _chunks(regions, ctx.sizes)
            # One product makes the gradient of the regions: [grad_contexts; temp1 * words]ᵀ [weights; grad_scores].
            left = regions.new_empty(images, 2 * length, depth, dtype=ctx.matmul_dtype)
            right = regions.new_empty(images, 2 * length, positions, dtype=ctx.matmul_dtype)
            spare = regions.new_empty(images if probs is None else 0, length, positions)
            for chunk, first, chunk_sizes in chunks:
                maps, part, number = regions[chunk[0]].to(ctx.matmul_dtype), chunk[1], first[1].stop
                factors, terms = left[first[0], : 2 * number], right[first[0], : 2 * number]
                weight, grad_scores = terms[:, :number], terms[:, number:]
                prob = spare[first] if probs is None else probs[chunk]
                if probs is None:
                    _word_softmax_(contrasts[part], maps, chunk_sizes, weight, prob)
                _region_weights_(prob, chunk_sizes, ctx.temp1, weight)
                context = torch.bmm(weight, maps.transpose(1, 2)) if contexts is None else contexts[chunk]
                context, cosine = context.float(), cosines[chunk].unsqueeze(-1)
                pull = grad_cosines[chunk].unsqueeze(-1) * _inverse_length(context)
                away = cosine * pull * _inverse_length(context)
                factors[:, :number] = (pull * unit_words[part]).addcmul_(away, context, value=-1)
                factors[:, number:] = ctx.temp1 * contrasts[part]
                # Back through both softmaxes: first the one over regions (without a normaliser) ...
                torch.bmm(factors[:, :number], maps, out=grad_scores)
                for section, of_weight, of_prob in _captions(chunk_sizes, grad_scores, weight, prob):
                    upstream = section.float().mul_(of_prob).mul_(of_weight)
                    # ... then the one over the words of a caption.
                    upstream.addcmul_(of_prob, upstream.sum(dim=2, keepdim=True), value=-1)
                    section.copy_(upstream)
                if grad_words is not None:
                    slope = grad_cosines[chunk].unsqueeze(-1)
                    towards = (pull * context).sum(dim=0) - (slope * cosine).sum(dim=0) * unit_words[part]
                    by_scores = torch.bmm(grad_scores, maps.transpose(1, 2)).sum(dim=0, dtype=words.dtype)
                    grad_words[part] += towards * _inverse_length(words[part]) + ctx.temp1 * by_scores
                if grad_regions is not None:
                    target, begun = grad_regions[chunk[0]], part.start > 0
                    if target.dtype == ctx.matmul_dtype:
                        target.baddbmm_(factors.transpose(1, 2), terms, beta=begun)
                    else:
                        product = torch.bmm(factors.transpose(1, 2), terms)
                        target.copy_(target + product if begun else product)
        return grad_regions, grad_words, None, None, None, None, None


_Chunk = tuple[tuple[slice, slice], tuple[slice, slice], list[int]]


def _chunks(regions: Tensor, sizes: list[int]) -> tuple[list[_Chunk], tuple[int, int]]:
    """Splits images (B, D, M) and captions into chunks of bounded size.

    A chunk has as many images as fit, at least one. The captions of a single image are split only if they are four
    times too large, because matrix products of few words are slow, and never within a caption.

    Returns:
        The chunks and the shape (images, words) of a buffer that holds any of them. A chunk consists of the slices of
        its images and words in (B, P, ...), their slices in such a buffer, and the sizes of its captions.
    """
    images, _, positions = regions.shape
    limit = _fitting(_CHUNK_ELEMENTS, regions)
    parts: list[list[int]] = [[]]
    for size in sizes:
        if parts[-1] and (sum(parts[-1]) + size) * positions > 4 * limit:
            parts.append([])
        parts[-1].append(size)
    ends = list(itertools.accumulate(sum(part) for part in parts))
    longest = max(sum(part) for part in parts)
    step = max(1, min(images, limit // max(1, longest * positions)))
    chunks = []
    for start in range(0, images, step):
        rows = slice(start, min(start + step, images))
        for end, part in zip(ends, parts, strict=True):
            in_buffer = slice(rows.stop - start), slice(sum(part))
            chunks.append(((rows, slice(end - sum(part), end)), in_buffer, part))
    return chunks, (step, longest)


def _fitting(elements: int, tensor: Tensor) -> int:
    """Returns the chunk size for a device: a CPU is limited by its caches, a GPU needs enough work per launch."""
    return elements if tensor.device.type == "cpu" else 64 * elements


def _captions(sizes: list[int], *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields views (B, captions, words per caption, ...) of tensors (B, P, ...), each of captions of the same size.

    A view has as many captions as keep the work on it within the CPU's second-level cache.
    """
    start = 0
    images, _, *rest = tensors[0].shape
    limit = _fitting(_SECTION_ELEMENTS, tensors[0]) // max(1, images * math.prod(rest))
    for size, group in itertools.groupby(sizes):
        left = len(list(group))
        while left:
            number = min(left, max(1, limit // size))
            stop = start + number * size
            yield tuple(tensor[:, start:stop].unflatten(1, (number, size)) for tensor in tensors)
            start, left = stop, left - number


def _by_caption(function: Callable[[Tensor], Tensor], values: Tensor, sizes: list[int]) -> Tensor:
    """Applies `function` to the last axis, the words of a caption: (B, P) to (B, G)."""
    parts = [function(section) for (section,) in _captions(sizes, values)]
    return torch.cat(parts, dim=1) if parts else values.new_zeros(len(values), 0)


def _contrasts(words: Tensor, sizes: list[int]) -> Tensor:
    """Subtracts from each word (P, D) the mean of its caption.

    A softmax over the words of a caption is invariant to what they share, and so is its gradient; rounding is not.
    """
    contrasts = words.clone()
    for (section,) in _captions(sizes, contrasts.unsqueeze(0)):
        section -= section.mean(dim=2, keepdim=True)
    return contrasts


def _word_softmax_(contrasts: Tensor, maps: Tensor, sizes: list[int], scores: Tensor, probs: Tensor) -> None:
    """Fills `probs` (b, P, M): for each region a softmax over the words of each caption.

    `scores` has the same shape and is filled with t_i·v_j.
    """
    torch.bmm(contrasts.expand(len(maps), -1, -1), maps, out=scores)
    for section, prob in _captions(sizes, scores, probs):
        torch.softmax(section, 2, dtype=probs.dtype, out=prob)


def _region_weights_(probs: Tensor, sizes: list[int], temp1: float, weights: Tensor) -> None:
    """Fills `weights` (b, P, M) with the second softmax without its normaliser, to which the cosine is invariant.

    Probabilities lie in 0..1: unless `temp1` is large, exponentials neither overflow nor underflow.
    """
    for prob, weight in _captions(sizes, probs, weights):
        if temp1 > 20:
            prob = prob - prob.amax(dim=-1, keepdim=True)
        scaled = torch.mul(prob, temp1, out=weight if weight.dtype == prob.dtype else None)
        torch.exp(scaled, out=weight)


def _inverse_length(vectors: Tensor) -> Tensor:
    """Returns 1 / |v|, (..., D) to (..., 1); 0 for a zero vector, so that it has no direction and no gradient."""
    length = vectors.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, 1 / length, 0.0)


def _unit(vectors: Tensor) -> Tensor:
    return vectors * _inverse_length(vectors)


def token_cosines(regions: Tensor, words: Tensor, scale: float) -> Tensor:
    """Computes cos(c_i, t_j) of the words of one caption in one image, with a_ij = softmax_j(t_i·v_j / τ).

    Args:
        regions: `(..., D, M)`.
        words: `(..., W, D)`.
        scale: 1/τ.

    Returns:
        `(..., W, W)`; row i is the context of word i.
    """
    attention = (scale * words @ regions).softmax(dim=-1)
    context = nn.functional.normalize(attention @ regions.transpose(-1, -2), dim=-1)
    return context @ nn.functional.normalize(words, dim=-1).transpose(-1, -2)


def token_logits(local_embeds: Tensor, word_embeds: Tensor, word_mask: Tensor, scale: float) -> Tensor:
    """Computes the similarity of `token_losses` of every image with every caption: the mean of cos(c_i, t_i)/τ.

    Args:
        local_embeds: Local maps, `(B, D, H', W')`.
        word_embeds: Word embeddings, `(N, W, D)`.
        word_mask: `(N, W)` bool, True where there is a word. A caption without words scores 0 with every image.
        scale: 1/τ.

    Returns:
        `(B, N)` float32.
    """
    with torch.autocast(device_type(local_embeds), enabled=False):
        words, mask = _without_empty_slots(word_embeds, word_mask)
        count = mask.sum(dim=1).clamp_min(1)
        rows = []
        for regions in _region_chunks(local_embeds, words):
            attention = (scale * words.flatten(0, 1) @ regions).softmax(dim=-1)
            context = (attention @ regions.transpose(1, 2)).unflatten(1, words.shape[:2])
            cosine = nn.functional.cosine_similarity(context, words, dim=-1)
            rows.append(scale * (cosine * mask).sum(dim=-1) / count)
        return torch.cat(rows)
