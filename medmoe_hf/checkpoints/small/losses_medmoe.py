"""The losses of MedMoE (arXiv 2506.08356, sections 4.4-4.6) as functions of embeddings.

Shapes: b images of this process, B images of all processes, N captions, W word slots per caption, D the width of the
shared space, M = H/4 * W/4 regions, K experts.
Everything is computed in float32, whatever the dtype of the embeddings and any autocast context.
"""

# mypy: allow-untyped-calls
# Some methods of torch.Tensor are untyped.

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .local_loss_kernel_medmoe import fused_gloria_logits, uses_kernel
from .modalities_medmoe import UNKNOWN_MODALITY
from .word_regions_medmoe import device_type, gloria_logits, token_cosines, token_logits


def cosine_logits(image_embeds: Tensor, text_embeds: Tensor, scale: float) -> Tensor:
    """Computes the cosine of every image with every caption, times a scale.

    Args:
        image_embeds: `(B, D)`, of any length.
        text_embeds: `(N, D)`, of any length.
        scale: Inverse temperature 1/τ.

    Returns:
        `(B, N)` float32.
    """
    with torch.autocast(device_type(image_embeds), enabled=False):
        image = nn.functional.normalize(image_embeds.float(), dim=-1)
        text = nn.functional.normalize(text_embeds.float(), dim=-1)
        return scale * image @ text.t()


def group_targets(groups: Tensor) -> Tensor:
    """Computes multi-positive targets: row i is uniform over P(i) = {j : g_j = g_i}, the positives of pair i.

    UniCL (Yang et al., "Unified Contrastive Learning in Image-Text-Label Space", CVPR 2022).

    Args:
        groups: `(B,)` integers, equal for pairs with the same meaning. A negative one is unknown: such a pair is its
            own only positive.

    Returns:
        `(B, B)` float32, symmetric, with rows that sum to 1.
    """
    positive = (groups.unsqueeze(1) == groups) & (groups >= 0)
    positive.fill_diagonal_(True)
    return positive.float() / positive.sum(dim=1, keepdim=True)


def text_similarity_targets(text_embeds: Tensor, temperature: float) -> Tensor:
    """Computes soft targets: T_ij = softmax_j(cos(t_i, t_j) / temperature), with cos(t_i, t_i) = 1.

    MedCLIP (Wang et al., "MedCLIP: Contrastive Learning from Unpaired Medical Images and Text", EMNLP 2022), which
    uses the cosines of extracted entities at a temperature of 1. As the temperature approaches 0 this becomes
    `group_targets` of equal texts.

    Args:
        text_embeds: `(B, D)`, by which the texts are compared. No gradient flows into it.
        temperature: Greater than 0.

    Returns:
        `(B, B)` float32, with rows that sum to 1.
    """
    with torch.autocast(device_type(text_embeds), enabled=False):
        text = nn.functional.normalize(text_embeds.detach().float(), dim=-1)
        cosines = (text @ text.t()).fill_diagonal_(1.0)
        return (cosines / temperature).softmax(dim=-1)


def contrastive_loss(logits_per_image: Tensor, contrast: str = "sum", targets: Tensor | None = None) -> Tensor:
    """Computes the contrastive loss in both directions: InfoNCE (section 4.4), or its multi-positive form.

    With s = `logits_per_image` and T = `targets` the direction from images to captions is
    -1/B Σ_i Σ_j T_ij log softmax_j(s_ij); the other one is the same for the transposed s. Where T is the identity,
    value and gradient equal those without targets bit for bit.

    Args:
        logits_per_image: `(B, B)`; image i and caption i are a pair.
        contrast: `"sum"` adds the directions, `"mean"` averages them.
        targets: `(B, B)` with rows that sum to 1: to which degree caption j is a positive of image i, and image j of
            caption i. See `group_targets` and `text_similarity_targets`. None: each pair is its own only positive.

    Returns:
        A scalar.

    Raises:
        ValueError: The numbers of images and captions differ.
    """
    if logits_per_image.shape[0] != logits_per_image.shape[1]:
        rows, columns = logits_per_image.shape
        raise ValueError(f"A contrastive loss needs a caption for each image, got {rows} images, {columns} captions.")
    both = _cross_entropy(logits_per_image, targets) + _cross_entropy(logits_per_image.t(), targets)
    return both if contrast == "sum" else both / 2


def _cross_entropy(logits: Tensor, targets: Tensor | None) -> Tensor:
    """Computes -1/B Σ_i Σ_j T_ij log softmax_j(s_ij); T is the identity if there are no targets."""
    own = torch.arange(logits.shape[0], device=logits.device)
    loss = nn.functional.cross_entropy(logits, own)
    if targets is None:
        return loss
    # Against T_i instead of the own column it is larger by Σ_j (δ_ij - T_ij) s_ij. These weights sum to 0 in a row, so
    # s_ii may be taken off s_ij for precision, and they are all exactly 0 where a pair is its own only positive.
    weights = torch.eye(len(logits), device=logits.device) - targets
    return loss + (weights * (logits - logits.detach().diagonal().unsqueeze(1))).sum() / len(logits)


