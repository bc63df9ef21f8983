"""Conversion of official and MedCLIP checkpoints.

No tensor is dropped silently: each function returns a `LoadReport` that tells where each tensor went, or why it was
dropped, and a missing tensor of a tower is an error. The output folder appears only when it is complete.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
    bert_fields,
    bert_name,
    count_parts,
    drop_rule,
    get_tensor,
    inside,
    listed,
    rename_tensors,
    swin_fields,
    swin_name,
    tower_rule,
)
from medmoe_hf.model import MedMoEConfig, MedMoEModel
from medmoe_hf.model.modalities_medmoe import MODALITIES
from medmoe_hf.model.presets_medmoe import OFFICIAL_VERSIONS, PRESET_MAX_LENGTH

CLINICAL_BERT = "emilyalsentzer/Bio_ClinicalBERT"
"""The text tower of the official code and of MedCLIP; its tokenizer is the default of both conversions."""


def convert_official(
    checkpoint: str | Path,
    out: str | Path,
    *,
    tokenizer: str = CLINICAL_BERT,
    official_version: int = 3,
    image_size: int = 224,
    text_heads: int | None = None,
    max_length: int = 25,
    modalities: Iterable[str] | None = None,
    allow_missing: Iterable[str] = (),
    force: bool = False,
) -> LoadReport:
    """Converts a checkpoint of the authors' code to a model of the `official` preset with equal outputs.

    Widths, depths, heads and windows of the Swin, the number of experts and the sizes of the text tower are read from
    the tensors.

    Args:
        checkpoint: A Lightning checkpoint or a state dict: `.ckpt`, `.pt`, `.bin` or `.safetensors`.
        out: Folder to create.
        tokenizer: A folder, a Hub id or the path of a `vocab.txt`.
        official_version: 1, 2 or 3: where the global embedding comes from (`OFFICIAL_VERSIONS`). The parameters are
            the same in all versions, so it cannot be read from the file.
        image_size: Side of the training images in pixels.
        text_heads: Number of attention heads of the BERT; `None` for width / 64.
        max_length: Number of tokens that captions were padded to; the report embedding is divided by it.
        modalities: Names of the experts in order; `None` for the six modalities of the official code if there are six
            experts, otherwise for `modality_0`, `modality_1`, ...
        allow_missing: Patterns of tensors (names in MedMoE) that the file may lack.
        force: Whether to replace `out` if it exists.

    Returns:
        Where each tensor went; also saved as `conversion.json`.

    Raises:
        ConvertError: For a file of another kind, missing tensors, wrong shapes, or code in the file.
        FileExistsError: If `out` exists and `force` is `False`.

    Example:
        ```python
        from medmoe_hf.hub import convert_official

        print(convert_official("medmoe.ckpt", "models/official"))
        ```
    """
    if official_version not in OFFICIAL_VERSIONS:
        raise ConvertError(f"official_version must be one of {sorted(OFFICIAL_VERSIONS)}, got {official_version}.")
    refuse_existing(out, force)
    state = read_state_dict(checkpoint)
    marker = "image_encoder.model.moe.router.0.weight"
    prefix = next((name.removesuffix(marker) for name in state if name.endswith(marker)), None)
    if prefix is None:
        raise ConvertError(
            f"{checkpoint} is no checkpoint of the official code: no tensor is called ...{marker}. Its tensors are "
            f"{listed(state)}."
        )
    image, linear = f"{prefix}image_encoder.", {"0": "fc1", "2": "fc2"}

    def router(name: str) -> tuple[str | None, str]:
        number, _, kind = name.partition(".")
        return f"vision_model.router.{linear.get(number, number)}.{kind}", ""

    def expert(name: str) -> tuple[str | None, str]:
        name = re.sub(r"\.attn_proj\.([02])\.", lambda match: f".scale_attention.{linear[match[1]]}.", name)
        return "vision_model.experts." + name.replace(".proj_convs.", ".scale_projections."), ""

    tensors, dropped = rename_tensors(
        state,
        [
            (f"{image}model.model.", tower_rule(BACKBONE, swin_name)),
            (f"{image}model.moe.router.", router),
            (f"{image}model.moe.experts.", expert),
            (f"{image}global_embedder.", drop_rule("the official code never uses it")),
            (f"{image}local_embedder.", drop_rule("the official code never uses it")),
            (f"{prefix}text_encoder.model.pooler.", drop_rule("the official code never uses it")),
            (f"{prefix}text_encoder.model.", tower_rule(ENCODER, bert_name)),
        ],
    )
    # The official code has linear layers, this package equivalent convolutions with kernel 1.
    tensors = {
        name: (old, tensor.reshape(*tensor.shape[:2], 1, 1) if ".experts." in name and tensor.dim() > 1 else tensor)
        for name, (old, tensor) in tensors.items()
    }
    count = count_parts(tensors, r"vision_model\.experts\.(\d+)\.")
    if modalities is None:
        modalities = MODALITIES if count == 6 else [f"modality_{index}" for index in range(count)]
    names = list(modalities)
    if len(names) != count:
        raise ConvertError(f"{checkpoint} has {count} experts, but {len(names)} modalities were given: {names}.")
    words = open_tokenizer(tokenizer, max_length)
    scorer = get_tensor(tensors, "vision_model.experts.0.scale_attention.fc1.weight")
    config = MedMoEConfig.from_preset(
        "official",
        text_config=bert_fields(inside(tensors, ENCODER), text_heads),
        bracket_token_ids=bracket_token_ids(words),
        report_length=max_length,
        vision_config={
            "swin_config": swin_fields(inside(tensors, BACKBONE)),
            "image_size": image_size,
            "modalities": names,
            "scale_attention_size": scorer.shape[0],
            "local_size": scorer.shape[1],
            "router_hidden_size": get_tensor(tensors, "vision_model.router.fc1.weight").shape[0],
            **OFFICIAL_VERSIONS[official_version],
        },
    )
    check_vocabulary(words, config.text_config.vocab_size)
    report = LoadReport(str(checkpoint), dropped=dropped)
    model = MedMoEModel(config)
    load_weights(model, tensors, report, lambda _: True, allow_missing)
    save_model(model, words, report, out, force)
    return report


def convert_medclip(
    checkpoint: str | Path,
    out: str | Path,
    *,
    tokenizer: str = CLINICAL_BERT,
    preset: str = "paper",
    projection_dim: int | None = None,
    image_size: int = 224,
    text_heads: int | None = None,
    allow_missing: Iterable[str] = (),
    force: bool = False,
) -> LoadReport:
    """Creates a new model with MedCLIP's two towers: the initialisation of the paper.

    Args:
        checkpoint: MedCLIP's `pytorch_model.bin`.
        out: Folder to create.
        tokenizer: A folder, a Hub id or the path of a `vocab.txt`.
        preset: Preset of the new model.
        projection_dim: Size of the shared embedding space; 512 with the `paper` preset keeps MedCLIP's projections
            too. `None` for the preset's value.
        image_size: Side of the images in pixels.
        text_heads: Number of attention heads of the BERT; `None` for width / 64.
        allow_missing: Patterns of tensors (names in MedMoE) that the file may lack.
        force: Whether to replace `out` if it exists.

    Returns:
        Where each tensor went; also saved as `conversion.json`.

    Raises:
        ConvertError: For a file of another kind, missing tensors, wrong shapes, or code in the file.
        FileExistsError: If `out` exists and `force` is `False`.

    Example:
        ```python
        from medmoe_hf.hub import convert_medclip

        print(convert_medclip("pytorch_model.bin", "models/start", preset="paper"))
        ```
    """
    refuse_existing(out, force)
    check_preset(preset)
    state = read_state_dict(checkpoint)
    towers = ("vision_model.model.", "text_model.model.")
    lacking = [tower for tower in towers if not any(name.startswith(tower) for name in state)]
    if lacking:
        raise ConvertError(
            f"{checkpoint} is no checkpoint of MedCLIP: no tensor name begins with {lacking[0]} (its Swin and BERT "
            f"are {' and '.join(towers)}*). Its tensors are {listed(state)}."
        )
    tensors, dropped = rename_tensors(
        state,
        [
            ("vision_model.model.", tower_rule(BACKBONE, swin_name)),
            ("vision_model.projection_head.", lambda name: (f"visual_projection.{name}", "")),
            ("text_model.model.pooler.", drop_rule("not used by any loss")),
            ("text_model.model.", tower_rule(ENCODER, bert_name)),
            ("text_model.projection_head.", lambda name: (f"text_projection.{name}", "")),
            ("logit_scale", lambda _: ("logit_scale", "")),
        ],
    )
    words = open_tokenizer(tokenizer, PRESET_MAX_LENGTH[preset])
    overrides: dict[str, Any] = {} if projection_dim is None else {"projection_dim": projection_dim}
    config = MedMoEConfig.from_preset(
        preset,
        text_config=bert_fields(inside(tensors, ENCODER), text_heads),
        vision_config={"swin_config": swin_fields(inside(tensors, BACKBONE)), "image_size": image_size},
        **overrides,
    )
    check_vocabulary(words, config.text_config.vocab_size)
    report = LoadReport(str(checkpoint))
    model = MedMoEModel(config)
    own = model.state_dict()
    if "logit_scale" in tensors:
        tensors["logit_scale"] = tensors["logit_scale"][0], tensors["logit_scale"][1].reshape(1)
    for name in ("visual_projection.weight", "text_projection.weight", "logit_scale"):
        if name in tensors and (name not in own or own[name].shape != tensors[name][1].shape):
            old, tensor = tensors.pop(name)
            expected = f"{tuple(own[name].shape)} in the preset" if name in own else "not in the preset"
            dropped[old] = f"does not match the preset ({tuple(tensor.shape)} here, {expected})"
    report.dropped = dropped
    load_weights(model, tensors, report, lambda name: name.startswith((BACKBONE, ENCODER)), allow_missing)
    save_model(model, words, report, out, force)
    return report
