"""Weights from elsewhere: official and MedCLIP checkpoints, and new models on published towers.

Nothing is lost in silence: every function gives a `LoadReport` that says of each tensor where it went, or why not, and
whatever a tower lacks is an error. The folder appears whole or not at all.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, BertTokenizer, SwinModel

from medmoe_hf.common.files import atomic_dir, redact_paths
from medmoe_hf.data.checkpoint_names import refuse_missing_folder
from medmoe_hf.data.phantom import phantom_vocabulary
from medmoe_hf.errors import ConvertError, PathExistsError
from medmoe_hf.hub.checkpoint_files import read_state_dict
from medmoe_hf.model import (
    MedMoEConfig,
    MedMoEImageProcessor,
    MedMoEModel,
    MedMoEProcessor,
    MedMoETokenizer,
)
from medmoe_hf.model.configuration_medmoe import OFFICIAL_VERSIONS, PRESET_MAX_LENGTH, preset_fields
from medmoe_hf.model.modalities_medmoe import MODALITIES

CLINICAL_BERT = "emilyalsentzer/Bio_ClinicalBERT"
"""The text tower of the official code and of MedCLIP; its tokenizer is the default of both conversions."""

_BACKBONE, _ENCODER = "vision_model.backbone.", "text_model.encoder."
_SHOWN = 12  # names that an error or a summary lists


@dataclass
class LoadReport:
    """Where the tensors of a source went.

    Attributes:
        source: what was read.
        taken: our name -> the source's name, for every tensor that was copied.
        dropped: the source's name -> why it was not.
        missing: our names that the source lacks though it should have them (allowed by the caller).
        initialised: our names that the source never has: new parts with fresh values.
        notes: what else a user should know.
    """

    source: str
    taken: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def renamed(self) -> dict[str, str]:
        """The part of `taken` whose name is another one here."""
        return {new: old for new, old in self.taken.items() if new != old}

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.taken)} tensors taken, {len(self.renamed)} of them renamed"]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.dropped.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            lines.append(f"  dropped {len(names)}, {reason}: {_listed(names)}")
        for title, names in (("missing", self.missing), ("newly initialised", _heads(self.initialised))):
            if names:
                lines.append(f"  {title}: {_listed(names)}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _heads(names: Iterable[str]) -> list[str]:
    """Module names two levels deep in the place of hundreds of tensors."""
    return list(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))


# Key remappers: pure functions from a source's name to the name inside our tower, or None for what is derived.

_SWIN_RENAMES = (
    (r"attention\.self\.(query|key|value)\.", lambda match: f"attention.{match[1][0]}_proj."),
    (r"attention\.self\.relative_position", lambda _: "attention.relative_position_bias.relative_position"),
    (r"attention\.output\.dense\.", lambda _: "attention.o_proj."),
    (r"intermediate\.dense\.", lambda _: "mlp.fc1."),
    (r"(?<!attention\.)output\.dense\.", lambda _: "mlp.fc2."),
)


def swin_name(name: str) -> str | None:
    """transformers' Swin, under the names before 5.x or the new ones."""
    for pattern, new in _SWIN_RENAMES:
        name = re.sub(pattern, new, name)
    return None if name.endswith("relative_position_index") else name


