"""The losses of MedMoE (arXiv 2506.08356, sections 4.4-4.6) as functions of embeddings.

Shapes: B images, N captions, W word slots a caption, D the width of the shared space, M = H/4 * W/4 regions,
K experts.
Everything is computed in float32, whatever the embeddings' type and any autocast around it.
"""

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


def contrastive_loss(logits_per_image: Tensor) -> Tensor:
    """InfoNCE in both directions, summed (section 4.4); image i and caption i belong together.

    Args:
        logits_per_image: (B, B).
    """
    if logits_per_image.shape[0] != logits_per_image.shape[1]:
        rows, columns = logits_per_image.shape
        raise ValueError(f"A contrastive loss needs a caption for each image, got {rows} images, {columns} captions.")
    target = torch.arange(logits_per_image.shape[0], device=logits_per_image.device)
    return nn.functional.cross_entropy(logits_per_image, target) + nn.functional.cross_entropy(
        logits_per_image.t(), target
    )


# Elements of the largest intermediate tensor: small enough to stay in the allocator's reach, large enough that small
# problems run in one piece.
_CHUNK_ELEMENTS = 2**22


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


def gloria_attention(regions: Tensor, words: Tensor, word_mask: Tensor) -> Tensor:
    """GLoRIA's first softmax: of each region, over the words of a caption.

    Args:
        regions: (b, D, M).
        words: (N, W, D).
        word_mask: (N, W) bool.

    Returns:
        (b, N, W, M), for each region the share of each word, 0 where there is no word.
    """
    scores = (words.flatten(0, 1) @ regions).unflatten(1, words.shape[:2])
    # The floor and not -inf: a caption without any word would turn the softmax into NaN.
    return scores.masked_fill(~word_mask.unsqueeze(-1), torch.finfo(scores.dtype).min).softmax(dim=2)


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


def word_contributions(regions: Tensor, words: Tensor, word_mask: Tensor) -> Tensor:
    """How much more a region adds to the global similarity by one word than by its text's other words.

    Where v_g is the mean of the regions and t_g the mean of the words, v_g·t_g is the mean over regions j and words i
    of s_ij = t_i·v_j: a class-activation map of the contrast that `contrastive_loss` trains, exact and for each word.
    What all words of a text share, its modality above all, is taken off: s_ij - mean_{k≠i} s_kj. A text of a single
    word has nothing to compare with; there it is s_ij alone.

    Args, returns: as `word_log_odds`, both in the space of the global embeddings.
    """
    with torch.autocast(regions.device.type, enabled=False):
        scores = (words.float() @ regions.float()).masked_fill(~word_mask.unsqueeze(-1), 0.0)
        rivals = (word_mask.sum(dim=1) - 1).clamp_min(1).view(-1, 1, 1)
        others = (scores.sum(dim=1, keepdim=True) - scores) / rivals
        return (scores - others).masked_fill(~word_mask.unsqueeze(-1), 0.0)


def gloria_logits(
    local_embeds: Tensor, word_embeds: Tensor, word_mask: Tensor, temp1: float, temp2: float, temp3: float
) -> Tensor:
    """Word-region similarity of every image with every caption: temp3 * log Σ_i exp(temp2 * cos(c_i, t_i)).

    The reading of Huang et al. (ICCV 2021), which the official code runs: c_i averages the regions under a softmax
    over words, times temp1, then a softmax over regions. The loop goes over chunks of images, so that no tensor of
    (B, N, W, M) is needed.

    Args:
        local_embeds: (B, D, H', W'), the local maps.
        word_embeds: (N, W, D).
        word_mask: (N, W) bool, True where there is a word. A caption without words scores 0 with every image.

    Returns:
        (B, N) float32.
    """
    with torch.autocast(local_embeds.device.type, enabled=False):
        words, mask = _without_empty_slots(word_embeds, word_mask)
        rows = []
        for regions in _region_chunks(local_embeds, words):
            # The second softmax without its normaliser: the cosine below does not see the length of the context. The
            # largest weight is 1, whatever `temp1`, so that the length does not vanish.
            attention = gloria_attention(regions, words, mask)
            attention = ((attention - attention.detach().amax(dim=-1, keepdim=True)) * temp1).exp()
            context = (attention.flatten(1, 2) @ regions.transpose(1, 2)).unflatten(1, words.shape[:2])
            cosine = nn.functional.cosine_similarity(words, context, dim=-1)
            weighted = (temp2 * cosine).masked_fill(~mask, torch.finfo(cosine.dtype).min)
            rows.append((temp3 * weighted.logsumexp(dim=-1)).masked_fill(~mask.any(dim=1), 0.0))
        return torch.cat(rows)


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


def token_loss(local_embeds: Tensor, word_embeds: Tensor, word_mask: Tensor, scale: float) -> Tensor:
    """The paper's printed local loss: a word's context must be nearer to that word than to its report's other words.

    -log exp(cos(c_i,t_i)/τ) / Σ_j exp(cos(c_i,t_j)/τ) over the words j of the same report, averaged over the words of
    a report and over the reports that have words.

    Args:
        local_embeds: (B, D, H', W').
        word_embeds: (B, W, D), caption i of image i.
        word_mask: (B, W) bool.
        scale: 1/τ, the same in the attention and in the contrast, as printed.
    """
    with torch.autocast(local_embeds.device.type, enabled=False):
        cosines = scale * _token_cosines(local_embeds.float().flatten(2), word_embeds.float(), scale)
        lowest = torch.finfo(cosines.dtype).min
        log_probs = cosines.masked_fill(~word_mask.unsqueeze(1), lowest).log_softmax(dim=-1)
        per_word = -log_probs.diagonal(dim1=1, dim2=2).masked_fill(~word_mask, 0.0)
        per_report = per_word.sum(dim=1) / word_mask.sum(dim=1).clamp_min(1)
        return per_report.sum() / word_mask.any(dim=1).sum().clamp_min(1)


def modality_loss(router_logits: Tensor, modality_labels: Tensor) -> Tensor:
    """Cross-entropy of a router's logits against the modality (section 4.5); labels of -100 are ignored.

    Args:
        router_logits: (B, K).
        modality_labels: (B,) in 0..K-1, or -100. If all are -100 the loss is 0, with a gradient of 0.
    """
    with torch.autocast(router_logits.device.type, enabled=False):
        total = nn.functional.cross_entropy(
            router_logits.float(), modality_labels, ignore_index=UNKNOWN_MODALITY, reduction="sum"
        )
        return total / (modality_labels != UNKNOWN_MODALITY).sum().clamp_min(1)


def local_logits(config: Any, local_embeds: Tensor, word_embeds: Tensor, word_mask: Tensor) -> Tensor:
    """The word-region similarity that belongs to `config.local_loss`; shapes as `gloria_logits`."""
    if config.local_loss == "gloria":
        return gloria_logits(local_embeds, word_embeds, word_mask, config.temp1, config.temp2, config.temp3)
    return token_logits(local_embeds, word_embeds, word_mask, config.temp3)


def local_loss(config: Any, local_embeds: Tensor, word_embeds: Tensor, word_mask: Tensor) -> Tensor:
    """The local loss that `config.local_loss` names; caption i belongs to image i."""
    if config.local_loss == "gloria":
        return contrastive_loss(local_logits(config, local_embeds, word_embeds, word_mask))
    return token_loss(local_embeds, word_embeds, word_mask, config.temp3)
