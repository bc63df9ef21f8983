"""MedMoE (arXiv 2506.08356): Swin pyramid, one expert per modality, report and image routers, text tower.

Shapes in this file: B images, N texts, L tokens, H x W pixels, S scales of the pyramid, K experts, D the width of the
local map (and of the shared space where there are no projections).
"""

# mypy: allow-subclassing-any, allow-untyped-calls, allow-untyped-decorators, no-warn-return-any
# transformers is untyped, and calling an nn.Module returns Any.

import functools
import inspect
import itertools
import math
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from transformers import AutoModel, PreTrainedModel, SwinModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .configuration_medmoe import (
    MedMoEConfig,
    MedMoESwinConfig,
    MedMoETextConfig,
    MedMoEVisionConfig,
    attach_to_package,
)
from .errors_medmoe import ArgumentError
from .losses_medmoe import cosine_logits, local_logits, local_terms, training_losses, word_attention
from .modalities_medmoe import UNKNOWN_MODALITY
from .rejection_medmoe import REJECTOR_FILE, Rejector, load_rejector, rejection_features
from .saving_medmoe import (
    CUSTOM_PIPELINES,
    PROCESSING_AUTO_MAP,
    upload_model,
    write_sentence_transformers_files,
)
from .tasks_medmoe import (
    TASKS_FILE,
    EncodedTask,
    Task,
    TaskAnswer,
    encode_task,
    load_tasks,
    suits,
    task_scores,
    write_tasks,
)
from .word_regions_medmoe import of_any_size, word_contributions, word_log_odds

if TYPE_CHECKING:
    # transformers reads these lines: it keeps the files beside this one, and saves them with every model.
    from .handler import EndpointHandler as EndpointHandler
    from .pipeline_medmoe import MedMoEZeroShotPipeline as MedMoEZeroShotPipeline
    from .processing_medmoe import MedMoEProcessor as MedMoEProcessor

try:
    import timm
except ImportError:  # only backbones named "timm/..." need it
    timm = None

logger = logging.get_logger(__name__)

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)

MINIMUM_IMAGE_SIDE = 64
"""Smallest side of an image: below it a stride-32 pyramid ends in a single cell, and BatchNorm has no statistics for a
single image."""

CPU_PIXELS = 4 * 224 * 224
"""Pixels per backbone call on a CPU without gradients. The largest blocks of memory are then below 32 MiB, above which
the C library requests new ones from the system each time; that would take a fifth of the total time."""

TEXTS_AT_A_TIME = 8
"""Texts per call of a frozen encoder on a CPU: few, so that little is padded, and enough to use its vector units."""

FOREIGN_BACKBONES = "MEDMOE_FOREIGN_BACKBONES"
"""Environment variable that allows backbones from outside timm. A configuration cannot allow them: it comes with the
model."""

_REQUIRED: Any = None  # `ModelOutput` requires a default for every field


@dataclass
class MedMoEBackboneOutput(ModelOutput):
    """Output of a backbone.

    Args:
        last_hidden_state: `(B, h*w, C)`, the tokens of the last level after LayerNorm.
        pooler_output: `(B, C)`, their mean.
        feature_maps: S maps `(B, C_s, H_s, W_s)`, finest first: the pyramid that the experts read.
        hidden_states: If requested, the tokens that enter the first stage and leave each stage (for a timm backbone:
            the maps of its levels).
        attentions: If requested, the attention weights of the last block of each stage.
    """

    last_hidden_state: Tensor = _REQUIRED
    pooler_output: Tensor = _REQUIRED
    feature_maps: tuple[Tensor, ...] = _REQUIRED
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class MedMoEVisionOutput(ModelOutput):
    """Output of the image tower.

    Args:
        last_hidden_state: `(B, h*w, C)`, the backbone's last tokens after LayerNorm.
        pooler_output: `(B, C)`, `(B, D)` or `(B, C + D)`, the global embedding v_g; from `get_image_features` `(B, D)`
            in the shared space.
        local_embeds: `(B, D, H/4, W/4)`, the local map V of each image's expert; None with `local=False`.
        scale_weights: `(B, S, H/4, W/4)`, that expert's softmax over the scales at each position.
        router_logits: `(B, K)`, from the image router.
        expert_ids: `(B,)`, the expert of each image.
        hidden_states: The backbone's, if requested.
        attentions: The backbone's, if requested.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    local_embeds: Tensor | None = None
    scale_weights: Tensor | None = None
    router_logits: Tensor | None = None
    expert_ids: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class MedMoETextOutput(ModelOutput):
    """Output of the text tower.

    Args:
        last_hidden_state: `(N, L, C)`, the encoder's last tokens.
        pooler_output: `(N, C)`, the report embedding t_g, the mean of its words; from `get_text_features` `(N, D)` in
            the shared space.
        word_embeds: `(N, L, C)`, or `(N, L, D)` in the shared space; slot i holds the i-th word, zero beyond the last.
        word_mask: `(N, L)` bool, True where there is a word.
        hidden_states: The encoder's, if requested.
        attentions: The encoder's, if requested.
    """

    last_hidden_state: Tensor = _REQUIRED
    pooler_output: Tensor = _REQUIRED
    word_embeds: Tensor = _REQUIRED
    word_mask: Tensor = _REQUIRED
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class MedMoEOutput(ModelOutput):
    """Output of the dual encoder for images and texts.

    Args:
        loss: The total loss with `return_loss=True`: the weighted sum of its three parts.
        logits_per_image: `(B, N)`, the similarity that `config.similarity` selects.
        logits_per_text: `(N, B)`, its transpose.
        text_embeds: `(N, D)`, of unit length.
        image_embeds: `(B, D)`, of unit length; where v_g includes the expert's map, that of `expert_ids`.
        loss_global: The unweighted global loss.
        loss_local: The unweighted local loss.
        loss_aux: The unweighted auxiliary loss.
        local_embeds: `(B, D, H/4, W/4)`, the map of the expert in `expert_ids`.
        word_embeds: `(N, L, D)`, zero where there is no word.
        word_mask: `(N, L)` bool, True where there is a word.
        router_logits: `(B, K)`, from the image router.
        report_router_logits: `(N, K)`, from the report router where there is one.
        expert_ids: `(B,)`: the caller's `modality`; otherwise, with `return_loss`, the expert that the image's own
            report selects (`config.router="report"`); otherwise that of the image router.
        scale_weights: `(B, S, H/4, W/4)`, of the expert in `expert_ids`.
        text_model_output: The output of the text tower.
        vision_model_output: The output of the image tower.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    loss_global: Tensor | None = None
    loss_local: Tensor | None = None
    loss_aux: Tensor | None = None
    local_embeds: Tensor | None = None
    word_embeds: Tensor | None = None
    word_mask: Tensor | None = None
    router_logits: Tensor | None = None
    report_router_logits: Tensor | None = None
    expert_ids: Tensor | None = None
    scale_weights: Tensor | None = None
    text_model_output: MedMoETextOutput | None = None
    vision_model_output: MedMoEVisionOutput | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


@dataclass
class MedMoERoutingOutput(ModelOutput):
    """Routing of images or reports.

    Args:
        probabilities: `(B, K)`, rows that sum to 1; column k belongs to `config.modalities[k]`.
        expert_ids: `(B,)`, the most probable expert.
        modality: Its name, B strings.
        ood_score: `(B,)` float32, how far each image is from those that the model knows, relative to the limit (see
            `Rejector`); None for reports, and for a model without a rejector.
        accepted: `(B,)` bool, `ood_score <= 1`: whether each image is like those that the model knows; None likewise.
    """

    probabilities: Tensor | None = None
    expert_ids: Tensor | None = None
    modality: list[str] | None = None
    ood_score: Tensor | None = None
    accepted: Tensor | None = None


@dataclass
class MedMoEStudyOutput(ModelOutput):
    """Embeddings of S series with N slices altogether, in the shared space.

    Args:
        pooler_output: `(S, D)`, the mean of the slices' unit vectors, scaled to length 1.
        slice_embeds: `(N, D)`, unit vectors.
        series_ids: `(N,)`, the series of each slice, 0..S-1.
        slice_ids: `(N,)`, the index of each slice in its series.
        router_logits: `(N, K)`, of the image router.
        votes: `(S, K)`, the mean of the slices' routing probabilities; column k belongs to `config.modalities[k]`.
        expert_ids: `(N,)`, the expert that read each slice.
    """

    pooler_output: Tensor | None = None
    slice_embeds: Tensor | None = None
    series_ids: Tensor | None = None
    slice_ids: Tensor | None = None
    router_logits: Tensor | None = None
    votes: Tensor | None = None
    expert_ids: Tensor | None = None


@dataclass
class MedMoEGroundingOutput(ModelOutput):
    """Location of each word of a text in its image.

    Args:
        heatmaps: `(B, L, H/4, W/4)`, how much more a region matches a word than the reference, or than the other words
            of the text; 0 at slots without a word. It is the word's contribution to the similarity
            (`word_contributions`), except without a reference and with `global_features="backbone"`: there it is the
            log-odds of GLoRIA's attention, whose sigmoid is the probability of the word given the region.
        attention: `(B, L, H/4, W/4)`, the weights with which the local loss averages regions for a word (GLoRIA's
            a_ij, or the softmax of section 4.4 with `local_loss="token"`); they sum to 1 for each word.
        word_mask: `(B, L)` bool, True where there is a word.
        expert_ids: `(B,)`, the expert whose map was read.
    """

    heatmaps: Tensor | None = None
    attention: Tensor | None = None
    word_mask: Tensor | None = None
    expert_ids: Tensor | None = None


