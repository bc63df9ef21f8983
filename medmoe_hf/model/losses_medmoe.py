"""The losses of MedMoE (arXiv 2506.08356, sections 4.4-4.6) as functions of embeddings.

Shapes: B images, N captions, W word slots a caption, D the width of the shared space, M = H/4 * W/4 regions,
K experts.
Everything is computed in float32, whatever the embeddings' type and any autocast around it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_medmoe import UNKNOWN_MODALITY


def cosine_logits(image_embeds: Tensor, text_embeds: Tensor, scale: float) -> Tensor:
    """Cosine of every image with every caption, times `scale` (1/τ).

    Args:
        image_embeds: (B, D).
        text_embeds: (N, D).

    Returns:
        (B, N) float32.
    """
    with torch.autocast(image_embeds.device.type, enabled=False):
        image = nn.functional.normalize(image_embeds.float(), dim=-1)
        text = nn.functional.normalize(text_embeds.float(), dim=-1)
        return scale * image @ text.t()


def contrastive_loss(logits_per_image: Tensor, contrast: str = "sum") -> Tensor:
    """InfoNCE in both directions (section 4.4); image i and caption i belong together.

    Args:
        logits_per_image: (B, B).
        contrast: whether the directions are added (`"sum"`) or averaged (`"mean"`).
    """
    if logits_per_image.shape[0] != logits_per_image.shape[1]:
        rows, columns = logits_per_image.shape
        raise ValueError(f"A contrastive loss needs a caption for each image, got {rows} images, {columns} captions.")
    target = torch.arange(logits_per_image.shape[0], device=logits_per_image.device)
    both = nn.functional.cross_entropy(logits_per_image, target) + nn.functional.cross_entropy(
        logits_per_image.t(), target
    )
    return both if contrast == "sum" else both / 2


# Elements of the largest intermediate tensor: small enough to stay in the caches' and the allocator's reach, large
# enough that small problems run in one piece.
_CHUNK_ELEMENTS = 2**20
# Elements of a softmax that is worth keeping for the backward pass: 64 MiB.
_KEPT_ELEMENTS = 2**24


def _region_chunks(local_embeds: Tensor, words: Tensor) -> tuple[Tensor, ...]:
    """Splits the images into chunks (b, D, M) whose word-region scores (b, N, W, M) have a bounded size."""
    regions = local_embeds.float().flatten(2)
    per_image = words.shape[0] * words.shape[1] * regions.shape[2]
    return regions.split(max(1, _CHUNK_ELEMENTS // max(per_image, 1)))


def _without_empty_slots(word_embeds: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Cuts the word axis behind the last slot that any caption uses; texts are padded much further."""
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
    with torch.autocast(regions.device.type, enabled=False):
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
    with torch.autocast(regions.device.type, enabled=False):
        if reference is not None:
            scores = (words.float() - reference.float().unsqueeze(-2)) @ regions.float()
            return scores.masked_fill(~word_mask.unsqueeze(-1), 0.0)
        scores = (words.float() @ regions.float()).masked_fill(~word_mask.unsqueeze(-1), 0.0)
        rivals = (word_mask.sum(dim=1) - 1).clamp_min(1).view(-1, 1, 1)
        others = (scores.sum(dim=1, keepdim=True) - scores) / rivals
        return (scores - others).masked_fill(~word_mask.unsqueeze(-1), 0.0)


def gloria_logits(
    local_embeds: Tensor, word_embeds: Tensor, word_mask: Tensor, temp1: float, temp2: float, temp3: float
) -> Tensor:
    """Word-region similarity of every image with every caption: temp3 * log Σ_i exp(temp2 * cos(c_i, t_i)).

    The reading of Huang et al. (ICCV 2021), which the official code runs: c_i averages the regions under a softmax
    over words, times temp1, then a softmax over regions. Differentiable once; no tensor of (B, N, W, M) is made in
    either direction unless it is small.

    Args:
        local_embeds: (B, D, H', W'), the local maps.
        word_embeds: (N, W, D).
        word_mask: (N, W) bool, True where there is a word. A caption without words scores 0 with every image.

    Returns:
        (B, N) float32.
    """
    with torch.autocast(local_embeds.device.type, enabled=False):
        counts = word_mask.sum(dim=1)
        # Captions with as many words as each other come to lie side by side, and their words without any padding.
        order = counts.argsort(stable=True)
        words = word_embeds.float()[order][word_mask[order]]
        widths, captions = counts.unique(return_counts=True)
        groups = [(width, number) for width, number in zip(widths.tolist(), captions.tolist(), strict=True) if width]
        similarity = _GloriaSimilarity.apply(local_embeds.float().flatten(2), words, groups, temp1, temp2)
        # No words, no similarity: such captions stand first.
        wordless = len(counts) - similarity.shape[1]
        similarity = nn.functional.pad(temp3 * similarity, (wordless, 0))
        return similarity[:, order.argsort()]