def bert_name(name: str) -> str | None:
    """transformers' BERT, LayerNorms as gamma and beta or not."""
    if name.endswith(("position_ids", "token_type_ids")):
        return None
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def swin_from_timm(state: Mapping[str, Tensor]) -> tuple[dict[str, tuple[str, Tensor]], dict[str, str]]:
    """timm's Swin (or Microsoft's file of it) as ours: new name -> (old name, tensor), and what was dropped and why.

    timm merges patches at the start of a stage, transformers and Microsoft at the end of the one before; queries, keys
    and values are one matrix there.
    """
    starts_with_merging = not any(name.startswith("layers.0.downsample.") for name in state)
    taken: dict[str, tuple[str, Tensor]] = {}
    dropped = {}
    for old, tensor in state.items():
        if re.search(r"relative_position_index$|attn_mask$", old):
            dropped[old] = "derived"
            continue
        if old.startswith("head."):
            dropped[old] = "a classifier"
            continue
        name = re.sub(r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection.", old)
        name = re.sub(r"^patch_embed\.norm\.", "embeddings.norm.", name)
        name = re.sub(r"^norm\.", "layernorm.", name)
        name = re.sub(r"^layers\.", "encoder.layers.", name)
        merging = re.match(r"encoder\.layers\.(\d+)\.downsample\.", name)
        if merging and starts_with_merging:
            name = name.replace(f"layers.{merging[1]}.", f"layers.{int(merging[1]) - 1}.", 1)
        name = name.replace(".norm1.", ".layernorm_before.").replace(".norm2.", ".layernorm_after.")
        name = name.replace(".attn.proj.", ".attention.o_proj.")
        name = name.replace(".attn.relative_position", ".attention.relative_position_bias.relative_position")
        if ".attn.qkv." in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                taken[name.replace(".attn.qkv.", f".attention.{part}_proj.")] = (old, piece)
        else:
            taken[name] = (old, tensor)
    return taken, dropped


# Shapes from tensors


def _get(tensors: Mapping[str, tuple[str, Tensor]], name: str) -> Tensor:
    if name not in tensors:
        raise ConvertError(f"the checkpoint lacks {name} (in our names), from which shapes are read.")
    return tensors[name][1]


def _count(names: Iterable[str], pattern: str) -> int:
    """How many numbers 0, 1, ... stand where the pattern has its group."""
    numbers = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    if numbers != set(range(len(numbers))) or not numbers:
        raise ConvertError(f"expected parts numbered 0, 1, ... under {pattern}, found {sorted(numbers)}.")
    return len(numbers)


def swin_fields(tensors: Mapping[str, tuple[str, Tensor]]) -> dict[str, Any]:
    """The fields of `SwinConfig` that a Swin's tensors (our names, inside the backbone) tell: all but image size."""
    patches = _get(tensors, "embeddings.patch_embeddings.projection.weight")
    stages = _count(tensors, r"encoder\.layers\.(\d+)\.")
    table = "encoder.layers.{}.blocks.0.attention.relative_position_bias.relative_position_bias_table"
    tables = [_get(tensors, table.format(stage)) for stage in range(stages)]
    first = "encoder.layers.0.blocks.0."
    hidden, width = _get(tensors, f"{first}mlp.fc1.weight").shape
    return {
        "embed_dim": patches.shape[0],
        "num_channels": patches.shape[1],
        "patch_size": patches.shape[-1],
        "depths": [_count(tensors, rf"encoder\.layers\.{stage}\.blocks\.(\d+)\.") for stage in range(stages)],
        "num_heads": [bias.shape[1] for bias in tables],
        "window_size": (math.isqrt(tables[0].shape[0]) + 1) // 2,
        "mlp_ratio": hidden / width,
        "qkv_bias": f"{first}attention.q_proj.bias" in tensors,
    }


def bert_fields(tensors: Mapping[str, tuple[str, Tensor]], heads: int | None) -> dict[str, Any]:
    """The fields of `BertConfig` that a BERT's tensors (in our names, inside the encoder) tell: all but the heads.

    By default a head is 64 wide, as in every published size.
    """
    vocab_size, width = _get(tensors, "embeddings.word_embeddings.weight").shape
    return {
        "model_type": "bert",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": _count(tensors, r"encoder\.layer\.(\d+)\."),
        "num_attention_heads": heads or max(1, width // 64),
        "intermediate_size": _get(tensors, "encoder.layer.0.intermediate.dense.weight").shape[0],
        "max_position_embeddings": _get(tensors, "embeddings.position_embeddings.weight").shape[0],
        "type_vocab_size": _get(tensors, "embeddings.token_type_embeddings.weight").shape[0],
    }


# From tensors to a model


def _sort(
    state: Mapping[str, Tensor], rules: Iterable[tuple[str, Callable[[str], tuple[str | None, str]]]]
) -> tuple[dict[str, tuple[str, Tensor]], dict[str, str]]:
    """Applies (prefix, rule) to every name, the first prefix that fits; a rule gives (new name, "") or (None, why)."""
    taken: dict[str, tuple[str, Tensor]] = {}
    dropped: dict[str, str] = {}
    rules = list(rules)
    for old, tensor in state.items():
        new, reason = None, "unknown to this kind of checkpoint"
        for prefix, rule in rules:
            if old.startswith(prefix):
                new, reason = rule(old.removeprefix(prefix))
                break
        if new is None:
            dropped[old] = reason
        else:
            taken[new] = (old, tensor)
    return taken, dropped


def _tower(prefix: str, rename: Callable[[str], str | None]) -> Callable[[str], tuple[str | None, str]]:
    def rule(name: str) -> tuple[str | None, str]:
        new = rename(name)
        return (None, "derived") if new is None else (prefix + new, "")

    return rule


def _drop(reason: str) -> Callable[[str], tuple[str | None, str]]:
    return lambda _: (None, reason)


def _inside(tensors: Mapping[str, tuple[str, Tensor]], prefix: str) -> dict[str, tuple[str, Tensor]]:
    return {name.removeprefix(prefix): pair for name, pair in tensors.items() if name.startswith(prefix)}


def _fill(
    model: MedMoEModel,
    tensors: Mapping[str, tuple[str, Tensor]],
    report: LoadReport,
    expected: Callable[[str], bool],
    allow_missing: Iterable[str] = (),
) -> None:
    """Copies tensors into the model and completes the report.

    Args:
        expected: whether the source should have a tensor of ours; the others are new parts.
        allow_missing: patterns of our names (`*` allowed) that it may lack all the same.

    Raises:
        ConvertError: names the tensors that are missing, or whose shapes do not fit.
    """
    own = model.state_dict()
    wrong = [
        f"{old} has shape {tuple(tensor.shape)} but {tuple(own[name].shape)} is expected"
        for name, (old, tensor) in tensors.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if wrong:
        raise ConvertError(f"{report.source}: shapes do not fit: {_listed(wrong)}.")
    missing = [name for name in own if name not in tensors and expected(name)]
    refused = [name for name in missing if not any(fnmatch(name, pattern) for pattern in allow_missing)]
    if refused:
        raise ConvertError(
            f"{report.source} lacks {len(refused)} tensors (in our names): {_listed(refused)}. If new values will do "
            'there, say so by --allow-missing "PATTERN".'
        )
    with torch.no_grad():
        for name, (old, tensor) in tensors.items():
            if name in own:
                own[name].copy_(tensor)
                report.taken[name] = old
            else:
                report.dropped[old] = "the model has no room for it"
    report.missing = missing
    report.initialised = [name for name in own if name not in tensors and not expected(name)]


def _check_preset(name: str) -> None:
    """Before anything is read: a wrong name is not to be told after a download."""
    try:
        preset_fields(name)
    except ValueError as error:
        raise ConvertError(str(error)) from None


def _open_tokenizer(source: str, max_length: int | None) -> MedMoETokenizer:
    """A folder, a Hub id, or BERT's vocab.txt itself.

    Raises:
        ConvertError: if there is none.
    """
    try:
        if Path(source).is_file():
            return MedMoETokenizer.from_tokenizer(BertTokenizer(vocab=str(source)), max_length=max_length)
        refuse_missing_folder(source, bare_ids=True)
        found = MedMoETokenizer.from_pretrained(source)
        return found if max_length is None else MedMoETokenizer.from_tokenizer(found, max_length=max_length)
    except (OSError, ValueError) as error:
        raise ConvertError(
            f'No tokenizer at "{source}" ({error}). Name a folder, a vocab.txt or a Hub id by --tokenizer.'
        ) from error


def _bracket_token_ids(tokenizer: MedMoETokenizer) -> list[int]:
    """The tokens that the official code's rule for words looks at (`word_rule="official"`)."""
    return sorted(index for token, index in tokenizer.get_vocab().items() if token.startswith("["))


def _check_vocabulary(tokenizer: MedMoETokenizer, config: MedMoEConfig) -> None:
    if len(tokenizer) > config.text_config.vocab_size:
        raise ConvertError(
            f"The tokenizer has {len(tokenizer)} tokens, the text tower embeds {config.text_config.vocab_size}: they "
            "do not belong together. Name the right one by --tokenizer."
        )


def _save(
    model: MedMoEModel,
    tokenizer: MedMoETokenizer,
    report: LoadReport,
    out: str | Path,
    force: bool,
    image_statistics: Mapping[str, Any] | None = None,
) -> None:
    side = model.config.vision_config.image_size
    images = MedMoEImageProcessor(size={"height": side, "width": side}, **(image_statistics or {}))
    with atomic_dir(out, force) as partial:
        model.save_pretrained(partial)
        MedMoEProcessor(images, tokenizer).save_pretrained(partial)
        (partial / "conversion.json").write_text(
            json.dumps(redact_paths(asdict(report)), indent=1) + "\n", encoding="utf-8"
        )


def _refuse_existing(out: str | Path, force: bool) -> None:
    # Before minutes of work, and not only when the folder is written.
    if Path(out).exists() and not force:
        raise PathExistsError(f"{out} exists already; choose another folder, or replace it by --force.")


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
    """A checkpoint of the authors' code as a model of the `official` preset, which gives its numbers.

    Widths, depths, heads and windows of the Swin, the number of experts and the text tower's sizes are read from the
    tensors.

    Args:
        checkpoint: Lightning's file or a bare state dict, `.ckpt`, `.pt`, `.bin` or `.safetensors`.
        out: the folder to make.
        tokenizer: a folder, a Hub id or a `vocab.txt`.
        official_version: 1, 2 or 3: where the global embedding comes from (`OFFICIAL_VERSIONS`); the parameters are
            the same, so the file does not say.
        image_size: side of the images it was trained on.
        text_heads: attention heads of the BERT; width / 64 by default.
        max_length: tokens that captions were padded to; the report embedding is divided by it.
        modalities: names of the experts in order; by default the six of the official labelling, if there are six.
        allow_missing: patterns of tensors (in our names) that the file may lack.
        force: replace `out`.

    Raises:
        ConvertError: for a file of another kind, missing tensors, wrong shapes, or code inside.
        FileExistsError: if `out` exists and `force` is False.
    """
    if official_version not in OFFICIAL_VERSIONS:
        raise ConvertError(f"official_version must be one of {sorted(OFFICIAL_VERSIONS)}, got {official_version}.")
    _refuse_existing(out, force)
    state = read_state_dict(checkpoint)
    marker = "image_encoder.model.moe.router.0.weight"
    prefix = next((name.removesuffix(marker) for name in state if name.endswith(marker)), None)
    if prefix is None:
        raise ConvertError(
            f"{checkpoint} is no checkpoint of the official code: there is no ...{marker}. Its tensors are "
            f"{_listed(state)}."
        )
    image, linear = f"{prefix}image_encoder.", {"0": "fc1", "2": "fc2"}

    def router(name: str) -> tuple[str | None, str]:
        number, _, kind = name.partition(".")
        return f"vision_model.router.{linear.get(number, number)}.{kind}", ""

    def expert(name: str) -> tuple[str | None, str]:
        name = re.sub(r"\.attn_proj\.([02])\.", lambda match: f".scale_attention.{linear[match[1]]}.", name)
        return "vision_model.experts." + name.replace(".proj_convs.", ".scale_projections."), ""

    tensors, dropped = _sort(
        state,
        [
            (f"{image}model.model.", _tower(_BACKBONE, swin_name)),
            (f"{image}model.moe.router.", router),
            (f"{image}model.moe.experts.", expert),
            (f"{image}global_embedder.", _drop("the official code never calls it")),
            (f"{image}local_embedder.", _drop("the official code never calls it")),
            (f"{prefix}text_encoder.model.pooler.", _drop("the official code never calls it")),
            (f"{prefix}text_encoder.model.", _tower(_ENCODER, bert_name)),
        ],
    )
    # Linear layers there, convolutions of kernel 1 here: the same numbers.
    tensors = {
        name: (old, tensor.reshape(*tensor.shape[:2], 1, 1) if ".experts." in name and tensor.dim() > 1 else tensor)
        for name, (old, tensor) in tensors.items()
    }
    count = _count(tensors, r"vision_model\.experts\.(\d+)\.")
    if modalities is None:
        modalities = MODALITIES if count == 6 else [f"modality_{index}" for index in range(count)]
    names = list(modalities)
    if len(names) != count:
        raise ConvertError(f"{checkpoint} has {count} experts, but {len(names)} modalities are named: {names}.")
    words = _open_tokenizer(tokenizer, max_length)
    scorer = _get(tensors, "vision_model.experts.0.scale_attention.fc1.weight")
    config = MedMoEConfig.from_preset(
        "official",
        text_config=bert_fields(_inside(tensors, _ENCODER), text_heads),
        bracket_token_ids=_bracket_token_ids(words),
        report_length=max_length,
        vision_config={
            "swin_config": swin_fields(_inside(tensors, _BACKBONE)),
            "image_size": image_size,
            "modalities": names,
            "scale_attention_size": scorer.shape[0],
            "local_size": scorer.shape[1],
            "router_hidden_size": _get(tensors, "vision_model.router.fc1.weight").shape[0],
            **OFFICIAL_VERSIONS[official_version],
        },
    )
    _check_vocabulary(words, config)
    report = LoadReport(str(checkpoint), dropped=dropped)
    model = MedMoEModel(config)
    _fill(model, tensors, report, lambda _: True, allow_missing)
    _save(model, words, report, out, force)
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
    """MedCLIP's two towers in a new model: the initialisation of the paper.

    Args:
        checkpoint: MedCLIP's `pytorch_model.bin`.
        preset: of the new model.
        projection_dim: 512 on a `paper` model keeps MedCLIP's projections too; None leaves the preset's choice.
        out, tokenizer, image_size, text_heads, allow_missing, force: as `convert_official`.

    Raises:
        ConvertError, FileExistsError: as `convert_official`.
    """
    _refuse_existing(out, force)
    _check_preset(preset)
    state = read_state_dict(checkpoint)
    towers = ("vision_model.model.", "text_model.model.")
    lacking = [tower for tower in towers if not any(name.startswith(tower) for name in state)]
    if lacking:
        raise ConvertError(
            f"{checkpoint} is no checkpoint of MedCLIP: nothing begins with {lacking[0]} (its Swin and BERT are "
            f"{' and '.join(towers)}*). Its tensors are {_listed(state)}."
        )
    tensors, dropped = _sort(
        state,
        [
            ("vision_model.model.", _tower(_BACKBONE, swin_name)),
            ("vision_model.projection_head.", lambda name: (f"visual_projection.{name}", "")),
            ("text_model.model.pooler.", _drop("no loss reaches it")),
            ("text_model.model.", _tower(_ENCODER, bert_name)),
            ("text_model.projection_head.", lambda name: (f"text_projection.{name}", "")),
            ("logit_scale", lambda _: ("logit_scale", "")),
        ],
    )
    words = _open_tokenizer(tokenizer, PRESET_MAX_LENGTH[preset])
    overrides: dict[str, Any] = {} if projection_dim is None else {"projection_dim": projection_dim}
    config = MedMoEConfig.from_preset(
        preset,
        text_config=bert_fields(_inside(tensors, _ENCODER), text_heads),
        vision_config={"swin_config": swin_fields(_inside(tensors, _BACKBONE)), "image_size": image_size},
        **overrides,
    )
    _check_vocabulary(words, config)
    report = LoadReport(str(checkpoint))
    model = MedMoEModel(config)
    own = model.state_dict()
    if "logit_scale" in tensors:
        tensors["logit_scale"] = tensors["logit_scale"][0], tensors["logit_scale"][1].reshape(1)
    for name in ("visual_projection.weight", "text_projection.weight", "logit_scale"):
        if name in tensors and (name not in own or own[name].shape != tensors[name][1].shape):
            old, tensor = tensors.pop(name)
            room = f"{tuple(own[name].shape)} there" if name in own else "no such part"
            dropped[old] = f"the preset has no room for it ({tuple(tensor.shape)} here, {room})"
    report.dropped = dropped
    _fill(model, tensors, report, lambda name: name.startswith((_BACKBONE, _ENCODER)), allow_missing)
    _save(model, words, report, out, force)
    return report


# New models on published towers


@dataclass
class _VisionSource:
    """A vision tower to start from: `vision_config` fields, tensors inside the backbone, and how its images look."""

    fields: dict[str, Any]
    tensors: dict[str, tuple[str, Tensor]]
    dropped: dict[str, str]
    image_statistics: dict[str, Any]
    note: str


_IMAGENET_NOTE = "images are normalised by ImageNet's statistics: the source says nothing else"


def _vision_from_state(state: Mapping[str, Tensor], source: str) -> tuple[dict[str, tuple[str, Tensor]], dict]:
    """A Swin's tensors in our names, whoever wrote them."""
    state = {re.sub(r"^(module|model)\.", "", name): tensor for name, tensor in state.items()}
    if "patch_embed.proj.weight" in state:
        return swin_from_timm(state)
    marker = "embeddings.patch_embeddings.projection.weight"
    prefix = next((name.removesuffix(marker) for name in state if name.endswith(marker)), None)
    if prefix is None or not any("relative_position_bias_table" in name for name in state):
        raise ConvertError(
            f"{source} holds no Swin, neither under timm's names (patch_embed.proj.weight, ...) nor under "
            f"transformers' ({marker}, ...). Its tensors are {_listed(state)}."
        )
    tensors, dropped = _sort(state, [(prefix, _tower("", swin_name))])
    for name in [name for name in tensors if not name.startswith(("embeddings.", "encoder.", "layernorm."))]:
        dropped[tensors.pop(name)[0]] = "no part of the tower"
    return tensors, dropped


def _vision_from_timm(source: str) -> _VisionSource:
    name = source.removeprefix("timm/")
    try:
        network = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # timm raises whatever the Hub client below raises
        raise ConvertError(f'Cannot get "{source}" ({error}). Is the name right, and the Hub reachable?') from error
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
    """`timm/<name>`, a checkpoint file of a Swin, or a folder or Hub id of transformers' Swin."""
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
        raise ConvertError(f'"{source}" lacks {_listed(sorted(info["missing_keys"]))}.')
    tensors = {name: (name, tensor) for name, tensor in network.state_dict().items() if swin_name(name)}
    dropped = dict.fromkeys(sorted(info["unexpected_keys"]), "no part of the tower")
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
    """A new model of a preset, on published towers where they are named; their weights land bit for bit.

    Args:
        out: the folder to make.
        preset: `paper`, `plus`, `official` or `tiny`.
        vision: a Swin: folder or Hub id of transformers' (old key names or new), a checkpoint file of either
            library, or `timm/<name>` (any hierarchical model of timm). Its shapes and image statistics come with it.
        text: folder or Hub id of any BERT-like model; its shapes come with it.
        tokenizer: folder, Hub id or `vocab.txt`; by default that of `text` (for `tiny`: the phantom reports' words).
        overrides: fields of `MedMoEConfig` to change.
        seed: of the new parts.
        force: replace `out`.

    Raises:
        ConvertError: for an unknown preset, and sources that cannot be read or do not fit.
        FileExistsError: if `out` exists and `force` is False.
    """
    _refuse_existing(out, force)
    _check_preset(preset)
    report = LoadReport(f"a new {preset} model")
    fields: dict[str, Any] = dict(overrides or {})
    tensors: dict[str, tuple[str, Tensor]] = {}
    source = None if vision is None else _open_vision(vision)
    if source is not None:
        fields["vision_config"] = {**source.fields, **fields.get("vision_config", {})}
        tensors |= {_BACKBONE + name: pair for name, pair in source.tensors.items()}
        report.dropped |= source.dropped
        report.notes.append(source.note)
    max_length = PRESET_MAX_LENGTH.get(preset)
    named = tokenizer or text
    if named is not None:
        words = _open_tokenizer(named, max_length)
    elif preset == "tiny":
        words = MedMoETokenizer.from_words(phantom_vocabulary(), max_length=max_length or 48)
    else:
        raise ConvertError(f"A {preset} model needs a vocabulary: name a text tower by --text or a --tokenizer.")
    if text is not None:
        try:
            refuse_missing_folder(text, bare_ids=True)
            encoder, info = AutoModel.from_pretrained(text, output_loading_info=True)
        except (OSError, ValueError) as error:
            raise ConvertError(f'No text tower at "{text}": {error}') from error
        absent = [name for name in info["missing_keys"] if not name.startswith("pooler.")]
        if absent:
            raise ConvertError(f'"{text}" lacks {_listed(sorted(absent))}.')
        for name, tensor in encoder.state_dict().items():
            if name.startswith("pooler."):
                report.dropped[name] = "no loss reaches it"
            else:
                tensors[_ENCODER + name] = (name, tensor)
        report.dropped |= dict.fromkeys(sorted(info["unexpected_keys"]), "no part of the tower")
        fields["text_config"] = encoder.config
        layers = encoder.config.num_hidden_layers
        if fields.get("num_summed_layers", 4) > layers:
            fields["num_summed_layers"] = layers
            report.notes.append(f"`num_summed_layers` is {layers}: the text tower has no more layers")
    else:
        text_fields = {"vocab_size": len(words), "pad_token_id": words.pad_token_id}
        fields["text_config"] = {**text_fields, **fields.get("text_config", {})}
    try:
        config = MedMoEConfig.from_preset(preset, **fields)
    except Exception as error:  # a strict dataclass's errors share no base with ValueError
        raise ConvertError(f"A {preset} model of these parts is not possible: {error}") from error
    _check_vocabulary(words, config)
    if preset == "official":
        config.bracket_token_ids = _bracket_token_ids(words)
    torch.manual_seed(seed)
    model = MedMoEModel(config)
    given = tuple(prefix for prefix, name in ((_BACKBONE, vision), (_ENCODER, text)) if name is not None)
    # The norm behind a timm backbone is a part of ours.
    ours = () if source is None or "swin_config" in source.fields else (f"{_BACKBONE}layernorm.",)
    _fill(model, tensors, report, lambda name: name.startswith(given) and not name.startswith(ours))
    _save(model, words, report, out, force, source.image_statistics if source else None)
    return report
