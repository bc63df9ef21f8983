"""New models on published towers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, SwinModel

from medmoe_hf.data.checkpoint_names import refuse_missing_folder
from medmoe_hf.data.phantom import phantom_vocabulary
from medmoe_hf.errors import ConvertError
from medmoe_hf.hub.assembly import (
    bracket_token_ids,
    check_preset,
    check_vocabulary,
    load_weights,
    open_tokenizer,
    refuse_existing,
    save_model,
)
from medmoe_hf.hub.checkpoint_files import read_state_dict
from medmoe_hf.hub.weight_mapping import (
    BACKBONE,
    ENCODER,
    LoadReport,
    listed,
    rename_tensors,
    swin_fields,
    swin_from_timm,
    swin_name,
    tower_rule,
)
from medmoe_hf.model import MedMoEConfig, MedMoEModel, MedMoETokenizer
from medmoe_hf.model.presets_medmoe import PRESET_MAX_LENGTH


@dataclass
class _VisionSource:
    """A vision tower to start from.

    Attributes:
        fields: Fields of `vision_config`.
        tensors: New name inside the backbone -> (old name, tensor).
        dropped: Old name -> why the tensor was dropped.
        image_statistics: `image_mean` and `image_std` of its images, if known.
        note: Message for the report.
    """

    fields: dict[str, Any]
    tensors: dict[str, tuple[str, Tensor]]
    dropped: dict[str, str]
    image_statistics: dict[str, Any]
    note: str


_IMAGENET_NOTE = "images are normalised by ImageNet's statistics: the source does not specify others"


def _vision_from_state(
    state: Mapping[str, Tensor], source: str
) -> tuple[dict[str, tuple[str, Tensor]], dict[str, str]]:
    """Renames the tensors of a Swin of timm, Microsoft or transformers."""
    state = {re.sub(r"^(module|model)\.", "", name): tensor for name, tensor in state.items()}
    if "patch_embed.proj.weight" in state:
        return swin_from_timm(state)
    marker = "embeddings.patch_embeddings.projection.weight"
    prefix = next((name.removesuffix(marker) for name in state if name.endswith(marker)), None)
    if prefix is None or not any("relative_position_bias_table" in name for name in state):
        raise ConvertError(
            f"{source} holds no Swin, neither with timm's names (patch_embed.proj.weight, ...) nor with "
            f"transformers' ({marker}, ...). Its tensors are {listed(state)}."
        )
    tensors, dropped = rename_tensors(state, [(prefix, tower_rule("", swin_name))])
    for name in [name for name in tensors if not name.startswith(("embeddings.", "encoder.", "layernorm."))]:
        dropped[tensors.pop(name)[0]] = "not part of the tower"
    return tensors, dropped


def _vision_from_timm(source: str) -> _VisionSource:
    name = source.removeprefix("timm/")
    try:
        network = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # timm passes on all errors of its Hub client
        raise ConvertError(
            f'Cannot load "{source}" ({error}). Check the name, and whether the Hub can be reached.'
        ) from error
    settings = network.pretrained_cfg
    statistics = {"image_mean": list(settings["mean"]), "image_std": list(settings["std"])}
    note = f"images are normalised as {source} expects"
    side = settings["input_size"][-1]
    if isinstance(network, timm.models.swin_transformer.SwinTransformer):
        tensors, dropped = swin_from_timm(network.state_dict())
        fields = {"swin_config": swin_fields(tensors), "image_size": side}
        return _VisionSource(fields, tensors, dropped, statistics, note)
    config = MedMoEConfig.from_preset(
        "paper", vision_config={"backbone": source, "image_size": side}, projection_dim=1
    )
    backbone = MedMoEModel(config).vision_model.backbone
    pretrained = timm.create_model(
        name, pretrained=True, features_only=True, out_indices=backbone.features.feature_info.out_indices
    )
    tensors = {f"features.{key}": (key, tensor) for key, tensor in pretrained.state_dict().items()}
    return _VisionSource({"backbone": source, "image_size": side}, tensors, {}, statistics, note)


def _open_vision(source: str) -> _VisionSource:
    """Loads `timm/<name>`, a checkpoint file of a Swin, or a folder or Hub id of transformers' Swin."""
    if source.startswith("timm/"):
        return _vision_from_timm(source)
    if Path(source).is_file():
        tensors, dropped = _vision_from_state(read_state_dict(source), source)
        return _VisionSource({"swin_config": swin_fields(tensors)}, tensors, dropped, {}, _IMAGENET_NOTE)
    try:
        refuse_missing_folder(source, bare_ids=True)
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConvertError(f'No vision tower at "{source}": {error}') from error
    if config.model_type != "swin":
        raise ConvertError(
            f'"{source}" is a {config.model_type}; a vision tower is a Swin of transformers, or "timm/<name>".'
        )
    network, info = SwinModel.from_pretrained(
        source, add_pooling_layer=False, output_loading_info=True, ignore_mismatched_sizes=False
    )
    if info["missing_keys"]:
        raise ConvertError(f'"{source}" lacks {listed(sorted(info["missing_keys"]))}.')
    tensors = {name: (name, tensor) for name, tensor in network.state_dict().items() if swin_name(name)}
    dropped = dict.fromkeys(sorted(info["unexpected_keys"]), "not part of the tower")
    side = config.image_size if isinstance(config.image_size, int) else max(config.image_size)
    fields = {
        "swin_config": {
            **swin_fields(tensors),
            "hidden_act": config.hidden_act,
            "layer_norm_eps": config.layer_norm_eps,
            "drop_path_rate": config.drop_path_rate,
        },
        "image_size": side,
    }
    try:
        images = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError):
        return _VisionSource(fields, tensors, dropped, {}, _IMAGENET_NOTE)
    statistics = {"image_mean": list(images.image_mean), "image_std": list(images.image_std)}
    return _VisionSource(fields, tensors, dropped, statistics, f"images are normalised as {source} expects")