class _GloriaSimilarity(torch.autograd.Function):
    """log Σ_i exp(temp2 * cos(c_i, t_i)) of every image and caption, with a backward pass of its own.

    Autograd would keep half a dozen tensors of (B, P, M), P the words of all captions. Here a chunk of images at a
    time is taken through all of it in one or two buffers, and only the contexts c_i (B, P, D) are kept, with the
    first softmax where that is small; else it is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, regions: Tensor, words: Tensor, groups: list[tuple[int, int]], temp1: float, temp2: float
    ) -> Tensor:
        """Gives (B, G).

        Args:
            regions: (B, D, M) float32.
            words: (P, D) float32, the words of caption after caption.
            groups: (words of a caption, number of such captions), in the order of `words`; G captions in all.
        """
        images, _, positions = regions.shape
        elements = images * len(words) * positions
        contexts = regions.new_empty(images, len(words), regions.shape[1])
        shares = regions.new_empty(images, len(words), positions) if elements <= _KEPT_ELEMENTS else None
        for rows in _image_chunks(regions, words):
            part = _word_shares(regions[rows], words, groups, None if shares is None else shares[rows])
            torch.bmm(_region_weights(part, temp1), regions[rows].transpose(1, 2), out=contexts[rows])
        cosines = torch.einsum("bpd,pd->bp", _unit(contexts), _unit(words))
        similarity = _by_caption(lambda values: values.logsumexp(dim=-1), temp2 * cosines, groups)
        ctx.save_for_backward(regions, words, contexts, shares, cosines, similarity)
        ctx.groups, ctx.temp1, ctx.temp2 = groups, temp1, temp2
        return similarity

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        regions, words, contexts, kept, cosines, similarity = ctx.saved_tensors
        wants_regions, wants_words = ctx.needs_input_grad[:2]
        sizes = torch.tensor(
            [width for width, number in ctx.groups for _ in range(number)], dtype=torch.long, device=words.device
        )
        with torch.autocast(regions.device.type, enabled=False):
            # d similarity / d cos is temp2 times the softmax over a caption's words.
            spread = [part.repeat_interleave(sizes, dim=1) for part in (gradient * ctx.temp2, similarity)]
            grad_cosines = spread[0] * (ctx.temp2 * cosines - spread[1]).exp()
            unit_words = _unit(words)
            grad_regions = torch.empty_like(regions) if wants_regions else None
            grad_words = torch.zeros_like(words)
            for rows in _image_chunks(regions, words):
                maps, weight, cosine = regions[rows], grad_cosines[rows, :, None], cosines[rows, :, None]
                unit_contexts = _unit(contexts[rows])
                if wants_words:
                    pull = (weight * (unit_contexts - cosine * unit_words)).sum(dim=0)
                    grad_words += pull * _inverse_length(words)
                grad_contexts = unit_words - cosine * unit_contexts
                grad_contexts *= weight * _inverse_length(contexts[rows])
                shares = _word_shares(maps, words, ctx.groups) if kept is None else kept[rows]
                region_weights = _region_weights(shares, ctx.temp1)
                if grad_regions is not None:
                    torch.bmm(grad_contexts.transpose(1, 2), region_weights, out=grad_regions[rows])
                # Back through both softmaxes, in place: first the one over regions (without a normaliser) ...
                grad_scores = region_weights.mul_(grad_contexts @ maps).mul_(shares)
                # ... then the one over the words of a caption.
                for section, share in _captions(ctx.groups, grad_scores, shares):
                    section.addcmul_(share, section.sum(dim=2, keepdim=True), value=-1)
                grad_scores *= ctx.temp1
                if wants_words:
                    grad_words += torch.einsum("bpm,bdm->pd", grad_scores, maps)
                if grad_regions is not None:
                    grad_regions[rows].baddbmm_(words.t().expand(len(maps), -1, -1), grad_scores)
        return grad_regions, grad_words if wants_words else None, None, None, None


def _image_chunks(regions: Tensor, words: Tensor) -> list[slice]:
    step = max(1, _CHUNK_ELEMENTS // max(1, len(words) * regions.shape[2]))
    return [slice(start, start + step) for start in range(0, len(regions), step)]


def _captions(groups: list[tuple[int, int]], *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views (B, captions of the group, their words, ...) of tensors (B, P, ...)."""
    start = 0
    for width, number in groups:
        yield tuple(tensor[:, start : start + width * number].unflatten(1, (number, width)) for tensor in tensors)
        start += width * number