def token_losses(local_embeds: Tensor, word_embeds: Tensor, word_mask: Tensor, scale: float) -> Tensor:
    """Computes the paper's printed local loss: contexts are contrasted with the words of their own report.

    -log exp(cos(c_i,t_i)/τ) / Σ_j exp(cos(c_i,t_j)/τ) over the words j of the same report, averaged over its words.

    Args:
        local_embeds: Local maps, `(B, D, H', W')`.
        word_embeds: Word embeddings, `(B, W, D)`; caption i belongs to image i.
        word_mask: `(B, W)` bool, True where there is a word.
        scale: 1/τ, the same in the attention and in the contrast, as printed.

    Returns:
        `(B,)` float32, one loss per report; 0 for a report without words.
    """
    with torch.autocast(device_type(local_embeds), enabled=False):
        cosines = scale * token_cosines(local_embeds.float().flatten(2), word_embeds.float(), scale)
        lowest = torch.finfo(cosines.dtype).min
        log_probs = cosines.masked_fill(~word_mask.unsqueeze(1), lowest).log_softmax(dim=-1)
        per_word = -log_probs.diagonal(dim1=1, dim2=2).masked_fill(~word_mask, 0.0)
        return per_word.sum(dim=1) / word_mask.sum(dim=1).clamp_min(1)


def modality_loss(config: Any, router_logits: Tensor, modality_labels: Tensor) -> Tensor:
    """Computes the cross-entropy of a router against the modality (section 4.5).

    Args:
        config: A `MedMoEConfig`; `aux_loss_on` and `aux_label_smoothing` are used.
        router_logits: `(B, K)`.
        modality_labels: `(B,)` in 0..K-1; -100 is ignored.

    Returns:
        A scalar, the mean over known labels. If there are none it is 0, with a gradient of 0.
    """
    with torch.autocast(device_type(router_logits), enabled=False):
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
    """Returns `config.temp1` for a map with this number of positions (see `MedMoEConfig.temp1_regions`)."""
    temp1: float = config.temp1
    return temp1 if config.temp1_regions is None else temp1 + math.log(positions / config.temp1_regions)


def contrasted_regions(config: Any, local_embeds: Tensor) -> Tensor:
    """Pools local maps to the regions that words are contrasted with (see `MedMoEConfig.local_loss_regions`).

    A region is the mean over the area that it covers; positions on its border count in part, so that each position
    of the map has the same total weight.

    Args:
        config: A `MedMoEConfig`; `local_loss_regions` is used.
        local_embeds: Local maps, `(B, D, H', W')`.

    Returns:
        The maps as they are where neither side exceeds `local_loss_regions`; otherwise float32, with no side longer
        than it.
    """
    most = config.local_loss_regions
    if most is None or max(local_embeds.shape[2:]) <= most:
        return local_embeds
    with torch.autocast(device_type(local_embeds), enabled=False):
        # Products with two small matrices: unlike adaptive pooling their gradients are deterministic on a GPU. With
        # channels last, as the experts return them, the products are few and large.
        rows, columns = (_area_weights(size, min(size, most), local_embeds.device) for size in local_embeds.shape[2:])
        narrow = columns @ local_embeds.float().movedim(1, -1)
        pooled: Tensor = (rows @ narrow.flatten(2)).unflatten(2, narrow.shape[2:]).movedim(-1, 1)
        return pooled


def _area_weights(size: int, regions: int, device: torch.device) -> Tensor:
    """Computes which share of each of `regions` equal intervals each of `size` equal ones covers: (regions, size)."""
    edges = torch.arange(size + 1, device=device) * regions
    first = torch.arange(regions, device=device).unsqueeze(1) * size
    overlap = edges[1:].clamp(max=first + size) - edges[:-1].clamp(min=first)
    return overlap.clamp_min(0).float() / size


def word_attention(config: Any, regions: Tensor, words: Tensor, word_mask: Tensor) -> Tensor:
    """Computes the attention a_ij of each word over regions in the local loss that `config.local_loss` selects.

    `gloria`: a softmax over words, times temp1, then a softmax over regions; `token`: a softmax over regions.

    Args:
        config: A `MedMoEConfig`.
        regions: Region embeddings, `(B, D, M)`.
        words: Word embeddings, `(B, W, D)`; text i belongs to image i.
        word_mask: `(B, W)` bool, True where there is a word.

    Returns:
        `(B, W, M)` float32, rows that sum to 1; 0 where there is no word.
    """
    with torch.autocast(device_type(regions), enabled=False):
        scores = words.float() @ regions.float()
        if config.local_loss == "gloria":
            # The softmax of a text without words is NaN, and masked below.
            probs = scores.masked_fill(~word_mask.unsqueeze(-1), -torch.inf).softmax(dim=1)
            scores = region_temperature(config, regions.shape[2]) * probs
        else:
            scores = config.temp3 * scores
        return scores.softmax(dim=-1).masked_fill(~word_mask.unsqueeze(-1), 0.0)


