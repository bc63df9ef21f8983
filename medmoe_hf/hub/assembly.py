"""From tensors, a configuration and a tokenizer to a model folder."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertTokenizer

from medmoe_hf.common.files import atomic_dir, check_output, redact_paths
from medmoe_hf.data.checkpoint_names import refuse_missing_folder
from medmoe_hf.errors import ConvertError
from medmoe_hf.hub.weight_mapping import LoadReport, listed
from medmoe_hf.model import MedMoEImageProcessor, MedMoEModel, MedMoEProcessor, MedMoETokenizer
from medmoe_hf.model.presets_medmoe import preset_fields


def load_weights(
    model: MedMoEModel,
    tensors: Mapping[str, tuple[str, Tensor]],
    report: LoadReport,
    expected: Callable[[str], bool],
    allow_missing: Iterable[str] = (),
) -> None:
    """Copies tensors into a model and completes the report.

    Args:
        model: The model to fill.
        tensors: Name in the model -> (name in the source, tensor).
        report: Completed by this function.
        expected: Tells whether the source should have the tensor of a name; the others are new parts.
        allow_missing: Patterns (with `*`) of names in the model that the source may lack nevertheless.

    Raises:
        ConvertError: If tensors are missing or have other shapes; the message names them.
    """
    own = model.state_dict()
    wrong = [
        f"{old} has shape {tuple(tensor.shape)} but {tuple(own[name].shape)} is expected"
        for name, (old, tensor) in tensors.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if wrong:
        raise ConvertError(f"{report.source}: shapes do not match: {listed(wrong)}.")
    missing = [name for name in own if name not in tensors and expected(name)]
    refused = [name for name in missing if not any(fnmatch(name, pattern) for pattern in allow_missing)]
    if refused:
        raise ConvertError(
            f"{report.source} lacks {len(refused)} tensors (names in MedMoE): {listed(refused)}. If they may get "
            'initial values, add --allow-missing "PATTERN".'
        )
    with torch.no_grad():
        for name, (old, tensor) in tensors.items():
            if name in own:
                own[name].copy_(tensor)
                report.taken[name] = old
            else:
                report.dropped[old] = "the model has no such tensor"
    report.missing = missing
    report.initialised = [name for name in own if name not in tensors and not expected(name)]


def check_preset(name: str) -> None:
    """Refuses an unknown preset before anything is downloaded.

    Raises:
        ConvertError: For an unknown name.
    """
    try:
        preset_fields(name)
    except ValueError as error:
        raise ConvertError(str(error)) from None


def open_tokenizer(source: str, max_length: int | None) -> MedMoETokenizer:
    """Loads a tokenizer.

    Args:
        source: A folder, a Hub id, or the path of BERT's `vocab.txt`.
        max_length: Longest text in tokens; `None` keeps the tokenizer's own value.

    Raises:
        ConvertError: If it cannot be loaded.
    """
    try:
        if Path(source).is_file():
            return MedMoETokenizer.from_tokenizer(BertTokenizer(vocab=str(source)), max_length=max_length)
        refuse_missing_folder(source, bare_ids=True)
        found = MedMoETokenizer.from_pretrained(source)
        return found if max_length is None else MedMoETokenizer.from_tokenizer(found, max_length=max_length)
    except (OSError, ValueError) as error:
        raise ConvertError(
            f'No tokenizer at "{source}" ({error}). Specify a folder, a vocab.txt or a Hub id with --tokenizer.'
        ) from error


def bracket_token_ids(tokenizer: MedMoETokenizer) -> list[int]:
    """Ids of the tokens that begin with a bracket, for `word_rule="official"`."""
    return sorted(index for token, index in tokenizer.get_vocab().items() if token.startswith("["))


def check_vocabulary(tokenizer: MedMoETokenizer, embedded: int) -> None:
    """Refuses a tokenizer with more tokens than the text tower embeds.

    Args:
        tokenizer: The tokenizer.
        embedded: Number of tokens that the text tower embeds.

    Raises:
        ConvertError: If it has more.
    """
    if len(tokenizer) > embedded:
        raise ConvertError(
            f"The tokenizer has {len(tokenizer)} tokens, the text tower embeds {embedded}: they do not belong "
            "together. Specify the right tokenizer with --tokenizer."
        )


def save_model(
    model: MedMoEModel,
    tokenizer: MedMoETokenizer,
    report: LoadReport,
    out: str | Path,
    force: bool,
    image_statistics: Mapping[str, Any] | None = None,
) -> None:
    """Saves a model, its processor and the report as a folder.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        report: Saved as `conversion.json`, without absolute paths.
        out: Folder to create.
        force: Whether to replace `out` if it exists.
        image_statistics: `image_mean` and `image_std` of the image processor; `None` for its defaults.
    """
    side = model.config.vision_config.image_size
    images = MedMoEImageProcessor(size={"height": side, "width": side}, **(image_statistics or {}))
    with atomic_dir(out, force) as partial:
        model.save_pretrained(partial)
        MedMoEProcessor(images, tokenizer).save_pretrained(partial)
        (partial / "conversion.json").write_text(
            json.dumps(redact_paths(asdict(report)), indent=1) + "\n", encoding="utf-8"
        )


def refuse_existing(out: str | Path, force: bool) -> None:
    """Refuses an existing output folder before minutes of work.

    Raises:
        PathExistsError: If `out` exists and `force` is `False`, or if it is no model folder, whose content would be
            lost.
    """
    check_output(out, force, "config.json")
