"""The losses of MedMoE (arXiv 2506.08356, sections 4.4-4.6) as functions of embeddings.

Shapes: B images, N captions, W word slots a caption, D the width of the shared space, M = H/4 * W/4 regions,
K experts.
Everything is computed in float32, whatever the embeddings' type and any autocast around it.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .modalities_medmoe import UNKNOWN_MODALITY


def cosine_logits(image_embeds: Tensor, text_embeds: Tensor, scale: float) -> Tensor:
    """Cosine of every image with every caption, times `scale` (1/τ).

    Args:
        image_embeds: (B, D).
        text_embeds: (N, D).

    Returns:
        (B, N) float32.
    """
    with torch.autocast(_device_type(image_embeds), enabled=False):
        image = nn.functional.normalize(image_embeds.float(), dim=-1)
        text = nn.functional.normalize(text_embeds.float(), dim=-1)
        return scale * image @ text.t()


def group_targets(groups: Tensor) -> Tensor:
    """Multi-positive targets: row i is uniform over P(i) = {j : g_j = g_i}, the positives of pair i.

    UniCL (Yang et al., "Unified Contrastive Learning in Image-Text-Label Space", CVPR 2022).

    Args:
        groups: (B,) integers, the same for pairs that mean the same; a negative one is unknown and makes a pair its
            own only positive.

    Returns:
        (B, B) float32, rows that sum to 1. Symmetric.
    """
    positive = (groups.unsqueeze(1) == groups) & (groups >= 0)
    positive.fill_diagonal_(True)
    return positive.float() / positive.sum(dim=1, keepdim=True)


def text_similarity_targets(text_embeds: Tensor, temperature: float) -> Tensor:
    """Soft targets: T_ij = softmax_j(cos(t_i, t_j) / temperature), the cosine of a text with itself being 1.

    MedCLIP (Wang et al., "MedCLIP: Contrastive Learning from Unpaired Medical Images and Text", EMNLP 2022), which
    takes the cosines of extracted entities at a temperature of 1. As the temperature approaches 0 this becomes
    `group_targets` of equal texts.

    Args:
        text_embeds: (B, D), what the texts are compared by. No gradient flows into it.
        temperature: greater than 0.

    Returns:
        (B, B) float32, rows that sum to 1.
    """
    with torch.autocast(_device_type(text_embeds), enabled=False):
        text = nn.functional.normalize(text_embeds.detach().float(), dim=-1)
        cosines = (text @ text.t()).fill_diagonal_(1.0)
        return (cosines / temperature).softmax(dim=-1)


def contrastive_loss(logits_per_image: Tensor, contrast: str = "sum", targets: Tensor | None = None) -> Tensor:
    """The contrastive loss in both directions: InfoNCE (section 4.4), or its multi-positive form.

    With s = `logits_per_image` and T = `targets` the direction from images to captions is
    -1/B Σ_i Σ_j T_ij log softmax_j(s_ij), and the other one the same of the transposed s. Where T is the identity,
    value and gradient equal those without targets bit for bit.

    Args:
        logits_per_image: (B, B), image i and caption i being a pair.
        contrast: whether the directions are added (`"sum"`) or averaged (`"mean"`).
        targets: (B, B), rows that sum to 1: how much caption j is a positive of image i, and image j of caption i.
            See `group_targets` and `text_similarity_targets`. None: each pair is its own only positive.
    """
    if logits_per_image.shape[0] != logits_per_image.shape[1]:
        rows, columns = logits_per_image.shape
        raise ValueError(f"A contrastive loss needs a caption for each image, got {rows} images, {columns} captions.")
    both = _cross_entropy(logits_per_image, targets) + _cross_entropy(logits_per_image.t(), targets)
    return both if contrast == "sum" else both / 2


def _cross_entropy(logits: Tensor, targets: Tensor | None) -> Tensor:
    """-1/B Σ_i Σ_j T_ij log softmax_j(s_ij), T the identity if there are no targets."""
    own = torch.arange(logits.shape[0], device=logits.device)
    loss = nn.functional.cross_entropy(logits, own)
    if targets is None:
        return loss
    # Against T_i instead of the own column it is larger by Σ_j (δ_ij - T_ij) s_ij. These weights sum to 0 in a row, so
    # s_ii may be taken off s_ij for precision, and they are all exactly 0 where a pair is its own only positive.
    weights = torch.eye(len(logits), device=logits.device) - targets
    return loss + (weights * (logits - logits.detach().diagonal().unsqueeze(1))).sum() / len(logits)


# Elements of the largest intermediate tensor: small enough to stay in the caches' and the allocator's reach, large
# enough that small problems run in one piece.
_CHUNK_ELEMENTS = 2**20
# The same for work that is done caption by caption.
_SECTION_ELEMENTS = 2**19
# Elements that GLoRIA's similarity keeps for its backward pass at most: 512 MiB.
_KEPT_ELEMENTS = 2**27


def _device_type(tensor: Tensor) -> str:
    """As `torch.autocast` takes it, which does not know the meta device."""
    return "cpu" if tensor.is_meta else tensor.device.type


def of_any_size(tensor: Tensor) -> bool:
    """Whether no step may depend on what tensors hold: in an exported graph, and on the meta device."""
    # Before torch 2.7 an export says no more than that it compiles.
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    return tensor.is_meta or exporting()


def _region_chunks(local_embeds: Tensor, words: Tensor) -> tuple[Tensor, ...]:
    """Splits the images into chunks (b, D, M) whose word-region scores (b, N, W, M) have a bounded size."""
    regions = local_embeds.float().flatten(2)
    if of_any_size(regions):
        return (regions,)
    per_image = words.shape[0] * words.shape[1] * regions.shape[2]
    return regions.split(max(1, _CHUNK_ELEMENTS // max(per_image, 1)))


def _without_empty_slots(word_embeds: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Cuts the word axis behind the last slot that any caption uses; texts are padded much further."""
    if of_any_size(word_mask):
        return word_embeds.float(), word_mask
    used = word_mask.any(dim=0).nonzero()
    width = int(used.max()) + 1 if len(used) else 1
    return word_embeds[:, :width].float(), word_mask[:, :width]


