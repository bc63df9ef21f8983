"""New models on published towers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from medmoe_hf.hub.text_towers import TextTower, open_text
from medmoe_hf.hub.vision_towers import VisionTower, open_vision
from medmoe_hf.hub.vocabulary import corpus_texts, needed_tokens, reduce_tokenizer
from medmoe_hf.hub.weight_mapping import BACKBONE, ENCODER, LoadReport
from medmoe_hf.model import MedMoEConfig, MedMoEModel, MedMoETokenizer
from medmoe_hf.model.presets_medmoe import PRESET_MAX_LENGTH, PRESETS


def init_model(
    out: str | Path,
    preset: str,
    *,
    vision: str | None = None,
    text: str | None = None,
    text_layers: int | None = None,
    tokenizer: str | None = None,
    vocabulary: str | Path | None = None,
    vocabulary_size: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    force: bool = False,
) -> LoadReport:
    """Creates a new model of a preset, with the exact weights of published towers if they are given.

    Args:
        out: Folder to create.
        preset: `paper`, `plus`, `official`, `small` or `tiny`.
        vision: A Swin: folder or Hub id of transformers' (with old or new tensor names), or a checkpoint file of
            transformers, timm or Microsoft. Or `timm/<name>` for any hierarchical model of timm, and
            `timm/<name>@<file>` for one with the weights of a local file (`.safetensors`, `.pth`, `.pt` or `.bin`),
            whose tensors are matched by name, or by order and shape where names differ. It determines the shapes of
            the tower, the normalisation of images and their size (except for the backbone that the preset has
            anyway). `None` for a tower with initial weights.
        text: Folder or Hub id of any BERT-like model; it determines the shapes of the tower. `None` for a tower with
            initial weights.
        text_layers: Number of first layers of `text` to keep; `None` for all.
        tokenizer: Folder, Hub id or path of a `vocab.txt`; `None` for the tokenizer of `text` (for `tiny`: one with
            the words of the phantom reports).
        vocabulary: A corpus, to which the vocabulary is reduced: a text file with one text per line, or a YAML file of
            sources. Its texts are encoded as before; other words are spelled. `None` for the whole vocabulary.
        vocabulary_size: Number of tokens to keep; the first other entries of the vocabulary are kept too. `None` for
            those that the corpus needs.
        overrides: Fields of `MedMoEConfig` to change.
        seed: Seed of the initial weights of new parts.
        force: Whether to replace `out` if it exists.

    Returns:
        Where each tensor went; also saved as `conversion.json`.

    Raises:
        ConvertError: For an unknown preset, towers that cannot be loaded or do not match, options that need others,
            and a corpus that cannot be read.
        FileExistsError: If `out` exists and `force` is `False`.

    Example:
        ```python
        from medmoe_hf.hub import init_model

        print(init_model("models/new", "tiny", seed=1))
        ```
    """
    refuse_existing(out, force)
    check_preset(preset)
    if text_layers is not None and text is None:
        raise ConvertError("--text-layers keeps layers of a text tower: specify one with --text.")
    if vocabulary_size is not None and vocabulary is None:
        raise ConvertError("--vocabulary-size needs a corpus: specify one with --vocabulary.")
    report = LoadReport(f"a new {preset} model")
    fields: dict[str, Any] = dict(overrides or {})
    tensors: dict[str, tuple[str, Tensor]] = {}
    image_tower = None if vision is None else open_vision(vision)
    if image_tower is not None:
        fields["vision_config"] = {**_vision_fields(image_tower, preset), **fields.get("vision_config", {})}
        tensors |= {BACKBONE + name: pair for name, pair in image_tower.tensors.items()}
        report.dropped |= image_tower.dropped
        report.notes += image_tower.notes
    words = _open_words(preset, tokenizer or text)
    text_tower = None if text is None else open_text(text, text_layers)
    if vocabulary is not None:
        if text_tower is not None:
            check_vocabulary(words, text_tower.rows)
        kept = needed_tokens(words, corpus_texts(vocabulary), vocabulary_size)
        words = reduce_tokenizer(words, kept.ids)
        if text_tower is not None:
            text_tower.keep_tokens(kept.ids)
        report.notes.append(str(kept))
    if text_tower is not None:
        tensors |= {ENCODER + name: (name, tensor) for name, tensor in text_tower.tensors.items()}
        report.dropped |= text_tower.dropped
        fields["text_config"] = text_tower.config
        _limit_summed_layers(fields, preset, text_tower, report)
    else:
        text_fields = {"vocab_size": len(words), "pad_token_id": words.pad_token_id}
        fields["text_config"] = {**text_fields, **fields.get("text_config", {})}
    try:
        config = MedMoEConfig.from_preset(preset, **fields)
    except Exception as error:  # errors of a strict dataclass do not derive from ValueError
        raise ConvertError(f"A {preset} model of these parts is not possible: {error}") from error
    check_vocabulary(words, config.text_config.vocab_size)
    if preset == "official":
        config.bracket_token_ids = bracket_token_ids(words)
    torch.manual_seed(seed)
    model = MedMoEModel(config)
    given = tuple(prefix for prefix, name in ((BACKBONE, vision), (ENCODER, text)) if name is not None)

    def expected(name: str) -> bool:
        # The norm after a timm backbone is new; counters of batches are absent from old files.
        new = image_tower is not None and "swin_config" not in image_tower.fields and name.startswith(_TIMM_NORM)
        return name.startswith(given) and not new and not name.endswith("num_batches_tracked")

    load_weights(model, tensors, report, expected)
    save_model(model, words, report, out, force, image_tower.image_statistics if image_tower else None)
    return report


_TIMM_NORM = f"{BACKBONE}layernorm."


def _vision_fields(tower: VisionTower, preset: str) -> dict[str, Any]:
    own = PRESETS[preset].get("vision_config", {})
    if "image_size" in own and own.get("backbone") == tower.fields["backbone"]:
        # The preset was designed for this backbone, at its own image size.
        return {name: value for name, value in tower.fields.items() if name != "image_size"}
    return tower.fields


def _open_words(preset: str, source: str | None) -> MedMoETokenizer:
    max_length = PRESET_MAX_LENGTH.get(preset)
    if source is not None:
        return open_tokenizer(source, max_length)
    if preset == "tiny":
        return MedMoETokenizer.from_words(phantom_vocabulary(), max_length=max_length or 48)
    raise ConvertError(f"A {preset} model needs a vocabulary: specify a text tower with --text, or a --tokenizer.")


def _limit_summed_layers(fields: dict[str, Any], preset: str, tower: TextTower, report: LoadReport) -> None:
    layers = tower.config.num_hidden_layers
    if fields.get("num_summed_layers", PRESETS[preset].get("num_summed_layers", 4)) > layers:
        fields["num_summed_layers"] = layers
        report.notes.append(f"`num_summed_layers` is {layers}, as the text tower has no more layers")