def init_model(
    out: str | Path,
    preset: str,
    *,
    vision: str | None = None,
    text: str | None = None,
    tokenizer: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    force: bool = False,
) -> LoadReport:
    """Creates a new model of a preset, with the exact weights of published towers if they are given.

    Args:
        out: Folder to create.
        preset: `paper`, `plus`, `official` or `tiny`.
        vision: A Swin: folder or Hub id of transformers' (with old or new tensor names), a checkpoint file of
            transformers, timm or Microsoft, or `timm/<name>` for any hierarchical model of timm. It determines the
            shapes of the tower and the normalisation of images. `None` for a tower with initial weights.
        text: Folder or Hub id of any BERT-like model; it determines the shapes of the tower. `None` for a tower with
            initial weights.
        tokenizer: Folder, Hub id or path of a `vocab.txt`; `None` for the tokenizer of `text` (for `tiny`: one with
            the words of the phantom reports).
        overrides: Fields of `MedMoEConfig` to change.
        seed: Seed of the initial weights of new parts.
        force: Whether to replace `out` if it exists.

    Returns:
        Where each tensor went; also saved as `conversion.json`.

    Raises:
        ConvertError: For an unknown preset, or for towers that cannot be loaded or do not match.
        FileExistsError: If `out` exists and `force` is `False`.

    Example:
        ```python
        from medmoe_hf.hub import init_model

        print(init_model("models/new", "tiny", seed=1))
        ```
    """
    refuse_existing(out, force)
    check_preset(preset)
    report = LoadReport(f"a new {preset} model")
    fields: dict[str, Any] = dict(overrides or {})
    tensors: dict[str, tuple[str, Tensor]] = {}
    source = None if vision is None else _open_vision(vision)
    if source is not None:
        fields["vision_config"] = {**source.fields, **fields.get("vision_config", {})}
        tensors |= {BACKBONE + name: pair for name, pair in source.tensors.items()}
        report.dropped |= source.dropped
        report.notes.append(source.note)
    max_length = PRESET_MAX_LENGTH.get(preset)
    named = tokenizer or text
    if named is not None:
        words = open_tokenizer(named, max_length)
    elif preset == "tiny":
        words = MedMoETokenizer.from_words(phantom_vocabulary(), max_length=max_length or 48)
    else:
        raise ConvertError(f"A {preset} model needs a vocabulary: specify a text tower with --text, or a --tokenizer.")
    if text is not None:
        try:
            refuse_missing_folder(text, bare_ids=True)
            encoder, info = AutoModel.from_pretrained(text, output_loading_info=True)
        except (OSError, ValueError) as error:
            raise ConvertError(f'No text tower at "{text}": {error}') from error
        absent = [name for name in info["missing_keys"] if not name.startswith("pooler.")]
        if absent:
            raise ConvertError(f'"{text}" lacks {listed(sorted(absent))}.')
        for name, tensor in encoder.state_dict().items():
            if name.startswith("pooler."):
                report.dropped[name] = "not used by any loss"
            else:
                tensors[ENCODER + name] = (name, tensor)
        report.dropped |= dict.fromkeys(sorted(info["unexpected_keys"]), "not part of the tower")
        fields["text_config"] = encoder.config
        layers = encoder.config.num_hidden_layers
        if fields.get("num_summed_layers", 4) > layers:
            fields["num_summed_layers"] = layers
            report.notes.append(f"`num_summed_layers` is {layers}, as the text tower has no more layers")
    else:
        text_fields = {"vocab_size": len(words), "pad_token_id": words.pad_token_id}
        fields["text_config"] = {**text_fields, **fields.get("text_config", {})}
    try:
        config = MedMoEConfig.from_preset(preset, **fields)
    except Exception as error:  # errors of a strict dataclass do not derive from ValueError
        raise ConvertError(f"A {preset} model of these parts is not possible: {error}") from error
    check_vocabulary(words, config)
    if preset == "official":
        config.bracket_token_ids = bracket_token_ids(words)
    torch.manual_seed(seed)
    model = MedMoEModel(config)
    given = tuple(prefix for prefix, name in ((BACKBONE, vision), (ENCODER, text)) if name is not None)
    # The norm after a timm backbone is new.
    ours = () if source is None or "swin_config" in source.fields else (f"{BACKBONE}layernorm.",)
    load_weights(model, tensors, report, lambda name: name.startswith(given) and not name.startswith(ours))
    save_model(model, words, report, out, force, source.image_statistics if source else None)
    return report