def word_log_odds(regions: Tensor, words: Tensor, word_mask: Tensor) -> Tensor:
    """How much more a region is like one word than like its text's other words: the logit of GLoRIA's first softmax.

    With t_i·v_j = s_ij this is s_ij - log Σ_{k≠i} exp s_kj: what all words of a text share, its modality above all,
    drops out. A text of a single word has nothing to compare with; there it is s_ij alone.

    Args:
        regions: (B, D, M).
        words: (B, W, D), text i about image i.
        word_mask: (B, W) bool.

    Returns:
        (B, W, M) float32, 0 where there is no word.
    """
    with torch.autocast(_device_type(regions), enabled=False):
        scores = words.float() @ regions.float()
        others = word_mask.unsqueeze(1) & ~torch.eye(words.shape[1], dtype=torch.bool, device=words.device)
        # Row i of (W, W, M) would be memory for nothing: one row of rivals at a time.
        rows = []
        for index in range(words.shape[1]):
            rivals = scores.masked_fill(~others[:, index].unsqueeze(-1), -torch.inf).logsumexp(dim=1)
            rows.append(scores[:, index] - rivals.masked_fill(rivals == -torch.inf, 0.0))
        return torch.stack(rows, dim=1).masked_fill(~word_mask.unsqueeze(-1), 0.0)


