"""Names and shapes of other libraries' weights: their names in MedMoE, and the configuration they imply."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from medmoe_hf.errors import ConvertError

BACKBONE, ENCODER = "vision_model.backbone.", "text_model.encoder."
"""Prefixes of the towers' tensors in a `MedMoEModel`."""

_SHOWN = 12  # names listed in an error or a summary


@dataclass
class LoadReport:
    """Where the tensors of a source went.

    Attributes:
        source: The file, folder or preset.
        taken: Name in the new model -> name in the source, for each tensor that was copied.
        dropped: Name in the source -> why it was not copied.
        missing: Names in the new model that the source should have but lacks (allowed by the caller).
        initialised: Names of new parts, which the source does not have; they have initial values.
        notes: Further messages for the user.

    Example:
        ```python
        from medmoe_hf.hub import init_model

        report = init_model("models/new", "tiny")
        print(report)
        print(report.initialised[:3])
        ```
    """

    source: str
    taken: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def renamed(self) -> dict[str, str]:
        """The part of `taken` whose names differ."""
        return {new: old for new, old in self.taken.items() if new != old}

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.taken)} tensors taken, {len(self.renamed)} of them renamed"]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.dropped.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            lines.append(f"  dropped {len(names)}, {reason}: {listed(names)}")
        for title, names in (("missing", self.missing), ("newly initialised", _module_names(self.initialised))):
            if names:
                lines.append(f"  {title}: {listed(names)}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def listed(names: Iterable[str]) -> str:
    """Names as one text; long lists are shortened."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _module_names(names: Iterable[str]) -> list[str]:
    """Module names, two levels deep, instead of hundreds of tensors."""
    return list(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))


# Renaming functions: from a name in the source to the name inside a tower, or None for derived tensors.

_SWIN_RENAMES = (
    (r"attention\.self\.(query|key|value)\.", lambda match: f"attention.{match[1][0]}_proj."),
    (r"attention\.self\.relative_position", lambda _: "attention.relative_position_bias.relative_position"),
    (r"attention\.output\.dense\.", lambda _: "attention.o_proj."),
    (r"intermediate\.dense\.", lambda _: "mlp.fc1."),
    (r"(?<!attention\.)output\.dense\.", lambda _: "mlp.fc2."),
)


def swin_name(name: str) -> str | None:
    """New name of a tensor of transformers' Swin, with the names before or since version 5."""
    for pattern, new in _SWIN_RENAMES:
        name = re.sub(pattern, new, name)
    return None if name.endswith("relative_position_index") else name


def bert_name(name: str) -> str | None:
    """New name of a tensor of transformers' BERT; LayerNorms may have gamma and beta, or weight and bias."""
    if name.endswith(("position_ids", "token_type_ids")):
        return None
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def swin_from_timm(state: Mapping[str, Tensor]) -> tuple[dict[str, tuple[str, Tensor]], dict[str, str]]:
    """Renames the tensors of timm's Swin, or of Microsoft's file.

    timm merges patches at the start of a stage, transformers and Microsoft at the end of the previous one. Queries,
    keys and values are one matrix in timm and Microsoft's file.

    Returns:
        New name -> (old name, tensor), and old name -> why the tensor was dropped.
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


def get_tensor(tensors: Mapping[str, tuple[str, Tensor]], name: str) -> Tensor:
    """A tensor that shapes are read from.

    Raises:
        ConvertError: If it is missing.
    """
    if name not in tensors:
        raise ConvertError(f"the checkpoint lacks {name} (name in MedMoE), from which shapes are read.")
    return tensors[name][1]


def count_parts(names: Iterable[str], pattern: str) -> int:
    """Number of consecutive indices 0, 1, ... that the group of the pattern matches."""
    numbers = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    if numbers != set(range(len(numbers))) or not numbers:
        raise ConvertError(f"expected parts numbered 0, 1, ... under {pattern}, found {sorted(numbers)}.")
    return len(numbers)


def swin_fields(tensors: Mapping[str, tuple[str, Tensor]]) -> dict[str, Any]:
    """The fields of `SwinConfig` that follow from a Swin's renamed tensors: all except the image size."""
    patches = get_tensor(tensors, "embeddings.patch_embeddings.projection.weight")
    stages = count_parts(tensors, r"encoder\.layers\.(\d+)\.")
    table = "encoder.layers.{}.blocks.0.attention.relative_position_bias.relative_position_bias_table"
    tables = [get_tensor(tensors, table.format(stage)) for stage in range(stages)]
    first = "encoder.layers.0.blocks.0."
    hidden, width = get_tensor(tensors, f"{first}mlp.fc1.weight").shape
    return {
        "embed_dim": patches.shape[0],
        "num_channels": patches.shape[1],
        "patch_size": patches.shape[-1],
        "depths": [count_parts(tensors, rf"encoder\.layers\.{stage}\.blocks\.(\d+)\.") for stage in range(stages)],
        "num_heads": [bias.shape[1] for bias in tables],
        "window_size": (math.isqrt(tables[0].shape[0]) + 1) // 2,
        "mlp_ratio": hidden / width,
        "qkv_bias": f"{first}attention.q_proj.bias" in tensors,
    }


def bert_fields(tensors: Mapping[str, tuple[str, Tensor]], heads: int | None) -> dict[str, Any]:
    """The fields of `BertConfig` that follow from a BERT's renamed tensors: all except the number of heads.

    Args:
        tensors: New name inside the encoder -> (old name, tensor).
        heads: Number of attention heads; `None` for heads of width 64, as in all published sizes.
    """
    vocab_size, width = get_tensor(tensors, "embeddings.word_embeddings.weight").shape
    return {
        "model_type": "bert",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": count_parts(tensors, r"encoder\.layer\.(\d+)\."),
        "num_attention_heads": heads or max(1, width // 64),
        "intermediate_size": get_tensor(tensors, "encoder.layer.0.intermediate.dense.weight").shape[0],
        "max_position_embeddings": get_tensor(tensors, "embeddings.position_embeddings.weight").shape[0],
        "type_vocab_size": get_tensor(tensors, "embeddings.token_type_embeddings.weight").shape[0],
    }


# Renaming


def rename_tensors(
    state: Mapping[str, Tensor], rules: Iterable[tuple[str, Callable[[str], tuple[str | None, str]]]]
) -> tuple[dict[str, tuple[str, Tensor]], dict[str, str]]:
    """Renames all tensors.

    Args:
        state: Old name -> tensor.
        rules: (prefix, rule); the first prefix that matches applies. A rule maps the rest of the name to
            (new name, "") or (`None`, why it is dropped).

    Returns:
        New name -> (old name, tensor), and old name -> why the tensor was dropped.
    """
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


def tower_rule(prefix: str, rename: Callable[[str], str | None]) -> Callable[[str], tuple[str | None, str]]:
    """A rule of `rename_tensors` that renames and adds a prefix; tensors without a new name are derived."""

    def rule(name: str) -> tuple[str | None, str]:
        new = rename(name)
        return (None, "derived") if new is None else (prefix + new, "")

    return rule


def drop_rule(reason: str) -> Callable[[str], tuple[str | None, str]]:
    """A rule of `rename_tensors` that drops all tensors."""
    return lambda _: (None, reason)


def inside(tensors: Mapping[str, tuple[str, Tensor]], prefix: str) -> dict[str, tuple[str, Tensor]]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): pair for name, pair in tensors.items() if name.startswith(prefix)}