def _by_caption(function: Callable[[Tensor], Tensor], values: Tensor, groups: list[tuple[int, int]]) -> Tensor:
    """(B, P) to (B, G): what `function` makes of the last axis, the words of a caption."""
    parts = [function(section) for (section,) in _captions(groups, values)]
    return torch.cat(parts, dim=1) if parts else values.new_zeros(len(values), 0)


def _word_shares(regions: Tensor, words: Tensor, groups: list[tuple[int, int]], out: Tensor | None = None) -> Tensor:
    """(b, P, M): for each region the share of each word, a softmax over the words of each caption."""
    if out is None:
        out = regions.new_empty(len(regions), len(words), regions.shape[2])
    torch.matmul(words, regions, out=out)
    for (section,) in _captions(groups, out):
        section.copy_(section.softmax(dim=2))
    return out


def _region_weights(shares: Tensor, temp1: float) -> Tensor:
    """The second softmax without its normaliser, which the cosine does not see. Shares lie in 0..1, so that a
    constant keeps the weights from overflowing; where it would let them vanish, each word's own largest share does."""
    peak = 1.0 if temp1 <= 20 else shares.amax(dim=-1, keepdim=True)
    return (shares - peak).mul_(temp1).exp_()


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
    with torch.autocast(local_embeds.device.type, enabled=False):
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
    with torch.autocast(local_embeds.device.type, enabled=False):
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
    with torch.autocast(router_logits.device.type, enabled=False):
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
    with torch.autocast(regions.device.type, enabled=False):
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
        return gloria_logits(local_embeds, word_embeds, word_mask, temp1, config.temp2, config.temp3)
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


def _loss_of_terms(config: Any, terms: Tensor, has_words: Tensor) -> Tensor:
    if config.local_loss == "token":
        return terms.sum() / has_words.sum().clamp_min(1)
    return contrastive_loss(terms, config.contrast)


def local_loss(config: Any, local_embeds: Tensor, word_embeds: Tensor, word_mask: Tensor) -> Tensor:
    """The local loss that `config.local_loss` names; shapes as `local_terms`."""
    return _loss_of_terms(config, local_terms(config, local_embeds, word_embeds, word_mask), word_mask.any(dim=1))


def training_losses(
    config: Any,
    scale: Any,
    image_embeds: Tensor,
    text_embeds: Tensor,
    terms: Tensor,
    has_words: Tensor,
    router_logits: Sequence[Tensor],
    modality_labels: Tensor | None,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """The total loss and its parts (sections 4.4-4.6).

    Args:
        scale: inverse temperature of the global similarity.
        image_embeds, text_embeds: (b, D); pair i is row i of both.
        terms: of `local_terms`.
        has_words: (b,) bool, whether a report has any.
        router_logits: (b, K) each, of the image router and of the report router where there is one.
        modality_labels: (b,), or None for no auxiliary loss.
        gather: (b, ...) to (B, ...), the rows of all processes in the same order everywhere, its backward the sum of
            their gradients. The loss is then the same everywhere, and the *mean* of the processes' gradients is that
            of one process with all rows. None: B = b.

    Returns:
        `loss`, and without their weights `loss_global`, `loss_local`, `loss_aux`.
    """
    together = gather if gather is not None else _alone
    losses = {
        "loss_global": contrastive_loss(
            cosine_logits(together(image_embeds), together(text_embeds), scale), config.contrast
        )
    }
    losses["loss_local"] = _loss_of_terms(config, together(terms), together(has_words))
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