def word_contributions(regions: Tensor, words: Tensor, word_mask: Tensor, reference: Tensor | None = None) -> Tensor:
    """How much more a region adds to the similarity by one word than by what the word is held against.

    Where v_g is the mean of the regions and t_g the mean of the words, v_g·t_g is the mean over regions j and words i
    of s_ij = t_i·v_j: a class-activation map of the contrast that `contrastive_loss` trains, exact and for each word.
    With a reference r (the embedding of reports without the finding, say) it is (t_i - r)·v_j: what speaks for the
    word and against the reference. Without one, what all words of a text share, its modality above all, is taken off:
    s_ij - mean_{k≠i} s_kj; a text of a single word has nothing to compare with, and there it is s_ij alone.

    Args:
        regions: (B, D, M).
        words: (B, W, D), text i about image i; both in the space of the global embeddings.
        word_mask: (B, W) bool.
        reference: (B, D) or (D,).

    Returns:
        (B, W, M) float32, 0 where there is no word.
    """
    with torch.autocast(_device_type(regions), enabled=False):
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
    products: torch.dtype = torch.float32,
) -> Tensor:
    """Word-region similarity of every image with every caption: temp3 * log Σ_i exp(temp2 * cos(c_i, t_i)).

    The reading of Huang et al. (ICCV 2021), which the official code runs: c_i averages the regions under a softmax
    over words, times temp1, then a softmax over regions. Differentiable once; no tensor of (B, N, W, M) is made in
    either direction unless it is small.

    Args:
        local_embeds: (B, D, H', W'), the local maps.
        word_embeds: (N, W, D).
        word_mask: (N, W) bool, True where there is a word. A caption without words scores 0 with every image.
        products: the type in which matrices are multiplied. With bfloat16 the factors and the result of each product
            are rounded to it; its sums and everything between the products stay float32.

    Returns:
        (B, N) float32.
    """
    with torch.autocast(_device_type(local_embeds), enabled=False):
        if of_any_size(local_embeds):
            return temp3 * _padded_gloria(local_embeds, word_embeds, word_mask, temp1, temp2)
        counts = word_mask.sum(dim=1)
        # Captions with as many words as each other come to lie side by side, and their words without any padding.
        order = counts.argsort(stable=True)
        words = word_embeds.float()[order][word_mask[order]]
        sizes = [size for size in counts[order].tolist() if size]
        regions = local_embeds.float().flatten(2)
        trained = torch.is_grad_enabled() and (regions.requires_grad or words.requires_grad)
        similarity = _GloriaSimilarity.apply(regions, words, sizes, temp1, temp2, products, trained)
        # No words, no similarity: such captions stand first.
        similarity = nn.functional.pad(temp3 * similarity, (len(counts) - len(sizes), 0))
        return similarity[:, order.argsort()]


def _padded_gloria(local_embeds: Tensor, word_embeds: Tensor, word_mask: Tensor, temp1: float, temp2: float) -> Tensor:
    """What `_GloriaSimilarity` gives, by tensors (B, N, W, M) of a size that no word count changes."""
    regions, words, mask = local_embeds.float().flatten(2), word_embeds.float(), word_mask.unsqueeze(-1)
    mean = (words * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp_min(1)
    scores = torch.einsum("nwd,bdm->bnwm", words - mean, regions)
    shares = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=2)
    contexts = torch.einsum("bnwm,bdm->bnwd", (temp1 * shares).softmax(dim=-1), regions)
    cosines = (_unit(contexts) * _unit(words)).sum(dim=-1).masked_fill(~word_mask, -torch.inf)
    worded = word_mask.any(dim=1)
    # A caption without words: 0, and not the logarithm of nothing.
    return (temp2 * cosines.masked_fill(~worded.unsqueeze(-1), 0.0)).logsumexp(dim=-1).masked_fill(~worded, 0.0)