def local_logits(config: Any, local_embeds: Tensor, word_embeds: Tensor, word_mask: Tensor) -> Tensor:
    """Computes the word-region similarity that belongs to `config.local_loss`.

    Args:
        config: A `MedMoEConfig`.
        local_embeds: Local maps, `(B, D, H', W')`.
        word_embeds: Word embeddings, `(N, W, D)`.
        word_mask: `(N, W)` bool, True where there is a word. A caption without words scores 0 with every image.

    Returns:
        `(B, N)` float32.
    """
    local_embeds = contrasted_regions(config, local_embeds)
    if config.local_loss == "gloria":
        temp1 = region_temperature(config, local_embeds.shape[2] * local_embeds.shape[3])
        dtype = getattr(torch, config.local_loss_matmul_dtype)
        fused = uses_kernel(local_embeds, word_mask, temp1, dtype)
        logits = fused_gloria_logits if fused else gloria_logits
        return logits(local_embeds, word_embeds, word_mask, temp1, config.temp2, config.temp3, dtype)
    return token_logits(local_embeds, word_embeds, word_mask, config.temp3)


def local_terms(
    config: Any,
    local_embeds: Tensor,
    word_embeds: Tensor,
    word_mask: Tensor,
    exchange: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Computes the terms of the local loss for the images of one process; caption i belongs to image i.

    Args:
        config: A `MedMoEConfig`.
        local_embeds: Local maps, `(b, D, H', W')`.
        word_embeds: Word embeddings, `(b, W, D)`.
        word_mask: `(b, W)` bool, True where there is a word.
        exchange: Called with a function of regions, words and mask, and with these of this process: the function's
            result for the regions of this process and the words of all processes, in the order of `gather`. Its
            backward is the sum of their gradients. None: N = b.

    Returns:
        `gloria`: similarities `(b, B)` with the captions of all processes; `token`: the losses `(b,)` of the reports
        of this process.
    """
    if config.local_loss == "token":
        return token_losses(contrasted_regions(config, local_embeds), word_embeds, word_mask, config.temp3)
    if exchange is None:
        return local_logits(config, local_embeds, word_embeds, word_mask)
    # Pooled before they are sent.
    return exchange(
        lambda *inputs: local_logits(config, *inputs), contrasted_regions(config, local_embeds), word_embeds, word_mask
    )


def _loss_of_terms(config: Any, terms: Tensor, has_words: Tensor, targets: Tensor | None = None) -> Tensor:
    if config.local_loss == "token":
        # A word is contrasted with the other words of its own report: no other pair is a negative.
        return terms.sum() / has_words.sum().clamp_min(1)
    return contrastive_loss(terms, config.contrast, targets)


def local_loss(config: Any, local_embeds: Tensor, word_embeds: Tensor, word_mask: Tensor) -> Tensor:
    """Computes the local loss that `config.local_loss` selects, within one process.

    Args:
        config: A `MedMoEConfig`.
        local_embeds: Local maps, `(B, D, H', W')`.
        word_embeds: Word embeddings, `(B, W, D)`; caption i belongs to image i.
        word_mask: `(B, W)` bool, True where there is a word.

    Returns:
        A scalar.
    """
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
    """Computes the total loss and its parts (sections 4.4-4.6).

    The positives of a pair, in the global loss and in GLoRIA's local loss, come from `positive_groups`; without these,
    and with `config.positives="text_similarity"`, from the cosines of the reports; otherwise a pair is its own only
    positive. The `token` loss contrasts words within one report and ignores other pairs.

    Args:
        config: A `MedMoEConfig`.
        scale: Inverse temperature of the global similarity, a number or a scalar tensor.
        image_embeds: `(b, D)`.
        text_embeds: `(b, D)`; row i belongs to image i.
        report_embeds: `(b, C)`, t_g before its projection, from which `"text_similarity"` derives the targets: the
            text tower's own similarity, which the contrast does not train directly.
        terms: The result of `local_terms`.
        has_words: `(b,)` bool, whether a report has any words.
        router_logits: `(b, K)` each, of the image router and of the report router where there is one.
        modality_labels: `(b,)` in 0..K-1, or -100; None for no auxiliary loss.
        gather: Maps `(b, ...)` to `(B, ...)`, the rows of all processes in the same order everywhere; its backward is
            the sum of their gradients. The loss is then the same everywhere, and the *mean* of the processes'
            gradients equals that of one process with all rows. None: B = b.
        positive_groups: `(b,)` integers, see `group_targets`.

    Returns:
        `loss`, and its unweighted parts `loss_global`, `loss_local` and `loss_aux`; scalars.
    """

    def together(rows: Tensor) -> Tensor:
        return rows if gather is None else gather(rows)

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