def record_as_configured(config: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns `kwargs` with the `output_hidden_states` and `output_attentions` of `config` as defaults."""
    given = {name: value for name, value in kwargs.items() if value is not None or not name.startswith("output_")}
    for name in ("output_hidden_states", "output_attentions"):
        if name not in given and getattr(config, name, None):
            given[name] = getattr(config, name)
    return given


def selected_states(states: Sequence[Tensor], wanted: bool | int | Sequence[int] | None) -> tuple[Any, ...] | None:
    """Returns the states that `output_hidden_states` selects, as in transformers.

    Args:
        states: All states.
        wanted: True for all, or indices (negative ones count from the end); the others become None.

    Returns:
        As many entries as `states`, or None if nothing is selected.
    """
    if not wanted:
        return None
    if wanted is True:
        return tuple(states)
    indices = [wanted] if isinstance(wanted, int) else wanted
    kept = {index % len(states) for index in indices if -len(states) <= index < len(states)}
    return tuple(state if number in kept else None for number, state in enumerate(states))


def word_starts(word_ids: Tensor) -> Tensor:
    """Returns an `(N, L)` bool mask of the first token of each word; `word_ids` as in `pool_words`."""
    starts = word_ids >= 0
    starts[:, 1:] &= word_ids[:, 1:] != word_ids[:, :-1]
    return starts


def official_word_ids(word_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Returns `(N, L)` word ids in which special tokens are words too, as in the official code."""
    positions = torch.arange(word_ids.shape[1], device=word_ids.device)
    return torch.where((word_ids < 0) & (attention_mask > 0), word_ids.shape[1] + positions, word_ids)


def official_word_mask(input_ids: Tensor, word_ids: Tensor, bracket_token_ids: Sequence[int]) -> Tensor:
    """Returns an `(N, L)` bool mask of the words that the official code's local loss sees.

    They are the first `cap_len` words, where `cap_len` is 1 + the number of words that do not begin with "[". This is
    meant to be [CLS] and the words, but a literal "[" in a text, or an unknown word ([UNK]), changes the number.
    """
    brackets = torch.tensor(list(bracket_token_ids), dtype=input_ids.dtype, device=input_ids.device)
    # An explicit comparison, because ONNX has no `isin`.
    counted = word_starts(word_ids) & (input_ids.unsqueeze(-1) != brackets).all(dim=-1)
    lengths = 1 + counted.sum(dim=1, keepdim=True)
    return torch.arange(input_ids.shape[1], device=input_ids.device) < lengths


def pool_words(hidden_states: Tensor, word_ids: Tensor, pooling: str) -> tuple[Tensor, Tensor]:
    """Sums or averages the tokens of each word, without a Python loop.

    Args:
        hidden_states: `(N, L, C)`, one embedding per token.
        word_ids: `(N, L)`, the word of each token, tokens of one word adjacent; -1 for no word. Only changes of the
            number matter: words are renumbered, so that the i-th word is in slot i.
        pooling: `"sum"` or `"mean"`.

    Returns:
        Word embeddings `(N, L, C)`, zero at slots without a word, and an `(N, L)` bool mask, True where there is a
        word.
    """
    in_word = word_ids >= 0
    slots = (word_starts(word_ids).cumsum(dim=1) - 1).clamp_min(0)
    counts = torch.zeros_like(slots).scatter_add(1, slots, in_word.to(slots.dtype))
    texts, length, width = hidden_states.shape
    first = torch.arange(texts, device=slots.device).unsqueeze(1) * length
    # One row behind the last takes the tokens of no word. Rows are added whole: a scatter adds number by number.
    rows = torch.where(in_word, first + slots, texts * length).flatten()
    words = hidden_states.new_zeros(texts * length + 1, width).index_add_(0, rows, hidden_states.flatten(0, 1))
    words = words[:-1].unflatten(0, (texts, length))
    if pooling == "mean":
        words = words / counts.clamp_min(1).unsqueeze(-1)
    return words, counts > 0


class MedMoESwinModel(SwinModel):
    """transformers' Swin, made stateless: its output depends on its input alone, at any image size.

    The original model shrinks its windows permanently when it meets a small map. Here a map smaller than a window is
    padded to one, and windows shift only where the map is larger than a window, as in the published weights at 224.
    """

    config: MedMoESwinConfig

    def get_input_embeddings(self) -> nn.Module:
        # Not the patch embedding itself: it returns a tuple, and activation checkpointing hooks need a tensor.
        return self.embeddings.patch_embeddings.projection

    @property
    def channels(self) -> list[int]:
        """Width of each level of the pyramid."""
        return [self.config.embed_dim * 2**stage for stage in range(len(self.config.depths))]

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> MedMoEBackboneOutput:
        """Encodes images; `config.pyramid` selects the feature maps.

        Args:
            pixel_values: `(B, 3, H, W)`.
            output_hidden_states: Which states to return, see `selected_states`.
            output_attentions: Whether to return attention weights.
            **kwargs: Ignored.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        window, merged = self.config.window_size, self.config.pyramid == "merged"
        by_windows = not output_hidden_states and not output_attentions and self._runs_by_windows(pixel_values)
        hidden_states, size = self.embeddings(pixel_values, interpolate_pos_encoding=True)
        feature_maps, all_states = [], [hidden_states]
        attentions: list[Any] = []
        for stage in self.encoder.layers:
            if merged:
                feature_maps.append(hidden_states.transpose(1, 2).unflatten(2, size))
            for index, block in enumerate(stage.blocks):
                block.shift_size = 0 if index % 2 == 0 or min(size) <= window else window // 2
            if by_windows and not any(side % window for side in size):
                leaving = self._stage_by_windows(stage, hidden_states, size)
                feature_map, attention = leaving.transpose(1, 2).unflatten(2, size), None
                hidden_states = leaving if stage.downsample is None else stage.downsample(leaving, size)
            else:
                hidden_states, feature_map, attention = stage(
                    hidden_states, size, always_partition=True, output_hidden_states_before_downsampling=True
                )
            if not merged:
                feature_maps.append(feature_map)
            all_states.append(hidden_states)
            attentions.append(attention)
            size = tuple(-(-side // 2) for side in size)
        tokens = self.layernorm(hidden_states)
        return MedMoEBackboneOutput(
            last_hidden_state=tokens,
            pooler_output=tokens.mean(dim=1),
            feature_maps=tuple(feature_maps),
            hidden_states=selected_states(all_states, output_hidden_states),
            attentions=tuple(attentions) if output_attentions and attentions[0] is not None else None,
        )

    def _runs_by_windows(self, pixel_values: Tensor) -> bool:
        """Returns whether `_stage_by_windows` may replace the stages: on a CPU for inference, if no hook sees them."""
        return (
            pixel_values.device.type == "cpu"
            and not self.training
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not in_process_group()
            and self.config._attn_implementation == "sdpa"
            and all(
                _unobserved(module)
                for stage in self.encoder.layers
                for module in (stage, *stage.blocks, *(block.attention for block in stage.blocks))
            )
        )

    def _stage_by_windows(self, stage: Any, hidden_states: Tensor, size: Sequence[int]) -> Tensor:
        """Runs the blocks of a stage with one copy of the tokens per block.

        Tokens stay in the order of windows from one block to the next. transformers pads, rolls and partitions them
        and does the reverse in each block: up to eleven copies.

        Args:
            stage: A stage of transformers' Swin, outside training.
            hidden_states: `(B, h*w, C)`.
            size: Height h and width w, multiples of the window.

        Returns:
            `(B, h*w, C)`, before the stage's patches are merged.
        """
        batch, length, width = hidden_states.shape
        tokens = hidden_states.flatten(0, 1)
        back = torch.arange(len(tokens))
        for block in stage.blocks:
            array, groups = _window_order(batch, *size, self.config.window_size, block.shift_size)
            order = torch.from_numpy(array)
            tokens = tokens.index_select(0, back[order])
            back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
            self._block_in_windows(block, tokens, groups)
        return tokens.index_select(0, back).view(batch, length, width)

    @staticmethod
    def _block_in_windows(block: Any, tokens: Tensor, groups: Sequence[tuple[int, np.ndarray | None]]) -> None:
        """Updates tokens `(N, C)`, ordered as `_window_order` says, by one block, in place."""
        attention, area, start = block.attention, block.window_size**2, 0
        states = block.layernorm_before(tokens)
        projections = [project(states) for project in (attention.q_proj, attention.k_proj, attention.v_proj)]
        bias = attention.relative_position_bias()
        for count, mask in groups:
            rows = slice(start, start + count * area)
            query, key, value = (
                states[rows].view(count, area, -1, attention.head_dim).transpose(1, 2) for states in projections
            )
            # One bias for all windows of a group: none is copied for each window.
            combined = bias if mask is None else bias + torch.from_numpy(mask).to(bias.dtype)
            mixed = nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=combined, scale=attention.scaling
            )
            tokens[rows] += attention.o_proj(mixed.transpose(1, 2).flatten(2).flatten(0, 1))
            start = rows.stop
        tokens += block.mlp(block.layernorm_after(tokens))


@functools.lru_cache(maxsize=64)
def _window_order(
    batch: int, height: int, width: int, window: int, shift: int
) -> tuple[np.ndarray, list[tuple[int, np.ndarray | None]]]:
    """Returns the order of tokens by windows, and groups of windows that share a mask of attention.

    As arrays, because tensors that are kept would belong to the mode (inference, export) in which they were made.

    Args:
        batch: Number of images B.
        height: Height of the map of tokens, a multiple of `window`.
        width: Width of the map, likewise.
        window: Side of a window.
        shift: By how much windows are shifted; 0 for not at all.

    Returns:
        `(B*height*width,)`, the token at each place of the new order; and for each group the number of its windows in
        all images and a float32 mask `(window**2, window**2)`, None where every token attends to every other one.
    """
    cells = np.roll(np.arange(height * width).reshape(height, width), (-shift, -shift), (0, 1))
    windows = cells.reshape(height // window, window, width // window, window).swapaxes(1, 2)
    # The last windows of rows and columns contain cells from the opposite side of the map.
    opposite = (np.arange(window) >= window - shift).astype(np.int64)
    inner, last = slice(-1), slice(-1, None)
    kinds = [(inner, inner), (inner, last), (last, inner), (last, last)] if shift else [(slice(None), slice(None))]
    order, groups = [], []
    for rows, columns in kinds:
        part = windows[rows, columns].reshape(-1)
        if not len(part):
            continue
        order.append((np.arange(batch)[:, None] * (height * width) + part).reshape(-1))
        origin = (2 * (rows is last) * opposite[:, None] + (columns is last) * opposite).reshape(-1)
        mask = np.where(origin[:, None] == origin, 0, -100).astype(np.float32) if origin.any() else None
        groups.append((batch * len(part) // window**2, mask))
    return np.concatenate(order), groups


class MedMoEPreTrainedModel(PreTrainedModel):
    """Base class of the models: initialisation, and saved folders that load where this package is not installed."""

    config: MedMoEConfig
    base_model_prefix = "medmoe"
    main_input_name = "pixel_values"
    input_modalities: tuple[str, ...] = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["SwinStage", "MedMoEExpert"]
    # Running statistics lose their small updates in 16 bits.
    _keep_in_fp32_modules_strict: Any = ["batch_norm"]
    # The losses are means over a batch, so `Trainer` has to divide by its accumulation steps.
    accepts_loss_kwargs = False
    _auto_map: dict[str, Any] = {}
    _custom_pipelines: dict[str, Any] | None = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # The convolutions of `MedMoEConvLayer`; those of the scorer are linear layers, and initialised like them.
        if isinstance(module, nn.Conv2d) and module.bias is None:
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> Any:
        """Saves the model as transformers does, with its Python files and an `auto_map` for every Auto class.

        Args:
            save_directory: The folder, created if it does not exist.
            **kwargs: Other arguments of `PreTrainedModel.save_pretrained`.
        """
        self.config.auto_map = dict(self._auto_map)
        if self._custom_pipelines is not None:
            self.config.custom_pipelines = deepcopy(self._custom_pipelines)
        elif hasattr(self.config, "custom_pipelines"):
            del self.config.custom_pipelines  # another model's, of the same configuration
        return super().save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Uploads the model to the Hugging Face Hub in one commit, with its Python files.

        The commit also deletes model weights of an earlier upload that it does not replace. The processor is uploaded
        by its own `push_to_hub`; `medmoe push` uploads both with a model card, after checks.

        Args:
            repo_id: The repository, `"user/name"`, created if it does not exist.
            **kwargs: Other arguments of `PreTrainedModel.push_to_hub`, such as `private`, `commit_message`,
                `revision` (a branch) or `create_pr`.

        Returns:
            The `CommitInfo` of huggingface_hub.

        Example:
            >>> from medmoe_hf.model import MedMoEConfig, MedMoEModel
            >>> model = MedMoEModel(MedMoEConfig.from_preset("tiny"))
            >>> model.push_to_hub("user/medmoe-tiny", private=True)  # doctest: +SKIP
        """
        return super().push_to_hub(repo_id, **kwargs)

    def _upload_modified_files(
        self, working_dir: Any, repo_id: str, files_timestamps: Any, commit_message: str | None = None, **commit: Any
    ) -> Any:
        # Called by `push_to_hub`.
        return upload_model(working_dir, repo_id, commit_message, **commit)


class MedMoETimmBackbone(MedMoEPreTrainedModel):
    """Any hierarchical timm model as a backbone.

    Channels and strides are read from timm's feature info. The last map, after LayerNorm, provides the tokens.

    Raises:
        ImportError: The timm package is not installed.
        ValueError: The model is not hierarchical, or is not part of timm and has not been allowed.
    """

    config: MedMoEVisionConfig
    input_modalities = ("image",)
    supports_gradient_checkpointing = False
    features: Any  # timm's wrapper

    def __init__(self, config: MedMoEVisionConfig) -> None:
        super().__init__(config)
        name = config.backbone.removeprefix("timm/")
        if not re.fullmatch(r"[\w.\-]+", name) and os.environ.get(FOREIGN_BACKBONES) != "1":
            raise ValueError(
                f'The backbone "{config.backbone}" is not part of timm: timm would fetch it from another repository '
                f"or folder. If you trust that too, set {FOREIGN_BACKBONES}=1."
            )
        if timm is None:
            raise ImportError(f'The backbone "{config.backbone}" needs the timm package: pip install timm')
        self.features = self._create(name, config.image_size, config.out_indices)
        info = self.features.feature_info
        if config.out_indices is None and min(info.reduction()) < 4:
            levels = [level for level, stride in zip(info.out_indices, info.reduction(), strict=True) if stride >= 4]
            self.features = self._create(name, config.image_size, levels)
        strides = self.features.feature_info.reduction()
        if len(strides) < 2 or any(fine >= coarse for fine, coarse in pairwise(strides)):
            raise ValueError(
                f"timm's {name} is not hierarchical: its levels have strides {strides}. Choose a hierarchical model "
                "(swin, convnext, resnet, ...) or levels of growing stride by `vision_config.out_indices`."
            )
        self.layernorm = nn.LayerNorm(self.channels[-1])
        # timm has no common name for its BatchNorms.
        norms = [
            name
            for name, module in self.features.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        self._keep_in_fp32_modules_strict = {rf"backbone\.features\.{name}\." for name in norms}
        self._convolutional = bool(norms)
        if torch.get_default_dtype().itemsize < 4:
            for module in self.features.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.float()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return next(module for module in self.features.modules() if isinstance(module, nn.Conv2d))

    @staticmethod
    def _create(name: str, image_size: int | None, out_indices: Sequence[int] | None) -> nn.Module:
        options: dict[str, Any] = {"pretrained": False, "features_only": True}
        if out_indices is not None:
            options["out_indices"] = tuple(out_indices)
        try:
            # Models with windows or position tables need to know that other image sizes are possible.
            return timm.create_model(name, img_size=image_size, strict_img_size=False, **options)
        except TypeError:
            return timm.create_model(name, **options)

    @property
    def channels(self) -> list[int]:
        """Width of each level of the pyramid."""
        return list(self.features.feature_info.channels())

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # timm initialises its own weights; after a load on the meta device derived buffers must be recomputed.
        make_buffers = getattr(module, "init_non_persistent_buffers", None)
        if make_buffers is not None:
            make_buffers()
        elif module is self.layernorm:
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | int | Sequence[int] | None = None, **kwargs: Any
    ) -> MedMoEBackboneOutput:
        """Encodes images.

        Args:
            pixel_values: `(B, 3, H, W)`.
            output_hidden_states: Which maps to return as hidden states, see `selected_states`.
            **kwargs: Ignored.
        """
        on_cpu = pixel_values.device.type == "cpu" and not torch.compiler.is_compiling()
        if self._convolutional and (on_cpu or _in_half_on_cuda(pixel_values)):
            # A CPU computes depthwise and 1x1 convolutions, and BatchNorm, twice as fast in this format; the matrix
            # units of a GPU read it without conversion.
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        maps = self.features(pixel_values)
        if getattr(self.features, "output_fmt", "NCHW") == "NHWC":
            maps = [feature_map.permute(0, 3, 1, 2) for feature_map in maps]
        tokens = self.layernorm(maps[-1].flatten(2).transpose(1, 2))
        return MedMoEBackboneOutput(
            last_hidden_state=tokens,
            pooler_output=tokens.mean(dim=1),
            feature_maps=tuple(maps),
            hidden_states=selected_states(maps, output_hidden_states),
        )


def _in_half_on_cuda(values: Tensor) -> bool:
    """Returns whether convolutions of a tensor run on CUDA in 16 bits."""
    return values.is_cuda and (values.dtype.itemsize == 2 or torch.is_autocast_enabled("cuda"))


def _concatenate(parts: Sequence[MedMoEBackboneOutput]) -> MedMoEBackboneOutput:
    """Concatenates a backbone's outputs for parts of a batch."""
    if len(parts) == 1:
        return parts[0]
    joined: dict[str, Any] = {}
    for name, value in parts[0].items():
        values = [part[name] for part in parts]
        if isinstance(value, tuple):
            # States that were not requested are None.
            joined[name] = tuple(None if one[0] is None else torch.cat(one) for one in zip(*values, strict=True))
        else:
            joined[name] = torch.cat(values)
    return MedMoEBackboneOutput(**joined)


def _empty_batch(output: Any) -> Any:
    """Returns a `ModelOutput` with the same fields and sizes for an empty batch."""

    def emptied(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(emptied, value))
        return value[:0] if isinstance(value, Tensor) else value

    return type(output)(**{name: emptied(value) for name, value in output.items()})


def in_process_group() -> bool:
    """Returns whether this process belongs to a process group, also to one with a single process, as under DDP."""
    return distributed.is_available() and distributed.is_initialized()


class MedMoEBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the images of all processes: under hard routing one process may have one image or none.

    Equal to `nn.BatchNorm2d` over the concatenated batch, in value, gradient and running statistics; parts of it may
    be empty. In a single process, and outside training, it is `nn.BatchNorm2d`.

    Attributes:
        normalise: Replaces this layer in training, `(b, C, H, W)` to the same; None: the batch's own statistics.
    """

    normalise: Callable[[Tensor], Tensor] | None = None

    def __init__(self, num_features: int) -> None:
        # float32 also where a model is created in 16 bits, as `from_pretrained` keeps it.
        default = torch.get_default_dtype()
        super().__init__(num_features, dtype=default if default.itemsize >= 4 else torch.float32)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.training and self.normalise is not None:
            return self.normalise(hidden_states)
        if not self.training or not in_process_group():
            return super().forward(hidden_states)
        normalised, mean, variance, count = _SharedBatchNorm.apply(hidden_states, self.weight, self.bias, self.eps)
        self.update_statistics(mean, variance, count)
        return normalised

    @torch.no_grad()
    def update_statistics(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Updates the running statistics with those of a batch, without waiting for a GPU.

        Args:
            mean: `(C,)`.
            variance: `(C,)`, biased.
            count: A scalar, values per channel; with 0 the statistics do not change.
        """
        if self.running_mean is None or self.running_var is None:
            return
        some = count > 0
        unbiased = variance * (count / (count - 1).clamp_min(1))
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += some
        momentum = 0.1 if self.momentum is None else self.momentum
        for running, found in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.copy_(torch.where(some, running.lerp(found.to(running), momentum), running))


class _SharedBatchNorm(torch.autograd.Function):
    """Normalises (b, C, H, W) by the mean and variance over all processes; sums are computed in float64."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
        numbers = values.float()
        local = values.numel() // values.shape[1]
        total = torch.cat([numbers.sum((0, 2, 3), dtype=torch.double), numbers.new_tensor([local]).double()])
        distributed.all_reduce(total)
        count = total[-1]
        mean = (total[:-1] / count.clamp_min(1)).float()
        # A second pass for the variance: a difference of squares would lose precision where the mean is large.
        centred = numbers - mean.view(-1, 1, 1)
        spread = centred.square().sum((0, 2, 3), dtype=torch.double)
        distributed.all_reduce(spread)
        variance = (spread / count.clamp_min(1)).float()
        inverse = (variance + eps).rsqrt()
        ctx.save_for_backward(centred, weight, inverse, count)
        normalised = centred * (weight * inverse).view(-1, 1, 1) + bias.view(-1, 1, 1)
        ctx.mark_non_differentiable(mean, variance, count)
        return normalised.to(values.dtype), mean, variance, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        centred, weight, inverse, count = ctx.saved_tensors
        upstream = gradient.float()
        standard = centred * inverse.view(-1, 1, 1)
        sums = torch.stack(
            [upstream.sum((0, 2, 3), dtype=torch.double), (upstream * standard).sum((0, 2, 3), dtype=torch.double)]
        )
        own = sums.to(weight.dtype, copy=True)  # of this process; in float64 too, where `to` alone is the same tensor
        distributed.all_reduce(sums)
        mean, along = (sums / count.clamp_min(1)).float().view(2, -1, 1, 1)
        values = (upstream - mean - standard * along) * (weight * inverse).view(-1, 1, 1)
        return values.to(gradient.dtype), own[1], own[0], None


class MedMoEConv2d(nn.Conv2d):
    """A convolution that also supports one kernel per image; its arguments are those of `nn.Conv2d`.

    Where routing happens inside a graph (see `MedMoEVisionModel.fuse`) its `weight` is (B, C_out, C_in, k, k) and its
    `bias` (B, C_out).
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.convolve(hidden_states, self.weight, self.bias)

    def convolve(self, hidden_states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolves with another weight and bias than the layer's own; kernels per image must keep the size.

        Args:
            hidden_states: `(B, C_in, H, W)`.
            weight: `(C_out, C_in, k, k)`, or `(B, C_out, C_in, k, k)` for one kernel per image.
            bias: `(C_out,)` or `(B, C_out)`; None for none.

        Returns:
            `(B, C_out, H', W')`.
        """
        if weight.dim() == 4:
            return self._conv_forward(hidden_states, weight, bias)
        size = hidden_states.shape[-2:]
        if self.kernel_size[0] > 1:
            columns = nn.functional.unfold(hidden_states, self.kernel_size, padding=self.kernel_size[0] // 2)
        else:
            columns = hidden_states.flatten(2)
        result = weight.flatten(2) @ columns
        if bias is not None:
            result = result + bias.unsqueeze(-1)
        return result.unflatten(2, size)


class MedMoEConvLayer(nn.Module):
    """Convolution, BatchNorm, ReLU: (B, C_in, H, W) to (B, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.convolution = MedMoEConv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.batch_norm = MedMoEBatchNorm(out_channels)

    def forward(self, hidden_states: Tensor) -> Tensor:
        convolution, norm = self.convolution, self.batch_norm
        if norm.training:
            return norm(convolution(hidden_states)).relu_()
        # A convolution wrapped by an adapter cannot be replaced by its weight.
        plain = isinstance(convolution, MedMoEConv2d)
        if norm.weight.dim() == 1 and not (plain and _unobserved(convolution) and _unobserved(norm)):
            return norm(convolution(hidden_states)).relu_()
        # Outside training the norm is a scale and a shift: applied to the kernel they cost a thousandth of what they
        # cost on the map.
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        if not plain:
            mapped = convolution(hidden_states)
            return (mapped * scale[..., None, None] + shift[..., None, None]).to(mapped.dtype).relu_()
        kernel = convolution.weight
        weight = kernel * scale[..., None, None, None]
        # Norms stay float32 in a model of another dtype.
        return convolution.convolve(hidden_states, weight.to(kernel.dtype), shift.to(kernel.dtype)).relu_()


def _unobserved(module: nn.Module) -> bool:
    """Returns whether a module's parameters may be used without calling it: it has no hooks and no wrapped `forward`.

    Accelerate adds such hooks to bring offloaded parameters in. Inside a graph hooks have no effect.
    """
    return torch.compiler.is_compiling() or not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


class MedMoEScaleScorer(nn.Module):
    """The scale-attention MLP, shared by an expert's scales: (B, D, h, w) to a logit per position (B, 1, H, W)."""

    def __init__(self, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        # 1x1 convolutions are linear layers that need no permutation of the map.
        self.fc1 = MedMoEConv2d(in_channels, hidden_size, 1)
        self.fc2 = MedMoEConv2d(hidden_size, 1, 1)

    def forward(self, hidden_states: Tensor, align: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Scores a map, or the aligned map.

        The first layer runs before `align`: interpolation weights sum to one, so a linear layer, its bias included,
        commutes with it. There are up to 64 times fewer positions before alignment.

        Args:
            hidden_states: `(B, D, h, w)`.
            align: Maps `(B, C, h, w)` to `(B, C, H, W)`; None for no alignment.

        Returns:
            `(B, 1, H, W)`, one logit per position.
        """
        hidden_states = self.fc1(hidden_states)
        if align is not None:
            hidden_states = align(hidden_states)
        return self.fc2(hidden_states.relu_())


class MedMoEExpert(nn.Module):
    """One modality's expert (section 4.3): projects each scale, aligns all to one size and mixes them.

    V = Σ_s β(s) F(s) at each position, with β a softmax over the scales. Subclasses can replace `projection`, `align`
    (with its `align_adjoint`) or `forward`; see `register_expert`.

    Args:
        config: The configuration of the image tower.
        channels: Widths C_s of the S levels of the pyramid.
    """

    # Two-dimensional interpolation is channels-last internally: other maps would be converted back and forth. Linear
    # layers are as fast in this format.
    memory_format = torch.channels_last

    def __init__(self, config: MedMoEVisionConfig, channels: Sequence[int]) -> None:
        super().__init__()
        self.score_native = config.scale_attention_native
        self.scale_projections = nn.ModuleList(self.projection(config, width) for width in channels)
        self.scale_attention = MedMoEScaleScorer(config.local_size, config.scale_attention_size)

    @staticmethod
    def projection(config: MedMoEVisionConfig, width: int) -> nn.Module:
        """Creates the layers of one scale, which map (B, width, H, W) to (B, D, H, W)."""
        hidden = config.expert_hidden_size
        return nn.Sequential(
            MedMoEConvLayer(width, hidden, 1),
            MedMoEConvLayer(hidden, hidden, 3),
            MedMoEConvLayer(hidden, config.local_size, 1),
        )

    @staticmethod
    def align(feature_map: Tensor, size: Sequence[int]) -> Tensor:
        """Interpolates (B, D, h, w) to (B, D, *size)."""
        return align_map(feature_map, size)

    @staticmethod
    def align_adjoint(weights: Tensor, size: Sequence[int]) -> Tensor:
        """Applies the adjoint of `align`: a weighted sum over the aligned map is a sum over the map itself.

        Args:
            weights: `(B, H, W)`, weights of the positions of an aligned map.
            size: Height h and width w of the map before alignment.

        Returns:
            `(B, h, w)`, weights of its positions.
        """
        rows, columns = (_interpolation(*sides).to(weights) for sides in zip(size, weights.shape[1:], strict=True))
        return rows @ weights @ columns.t()

    def forward(
        self,
        feature_maps: Sequence[Tensor],
        size: Sequence[int] | None = None,
        mean_only: bool = False,
        out: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Computes the local map.

        Args:
            feature_maps: S maps `(B, C_s, H_s, W_s)`.
            size: Height and width of the local map; by default those of the first map.
            mean_only: Whether only the mean of the local map is computed, which does not need the map.
            out: Tensor into which the local map is written; only without gradients.

        Returns:
            The local map `(B, D, *size)` and the scale weights `(B, S, *size)`; with `mean_only` a tuple of the mean
            `(B, D)` alone.
        """
        size = feature_maps[0].shape[-2:] if size is None else size
        projected = [
            project(feature_map.contiguous(memory_format=self.memory_format))
            for project, feature_map in zip(self.scale_projections, feature_maps, strict=True)
        ]
        if self.score_native:
            scores = [align_map(self.scale_attention(scale), size) for scale in projected]
        else:
            scores = [self.scale_attention(scale, lambda hidden: self.align(hidden, size)) for scale in projected]
        logits = torch.cat(scores, dim=1)
        weights = logits.float().softmax(dim=1).to(logits.dtype)
        if mean_only:
            sums = [
                scale.flatten(2) @ self.align_adjoint(weight, scale.shape[-2:]).flatten(1).unsqueeze(2)
                for scale, weight in zip(projected, weights.unbind(dim=1), strict=True)
            ]
            return (torch.cat(sums, dim=2).sum(dim=2) / (size[0] * size[1]),)
        local = torch.mul(self.align(projected[0], size), weights[:, :1], out=out)
        for index, scale in enumerate(projected[1:], start=1):
            local.addcmul_(self.align(scale, size), weights[:, index : index + 1])
        return local, weights


class MedMoETokenExpert(MedMoEExpert):
    """The official code's expert: a linear layer and ReLU per scale, no norm, tokens aligned as one sequence."""

    @staticmethod
    def projection(config: MedMoEVisionConfig, width: int) -> nn.Module:
        return nn.Sequential(MedMoEConv2d(width, config.local_size, 1), nn.ReLU(inplace=True))

    @staticmethod
    def align(feature_map: Tensor, size: Sequence[int]) -> Tensor:
        """Interpolates along the flattened tokens, as the official code does; this does not preserve locations."""
        if feature_map.shape[-2:] == tuple(size):
            return feature_map
        tokens = feature_map.flatten(2)
        if torch.compiler.is_compiling() or tokens.is_meta:
            tokens = nn.functional.interpolate(tokens, size=math.prod(size), mode="linear", align_corners=False)
            return tokens.unflatten(2, tuple(size))
        # A matrix product for each row of the result: a CPU interpolates maps of this format one value at a time.
        index, weights = map(torch.from_numpy, _token_interpolation(tokens.shape[2], *size))
        near = tokens.transpose(1, 2).index_select(1, index.to(tokens.device)).unflatten(1, (size[0], -1))
        return (weights.to(tokens) @ near).movedim(-1, 1)

    @staticmethod
    def align_adjoint(weights: Tensor, size: Sequence[int]) -> Tensor:
        tokens = weights.flatten(1)
        if weights.shape[1:] != size:
            tokens = tokens @ _interpolation(size[0] * size[1], tokens.shape[1]).to(weights).t()
        return tokens.unflatten(1, tuple(size))


class MedMoELinearExpert(MedMoEExpert):
    """No expert: each scale is projected by a linear layer, and all scales are averaged with equal weight.

    The size and meaning of its outputs are those of `MedMoEExpert`; the scale weights are constant.
    """

    def __init__(self, config: MedMoEVisionConfig, channels: Sequence[int]) -> None:
        nn.Module.__init__(self)
        self.scale_projections = nn.ModuleList(MedMoEConv2d(width, config.local_size, 1) for width in channels)

    def forward(
        self,
        feature_maps: Sequence[Tensor],
        size: Sequence[int] | None = None,
        mean_only: bool = False,
        out: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        size = feature_maps[0].shape[-2:] if size is None else size
        aligned = [
            self.align(project(feature_map.contiguous(memory_format=self.memory_format)), size)
            for project, feature_map in zip(self.scale_projections, feature_maps, strict=True)
        ]
        local = torch.mul(sum(aligned[1:], aligned[0]), 1 / len(aligned), out=out)
        if mean_only:
            return (local.mean(dim=(2, 3)),)
        return local, local.new_full((local.shape[0], len(aligned), *local.shape[2:]), 1 / len(aligned))


def _rows(parts: Sequence[Tensor], groups: Sequence[Sequence[int]]) -> list[Tensor]:
    """Returns rows of the concatenated `parts`, for each group of their numbers; a row belongs to one group only."""
    if parts[0].device.type == "cpu" and all(map(len, parts)):
        # Piece by piece: the gradient of an index is added to zeros, and loses its memory format.
        pieces = [piece for part in parts for piece in part.split(1)]
        return [torch.cat([pieces[row] for row in rows]) if rows else parts[0][:0] for rows in groups]
    # Empty parts too: gradients have to reach their experts.
    whole = parts[0] if len(parts) == 1 else torch.cat(tuple(parts))
    index = torch.tensor(list(itertools.chain(*groups)))
    return list(whole[index.to(whole.device, non_blocking=True)].split(list(map(len, groups))))


def _floating_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and running statistics by name, without counters."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def _interpolation(source: int, target: int) -> Tensor:
    """Returns the matrix (source, target) of linear interpolation from `source` to `target` cells."""
    rows = torch.eye(source).unsqueeze(0)
    return nn.functional.interpolate(rows, size=target, mode="linear", align_corners=False)[0]


@functools.lru_cache(maxsize=64)
def _token_interpolation(source: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns linear interpolation of a sequence to `height * width` positions, as one product per row of positions.

    As arrays, because tensors that are kept would belong to the mode (inference, export) in which they were made.

    Returns:
        `(height * K,)`, the K tokens that each row of the result depends on; and their weights, `(height, width, K)`.
    """
    places = (source / (height * width) * (np.arange(height * width) + 0.5) - 0.5).clip(0).reshape(height, width)
    before = places.astype(np.int64)
    after = np.minimum(before + 1, source - 1)
    count = int((after[:, -1] - before[:, 0]).max()) + 1
    index = np.minimum(before[:, :1], source - count) + np.arange(count)
    share = (places - before)[..., None]
    weights = (before[..., None] == index[:, None]) * (1 - share) + (after[..., None] == index[:, None]) * share
    return index.flatten(), weights


_EXPERTS: dict[str, type[nn.Module]] = {
    "convolution": MedMoEExpert,
    "token": MedMoETokenExpert,
    "linear": MedMoELinearExpert,
}


def register_expert(name: str, cls: type[nn.Module], exist_ok: bool = False) -> None:
    """Adds a class of experts, to be selected by `MedMoEVisionConfig.expert_type`.

    The name is saved with the configuration, the class is not: register it before loading such a checkpoint too.

    Args:
        name: The value of `expert_type` that selects the class.
        cls: A subclass of `MedMoEExpert`, or any module with the same constructor and `forward`. It is created once
            per modality as `cls(config, channels)`, with the widths of the pyramid's S levels, and called with S
            feature maps of shape `(B, C_s, H_s, W_s)`.
        exist_ok: Whether a class that is registered under the same name may be replaced.

    Raises:
        ValueError: The name is already taken by another class.

    Example:
        >>> from medmoe_hf.model import MedMoEConfig, MedMoEExpert, MedMoEModel, register_expert
        >>> class CoarseExpert(MedMoEExpert):
        ...     def __init__(self, config, channels):
        ...         super().__init__(config, channels[-1:])
        ...
        ...     def forward(self, feature_maps, *args, **kwargs):
        ...         return super().forward(feature_maps[-1:], *args, **kwargs)
        >>> register_expert("coarse", CoarseExpert)
        >>> model = MedMoEModel(MedMoEConfig.from_preset("tiny", vision_config={"expert_type": "coarse"}))
    """
    if not exist_ok and _EXPERTS.get(name, cls) is not cls:
        raise ValueError(
            f'An expert named "{name}" is already registered ({_EXPERTS[name].__name__}); choose another name, '
            "or pass `exist_ok=True` to replace it."
        )
    _EXPERTS[name] = cls


def expert_class(name: str) -> type[nn.Module]:
    """Returns the class that is registered under a name.

    Raises:
        ValueError: The name is unknown; the message lists the known ones.
    """
    if name not in _EXPERTS:
        near = get_close_matches(name, _EXPERTS, n=1)
        hint = f' Did you mean "{near[0]}"?' if near else " Add your own with `register_expert`."
        raise ValueError(f'Unknown `expert_type` "{name}". Known types: {", ".join(sorted(_EXPERTS))}.{hint}')
    return _EXPERTS[name]


def align_map(feature_map: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolates (B, C, h, w) bilinearly to (B, C, *size); cell centres keep their locations."""
    if feature_map.shape[-2:] == tuple(size):
        return feature_map
    return nn.functional.interpolate(feature_map, size=tuple(size), mode="bilinear", align_corners=False)


class MedMoERouter(nn.Module):
    """W2 ReLU(W1 x) (section 4.3), optionally after a LayerNorm: an embedding (B, C) to logits (B, K)."""

    def __init__(self, in_features: int, hidden_size: int, num_experts: int, norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_features) if norm else nn.Identity()
        self.fc1 = nn.Linear(in_features, hidden_size)
        self.fc2 = nn.Linear(hidden_size, num_experts)

    def forward(self, embeds: Tensor) -> Tensor:
        return self.fc2(nn.functional.relu(self.fc1(self.norm(embeds))))


class MedMoEVisionModel(MedMoEPreTrainedModel):
    """The image tower: backbone, image router, and one expert per modality; each image is sent to one expert.

    Args:
        config: The configuration.

    Example:
        >>> import torch
        >>> from medmoe_hf.model import MedMoEConfig, MedMoEVisionModel
        >>> model = MedMoEVisionModel(MedMoEConfig.from_preset("tiny").vision_config).eval()
        >>> output = model(torch.zeros(2, 3, 64, 64), modality=["xray", "ct"])
        >>> output.local_embeds.shape, output.expert_ids.tolist()
        (torch.Size([2, 64, 16, 16]), [0, 1])
    """

    config: MedMoEVisionConfig
    base_model_prefix = "vision_model"
    input_modalities = ("image",)
    _auto_map = {
        "AutoConfig": "configuration_medmoe.MedMoEVisionConfig",
        "AutoModel": "modeling_medmoe.MedMoEVisionModel",
        **PROCESSING_AUTO_MAP,
    }

    def __init__(self, config: MedMoEVisionConfig) -> None:
        super().__init__(config)
        if config.backbone == "swin":
            self.backbone = MedMoESwinModel._from_config(config.swin_config, add_pooling_layer=False)
        else:
            self.backbone = MedMoETimmBackbone._from_config(config)
        channels = self.backbone.channels
        self.router = MedMoERouter(
            channels[-1], config.router_hidden_size, config.num_experts, norm=config.router_norm
        )
        self.level_norms = nn.ModuleList(nn.LayerNorm(width) for width in channels if config.pyramid_norm)
        expert = expert_class(config.expert_type)
        number = 1 if config.shared_expert else config.num_experts
        self.experts = nn.ModuleList(expert(config, channels) for _ in range(number))
        self.post_init()

    def feature_size(self, kind: str | None = None) -> int:
        """Returns the width of `pooled_features(..., kind)`, which is that of v_g before any projection by default."""
        widths = {"backbone": self.backbone.channels[-1], "expert": self.config.local_size}
        widths["both"] = sum(widths.values())
        return widths[kind or self.config.global_features]

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def encode(self, pixel_values: Tensor, **kwargs: Any) -> MedMoEBackboneOutput:
        """Runs the backbone alone, whose output all experts share.

        Args:
            pixel_values: `(B, 3, H, W)`, sides of at least 64 pixels.
            **kwargs: `output_hidden_states` and `output_attentions`.

        Returns:
            Tokens and pyramid.

        Raises:
            ValueError: There are not four dimensions, or a side is smaller than 64.
        """
        if pixel_values.dim() != 4 or min(pixel_values.shape[-2:]) < MINIMUM_IMAGE_SIDE:
            raise ValueError(
                f"`pixel_values` must be (batch, channels, height, width) with sides of {MINIMUM_IMAGE_SIDE} pixels "
                f"or more, got {tuple(pixel_values.shape)}."
            )
        kwargs = record_as_configured(self.config, kwargs)
        if not torch.compiler.is_compiling() and not len(pixel_values):
            # Reshapes inside the backbones cannot infer sizes from an empty batch.
            return _empty_batch(self.encode(pixel_values.new_zeros(1, *pixel_values.shape[1:]), **kwargs))
        # The dual encoder calls this method instead of `forward`, where Accelerate's hook would do it.
        device = getattr(getattr(self, "_hf_hook", None), "execution_device", None)
        pixel_values = pixel_values.to(device=device, dtype=self.backbone.dtype)
        if self._on_cpu_for_inference(pixel_values):
            pieces = pixel_values.split(max(1, CPU_PIXELS // math.prod(pixel_values.shape[-2:])))
            output = _concatenate([self.backbone(piece, **kwargs) for piece in pieces])
        else:
            output = self.backbone(pixel_values, **kwargs)
        if len(self.level_norms):
            output.feature_maps = tuple(
                norm(feature_map.movedim(1, -1)).movedim(-1, 1)
                for norm, feature_map in zip(self.level_norms, output.feature_maps, strict=True)
            )
        return output

    def _on_cpu_for_inference(self, values: Tensor) -> bool:
        """Returns whether a batch may be processed in parts that suit a CPU.

        Results then do not depend on the batch, no graph is recorded, and no other process waits for the same number
        of module calls.
        """
        return (
            values.device.type == "cpu"
            and not self.training
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not in_process_group()
        )

    def select_experts(self, router_logits: Tensor, modality: Any = None) -> Tensor:
        """Selects the expert with the largest logit, except where the caller's `modality` names one.

        Args:
            router_logits: `(B, ..., K)`.
            modality: A name, alias or id, for all images or one per image; None or -100 if unknown.

        Returns:
            Expert ids `(B, ...)`.
        """
        selected = router_logits.argmax(dim=-1)
        if modality is None:
            return selected
        ids = torch.tensor(self.config.modality_ids(modality, len(selected))).to(selected.device, non_blocking=True)
        ids = ids.view(-1, *[1] * (selected.dim() - 1))
        return torch.where(ids == UNKNOWN_MODALITY, selected, ids)

    def expert_index(self, expert_ids: Tensor) -> Tensor:
        """Returns the index in `experts` of each expert id: the id itself, or 0 with `shared_expert`."""
        return torch.zeros_like(expert_ids) if self.config.shared_expert else expert_ids

    def mixture_weights(self, router_logits: Tensor, modality: Any = None) -> Tensor | None:
        """Returns the weights of the experts in a soft mixture: the router's probabilities.

        Args:
            router_logits: `(B, K)`.
            modality: As in `select_experts`; all weight is on the expert that it names.

        Returns:
            `(B, K)`, rows that sum to 1; None with `mixture="hard"`.
        """
        if self.config.mixture == "hard":
            return None
        weights = router_logits.softmax(dim=-1)
        if modality is None:
            return weights
        ids = torch.tensor(self.config.modality_ids(modality, len(weights))).to(weights.device, non_blocking=True)
        ids = ids.unsqueeze(1)
        named = torch.zeros_like(weights).scatter(1, ids.clamp_min(0), 1.0)
        return torch.where(ids == UNKNOWN_MODALITY, weights, named)

    def map_size(self, feature_maps: Sequence[Tensor]) -> tuple[int, int]:
        """Returns height and width of the local map of a pyramid."""
        side = self.config.map_size
        height, width = feature_maps[0].shape[-2:]
        return (height, width) if side is None else (side, side)

    def fuse(
        self,
        feature_maps: Sequence[Tensor],
        expert_ids: Tensor,
        mixture: Tensor | None = None,
        modality: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Sends each image through its expert; experts without images are not computed.

        In a process group all experts are called, with empty batches where needed: sharded parameters are gathered,
        and gradients reduced, by all processes or by none.

        Args:
            feature_maps: S maps `(B, C_s, H_s, W_s)`.
            expert_ids: `(B,)`.
            mixture: `(B, K)` from `mixture_weights`; all experts are then computed and averaged with these weights.
            modality: What `select_experts` was called with. If it names the expert of each image, the host does not
                wait for a GPU to find out.

        Returns:
            Local maps `(B, D, H_1, W_1)` and scale weights `(B, S, H_1, W_1)`, in the order of the batch.
        """
        size = self.map_size(feature_maps)
        if mixture is not None:
            everything = [expert(feature_maps, size) for expert in self.experts]
            local, weights = (torch.stack(parts, dim=1) for parts in zip(*everything, strict=True))
            return torch.einsum("bk,bkdhw->bdhw", mixture, local), torch.einsum("bk,bkshw->bshw", mixture, weights)
        local, weights = self._dispatch(feature_maps, expert_ids, size, modality=modality)
        return local, weights

    def mean_embeds(
        self,
        feature_maps: Sequence[Tensor],
        expert_ids: Tensor,
        mixture: Tensor | None = None,
        modality: Any = None,
    ) -> Tensor:
        """Computes the mean of the local map of `fuse` without computing the map.

        Args:
            feature_maps: S maps `(B, C_s, H_s, W_s)`.
            expert_ids: `(B,)`.
            mixture: As in `fuse`.
            modality: As in `fuse`.

        Returns:
            `(B, D)`.
        """
        size = self.map_size(feature_maps)
        if mixture is not None:
            everything = torch.stack([expert(feature_maps, size, mean_only=True)[0] for expert in self.experts], dim=1)
            return (mixture.unsqueeze(1).to(everything.dtype) @ everything).squeeze(1)
        return self._dispatch(feature_maps, expert_ids, size, mean_only=True, modality=modality)[0]

    def _dispatch(
        self,
        feature_maps: Sequence[Tensor],
        expert_ids: Tensor,
        size: Sequence[int],
        mean_only: bool = False,
        modality: Any = None,
    ) -> tuple[Tensor, ...]:
        """Runs each image's own expert; the results are in the order of the batch.

        Images are grouped by expert, or computed one by one on a CPU without gradients. A compiled graph must not
        depend on the routing; there each image brings its expert's parameters instead: the same arithmetic in the same
        modules. This is not done where gradients are needed: experts without images would get zeros instead of None.
        """
        expert_ids = self.expert_index(expert_ids)
        if torch.compiler.is_compiling() and not self.training and not torch.is_grad_enabled():
            every = [_floating_tensors(expert) for expert in self.experts]
            own = {name: torch.stack([tensors[name] for tensors in every])[expert_ids] for name in every[0]}
            return torch.func.functional_call(self.experts[0], own, (feature_maps, size, mean_only))
        if expert_ids.is_meta or not len(expert_ids):
            # Only sizes matter, and they are the same for every expert.
            return self.experts[0](feature_maps, size, mean_only)
        if self._on_cpu_for_inference(expert_ids):
            return self._dispatch_per_sample(feature_maps, expert_ids, size, mean_only)
        groups = self._grouping(expert_ids, modality)
        together = in_process_group()
        called = [(expert, rows) for expert, rows in zip(self.experts, groups, strict=True) if rows or together]
        if len(called) == 1:
            return called[0][0](feature_maps, size, mean_only)
        own_rows = [rows for _, rows in called]
        inputs = zip(*(_rows([feature_map], own_rows) for feature_map in feature_maps), strict=True)
        parts = [expert(maps, size, mean_only) for (expert, _), maps in zip(called, inputs, strict=True)]
        order = list(itertools.chain(*own_rows))
        back = sorted(range(len(order)), key=order.__getitem__)
        # Experts may be on several devices.
        return tuple(
            _rows([value.to(expert_ids.device) for value in values], [back])[0] for values in zip(*parts, strict=True)
        )

    def _grouping(self, expert_ids: Tensor, modality: Any) -> list[list[int]]:
        """Returns the images of each expert."""
        named = [] if modality is None else self.config.modality_ids(modality, len(expert_ids))
        if modality is None or UNKNOWN_MODALITY in named:
            named = expert_ids.tolist()
        elif self.config.shared_expert:
            named = [0] * len(named)
        return [[row for row, own in enumerate(named) if own == expert] for expert in range(len(self.experts))]

    def apply_expert(self, expert: int, feature_maps: Sequence[Tensor], size: Sequence[int]) -> tuple[Tensor, ...]:
        """Runs one expert on all images.

        Args:
            expert: Index of the expert.
            feature_maps: S maps `(B, C_s, H_s, W_s)`.
            size: Height and width of the local maps.

        Returns:
            Local maps `(B, D, *size)` and scale weights `(B, S, *size)`.
        """
        expert = 0 if self.config.shared_expert else expert
        if self._on_cpu_for_inference(feature_maps[0]):
            expert_ids = torch.full((len(feature_maps[0]),), expert)
            return self._dispatch_per_sample(feature_maps, expert_ids, size, mean_only=False)
        return self.experts[expert](feature_maps, size)

    def _dispatch_per_sample(
        self, feature_maps: Sequence[Tensor], expert_ids: Tensor, size: Sequence[int], mean_only: bool
    ) -> tuple[Tensor, ...]:
        """As `_dispatch`, image by image into one result.

        Intermediate results then stay in the processor's cache and in memory that is already allocated.
        """
        results: tuple[Tensor, ...] = ()
        for row, expert in enumerate(expert_ids.tolist()):
            into = results[0][row : row + 1] if results and not mean_only else None
            values = self.experts[expert]([maps[row : row + 1] for maps in feature_maps], size, mean_only, into)
            if len(expert_ids) == 1:
                return values
            # Expanded, not by shape alone: maps keep their memory format.
            results = results or tuple(
                torch.empty_like(value.expand(len(expert_ids), *value.shape[1:])) for value in values
            )
            for result, value in zip(results, values, strict=True):
                if value is not into:
                    result[row] = value[0]
        return results

    def global_embeds(
        self, backbone_output: MedMoEBackboneOutput, expert_output: Tensor | None, kind: str | None = None
    ) -> Tensor:
        """Assembles v_g from what the backbone and the selected expert have computed.

        Args:
            backbone_output: The result of `encode`; its `pooler_output` is used.
            expert_output: The local map `(B, D, H_1, W_1)`, or its mean `(B, D)`; None if v_g needs neither.
            kind: `"backbone"`, `"expert"` or `"both"`; by default `config.global_features`.

        Returns:
            The backbone's mean `(B, C)`, the mean of the local map `(B, D)`, or both concatenated `(B, C + D)`.
        """
        kind = kind or self.config.global_features
        parts = [] if kind == "expert" else [backbone_output.pooler_output]
        if kind != "backbone":
            assert expert_output is not None
            parts.append(expert_output.mean(dim=(2, 3)) if expert_output.dim() == 4 else expert_output)
        return torch.cat(parts, dim=-1)

    def pooled_features(
        self, backbone_output: MedMoEBackboneOutput, kind: str | None = None, modality: Any = None
    ) -> Tensor:
        """Computes `global_embeds` with the expert that the image router or the caller selects, without a local map.

        Args:
            backbone_output: The result of `encode`.
            kind: See `global_embeds`. No expert runs for `"backbone"`.
            modality: Overrides the router, as in `forward`.

        Returns:
            `(B, feature_size(kind))`.
        """
        kind = kind or self.config.global_features
        mean = None
        if kind != "backbone":
            router_logits = self.router(backbone_output.pooler_output)
            expert_ids = self.select_experts(router_logits, modality)
            mixture = self.mixture_weights(router_logits, modality)
            mean = self.mean_embeds(backbone_output.feature_maps, expert_ids, mixture, modality)
        return self.global_embeds(backbone_output, mean, kind)

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, modality: Any = None, local: bool = True, **kwargs: Any
    ) -> MedMoEVisionOutput:
        """Encodes images.

        Args:
            pixel_values: `(B, 3, H, W)`, sides of at least 64 pixels.
            modality: Overrides the router: a name, alias or id, for all images or one per image; None or -100 if
                unknown.
            local: False skips the experts where the global embedding does not need them.
            **kwargs: `output_hidden_states`, `output_attentions` and `return_dict`.

        Returns:
            Embeddings, local map and routing.
        """
        backbone_output = self.encode(pixel_values, **kwargs)
        router_logits = self.router(backbone_output.pooler_output)
        expert_ids = self.select_experts(router_logits, modality)
        local_embeds = scale_weights = expert_output = None
        routed = backbone_output.feature_maps, expert_ids, self.mixture_weights(router_logits, modality), modality
        if local:
            local_embeds, scale_weights = self.fuse(*routed)
            expert_output = local_embeds
        elif self.config.global_features != "backbone":
            expert_output = self.mean_embeds(*routed)
        return MedMoEVisionOutput(
            last_hidden_state=backbone_output.last_hidden_state,
            pooler_output=self.global_embeds(backbone_output, expert_output),
            local_embeds=local_embeds,
            scale_weights=scale_weights,
            router_logits=router_logits,
            expert_ids=expert_ids,
            hidden_states=backbone_output.hidden_states,
            attentions=backbone_output.attentions,
        )


def _without_recorders(module: Any) -> Any:
    """Returns a copy of a module, with the same parameters, without the hooks with which transformers records outputs.

    These hooks are local functions, which cannot be pickled.
    """
    if module is None:
        return None
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__.update(module.__dict__)
    twin.__dict__.pop("_output_capturing_hooks_installed", None)
    twin._modules = {name: _without_recorders(child) for name, child in module._modules.items()}
    twin._forward_hooks = OrderedDict(
        (number, hook)
        for number, hook in module._forward_hooks.items()
        if getattr(hook, "__module__", None) != maybe_install_capturing_hooks.__module__
    )
    return twin


class MedMoETextModel(MedMoEPreTrainedModel):
    """The text tower: a BERT-like encoder whose last layers are summed and whose tokens are pooled to words.

    Args:
        config: The configuration.

    Example:
        >>> from medmoe_hf.model import MedMoETextConfig, MedMoETextModel, MedMoETokenizer
        >>> tokenizer = MedMoETokenizer.from_words(["pleural effusion"], max_length=16)
        >>> config = MedMoETextConfig(text_config={"vocab_size": len(tokenizer), "num_hidden_layers": 4})
        >>> output = MedMoETextModel(config).eval()(**tokenizer(["effusion", "pleural effusion"], return_tensors="pt"))
        >>> output.pooler_output.shape, output.word_mask.sum(dim=1).tolist()
        (torch.Size([2, 768]), [1, 2])
    """

    config: MedMoETextConfig
    base_model_prefix = "text_model"
    main_input_name = "input_ids"
    input_modalities = ("text",)
    _auto_map = {
        "AutoConfig": "configuration_medmoe.MedMoETextConfig",
        "AutoModel": "modeling_medmoe.MedMoETextModel",
        **PROCESSING_AUTO_MAP,
    }

    def __init__(self, config: MedMoETextConfig) -> None:
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.text_config)
        # No loss would ever reach the pooler.
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None
        self._encoder_arguments = frozenset(inspect.signature(self.encoder.forward).parameters)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        word_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> MedMoETextOutput:
        """Encodes reports or prompts.

        Args:
            input_ids: Tokens `(N, L)`.
            attention_mask: `(N, L)`, 0 at padding.
            token_type_ids: `(N, L)`, for encoders that use them.
            word_ids: `(N, L)`, the word of each token, -1 for none, as returned by `MedMoETokenizer`. Without them
                every attended token counts as a word.
            inputs_embeds: `(N, L, C)`, instead of `input_ids`.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict` and other arguments of the encoder.

        Returns:
            Report and word embeddings.
        """
        kwargs = record_as_configured(self.config, kwargs)
        given = inputs_embeds if input_ids is None else input_ids
        if given is not None and not torch.compiler.is_compiling() and not len(given):
            # Reshapes inside the encoders cannot infer sizes from an empty batch.
            one = [
                None if value is None else value.new_ones(1, *value.shape[1:])
                for value in (input_ids, attention_mask, token_type_ids, word_ids, inputs_embeds)
            ]
            return _empty_batch(self(*one, return_dict=True, **kwargs))
        wants_states = kwargs.pop("output_hidden_states", self.encoder.config.output_hidden_states)
        if token_type_ids is not None and "token_type_ids" in self._encoder_arguments:
            kwargs["token_type_ids"] = token_type_ids
        outputs = None
        observed = wants_states or kwargs.get("output_attentions")
        if input_ids is not None and attention_mask is not None and not observed and self._encodes_once(input_ids):
            last_hidden_state, tokens = self._encode_once(input_ids, attention_mask, kwargs)
        else:
            outputs = self.encoder(
                input_ids=input_ids,
                # On the meta device transformers cannot read a mask; the sizes are the same without one.
                attention_mask=None if attention_mask is not None and attention_mask.is_meta else attention_mask,
                inputs_embeds=inputs_embeds,
                output_hidden_states=True,
                return_dict=True,
                **kwargs,
            )
            last_hidden_state, tokens = outputs.last_hidden_state, self._summed_layers(outputs)
        if attention_mask is None:
            attention_mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        word_ids = self._word_ids(attention_mask, word_ids)
        word_embeds, word_mask = pool_words(tokens, word_ids, self.config.word_pooling)
        count = word_mask.sum(dim=1, keepdim=True).clamp_min(1)
        if self.config.report_length is not None:
            count = torch.full_like(count, self.config.report_length)
        if self.config.word_rule == "official":
            if input_ids is None:
                raise ValueError('`word_rule="official"` needs `input_ids`: it depends on the tokens themselves.')
            word_mask = official_word_mask(input_ids, word_ids, self.config.bracket_token_ids)
        return MedMoETextOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=word_embeds.sum(dim=1) / count,
            word_embeds=word_embeds,
            word_mask=word_mask,
            hidden_states=None if outputs is None else selected_states(outputs.hidden_states, wants_states),
            attentions=None if outputs is None else outputs.attentions,
        )

    def _summed_layers(self, outputs: Any) -> Tensor:
        # Layers first, then tokens: one sum over words instead of one per layer.
        total, *others = outputs.hidden_states[-self.config.num_summed_layers :]
        if others:
            total = total + others[0]  # the only sum that needs memory of its own
        for layer in others[1:]:
            total += layer
        return total

    def _encodes_once(self, input_ids: Tensor) -> bool:
        """Returns whether `_encode_once` applies: a frozen encoder on a CPU, without dropout."""
        return (
            input_ids.device.type == "cpu"
            and not self.encoder.training
            and not torch.compiler.is_compiling()
            and not in_process_group()
            and not any(parameter.requires_grad for parameter in self.encoder.parameters())
        )

    def _encode_once(self, input_ids: Tensor, attention_mask: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Encodes each different text of a batch once, and with others of about its length.

        A batch with one long report would otherwise be padded to it: with short captions that share words, as in
        training on labels, this takes a fraction of the time.

        Returns:
            The last layer `(N, L, C)` and the sum of the last layers `(N, L, C)`, zero at padding.
        """
        types = kwargs.get("token_type_ids")
        content = torch.cat([input_ids, attention_mask, *([] if types is None else [types])], dim=1)
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, numbers in enumerate(content.tolist()):
            rows_of.setdefault(tuple(numbers), []).append(row)
        firsts = torch.tensor([rows[0] for rows in rows_of.values()])
        positions = torch.arange(1, input_ids.shape[1] + 1)
        lengths = ((attention_mask[firsts] > 0) * positions).amax(dim=1).clamp_min(1)
        places = torch.empty(len(input_ids), dtype=torch.long)
        results: list[tuple[Tensor, Tensor]] = []
        order = lengths.argsort(stable=True)
        for chunk in order.split(TEXTS_AT_A_TIME):
            rows, length = firsts[chunk], int(lengths[chunk].max())
            cut = {} if types is None else {"token_type_ids": types[rows, :length]}
            outputs = self.encoder(
                input_ids=input_ids[rows, :length],
                attention_mask=attention_mask[rows, :length],
                output_hidden_states=True,
                return_dict=True,
                **{**kwargs, **cut},
            )
            padding = (0, 0, 0, input_ids.shape[1] - length)
            pair = outputs.last_hidden_state, self._summed_layers(outputs)
            last, tokens = (nn.functional.pad(states, padding) for states in pair)
            results.append((last, tokens))
        of_text = list(rows_of.values())
        for place, text in enumerate(order.tolist()):
            places[of_text[text]] = place
        last, tokens = (torch.cat(parts)[places] for parts in zip(*results, strict=True))
        return last, tokens

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state["_modules"] = {name: _without_recorders(module) for name, module in self._modules.items()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Immediately: installed during the first call, they would break the graph of a compiled model.
        maybe_install_capturing_hooks(self.encoder)

    def _word_ids(self, attention_mask: Tensor, word_ids: Tensor | None) -> Tensor:
        """Returns word ids (N, L); a text without words becomes one word of all its tokens."""
        if word_ids is None:
            positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
            return torch.where(attention_mask > 0, positions, -1)
        if self.config.word_rule == "official":
            return official_word_ids(word_ids, attention_mask)
        wordless = (word_ids < 0).all(dim=1, keepdim=True)
        return torch.where(wordless & (attention_mask > 0), 0, word_ids)


class MedMoEModel(MedMoEPreTrainedModel):
    """The dual encoder: image tower with one expert per modality, text tower, and projections to a shared space.

    Args:
        config: The configuration.

    Attributes:
        tasks: Name -> `Task`, what `classify` can be asked; saved as `tasks.json` and loaded with the model.
        rejector: The `Rejector` by which `route` recognises images that are unlike those the model knows, saved as
            `rejector.safetensors` and loaded with the model; None if none was fitted.

    Example:
        >>> import torch
        >>> from medmoe_hf.model import MedMoEConfig, MedMoEImageProcessor, MedMoEModel
        >>> from medmoe_hf.model import MedMoEProcessor, MedMoETokenizer
        >>> tokenizer = MedMoETokenizer.from_words(["chest radiograph with effusion"], max_length=16)
        >>> processor = MedMoEProcessor(MedMoEImageProcessor(size=64), tokenizer)
        >>> config = MedMoEConfig.from_preset("tiny", text_config={"vocab_size": len(tokenizer)})
        >>> model = MedMoEModel(config).eval()
        >>> images = torch.randint(256, (2, 64, 64), dtype=torch.uint8)
        >>> inputs = processor(images=list(images), text=["effusion", "chest", "radiograph"], return_tensors="pt")
        >>> model(**inputs).logits_per_image.shape
        torch.Size([2, 3])
    """

    config: MedMoEConfig
    _auto_map = {
        "AutoConfig": "configuration_medmoe.MedMoEConfig",
        "AutoModel": "modeling_medmoe.MedMoEModel",
        "AutoModelForZeroShotImageClassification": "modeling_medmoe.MedMoEModel",
        "AutoModelForImageClassification": "modeling_medmoe.MedMoEForImageClassification",
        **PROCESSING_AUTO_MAP,
    }
    _custom_pipelines = CUSTOM_PIPELINES

    def __init__(self, config: MedMoEConfig) -> None:
        super().__init__(config)
        self.vision_model = MedMoEVisionModel._from_config(config.vision_config)
        self.text_model = MedMoETextModel._from_config(config.text_model_config())
        text_size, vision_config = config.text_config.hidden_size, config.vision_config
        self.report_router = None
        if config.router != "image":
            self.report_router = MedMoERouter(
                text_size, vision_config.router_hidden_size, vision_config.num_experts, norm=vision_config.router_norm
            )
        global_size, size = self.vision_model.feature_size(), config.projection_dim
        if size is None and global_size != text_size:
            raise ValueError(
                f"The image tower's global embedding has width {global_size} and the report embedding {text_size}; "
                "set `projection_dim`."
            )
        self.visual_projection = None if size is None else nn.Linear(global_size, size, bias=False)
        self.local_projection = None if size is None else nn.Linear(vision_config.local_size, size, bias=False)
        self.text_projection = None if size is None else nn.Linear(text_size, size, bias=False)
        self.word_projection = None if size is None else nn.Linear(text_size, size, bias=False)
        # One-dimensional, because FSDP does not shard scalars.
        self.logit_scale = nn.Parameter(torch.tensor([INITIAL_LOGIT_SCALE])) if config.learned_scale else None
        self.tasks: dict[str, Task] = {}
        self.rejector: Rejector | None = None
        self._encoded_task: tuple[Any, EncodedTask] | None = None
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads a model as transformers does, with its tasks and its rejector.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            *args: Other arguments of `PreTrainedModel.from_pretrained`.
            **kwargs: Likewise.

        Returns:
            The model; with `output_loading_info=True` a pair of it and the loading info.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if pretrained_model_name_or_path is not None:
            # The commit that the weights are from, if it is known: a branch may move meanwhile.
            revision = getattr(model.config, "_commit_hash", None) or kwargs.get("revision")
            model.tasks = load_tasks(pretrained_model_name_or_path, revision, kwargs)
            model.rejector = load_rejector(pretrained_model_name_or_path, revision, kwargs)
            model.drop_stale_rejector()
        return loaded

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> Any:
        """Saves the model as transformers does, with its Python files, an `auto_map`, its tasks and its rejector.

        A rejector that was fitted to other weights than the model has now is dropped with a warning.

        Args:
            save_directory: The folder, created if it does not exist. A `tasks.json` and a `rejector.safetensors` in
                it are replaced, or removed if the model has none: they would be another model's. The
                files that sentence-transformers reads are added where they are missing.
            **kwargs: Other arguments of `PreTrainedModel.save_pretrained`.
        """
        # First, because transformers uploads the folder at the end.
        folder = Path(save_directory)
        if kwargs.get("is_main_process", True) and not folder.is_file():
            self.drop_stale_rejector()
            folder.mkdir(parents=True, exist_ok=True)
            write_sentence_transformers_files(folder)
            if self.tasks:
                write_tasks(folder / TASKS_FILE, self.tasks)
            else:
                (folder / TASKS_FILE).unlink(missing_ok=True)
            if self.rejector is not None:
                self.rejector.save(folder / REJECTOR_FILE)
            else:
                (folder / REJECTOR_FILE).unlink(missing_ok=True)
        return super().save_pretrained(save_directory, **kwargs)

    def drop_stale_rejector(self) -> None:
        """Drops the rejector, with a warning, if the image tower no longer has the weights that it was fitted to."""
        if self.rejector is not None and not self.rejector.fits(self.vision_model):
            self.rejector = None
            logger.warning(
                "The rejector was fitted to other weights of the image tower, and is dropped: the model accepts all "
                "images until `medmoe fit-rejector` fits a new one."
            )

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.logit_scale is not None:
            init.constant_(self.logit_scale, INITIAL_LOGIT_SCALE)

    @property
    def global_scale(self) -> Any:
        """Inverse temperature of the global similarity: `config.temp3`, or the learned one (at most 100)."""
        if self.logit_scale is None:
            return self.config.temp3
        return self.logit_scale.float().clamp(max=math.log(100)).exp()

    def _project_image(self, global_embeds: Tensor, local_embeds: Any) -> tuple[Tensor, Any]:
        if self.visual_projection is None or self.local_projection is None:
            return global_embeds, local_embeds
        if local_embeds is not None:
            local_embeds = self.local_projection(local_embeds.movedim(1, -1)).movedim(-1, 1)
        return self.visual_projection(global_embeds), local_embeds

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, modality: Any = None, local: bool = True, **kwargs: Any
    ) -> MedMoEVisionOutput:
        """Encodes images in the shared space.

        Args:
            pixel_values: `(B, 3, H, W)`, sides of at least 64 pixels.
            modality: Overrides the image router: a name, alias or id, for all images or one per image; None or -100 if
                unknown.
            local: False skips the experts where the global embedding does not need them; `local_embeds` is then None.
            **kwargs: `output_hidden_states`, `output_attentions` and `return_dict`.

        Returns:
            The output of the image tower, with `pooler_output` `(B, D)` and `local_embeds` `(B, D, H/4, W/4)` in the
            shared space.

        Example:
            >>> import torch
            >>> from medmoe_hf.model import MedMoEConfig, MedMoEModel
            >>> model = MedMoEModel(MedMoEConfig.from_preset("tiny")).eval()
            >>> output = model.get_image_features(torch.zeros(2, 3, 64, 64), modality="ct")
            >>> output.pooler_output.shape, output.local_embeds.shape
            (torch.Size([2, 64]), torch.Size([2, 64, 16, 16]))
        """
        kwargs = record_as_configured(self.config, kwargs)
        outputs = self.vision_model(pixel_values, modality=modality, local=local, return_dict=True, **kwargs)
        outputs.pooler_output, outputs.local_embeds = self._project_image(outputs.pooler_output, outputs.local_embeds)
        return outputs

    @torch.no_grad()
    def get_study_features(self, pixel_values: Any, modality: Any = None) -> MedMoEStudyOutput:
        """Encodes whole series in the shared space, a batch of slices at a time.

        Args:
            pixel_values: What `MedMoEProcessor(study=...)` returns as `pixel_values`; any iterable of such batches, or
                of tensors `(B, 3, H, W)`, which are then one series; or one tensor.
            modality: Overrides the image router: a name, alias or id for all slices, or a list with one for each
                series, None or -100 if unknown. Without it each slice is read by the expert that it selects: pass the
                modality that most of `votes` are for to read a series by one expert.

        Returns:
            Embeddings of series and slices, and the votes of the router. There is a row for each series, up to the
            last one that has slices; it is zero for a series without any.

        Raises:
            ValueError: There are no slices, or not a modality for each series.

        Example:
            >>> import torch
            >>> from medmoe_hf.model import MedMoEConfig, MedMoEModel
            >>> model = MedMoEModel(MedMoEConfig.from_preset("tiny")).eval()
            >>> output = model.get_study_features([torch.rand(2, 3, 64, 64), torch.rand(1, 3, 64, 64)], modality="ct")
            >>> output.pooler_output.shape, output.slice_embeds.shape, output.votes.shape
            (torch.Size([1, 64]), torch.Size([3, 64]), torch.Size([1, 6]))
        """
        per_series = list(modality) if isinstance(modality, (list, tuple)) else None
        embeds, logits, experts, series_ids, slice_ids = [], [], [], [], []
        seen = 0
        for batch in [pixel_values] if isinstance(pixel_values, Tensor) else pixel_values:
            if isinstance(batch, Tensor):
                count = len(batch)
                batch = {
                    "pixel_values": batch,
                    "series_ids": torch.zeros(count, dtype=torch.long),
                    "slice_ids": torch.arange(seen, seen + count),
                }
            pixels, series = batch["pixel_values"], batch["series_ids"].cpu()
            count = len(pixels)
            seen += count
            if per_series is not None and count and int(series.max()) >= len(per_series):
                raise ValueError(
                    f"`modality` has {len(per_series)} entries, but there is a series {int(series.max())}, from 0."
                )
            own = modality if per_series is None else [per_series[index] for index in series.tolist()]
            output = self.get_image_features(
                pixels.to(self.device, self.dtype), modality=own, local=False, return_dict=True
            )
            embeds.append(nn.functional.normalize(output.pooler_output.float(), dim=-1))
            logits.append(output.router_logits.float())
            experts.append(output.expert_ids)
            series_ids.append(series)
            slice_ids.append(batch["slice_ids"].cpu())
        if not seen:
            raise ValueError("There are no slices: none of the study's could be decoded.")
        slice_embeds, router_logits = torch.cat(embeds), torch.cat(logits)
        owners = torch.cat(series_ids).to(slice_embeds.device)
        members = nn.functional.one_hot(owners).float()  # (N, S)
        counts = members.sum(dim=0).clamp_min(1).unsqueeze(1)
        return MedMoEStudyOutput(
            pooler_output=nn.functional.normalize(members.t() @ slice_embeds, dim=-1),
            slice_embeds=slice_embeds,
            series_ids=owners,
            slice_ids=torch.cat(slice_ids).to(slice_embeds.device),
            router_logits=router_logits,
            votes=members.t() @ router_logits.softmax(dim=-1) / counts,
            expert_ids=torch.cat(experts),
        )

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        word_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> MedMoETextOutput:
        """Encodes texts in the shared space.

        Args:
            input_ids: Tokens `(N, L)`.
            attention_mask: `(N, L)`, 0 at padding.
            token_type_ids: `(N, L)`, for encoders that use them.
            word_ids: `(N, L)`, the word of each token, -1 for none; see `MedMoETextModel.forward`.
            **kwargs: `output_hidden_states`, `output_attentions` and `return_dict`.

        Returns:
            The output of the text tower, with `pooler_output` `(N, D)` and `word_embeds` `(N, L, D)` in the shared
            space.

        Example:
            >>> from medmoe_hf.model import MedMoEConfig, MedMoEModel, MedMoETokenizer
            >>> tokenizer = MedMoETokenizer.from_words(["effusion"], max_length=16)
            >>> model = MedMoEModel(MedMoEConfig.from_preset("tiny")).eval()
            >>> model.get_text_features(**tokenizer(["effusion"], return_tensors="pt")).pooler_output.shape
            torch.Size([1, 64])
        """
        outputs = self._encode_text(input_ids, attention_mask, token_type_ids, word_ids, **kwargs)
        return self._project_text(outputs)

    def _encode_text(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        word_ids: Tensor | None,
        **kwargs: Any,
    ) -> MedMoETextOutput:
        return self.text_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            word_ids=word_ids,
            return_dict=True,
            **record_as_configured(self.config, kwargs),
        )

    def _project_text(self, outputs: MedMoETextOutput) -> MedMoETextOutput:
        if self.text_projection is not None and self.word_projection is not None:
            outputs.pooler_output = self.text_projection(outputs.pooler_output)
            outputs.word_embeds = self.word_projection(outputs.word_embeds)
        return outputs

    @torch.no_grad()
    def route(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        word_ids: Tensor | None = None,
    ) -> MedMoERoutingOutput:
        """Asks the image router (`pixel_values`) or the report router (`input_ids`), one of the two.

        The router sends every image to an expert; with a rejector, `accepted` says whether it is like the images that
        the model knows.

        Args:
            pixel_values: `(B, 3, H, W)`.
            input_ids: Tokens `(B, L)`.
            attention_mask: `(B, L)`, 0 at padding.
            token_type_ids: `(B, L)`, for encoders that use them.
            word_ids: `(B, L)`, the word of each token, -1 for none.

        Returns:
            Probabilities `(B, K)`, expert ids `(B,)` and names of modalities; and for images, if the model has a
            rejector, `ood_score` and `accepted`, `(B,)`.

        Raises:
            ValueError: Both or none are passed, or reports where `config.router` is `"image"`.

        Example:
            >>> import torch
            >>> from medmoe_hf.model import MedMoEConfig, MedMoEModel
            >>> model = MedMoEModel(MedMoEConfig.from_preset("tiny")).eval()
            >>> model.route(torch.zeros(2, 3, 64, 64)).probabilities.shape
            torch.Size([2, 6])
        """
        if (pixel_values is None) == (input_ids is None):
            raise ValueError("`route` takes either `pixel_values` or `input_ids`, to ask one of the two routers.")
        ood_score = None
        if pixel_values is not None:
            encoded = self.vision_model.encode(pixel_values)
            logits = self.vision_model.router(encoded.pooler_output)
            ood_score = self.ood_scores(encoded, logits)
        elif self.report_router is not None:
            text = self._encode_text(input_ids, attention_mask, token_type_ids, word_ids)
            logits = self.report_router(text.pooler_output)
        else:
            raise ValueError('This model has no report router (`config.router="image"`); ask for images.')
        expert_ids = logits.argmax(dim=-1)
        return MedMoERoutingOutput(
            probabilities=logits.float().softmax(dim=-1),
            expert_ids=expert_ids,
            modality=[self.config.modalities[index] for index in expert_ids.tolist()],
            ood_score=ood_score,
            accepted=None if ood_score is None else ood_score <= 1,
        )

    def ood_scores(self, encoded: MedMoEBackboneOutput, router_logits: Tensor) -> Tensor | None:
        """Scores how far images are from those that the model knows, for callers that have run the backbone.

        Args:
            encoded: Of `vision_model.encode`.
            router_logits: `(B, K)` of the image router.

        Returns:
            `(B,)` float32, see `MedMoERoutingOutput`; None without a rejector.
        """
        if self.rejector is None:
            return None
        return self.rejector.scores(rejection_features(encoded.feature_maps), router_logits.argmax(dim=-1))

    @torch.no_grad()
    def ground(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        word_ids: Tensor | None = None,
        modality: Any = None,
        reference: Mapping[str, Tensor] | None = None,
    ) -> MedMoEGroundingOutput:
        """Computes a heat map per word of each image's text: high where a region matches it more than a reference.

        The best reference are reports of the same modality without the finding: `text="effusion"`, with normal chest
        radiographs as the reference. Without a reference a word is compared with the other words of its text.

        Where the local maps make up the global embedding (`global_features="expert"`), both are compared in the space
        of the global similarity, which distinguishes images; otherwise in that of the local loss. There two words that
        often occur together share their regions, and one of them may be found where the other one is not.

        Args:
            pixel_values: `(B, 3, H, W)`.
            input_ids: Tokens `(B, L)`, text i about image i; or `(1, L)`, one text about all images.
            attention_mask: Same shape, 0 at padding.
            token_type_ids: Same shape, for encoders that use them.
            word_ids: Same shape, the word of each token, -1 for none.
            modality: Overrides the routers, as in `forward`.
            reference: Tokenized texts (any number of them, which are averaged) with which all images are compared:
                what the processor returns for `text=[...]`.

        Returns:
            Heat maps and attention `(B, L, H/4, W/4)`; `MedMoEProcessor.post_process_grounding` resizes them to the
            images.

        Raises:
            ValueError: The number of texts is neither 1 nor B.

        Example:
            >>> import torch
            >>> from medmoe_hf.model import MedMoEConfig, MedMoEModel, MedMoETokenizer
            >>> tokenizer = MedMoETokenizer.from_words(["effusion normal"], max_length=16)
            >>> model = MedMoEModel(MedMoEConfig.from_preset("tiny")).eval()
            >>> text, normal = (tokenizer([word], return_tensors="pt") for word in ("effusion", "normal"))
            >>> grounding = model.ground(torch.zeros(2, 3, 64, 64), **text, modality="xray", reference=normal)
            >>> grounding.heatmaps.shape
            torch.Size([2, 3, 16, 16])
        """
        images = len(pixel_values)
        if len(input_ids) not in (1, images):
            raise ValueError(f"`ground` takes one text, or one for each of the {images} images; got {len(input_ids)}.")
        text = self._encode_text(input_ids, attention_mask, token_type_ids, word_ids)
        backbone_output = self.vision_model.encode(pixel_values)
        if self.report_router is not None and self.config.router == "report":
            logits = self.report_router(text.pooler_output).expand(images, -1)
        else:
            logits = self.vision_model.router(backbone_output.pooler_output)
        expert_ids = self.vision_model.select_experts(logits, modality)
        mixture = self.vision_model.mixture_weights(logits, modality)
        local, _ = self.vision_model.fuse(backbone_output.feature_maps, expert_ids, mixture)
        words, word_mask = text.word_embeds.expand(images, -1, -1), text.word_mask.expand(images, -1)
        reference_embeds = None
        if reference is not None:
            reference_embeds = self.text_model(**reference, return_dict=True).pooler_output.mean(dim=0)

        def project(regions_by: nn.Module | None, words_by: nn.Module | None) -> tuple[Tensor, Tensor, Tensor | None]:
            if regions_by is None or words_by is None:
                return local.flatten(2), words, reference_embeds
            regions = regions_by(local.flatten(2).transpose(1, 2)).transpose(1, 2)
            # Without a bias the projection commutes with the mean of the words.
            return regions, words_by(words), None if reference_embeds is None else words_by(reference_embeds)

        regions, by_loss, absent = project(self.local_projection, self.word_projection)
        attention = word_attention(self.config, regions, by_loss, word_mask)
        if self.config.vision_config.global_features == "expert":
            regions, by_global, absent = project(self.visual_projection, self.text_projection)
            heatmaps = word_contributions(regions, by_global, word_mask, absent)
        elif absent is not None:
            heatmaps = word_contributions(regions, by_loss, word_mask, absent)
        else:
            heatmaps = word_log_odds(regions, by_loss, word_mask)
        return MedMoEGroundingOutput(
            heatmaps=heatmaps.unflatten(2, local.shape[2:]),
            attention=attention.unflatten(2, local.shape[2:]),
            word_mask=word_mask,
            expert_ids=expert_ids,
        )

    def classify(
        self,
        pixel_values: Tensor,
        task: str | Task,
        modality: Any = None,
        prevalence: Mapping[str, float] | None = None,
    ) -> TaskAnswer:
        """Classifies images by one of the model's tasks: probabilities, labels and, if calibrated, prediction sets.

        The sentences of the last task are encoded once, for any number of calls. Images of another modality than the
        task are named by a warning, and nothing is decided for them: they are read as what the image router chooses,
        or as `modality` says.

        Args:
            pixel_values: `(B, 3, H, W)`, sides of at least 64 pixels.
            task: Name of one of `tasks`; or a task with tokens, as `MedMoEProcessor.tokenize_task` returns it.
            modality: Overrides the routers: a name, alias or id, for all images or one per image; None or -100 if
                unknown.
            prevalence: Class -> share where the model is used, if it differs from that of the images that the task was
                calibrated on. Probabilities are corrected for it; labels and sets do not depend on it.

        Returns:
            Probabilities and decisions, and whether the images are of the task's modality.

        Raises:
            ValueError: There is no such task, or it has no tokens.

        Example:
            >>> import torch
            >>> from medmoe_hf.model import MedMoEConfig, MedMoEImageProcessor, MedMoEModel
            >>> from medmoe_hf.model import MedMoEProcessor, MedMoETokenizer
            >>> from medmoe_hf.model.tasks_medmoe import Task
            >>> tokenizer = MedMoETokenizer.from_words(["clear lungs pleural effusion"], max_length=16)
            >>> processor = MedMoEProcessor(MedMoEImageProcessor(size=64), tokenizer)
            >>> config = MedMoEConfig.from_preset("tiny", text_config={"vocab_size": len(tokenizer)})
            >>> model = MedMoEModel(config).eval()
            >>> task = Task("chest", {"normal": ["Clear lungs."], "effusion": ["Pleural effusion."]})
            >>> model.tasks["chest"] = processor.tokenize_task(task)
            >>> answer = model.classify(torch.rand(2, 3, 64, 64), task="chest")
            >>> answer.probabilities.shape, answer.calibrated, answer.fits
            (torch.Size([2, 2]), False, [True, True])
        """
        answer = self._answer_task(pixel_values, task, modality, prevalence)
        if answer.warning:
            logger.warning(answer.warning)
        return answer

    @torch.no_grad()
    def _answer_task(
        self,
        pixel_values: Tensor,
        task: str | Task,
        modality: Any = None,
        prevalence: Mapping[str, float] | None = None,
    ) -> TaskAnswer:
        """`classify` without its warning, for callers that count the images of several batches."""
        if not isinstance(task, Task):
            if task not in self.tasks:
                known = (
                    f"It has {', '.join(self.tasks)}." if self.tasks else "It has none; `medmoe calibrate` adds one."
                )
                raise ArgumentError(f'The model has no task "{task}". {known}')
            task = self.tasks[task]
        scores, expert_ids = task_scores(self, pixel_values, task, self._encode_task(task), modality)
        read_as = [self.config.modalities[index] for index in expert_ids.tolist()]
        fits = [suits(task, name) for name in read_as]
        labels, sets = task.decide(scores)
        return TaskAnswer(
            task.name,
            task.classes,
            scores,
            task.probabilities(scores, prevalence),
            [own if fit else None for own, fit in zip(labels, fits, strict=True)],
            None if sets is None else [own if fit else None for own, fit in zip(sets, fits, strict=True)],
            calibrated=task.calibration is not None,
            modality=read_as,
            fits=fits,
        )

    def _encode_task(self, task: Task) -> EncodedTask:
        if self.training:  # dropout
            return encode_task(self, task)
        # Changes of weights, in place or by moving them, are noticed; the last task only is kept.
        tensors = [one for name, one in self.named_parameters() if not name.startswith("vision_model.")]
        key = (
            {name: getattr(task, name) for name in ("prompts", "negative_prompts", "tokens")},
            [(tensor.data_ptr(), tensor._version, tensor.dtype, tensor.device) for tensor in tensors],
        )
        if self._encoded_task is None or self._encoded_task[0] != key:
            self._encoded_task = key, encode_task(self, task)
        return self._encoded_task[1]

    def similarity(
        self, image_embeds: Tensor, local_embeds: Tensor, text: MedMoETextOutput, kind: str | None = None
    ) -> Tensor:
        """Scores every image against every text.

        Args:
            image_embeds: `(B, D)` in the shared space.
            local_embeds: `(B, D, H_1, W_1)` in the shared space.
            text: N texts, as `get_text_features` returns them.
            kind: `"global"`, `"local"` or `"mean"`; by default `config.similarity`.

        Returns:
            `(B, N)` logits.
        """
        kind = kind or self.config.similarity
        logits = []
        if kind != "local":
            logits.append(cosine_logits(image_embeds, text.pooler_output, self.global_scale))
        if kind != "global":
            logits.append(local_logits(self.config, local_embeds, text.word_embeds, text.word_mask))
        return sum(logits[1:], logits[0]) / len(logits)

    def similarity_by_expert(
        self,
        backbone_output: MedMoEBackboneOutput,
        texts: Sequence[MedMoETextOutput],
        pair_ids: Tensor,
        expert_ids: Tensor | None = None,
        kind: str | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scores every image against every text, with an expert per pair.

        The backbone has run once; each expert runs once, on the images that a pair or `expert_ids` sends to it.

        Args:
            backbone_output: The result of `MedMoEVisionModel.encode` for B images.
            texts: Batches of texts, N in total, as `get_text_features` returns them.
            pair_ids: `(B, N)`; image i is read for text j with the expert `pair_ids[i, j]`.
            expert_ids: `(B,)`, the experts whose local maps are returned; None for none.
            kind: As in `similarity`.

        Returns:
            `(B, N)` float32 logits, and what `MedMoEVisionModel.fuse` returns for `expert_ids`: local maps and scale
            weights.
        """
        pair_ids = self.vision_model.expert_index(pair_ids)
        expert_ids = None if expert_ids is None else self.vision_model.expert_index(expert_ids)
        if of_any_size(pair_ids) or not len(pair_ids):
            return self._similarity_by_every_expert(backbone_output, texts, pair_ids, expert_ids, kind)
        vision, feature_maps = self.vision_model, backbone_output.feature_maps
        logits = backbone_output.pooler_output.new_zeros(pair_ids.shape, dtype=torch.float32)
        selected, size = [], vision.map_size(feature_maps)
        every = pair_ids.flatten() if expert_ids is None else torch.cat([expert_ids, pair_ids.flatten()])
        for expert in every.unique().tolist():
            pairs = pair_ids == expert
            own = torch.zeros_like(pairs[:, 0]) if expert_ids is None else expert_ids == expert
            rows = (own | pairs.any(dim=1)).nonzero().squeeze(1)
            local, weights = vision.apply_expert(expert, [maps[rows] for maps in feature_maps], size)
            selected.append((local[own[rows]], weights[own[rows]]))
            some = MedMoEBackboneOutput(pooler_output=backbone_output.pooler_output[rows])
            image_embeds, local = self._project_image(vision.global_embeds(some, local), local)
            start = 0
            for text in texts:
                stop = start + len(text.pooler_output)
                columns = pairs[:, start:stop].any(dim=0).nonzero().squeeze(1)
                if len(columns):
                    part = MedMoETextOutput(
                        pooler_output=text.pooler_output[columns],
                        word_embeds=text.word_embeds[columns],
                        word_mask=text.word_mask[columns],
                    )
                    block = rows.unsqueeze(1), start + columns
                    scores = self.similarity(image_embeds, local, part, kind)
                    logits = logits.index_put(block, torch.where(pairs[block], scores, logits[block]))
                start = stop
        if expert_ids is None:
            return logits, None, None
        back = expert_ids.argsort(stable=True).argsort()
        local_embeds, scale_weights = (torch.cat(part)[back] for part in zip(*selected, strict=True))
        return logits, local_embeds, scale_weights

    def _similarity_by_every_expert(
        self,
        backbone_output: MedMoEBackboneOutput,
        texts: Sequence[MedMoETextOutput],
        pair_ids: Tensor,
        expert_ids: Tensor | None,
        kind: str | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As `similarity_by_expert`, but every expert reads every image: no step depends on where images are sent."""
        vision, size = self.vision_model, self.vision_model.map_size(backbone_output.feature_maps)
        logits, maps = [], []
        for expert in vision.experts:
            maps.append(expert(backbone_output.feature_maps, size))
            embeds, local = self._project_image(vision.global_embeds(backbone_output, maps[-1][0]), maps[-1][0])
            parts = [self.similarity(embeds, local, text, kind).float() for text in texts]
            logits.append(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0])
        selected = torch.stack(logits).gather(0, pair_ids.unsqueeze(0)).squeeze(0)
        if expert_ids is None:
            return selected, None, None
        rows = torch.arange(expert_ids.shape[0], device=expert_ids.device)
        local_embeds, scale_weights = (torch.stack(values)[expert_ids, rows] for values in zip(*maps, strict=True))
        return selected, local_embeds, scale_weights

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        word_ids: Tensor | None = None,
        modality: Any = None,
        return_loss: bool | None = None,
        gather: Callable[[Tensor], Tensor] | None = None,
        exchange: Callable[..., Tensor] | None = None,
        positive_groups: Tensor | None = None,
        **kwargs: Any,
    ) -> MedMoEOutput | MedMoEVisionOutput | MedMoETextOutput:
        """Compares images with texts; with only one of the two, returns `get_image_features` or `get_text_features`.

        Without `return_loss` every image is compared with every text (B and N may differ). With the report router,
        entry (i, j) then reads image i with the expert that text j selects, unless `modality` names that of image i.
        With `return_loss` text i is the report of image i and selects its expert.

        Args:
            input_ids: Tokens `(N, L)`.
            pixel_values: `(B, 3, H, W)`, sides of at least 64 pixels.
            attention_mask: `(N, L)`, 0 at padding.
            token_type_ids: `(N, L)`, for encoders that use them.
            word_ids: `(N, L)`, the word of each token, -1 for none; see `MedMoETextModel.forward`.
            modality: Overrides the routers: a name, alias or id, for all images or one per image; None or -100 if
                unknown.
            return_loss: Whether to compute the losses.
            gather: Concatenates the rows `(b, ...)` of all processes to `(B, ...)`, differentiably; the losses then
                contrast over all of them. None contrasts within this batch.
            exchange: Compares images with the words of all processes, see `losses_medmoe.local_terms`; GLoRIA's local
                loss needs it where there is `gather`.
            positive_groups: `(B,)` integers, equal for pairs with the same meaning: they are positives of each other
                in the losses (see `losses_medmoe.contrastive_loss`). -1 is unknown: its own only positive. None: every
                pair is, unless `config.positives` is `"text_similarity"`.
            **kwargs: `modality_labels` `(B,)`, the targets of the routers for the auxiliary loss, with -100 ignored;
                `output_hidden_states`, `output_attentions` and `return_dict`.

        Returns:
            `MedMoEOutput`; `MedMoEVisionOutput` or `MedMoETextOutput` if only one of the two is passed.

        Raises:
            ValueError: There are neither images nor texts, or the numbers do not match those that the loss needs.

        Example:
            >>> import torch
            >>> from medmoe_hf.model import MedMoEConfig, MedMoEModel, MedMoETokenizer
            >>> tokenizer = MedMoETokenizer.from_words(["effusion normal"], max_length=16)
            >>> model = MedMoEModel(MedMoEConfig.from_preset("tiny")).eval()
            >>> texts = tokenizer(["effusion", "normal"], return_tensors="pt")
            >>> output = model(pixel_values=torch.rand(2, 3, 64, 64), **texts, modality="xray", return_loss=True)
            >>> output.logits_per_image.shape, output.loss.shape
            (torch.Size([2, 2]), torch.Size([]))
        """
        # Not a named argument: `Trainer` expects every argument with "label" in its name in a batch, and does not
        # evaluate the loss of batches without it.
        modality_labels = kwargs.pop("modality_labels", None)
        if pixel_values is None and input_ids is None:
            raise ValueError("MedMoE needs `pixel_values`, `input_ids` or both.")
        if pixel_values is None:
            return self.get_text_features(
                input_ids, attention_mask, token_type_ids, word_ids, return_dict=True, **kwargs
            )
        if input_ids is None:
            return self.get_image_features(pixel_values, modality=modality, return_dict=True, **kwargs)

        vision, config = self.vision_model, self.config
        kwargs = record_as_configured(config, kwargs)
        text = self._encode_text(input_ids, attention_mask, token_type_ids, word_ids, **kwargs)
        report_logits = None if self.report_router is None else self.report_router(text.pooler_output)
        report_embeds = text.pooler_output
        text = self._project_text(text)
        backbone_output = vision.encode(pixel_values, **kwargs)
        router_logits = vision.router(backbone_output.pooler_output)
        if return_loss and (len(pixel_values) != len(input_ids) or (not len(pixel_values) and gather is None)):
            raise ValueError(
                "`return_loss` needs images, and one text for each; "
                f"got {len(pixel_values)} images, {len(input_ids)} texts."
            )
        if return_loss and (gather is None) != (exchange is None):
            raise ValueError(
                "`gather` and `exchange` are passed together, so that all losses contrast the same pairs."
            )
        if return_loss and positive_groups is not None and positive_groups.shape != input_ids.shape[:1]:
            raise ValueError(
                f"`positive_groups` needs one id for each of {len(input_ids)} pairs, got the shape "
                f"{tuple(positive_groups.shape)}."
            )
        # With `router="both"` reports have a router too, but it selects nothing.
        selecting = report_logits if config.router == "report" else None
        expert_ids = vision.select_experts(
            selecting if return_loss and selecting is not None else router_logits, modality
        )
        logits_per_image = None
        per_expert = config.similarity != "global" or config.vision_config.global_features != "backbone"
        if selecting is not None and per_expert and not return_loss:
            pair_ids = vision.select_experts(selecting.expand(pixel_values.shape[0], -1, -1), modality)
            logits_per_image, local, scale_weights = self.similarity_by_expert(
                backbone_output, [text], pair_ids, expert_ids
            )
        else:
            mixture = vision.mixture_weights(router_logits, modality)
            local, scale_weights = vision.fuse(backbone_output.feature_maps, expert_ids, mixture, modality)
        image_embeds, local = self._project_image(vision.global_embeds(backbone_output, local), local)
        if logits_per_image is None:
            logits_per_image = self.similarity(image_embeds, local, text)

        losses: dict[str, Tensor] = {}
        if return_loss:
            losses = training_losses(
                config,
                self.global_scale,
                image_embeds,
                text.pooler_output,
                report_embeds,
                local_terms(config, local, text.word_embeds, text.word_mask, exchange),
                text.word_mask.any(dim=1),
                [logits for logits in (router_logits, report_logits) if logits is not None],
                modality_labels,
                gather,
                positive_groups,
            )
        return MedMoEOutput(
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_image.t(),
            text_embeds=nn.functional.normalize(text.pooler_output.float(), dim=-1),
            image_embeds=nn.functional.normalize(image_embeds.float(), dim=-1),
            local_embeds=local,
            word_embeds=text.word_embeds,
            word_mask=text.word_mask,
            router_logits=router_logits,
            report_router_logits=report_logits,
            expert_ids=expert_ids,
            scale_weights=scale_weights,
            text_model_output=text,
            vision_model_output=MedMoEVisionOutput(
                last_hidden_state=backbone_output.last_hidden_state,
                pooler_output=image_embeds,
                local_embeds=local,
                scale_weights=scale_weights,
                router_logits=router_logits,
                expert_ids=expert_ids,
                hidden_states=backbone_output.hidden_states,
                attentions=backbone_output.attentions,
            ),
            **losses,
        )


class MedMoEForImageClassification(MedMoEPreTrainedModel):
    """The image tower with a linear classification head on the features that `config.classifier_features` selects.

    Args:
        config: The configuration; `num_labels`, `id2label`, `problem_type` and `freeze_vision_model` apply.

    Example:
        >>> import torch
        >>> from medmoe_hf.model import MedMoEConfig, MedMoEForImageClassification
        >>> model = MedMoEForImageClassification(MedMoEConfig.from_preset("tiny", num_labels=3)).eval()
        >>> output = model(torch.zeros(2, 3, 64, 64), labels=torch.tensor([0, 2]))
        >>> output.logits.shape, output.loss.shape
        (torch.Size([2, 3]), torch.Size([]))
    """

    config: MedMoEConfig
    input_modalities = ("image",)
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^report_router\.", r"_projection\."]
    _auto_map = MedMoEModel._auto_map

    def __init__(self, config: MedMoEConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vision_model = MedMoEVisionModel._from_config(config.vision_config)
        self.classifier = nn.Linear(self.vision_model.feature_size(config.classifier_features), config.num_labels)
        self.post_init()
        self.train()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.get_input_embeddings()

    def train(self, mode: bool = True) -> "MedMoEForImageClassification":
        super().train(mode)
        if self.config.freeze_vision_model:
            # Otherwise BatchNorm would keep updating its statistics, and the tower would not be frozen.
            self.vision_model.eval()
            # Here, because `from_pretrained` recreates the parameters after `__init__`, and then calls `eval`.
            self.vision_model.requires_grad_(False)
        return self

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, modality: Any = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """Classifies images.

        Args:
            pixel_values: `(B, 3, H, W)`, sides of at least 64 pixels.
            labels: Class ids `(B,)`; floats `(B, num_labels)` for `problem_type="multi_label_classification"`; floats
                for `"regression"`.
            modality: Overrides the router, as in `MedMoEModel.forward`.
            **kwargs: `output_hidden_states`, `output_attentions` and `return_dict`.

        Returns:
            `logits` `(B, num_labels)` and, with labels, the `loss`.

        Raises:
            ValueError: There are labels but no images.
        """
        if labels is not None and not len(pixel_values):
            raise ValueError("A loss needs images; `pixel_values` holds none.")
        backbone_output = self.vision_model.encode(pixel_values, **record_as_configured(self.config, kwargs))
        features = self.vision_model.pooled_features(backbone_output, self.config.classifier_features, modality)
        logits = self.classifier(features)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=backbone_output.hidden_states,
            attentions=backbone_output.attentions,
        )


MedMoEModel.register_for_auto_class("AutoModel")
MedMoEVisionModel.register_for_auto_class("AutoModel")
MedMoETextModel.register_for_auto_class("AutoModel")
MedMoEForImageClassification.register_for_auto_class("AutoModelForImageClassification")
attach_to_package(__name__)