class _GloriaSimilarity(torch.autograd.Function):
    """log Σ_i exp(temp2 * cos(c_i, t_i)) of every image and caption, with a backward pass of its own.

    Autograd would keep half a dozen tensors of (B, P, M), P the words of all captions. Here an image at a time, or a
    chunk of small ones, is taken through all of it in the same few buffers. Kept for the backward pass are the
    contexts c_i (B, P, D) and the first softmax (B, P, M), as far as `_KEPT_ELEMENTS` reaches. Without the softmax
    the five matrix products of both passes become six, without the contexts too they become seven.
    """

    @staticmethod
    def forward(
        ctx: Any,
        regions: Tensor,
        words: Tensor,
        sizes: list[int],
        temp1: float,
        temp2: float,
        products: torch.dtype,
        trained: bool,
    ) -> Tensor:
        """Gives (B, G).

        Args:
            regions: (B, D, M) float32.
            words: (P, D) float32, the words of caption after caption.
            sizes: the number of words of each of the G captions, ascending.
            products: see `gloria_logits`.
            trained: whether a backward pass may follow.
        """
        images, depth, positions = regions.shape
        everything = images, len(words)
        keeps_contexts = trained and images * len(words) * depth <= _KEPT_ELEMENTS
        keeps_shares = keeps_contexts and images * len(words) * (depth + positions) <= _KEPT_ELEMENTS
        chunks, most = _chunks(regions, sizes)
        contexts = regions.new_empty(*(everything if keeps_contexts else most), depth, dtype=products)
        shares = regions.new_empty(*(everything if keeps_shares else most), positions)
        weights = regions.new_empty(*most, positions, dtype=products)
        cosines = regions.new_empty(everything)
        unit_words, contrasts = _unit(words), _contrasts(words, sizes).to(products)
        for chunk, first, chunk_sizes in chunks:
            maps, part = regions[chunk[0]].to(products), chunk[1]
            context = contexts[chunk if keeps_contexts else first]
            share, weight = shares[chunk if keeps_shares else first], weights[first]
            _word_softmax_(contrasts[part], maps, chunk_sizes, weight, share)
            _region_weights_(share, chunk_sizes, temp1, weight)
            torch.bmm(weight, maps.transpose(1, 2), out=context)
            cosines[chunk] = (_unit(context.float()) * unit_words[part]).sum(dim=-1)
        similarity = _by_caption(lambda values: values.logsumexp(dim=-1), temp2 * cosines, sizes)
        kept = contexts if keeps_contexts else None, shares if keeps_shares else None
        ctx.save_for_backward(regions, words, *kept, cosines, similarity)
        ctx.sizes, ctx.temp1, ctx.temp2, ctx.products = sizes, temp1, temp2, products
        return similarity

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        regions, words, contexts, shares, cosines, similarity = ctx.saved_tensors
        wants_regions, wants_words = ctx.needs_input_grad[:2]
        _, depth, positions = regions.shape
        with torch.autocast(_device_type(regions), enabled=False):
            # d similarity / d cos is temp2 times the softmax over a caption's words.
            sizes = torch.tensor(ctx.sizes, dtype=torch.long, device=words.device)
            spread = [part.repeat_interleave(sizes, dim=1) for part in (gradient * ctx.temp2, similarity)]
            grad_cosines = spread[0] * (ctx.temp2 * cosines - spread[1]).exp()
            unit_words, contrasts = _unit(words), _contrasts(words, ctx.sizes).to(ctx.products)
            grad_regions = torch.empty_like(regions) if wants_regions else None
            grad_words = torch.zeros_like(words) if wants_words else None
            chunks, (images, length) = _chunks(regions, ctx.sizes)
            # One product makes the gradient of the regions: [grad_contexts; temp1 * words]ᵀ [weights; grad_scores].
            left = regions.new_empty(images, 2 * length, depth, dtype=ctx.products)
            right = regions.new_empty(images, 2 * length, positions, dtype=ctx.products)
            spare = regions.new_empty(images if shares is None else 0, length, positions)
            for chunk, first, chunk_sizes in chunks:
                maps, part, number = regions[chunk[0]].to(ctx.products), chunk[1], first[1].stop
                factors, terms = left[first[0], : 2 * number], right[first[0], : 2 * number]
                weight, grad_scores = terms[:, :number], terms[:, number:]
                share = spare[first] if shares is None else shares[chunk]
                if shares is None:
                    _word_softmax_(contrasts[part], maps, chunk_sizes, weight, share)
                _region_weights_(share, chunk_sizes, ctx.temp1, weight)
                context = torch.bmm(weight, maps.transpose(1, 2)) if contexts is None else contexts[chunk]
                context, cosine = context.float(), cosines[chunk].unsqueeze(-1)
                pull = grad_cosines[chunk].unsqueeze(-1) * _inverse_length(context)
                away = cosine * pull * _inverse_length(context)
                factors[:, :number] = (pull * unit_words[part]).addcmul_(away, context, value=-1)
                factors[:, number:] = ctx.temp1 * contrasts[part]
                # Back through both softmaxes: first the one over regions (without a normaliser) ...
                torch.bmm(factors[:, :number], maps, out=grad_scores)
                for section, of_weight, of_share in _captions(chunk_sizes, grad_scores, weight, share):
                    upstream = section.float().mul_(of_share).mul_(of_weight)
                    # ... then the one over the words of a caption.
                    upstream.addcmul_(of_share, upstream.sum(dim=2, keepdim=True), value=-1)
                    section.copy_(upstream)
                if grad_words is not None:
                    slope = grad_cosines[chunk].unsqueeze(-1)
                    towards = (pull * context).sum(dim=0) - (slope * cosine).sum(dim=0) * unit_words[part]
                    by_scores = torch.bmm(grad_scores, maps.transpose(1, 2)).sum(dim=0, dtype=words.dtype)
                    grad_words[part] += towards * _inverse_length(words[part]) + ctx.temp1 * by_scores
                if grad_regions is not None:
                    target, begun = grad_regions[chunk[0]], part.start > 0
                    if target.dtype == ctx.products:
                        target.baddbmm_(factors.transpose(1, 2), terms, beta=begun)
                    else:
                        product = torch.bmm(factors.transpose(1, 2), terms)
                        target.copy_(target + product if begun else product)
        return grad_regions, grad_words, None, None, None, None, None


