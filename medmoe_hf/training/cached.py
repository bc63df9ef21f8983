"""Gradient caching: the exact step of a large batch, in the memory of a small one.

A step of `gradient_accumulation_steps` micro-batches (and of all processes) is computed as if it were one batch:
contrastive losses see all pairs, and the experts' BatchNorm uses the statistics of all images. There are six passes
over the micro-batches; small intermediate results are kept in between:

1. without gradients: texts, and images up to the pyramid;
2. the experts' BatchNorm statistics, one layer after another: each needs those before it;
3. without gradients: the experts, embeddings, similarities with all words; then the loss, and its gradients with
   respect to all these;
4. the experts with gradients, back to the pyramid, the words and the statistics;
5. from the statistics back, one layer after another;
6. towers once more with gradients (their random numbers replayed), back to the weights.

After Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (2021); passes 2 and 5 are
what BatchNorm adds.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from medmoe_hf.model import MedMoEModel
from medmoe_hf.model.losses_medmoe import local_terms, training_losses
from medmoe_hf.model.modeling_medmoe import MedMoEBackboneOutput, MedMoEBatchNorm, in_process_group
from medmoe_hf.training.exchange import exchanged_logits
from medmoe_hf.training.negatives import average_gradients, gather_rows, summed


@dataclass
class _Part:
    """Intermediate results of a micro-batch.

    Attributes:
        texts: Inputs of the text tower.
        pixel_values: (b, 3, H, W).
        random_state: State of the random number generators before its towers ran.
        pooled: (b, C), of the backbone. A leaf; pass 4 computes its gradient.
        maps: Feature pyramid of the backbone, (b, C_s, H_s, W_s) per scale. Leaves, as `pooled`.
        outputs: Leaves that the loss is computed from: `image` and `text` (b, D), `words` (b, L, D), `terms` of the
            local loss, `router` and `report_router` (b, K).
        word_mask: (b, L).
        expert_ids: (b,), indices of `vision_model.experts`.
        mixture: (b, K), or `None` if each image has one expert.
        modality: The caller's, which overrides the routers.
        report_embeds: (b, C), before projection.
    """

    texts: dict[str, Any]
    pixel_values: Tensor
    random_state: list[Tensor]
    pooled: Tensor
    maps: list[Tensor]
    outputs: dict[str, Tensor]
    word_mask: Tensor
    expert_ids: Tensor
    mixture: Tensor | None
    modality: Any
    report_embeds: Tensor

    def rows(self, expert: int) -> Tensor | slice:
        """Indices of the images that an expert computes."""
        return slice(None) if self.mixture is not None else (self.expert_ids == expert).nonzero().squeeze(1)


def cached_step(
    model: MedMoEModel,
    batches: list[dict[str, Any]],
    backward: Callable[[Tensor], None] = Tensor.backward,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Tensor]:
    """Computes the gradients of a step over all micro-batches and processes as if they were one batch.

    The gradients are averaged over processes and added to `.grad`. The result is that of one large batch, with two
    exceptions: dropout draws different numbers than one batch would (the same in all passes over a micro-batch), and a
    BatchNorm inside a timm backbone sees one micro-batch at a time.

    Args:
        model: A model that is not wrapped by DDP, since gradients are averaged here.
        batches: Micro-batches of `ContrastiveCollator`, on the model's device.
        backward: Called with the loss; a gradient scaler can be applied here.
        autocast: Returns the context of forward passes.

    Returns:
        Scalars `loss`, `loss_global`, `loss_local` and `loss_aux` of the entire step, detached, and `expert_counts`
        (K,), the number of images per expert.

    Example:
        ```python
        from medmoe_hf.data import phantom_sample
        from medmoe_hf.data.collate import ContrastiveCollator
        from medmoe_hf.training import build_model
        from medmoe_hf.training.cached import cached_step
        from medmoe_hf.training.config import ModelSection

        model, processor = build_model(ModelSection(preset="tiny"))
        collator = ContrastiveCollator(processor)
        samples = [phantom_sample(index) for index in range(8)]
        losses = cached_step(model.train(), [collator(samples[:4]), collator(samples[4:])])
        ```
    """
    vision = model.vision_model
    with torch.no_grad(), autocast():
        parts = [_encode(model, batch) for batch in batches]
    counts = _expert_counts(parts, len(vision.experts))
    used = [index for index, count in enumerate(counts.tolist()) if count]
    with _step_norms(vision, parts, used, autocast) as norms:
        mask = _joined([part.word_mask for part in parts])
        # Detached here: the gradient of a word is complete only after all images.
        own_words = _joined([part.outputs["words"] for part in parts])
        words = {"embeds": own_words.detach().requires_grad_(), "mask": mask}
        with torch.no_grad(), autocast():
            for part in parts:
                image, terms = _experts(model, part, words)
                part.outputs |= {"image": image.detach().requires_grad_(), "terms": terms.detach().requires_grad_()}
        column = {
            name: _joined([part.outputs[name] for part in parts]) for name in parts[0].outputs if name != "words"
        }
        losses = training_losses(
            model.config,
            model.global_scale,
            column["image"],
            column["text"],
            torch.cat([part.report_embeds for part in parts]),
            column["terms"],
            mask.any(dim=1),
            [column[name] for name in ("router", "report_router") if name in column],
            torch.cat([batch["modality_labels"] for batch in batches]),
            gather_rows,
            torch.cat([batch["positive_groups"] for batch in batches]) if "positive_groups" in batches[0] else None,
        )
        backward(losses["loss"])
        _back_through_experts(model, parts, words, norms, autocast)
    if words["embeds"].grad is not None:
        torch.autograd.backward([own_words], [words["embeds"].grad])
    _back_through_towers(model, parts, autocast)
    average_gradients([parameter for parameter in model.parameters() if parameter.requires_grad])
    return {name: value.detach() for name, value in losses.items()} | {"expert_counts": counts}


def _encode(model: MedMoEModel, batch: dict[str, Any]) -> _Part:
    """Pass 1."""
    vision = model.vision_model
    texts = {
        name: value
        for name, value in batch.items()
        if name not in ("pixel_values", "modality", "modality_labels", "positive_groups", "return_loss")
    }
    state = _random_state(batch["pixel_values"].device)
    outputs, word_mask, report_embeds = _text_outputs(model, texts)
    backbone = vision.encode(batch["pixel_values"])
    outputs["router"] = vision.router(backbone.pooler_output)
    selecting = outputs["report_router"] if model.config.router == "report" else outputs["router"]
    return _Part(
        texts=texts,
        pixel_values=batch["pixel_values"],
        random_state=state,
        pooled=backbone.pooler_output.detach().requires_grad_(),
        maps=[feature_map.detach().requires_grad_() for feature_map in backbone.feature_maps],
        outputs={name: value.detach().requires_grad_() for name, value in outputs.items()},
        word_mask=word_mask,
        expert_ids=vision.expert_index(vision.select_experts(selecting, batch.get("modality"))),
        mixture=vision.mixture_weights(outputs["router"], batch.get("modality")),
        modality=batch.get("modality"),
        report_embeds=report_embeds,
    )


def _text_outputs(model: MedMoEModel, texts: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Outputs of texts with gradients, word mask (b, L), and report embeddings (b, C) before projection."""
    text = model._encode_text(**{"attention_mask": None, "token_type_ids": None, "word_ids": None, **texts})
    outputs = {} if model.report_router is None else {"report_router": model.report_router(text.pooler_output)}
    report_embeds = text.pooler_output
    text = model._project_text(text)
    return outputs | {"text": text.pooler_output, "words": text.word_embeds}, text.word_mask, report_embeds