_Chunk = tuple[tuple[slice, slice], tuple[slice, slice], list[int]]


def _chunks(regions: Tensor, sizes: list[int]) -> tuple[list[_Chunk], tuple[int, int]]:
    """Cuts images (B, D, M) and captions into chunks of bounded size.

    As many images as fit, at least one. The captions of a single image are cut only when they are four times too
    large, because products of few words are slow, and never inside a caption.

    Returns:
        for each chunk where its images and its words lie in (B, P, ...), where they lie in a buffer for any chunk,
        and the sizes of its captions; and the images and words of that buffer.
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
            place = slice(rows.stop - start), slice(sum(part))
            chunks.append(((rows, slice(end - sum(part), end)), place, part))
    return chunks, (step, longest)


def _fitting(elements: int, tensor: Tensor) -> int:
    """Caches bound what a CPU should take at a time; a GPU wants work enough for each launch."""
    return elements if tensor.device.type == "cpu" else 64 * elements


def _captions(sizes: list[int], *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views (B, captions, words of each, ...) of tensors (B, P, ...), of captions of the same size.

    As many captions as leave all that is done to a view in the CPU's second-level cache.
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
    """(B, P) to (B, G): what `function` makes of the last axis, the words of a caption."""
    parts = [function(section) for (section,) in _captions(sizes, values)]
    return torch.cat(parts, dim=1) if parts else values.new_zeros(len(values), 0)


def _contrasts(words: Tensor, sizes: list[int]) -> Tensor:
    """(P, D) words less the mean of their caption.

    A softmax over the words of a caption does not see what they share, nor does its gradient; rounding does.
    """
    contrasts = words.clone()
    for (section,) in _captions(sizes, contrasts.unsqueeze(0)):
        section -= section.mean(dim=2, keepdim=True)
    return contrasts


def _word_softmax_(contrasts: Tensor, maps: Tensor, sizes: list[int], scores: Tensor, shares: Tensor) -> None:
    """Fills `shares` (b, P, M): for each region the share of each word, a softmax over the words of each caption.

    `scores` is as large, and left with t_i·v_j.
    """
    torch.bmm(contrasts.expand(len(maps), -1, -1), maps, out=scores)
    for section, share in _captions(sizes, scores, shares):
        torch.softmax(section, 2, dtype=shares.dtype, out=share)


def _region_weights_(shares: Tensor, sizes: list[int], temp1: float, weights: Tensor) -> None:
    """Fills `weights` (b, P, M) with the second softmax without its normaliser, which the cosine does not see.

    Shares lie in 0..1: unless `temp1` is large, exponentials neither overflow nor vanish.
    """
    for share, weight in _captions(sizes, shares, weights):
        if temp1 > 20:
            share = share - share.amax(dim=-1, keepdim=True)
        scaled = torch.mul(share, temp1, out=weight if weight.dtype == share.dtype else None)
        torch.exp(scaled, out=weight)


def _inverse_length(vectors: Tensor) -> Tensor:
    """(..., D) to (..., 1); 0 for a vector of length 0, so that it has no direction and no gradient."""
    length = vectors.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, 1 / length, 0.0)


def _unit(vectors: Tensor) -> Tensor:
    return vectors * _inverse_length(vectors)


def _token_cosines(regions: Tensor, words: Tensor, scale: float) -> Tensor:
    """cos(c_i, t_j) of the words of one caption in one image, with a_ij = softmax_j(t_i·v_j / τ) (section 4.4).

    Args:
        regions: (..., D, M).
        words: (..., W, D).

    Returns:
        (..., W, W), row i the context of word i.
    """
    attention = (scale * words @ regions).softmax(dim=-1)
    context = nn.functional.normalize(attention @ regions.transpose(-1, -2), dim=-1)
    return context @ nn.functional.normalize(words, dim=-1).transpose(-1, -2)


def token_logits(local_embeds: Tensor, word_embeds: Tensor, word_mask: Tensor, scale: float) -> Tensor:
    """Similarity of every image with every caption as `token_loss` reads it: the mean over words of cos(c_i, t_i)/τ.

    Args, returns: as `gloria_logits`; `scale` is 1/τ.
    """
    with torch.autocast(_device_type(local_embeds), enabled=False):
        words, mask = _without_empty_slots(word_embeds, word_mask)
        count = mask.sum(dim=1).clamp_min(1)
        rows = []
        for regions in _region_chunks(local_embeds, words):
            attention = (scale * words.flatten(0, 1) @ regions).softmax(dim=-1)
            context = (attention @ regions.transpose(1, 2)).unflatten(1, words.shape[:2])
            cosine = nn.functional.cosine_similarity(context, words, dim=-1)
            rows.append(scale * (cosine * mask).sum(dim=-1) / count)
        return torch.cat(rows)


def token_losses(local_embeds: Tensor, word_embeds: Tensor, word_mask: Tensor, scale: float) -> Tensor:
    """The paper's printed local loss: a word's context must be nearer to that word than to its report's other words.

    -log exp(cos(c_i,t_i)/τ) / Σ_j exp(cos(c_i,t_j)/τ) over the words j of the same report, averaged over its words.

    Args:
        local_embeds: (B, D, H', W').
        word_embeds: (B, W, D), caption i of image i.
        word_mask: (B, W) bool.
        scale: 1/τ, the same in the attention and in the contrast, as printed.

    Returns:
        (B,) float32, of each report; 0 for one without words.
    """
    with torch.autocast(_device_type(local_embeds), enabled=False):
        cosines = scale * _token_cosines(local_embeds.float().flatten(2), word_embeds.float(), scale)
        lowest = torch.finfo(cosines.dtype).min
        log_probs = cosines.masked_fill(~word_mask.unsqueeze(1), lowest).log_softmax(dim=-1)
        per_word = -log_probs.diagonal(dim1=1, dim2=2).masked_fill(~word_mask, 0.0)
        return per_word.sum(dim=1) / word_mask.sum(dim=1).clamp_min(1)


def modality_loss(config: Any, router_logits: Tensor, modality_labels: Tensor) -> Tensor:
    """Cross-entropy of a router against the modality (section 4.5); labels of -100 are ignored.

    Args:
        config: whose `aux_loss_on` and `aux_label_smoothing` are used.
        router_logits: (B, K).
        modality_labels: (B,) in 0..K-1, or -100. If all are -100 the loss is 0, with a gradient of 0.
    """
    with torch.autocast(_device_type(router_logits), enabled=False):
        scores = router_logits.float()
        if config.aux_loss_on == "probabilities":
            scores = scores.softmax(dim=-1)
        total = nn.functional.cross_entropy(
            scores,
            modality_labels,
            ignore_index=UNKNOWN_MODALITY,
            reduction="sum",
            label_smoothing=config.aux_label_smoothing,
        )
        return total / (modality_labels != UNKNOWN_MODALITY).sum().clamp_min(1)


def region_temperature(config: Any, positions: int) -> float:
    """`config.temp1` for a map of so many positions (see `temp1_regions`)."""
    if config.temp1_regions is None:
        return config.temp1
    return config.temp1 + math.log(positions / config.temp1_regions)


def word_attention(config: Any, regions: Tensor, words: Tensor, word_mask: Tensor) -> Tensor:
    """a_ij, which regions the context c_i of a word averages in the local loss that `config.local_loss` names.

    `gloria`: a softmax over words, times temp1, then a softmax over regions; `token`: a softmax over regions.

    Args:
        regions: (B, D, M).
        words: (B, W, D), text i about image i.
        word_mask: (B, W) bool.

    Returns:
        (B, W, M) float32, rows that sum to 1; 0 where there is no word.
    """
    with torch.autocast(_device_type(regions), enabled=False):
        scores = words.float() @ regions.float()
        if config.local_loss == "gloria":
            # A text without words has nothing to share out: NaN, and masked below.
            shares = scores.masked_fill(~word_mask.unsqueeze(-1), -torch.inf).softmax(dim=1)
            scores = region_temperature(config, regions.shape[2]) * shares
        else:
            scores = config.temp3 * scores
        return scores.softmax(dim=-1).masked_fill(~word_mask.unsqueeze(-1), 0.0)


def local_logits(config: Any, local_embeds: Tensor, word_embeds: Tensor, word_mask: Tensor) -> Tensor:
    """The word-region similarity that belongs to `config.local_loss`; shapes as `gloria_logits`."""
    if config.local_loss == "gloria":
        temp1 = region_temperature(config, local_embeds.shape[2] * local_embeds.shape[3])
        products = getattr(torch, config.local_loss_matmul_dtype)
        return gloria_logits(local_embeds, word_embeds, word_mask, temp1, config.temp2, config.temp3, products)
    return token_logits(local_embeds, word_embeds, word_mask, config.temp3)


def local_terms(
    config: Any,
    local_embeds: Tensor,
    word_embeds: Tensor,
    word_mask: Tensor,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """What the local loss is made of, for the images of one process; caption i belongs to image i.

    Words travel between processes, local maps never do: a map is a hundred times as large as a caption.

    Args:
        local_embeds: (b, D, H', W').
        word_embeds: (b, W, D).
        word_mask: (b, W) bool.
        gather: as in `training_losses`.

    Returns:
        `gloria`: similarities (b, B) with the captions of all processes; `token`: the losses (b,) of the own reports.
    """
    if config.local_loss == "token":
        return token_losses(local_embeds, word_embeds, word_mask, config.temp3)
    if gather is not None:
        word_embeds, word_mask = gather(word_embeds), gather(word_mask)
    return local_logits(config, local_embeds, word_embeds, word_mask)


def _loss_of_terms(config: Any, terms: Tensor, has_words: Tensor, targets: Tensor | None = None) -> Tensor:
    if config.local_loss == "token":
        # A word is contrasted with the other words of its own report: no other pair is a negative.
        return terms.sum() / has_words.sum().clamp_min(1)
    return contrastive_loss(terms, config.contrast, targets)


def local_loss(config: Any, local_embeds: Tensor, word_embeds: Tensor, word_mask: Tensor) -> Tensor:
    """The local loss that `config.local_loss` names; shapes as `local_terms`."""
    return _loss_of_terms(config, local_terms(config, local_embeds, word_embeds, word_mask), word_mask.any(dim=1))


def training_losses(
    config: Any,
    scale: Any,
    image_embeds: Tensor,
    text_embeds: Tensor,
    report_embeds: Tensor,
    terms: Tensor,
    has_words: Tensor,
    router_logits: Sequence[Tensor],
    modality_labels: Tensor | None,
    gather: Callable[[Tensor], Tensor] | None = None,
    positive_groups: Tensor | None = None,
) -> dict[str, Tensor]:
    """The total loss and its parts (sections 4.4-4.6).

    The positives of a pair, in the global loss and in GLoRIA's local one, are those of `positive_groups`; without
    these, with `config.positives` `"text_similarity"`, they follow from the reports' cosines; else it is its own. The
    `token` loss contrasts words within one report, and knows no other pair.

    Args:
        scale: inverse temperature of the global similarity.
        image_embeds, text_embeds: (b, D); pair i is row i of both.
        report_embeds: (b, C), t_g before its projection, from which `"text_similarity"` takes the targets: what the
            text tower knows of the reports, not what the contrast has made of it.
        terms: of `local_terms`.
        has_words: (b,) bool, whether a report has any.
        router_logits: (b, K) each, of the image router and of the report router where there is one.
        modality_labels: (b,), or None for no auxiliary loss.
        gather: (b, ...) to (B, ...), the rows of all processes in the same order everywhere, its backward the sum of
            their gradients. The loss is then the same everywhere, and the *mean* of the processes' gradients is that
            of one process with all rows. None: B = b.
        positive_groups: (b,), see `group_targets`.

    Returns:
        `loss`, and without their weights `loss_global`, `loss_local`, `loss_aux`.
    """
    together = gather if gather is not None else _alone
    targets = None
    if positive_groups is not None:
        targets = group_targets(together(positive_groups))
    elif config.positives == "text_similarity":
        targets = text_similarity_targets(together(report_embeds.detach()), config.positives_temperature)
    losses = {
        "loss_global": contrastive_loss(
            cosine_logits(together(image_embeds), together(text_embeds), scale), config.contrast, targets
        )
    }
    losses["loss_local"] = _loss_of_terms(config, together(terms), together(has_words), targets)
    losses["loss_aux"] = losses["loss_global"].new_zeros(())
    if modality_labels is not None:
        labels = together(modality_labels)
        for logits in router_logits:
            losses["loss_aux"] = losses["loss_aux"] + modality_loss(config, together(logits), labels)
    losses["loss"] = (
        config.global_loss_weight * losses["loss_global"]
        + config.local_loss_weight * losses["loss_local"]
        + config.aux_loss_weight * losses["loss_aux"]
    )
    return losses


def _alone(rows: Tensor) -> Tensor:
    return rows