def _experts(model: MedMoEModel, part: _Part, words: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Global image embeddings (b, D) and the terms of the local loss, from the pyramid of a micro-batch."""
    vision = model.vision_model
    mixture = part.mixture
    if mixture is not None and torch.is_grad_enabled():
        # Computed again, since gradients flow through the weights.
        mixture = vision.mixture_weights(vision.router(part.pooled), part.modality)
    local, _ = vision.fuse(part.maps, part.expert_ids, mixture, part.modality)
    backbone = MedMoEBackboneOutput(pooler_output=part.pooled)
    image, local = model._project_image(vision.global_embeds(backbone, local), local)
    if model.config.local_loss == "token":
        return image, local_terms(model.config, local, part.outputs["words"], part.word_mask)
    return image, local_terms(model.config, local, words["embeds"], words["mask"], exchanged_logits)


def _expert_counts(parts: list[_Part], experts: int) -> Tensor:
    """Number of images that each expert computes, over all processes: (K,)."""
    ids = torch.cat([part.expert_ids for part in parts])
    counts = torch.bincount(ids, minlength=experts)
    if parts[0].mixture is not None:
        counts = torch.full_like(counts, len(ids))
    if in_process_group():
        distributed.all_reduce(counts)
    return counts


# BatchNorm over the entire step


class _StepNorm:
    """BatchNorm by the statistics of all images of a step, instead of those of a micro-batch.

    The backward pass of BatchNorm subtracts two averages over all images from the gradient, but a micro-batch knows
    only its own averages. It subtracts and records those; the difference is added when all are known. (Subtracting
    nothing at first would be simpler, but lose a digit of precision: large terms would cancel only at the pyramid.)

    Attributes:
        expert: Index of the expert that the layer belongs to.
        scale: Index of the scale.
        depth: Index of the layer in the scale's projection.
        mean: (C, 1, 1), mean over the step.
        inverse: (C, 1, 1), one over the standard deviation over the step.
        count: Values per channel, over all processes.
        sums: (micro-batches, 2, C) in float64: sums of the gradient, and of the gradient times the normalised values.
        sizes: Values per channel of each micro-batch.
        part: Index of the current micro-batch.
    """

    def __init__(self, expert: int, scale: int, depth: int, layer: MedMoEBatchNorm, total: Tensor, parts: int) -> None:
        self.expert, self.scale, self.depth, self.layer = expert, scale, depth, layer
        self.count = total[-1].item()
        mean, square = (total[:-1] / self.count).view(2, -1)
        variance = (square - mean.square()).clamp_min(0)
        layer.update_statistics(mean.float(), variance.float(), total[-1])
        self.mean = mean.float().view(-1, 1, 1)
        self.inverse = (variance.float() + layer.eps).rsqrt().view(-1, 1, 1)
        self.sums = total.new_zeros(parts, 2, layer.num_features)
        self.sizes = [0] * parts
        self.part = 0

    def __call__(self, values: Tensor) -> Tensor:
        normalised: Tensor = _NormaliseByStep.apply(values, self.layer.weight, self.layer.bias, self)
        return normalised

    def standard(self, values: Tensor) -> Tensor:
        standard: Tensor = (values.float() - self.mean) * self.inverse
        return standard

    def remainder(self, values: Tensor, totals: Tensor) -> Tensor:
        """What is still missing in the gradient of `values`, given `totals` (2, C), the sums over the entire step."""
        size = max(1, self.sizes[self.part])
        by_sum, by_product = (self.sums[self.part] / size - totals / self.count).float().view(2, -1, 1, 1)
        scale = self.layer.weight.detach().float().view(-1, 1, 1) * self.inverse
        missing: Tensor = (by_sum + self.standard(values) * by_product) * scale
        return missing


class _NormaliseByStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor, norm: _StepNorm) -> Tensor:
        ctx.save_for_backward(values, weight)
        ctx.norm = norm
        return (norm.standard(values) * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)).to(values.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        norm, upstream = ctx.norm, gradient.float()
        standard = norm.standard(values)
        sums = torch.stack(
            [upstream.sum((0, 2, 3), dtype=torch.double), (upstream * standard).sum((0, 2, 3), dtype=torch.double)]
        )
        norm.sums[norm.part] += sums
        norm.sizes[norm.part] = values.numel() // values.shape[1]
        mean, along = (sums / max(1, norm.sizes[norm.part])).float().view(2, -1, 1, 1)
        own = (upstream - mean - standard * along) * (weight.view(-1, 1, 1) * norm.inverse)
        return own.to(gradient.dtype), sums[1].to(weight.dtype), sums[0].to(weight.dtype), None


@contextmanager
def _step_norms(
    vision: Any, parts: list[_Part], used: list[int], autocast: Callable[[], AbstractContextManager[Any]]
) -> Iterator[list[_StepNorm]]:
    """Pass 2: in the block, the BatchNorms of experts in training mode use the statistics of the entire step."""
    norms: list[_StepNorm] = []
    depths = max((len(layers) for expert in vision.experts for layers in _sequences(expert)), default=0)
    try:
        for depth in range(depths):
            layers = list(_batch_norms(vision, used, depth))
            totals = []
            for expert, scale, layer in layers:
                total = torch.zeros(2 * layer.num_features + 1, dtype=torch.double, device=layer.weight.device)
                for part in parts:
                    with torch.no_grad(), autocast():
                        values = _before_norm(vision, part, expert, scale, depth)
                    if values is not None:
                        numbers = values.double()
                        size = total.new_tensor([numbers.numel() // numbers.shape[1]])
                        total += torch.cat([numbers.sum((0, 2, 3)), numbers.square().sum((0, 2, 3)), size])
                totals.append(total)
            for (expert, scale, layer), total in zip(layers, summed(totals), strict=True):
                layer.normalise = _StepNorm(expert, scale, depth, layer, total, len(parts))
                norms.append(layer.normalise)
        yield norms
    finally:
        for norm in norms:
            norm.layer.normalise = None


def _sequences(expert: Any) -> list[nn.Sequential]:
    """The projections of an expert's scales that have several layers, of which some may be norms."""
    return [layers for layers in expert.scale_projections if isinstance(layers, nn.Sequential)]


def _batch_norms(vision: Any, used: list[int], depth: int) -> Iterator[tuple[int, int, MedMoEBatchNorm]]:
    for expert in used:
        for scale, projection in enumerate(_sequences(vision.experts[expert])):
            layer = getattr(projection[depth], "batch_norm", None) if depth < len(projection) else None
            if isinstance(layer, MedMoEBatchNorm) and layer.training:
                yield expert, scale, layer


def _before_norm(vision: Any, part: _Part, expert: int, scale: int, depth: int) -> Tensor | None:
    """Input (n, C, H, W) of an expert's BatchNorm at a depth for a micro-batch; `None` without an image."""
    hidden_states = part.maps[scale][part.rows(expert)]
    if not len(hidden_states):
        return None
    projection = vision.experts[expert].scale_projections[scale]
    for layer in projection[:depth]:
        hidden_states = layer(hidden_states)
    values: Tensor = projection[depth].convolution(hidden_states)
    return values


def _back_through_experts(
    model: MedMoEModel,
    parts: list[_Part],
    words: dict[str, Tensor],
    norms: list[_StepNorm],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Passes 4 and 5: gradients of the pyramids, the words, and the experts' weights."""
    vision = model.vision_model
    for number, part in enumerate(parts):
        _select(norms, number)
        with autocast():
            image, terms = _experts(model, part, words)
            logits = vision.router(part.pooled)
        _backward([image, terms, logits], [part.outputs[name].grad for name in ("image", "terms", "router")])
    for depth in sorted({norm.depth for norm in norms}, reverse=True):
        layers = [norm for norm in norms if norm.depth == depth]
        for norm, totals in zip(layers, summed([norm.sums.sum(dim=0) for norm in layers]), strict=True):
            for number, part in enumerate(parts):
                _select(norms, number)
                with autocast():
                    values = _before_norm(vision, part, norm.expert, norm.scale, depth)
                if values is not None:
                    _backward([values], [norm.remainder(values.detach(), totals)])


def _select(norms: list[_StepNorm], part: int) -> None:
    for norm in norms:
        norm.part = part


def _back_through_towers(
    model: MedMoEModel, parts: list[_Part], autocast: Callable[[], AbstractContextManager[Any]]
) -> None:
    """Pass 6."""
    vision = model.vision_model
    after = _random_state(parts[0].pooled.device)
    # Pass 1 has already updated the running statistics of a backbone's own BatchNorms.
    running = {
        name: buffer.clone()
        for name, buffer in vision.backbone.named_buffers()
        if "running_" in name or "num_b" in name
    }
    encodes = any(
        parameter.requires_grad for part in (vision.backbone, vision.level_norms) for parameter in part.parameters()
    )
    for part in parts:
        _set_random_state(part.random_state)
        with autocast():
            outputs = _text_outputs(model, part.texts)[0]
        _backward(list(outputs.values()), [part.outputs[name].grad for name in outputs])
        if encodes:  # else the backbone is frozen
            with autocast():
                backbone = vision.encode(part.pixel_values)
            _backward(
                [backbone.pooler_output, *backbone.feature_maps],
                [part.pooled.grad, *(feature_map.grad for feature_map in part.maps)],
            )
        # Freed here: the next micro-batch needs the memory.
        part.maps, part.pixel_values = [], part.pixel_values[:0]
    _set_random_state(after)
    for name, buffer in vision.backbone.named_buffers():
        if name in running:
            buffer.copy_(running[name])


def _backward(outputs: list[Tensor], gradients: list[Tensor | None]) -> None:
    """Backward pass from several outputs at once; those without a graph or without a gradient are skipped."""
    pairs = [
        (output, gradient.to(output.dtype))
        for output, gradient in zip(outputs, gradients, strict=True)
        if output.requires_grad and gradient is not None
    ]
    if pairs:
        torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])


def _joined(tensors: list[Tensor]) -> Tensor:
    """Concatenates the rows of all micro-batches; words are padded with trailing zeros to the longest text."""
    if tensors[0].dim() < 2 or len({tensor.shape[1] for tensor in tensors}) == 1:
        return torch.cat(tensors)
    width = max(tensor.shape[1] for tensor in tensors)
    padding = [[0, 0] * (tensor.dim() - 2) + [0, width - tensor.shape[1]] for tensor in tensors]
    return torch.cat([nn.functional.pad(tensor, pad) for tensor, pad in zip(tensors, padding, strict=True)])


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)
