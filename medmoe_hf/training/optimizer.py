"""Which parameters are trained and how: freezing, AdamW's parameter groups, training mode."""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any

from torch import nn

from medmoe_hf.errors import ArgumentError

# Additive offsets and temperatures that are not vectors: Swin's and T5's relative positions, position and segment
# embeddings, class and mask tokens.
_NO_DECAY = re.compile(
    r"relative_position|relative_attention_bias|rel_pos|rel_embeddings|cpb_mlp|pos_embed|position_embeddings"
    r"|token_type_embeddings|logit_scale|(?:cls|mask)_token"
)
_TOWER = re.compile(r"(?:^|\.)(?:(?P<vision>(?:vision_model\.)?backbone)|(?:text_model\.)?encoder)\.(?P<inside>.+)")
# `encoder.layers.0.blocks.1.` (Swin), `encoder.layer.3.` (BERT) and timm's
# `stages_0.blocks.1.`, `layer1.0.`, `blocks.0.1.`
_LAYER = re.compile(r"(?:^|[._])(?:layers?|stages?|[a-z]*blocks?)[._]?(\d+)(?:\.(?:blocks\.)?(\d+)(?=\.))?\.")

_BATCH_NORM = nn.modules.batchnorm._BatchNorm

_IN_FRONT: tuple[int, ...] = ()
"""Layer number of a tower's embeddings or stem: sorts before any layer."""


def split_tower(name: str) -> tuple[str, str] | None:
    """Splits the name of a parameter or module into tower and name inside the tower.

    Works for the dual encoder, the classifier and single towers, with or without wrappers (DDP, PEFT).

    Returns:
        "vision_model" or "text_model", and the rest of the name; `None` for routers, experts and projections.
    """
    found = _TOWER.search(name)
    if found is None:
        return None
    return "vision_model" if found["vision"] else "text_model", found["inside"]


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    learning_rate: float | None = None,
    layer_decay: float = 1.0,
    learning_rates: Mapping[str, float] | None = None,
    starts: Mapping[nn.Parameter, int] | None = None,
) -> list[dict[str, Any]]:
    """Trainable parameters as parameter groups for AdamW: weight decay and the learning rate of each layer.

    There is no weight decay on:

    - norms, biases and temperatures: parameters with one dimension or none, for which zero is no useful prior;
    - position (absolute or relative) and segment embeddings: each row is an additive offset, like a bias. A position
      that never occurs in training has no gradient, and decay alone would erase it.

    Word embeddings are decayed, as in BERT's own training.

    With `layer_decay` below 1 a layer learns at `learning_rate * layer_decay ** distance`. The distance is 0 for
    experts, routers, projections, temperatures and a tower's final norm, 1 for a tower's last layer (a block of the
    Swin, a layer of the text encoder), and grows by one per layer down to the embeddings, which learn slowest. What
    merges patches after a stage belongs to the stage's last block. Layers are recognised by their numbers, which works
    for most encoders and timm backbones; a tower without recognised layers has distance 1.

    Args:
        model: The model, after freezing and wrapping (PEFT).
        weight_decay: Weight decay of the groups with decay.
        learning_rate: Learning rate at distance 0; `None` to leave it to the optimizer.
        layer_decay: Factor from one layer to the next lower one, in (0, 1].
        learning_rates: Names or patterns, as in `freeze`, to the learning rate at distance 0 of the parameters that
            match, instead of `learning_rate`. `layer_decay` applies to it too. Of several that match a parameter the
            last one counts.
        starts: Step from which a parameter is trained (`Unfreezing.starts`); the others are trained from the first.

    Returns:
        Groups with `name`, `params`, `weight_decay`, `start` and (with a `learning_rate`) `lr`: first those with the
        full learning rate, then the towers from top to bottom. No group is empty, and each parameter is in exactly
        one.

    Raises:
        ValueError: If nothing is trainable, if a name matches nothing, or for a `layer_decay` out of range or without
            a `learning_rate`.

    Example:
        ```python
        import torch
        from medmoe_hf import MedMoEConfig, MedMoEModel
        from medmoe_hf.training.optimizer import parameter_groups

        model = MedMoEModel(MedMoEConfig.from_preset("tiny"))
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.05, learning_rate=1e-4, layer_decay=0.8))
        ```
    """
    if not 0 < layer_decay <= 1:
        raise ArgumentError(f"`layer_decay` must lie in (0, 1], 1 for one rate everywhere; got {layer_decay}.")
    if layer_decay < 1 and learning_rate is None:
        raise ArgumentError("`layer_decay` needs a `learning_rate` to start from.")
    towers: dict[str, dict[str, tuple[str, nn.Parameter]]] = {"vision_model": {}, "text_model": {}}
    for name, parameter in model.named_parameters():  # a shared parameter once
        if layer_decay < 1 and (split := split_tower(name)) is not None:
            towers[split[0]][name] = split[1], parameter
    places: dict[str, tuple[int, int, str]] = {}  # order of the tower, distance from the top, title
    for order, (tower, members) in enumerate(towers.items(), start=1):
        for name, (distance, layer) in _distances(members).items():
            if distance:
                places[name] = order, distance, f"{tower} {layer}"

    own_rates: dict[nn.Parameter, tuple[int, str, float | None]] = {}
    for number, (pattern, own_rate) in enumerate((learning_rates or {}).items(), start=1):
        for parameter in matching_parameters(model, pattern, "learning_rates"):
            own_rates[parameter] = number, pattern, own_rate

    common = "all" if layer_decay == 1 and not own_rates else "full rate" if not own_rates else "other parts"
    groups: dict[tuple[int, int, int, int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        number, pattern, rate = own_rates.get(parameter, (0, "", learning_rate))
        order, distance, title = places.get(name, (0, 0, pattern or common))
        start = (starts or {}).get(parameter, 0)
        decayed = parameter.ndim > 1 and not _NO_DECAY.search(name)
        group = groups.setdefault((order, distance, number, start, not decayed), {})
        if not group:
            parts = [title if title == pattern or not pattern else f"{title} ({pattern})"]
            parts += ["decayed" if decayed else "not decayed", *([f"from step {start}"] if start else [])]
            group["name"] = ", ".join(parts)
            group["params"] = []
            group["weight_decay"] = weight_decay if decayed else 0.0
            group["start"] = start
            if rate is not None:
                group["lr"] = rate * layer_decay**distance
        group["params"].append(parameter)
    if not groups:
        raise ArgumentError("No parameter is trainable: `freeze` covers the whole model. Leave something out of it.")
    return [groups[key] for key in sorted(groups)]


def _distances(members: dict[str, tuple[str, nn.Parameter]]) -> dict[str, tuple[int, str]]:
    """Distance of each parameter of one tower from the top, and the name of its layer.

    Args:
        members: Full name -> (name inside the tower, parameter), in the order of registration.
    """
    numbers = {name: found for name, (inside, _) in members.items() if (found := _LAYER.search(inside))}
    order = {name: position for position, name in enumerate(members)}
    last = max((order[name] for name in numbers), default=len(order))
    blocks: dict[int, list[tuple[int, int]]] = {}  # stage -> (block, first position in the order of registration)
    for name, found in numbers.items():
        known = blocks.setdefault(int(found[1]), [])
        if found[2] is not None and int(found[2]) not in [block for block, _ in known]:
            known.append((int(found[2]), order[name]))
    layers: dict[str, tuple[int, ...] | None] = {}
    for name, (_, parameter) in members.items():
        if name in numbers:
            stage, block = int(numbers[name][1]), numbers[name][2]
            if block is not None or not blocks[stage]:
                layers[name] = (stage,) if block is None else (stage, int(block))
            else:  # merges patches: timm registers it before a stage's blocks, transformers after them
                in_front = order[name] < min(position for _, position in blocks[stage])
                layers[name] = stage, (min if in_front else max)(blocks[stage])[0]
        else:
            layers[name] = None if order[name] > last and parameter.ndim <= 1 else _IN_FRONT
    ascending = sorted({layer for layer in layers.values() if layer is not None} | {_IN_FRONT})
    titles = {layer: f"layer {'.'.join(map(str, layer))}" for layer in ascending}
    titles[_IN_FRONT] = "embeddings" if numbers else "(no layers found)"
    return {
        name: (0, "final norm") if layer is None else (len(ascending) - ascending.index(layer), titles[layer])
        for name, layer in layers.items()
    }


def freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    """Freezes the parameters that match a pattern.

    Args:
        model: The model; with adapters, the model inside: `peft_model.get_base_model()`.
        patterns: Names of parameters or modules (`text_model`, `vision_model.backbone.embeddings`), with the wildcards
            of file names (`*.experts.2`, `*.experts.[0-2].*`). They match entire parts between dots: `layer.1` does
            not match `layer.10`.

    Raises:
        ValueError: If a pattern matches nothing; the message names the parts of the model and the nearest names.
    """
    for pattern in patterns:
        for parameter in matching_parameters(model, pattern, "freeze"):
            parameter.requires_grad_(False)


def matching_parameters(model: nn.Module, pattern: str, key: str) -> list[nn.Parameter]:
    """The parameters that a name or pattern of `freeze` matches.

    Args:
        model: The model; names are those without PEFT's wrapper.
        pattern: A name or pattern.
        key: Key of the configuration that it comes from, for the message.

    Raises:
        ValueError: If there are none; the message names the parts of the model and the nearest names.
    """
    # A shared parameter under all of its names.
    found = model.named_parameters(remove_duplicate=False)
    parameters = {name.removeprefix("base_model.model."): parameter for name, parameter in found}
    fitting = [parameter for name, parameter in parameters.items() if fits(name, pattern)]
    if not fitting:
        known = known_names(pattern, parameters)
        raise ArgumentError(f'`{key}`: no parameter begins with "{pattern}" or matches it as a pattern. {known}')
    return fitting


def frozen_norms(model: nn.Module, patterns: Iterable[str]) -> list[nn.Module]:
    """The BatchNorms whose running statistics `freeze_statistics` keeps.

    Args:
        model: The model.
        patterns: Names of modules, or patterns, as in `freeze`.

    Raises:
        ValueError: If a pattern matches no BatchNorm; the message names the nearest that are.
    """
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BATCH_NORM)}
    chosen: dict[str, nn.Module] = {}
    for pattern in patterns:
        fitting = {name: module for name, module in norms.items() if fits(name, pattern)}
        if not fitting:
            what = f"no BatchNorm is in `{pattern}`" if norms else "the model has no BatchNorm"
            raise ArgumentError(f"`freeze_statistics`: {what}. {known_names(pattern, norms) if norms else ''}".strip())
        chosen |= fitting
    return list(chosen.values())


def fits(name: str, pattern: str) -> bool:
    """Whether a pattern matches a name from its beginning up to a dot, or all of it."""
    whole = pattern.rstrip(".")
    return fnmatchcase(name, whole) or fnmatchcase(name, f"{whole}.*")


def known_names(pattern: str, names: Iterable[str]) -> str:
    """What a model has instead of a pattern without matches, for a message."""
    names = list(names)
    near = nearest_names(pattern.rstrip("."), names)
    hint = f" Nearest: {', '.join(near)}." if near else ""
    return f"The model has {', '.join(sorted({name.split('.')[0] for name in names}))}.{hint}"


def nearest_names(pattern: str, names: Iterable[str]) -> list[str]:
    """Up to three names of parameters or modules that are most similar to a pattern without matches."""
    paths = {path for name in names for path in accumulate(name.split("."), "{}.{}".format)}
    if pattern.startswith("*"):  # the pattern describes the end of a name
        pattern = pattern.strip("*.")
        length = pattern.count(".") + 1
        paths = {".".join(path.split(".")[-length:]) for path in paths}
    return get_close_matches(pattern, sorted(paths), n=3)


def train_mode(model: nn.Module) -> None:
    """Like `model.train()`, but modules without trainable parameters stay in evaluation mode.

    A frozen BatchNorm that updates its statistics is not frozen, and dropout in a frozen part only adds noise. Call
    this again after anything that calls `model.train()`.

    In a tower with adapters (PEFT's LoRA layers), however, dropout and stochastic depth are active everywhere, as if
    the tower were trained: they regularise its output, and using them only in the modules that have an adapter would
    change the network that was pretrained. Frozen BatchNorms stay in evaluation mode there too. The dropout of the
    adapters themselves is always active.
    """
    model.train()
    adapted = {
        split[0]
        for name, module in model.named_modules()
        if hasattr(module, "base_layer")
        and any(parameter.requires_grad for parameter in module.parameters())
        and (split := split_tower(name)) is not None
    }

    def visit(module: nn.Module, name: str) -> None:
        trainable = [parameter.requires_grad for parameter in module.parameters()]
        tower = split_tower(f"{name}.weight")  # with a suffix, so that the tower's own module is recognised
        inside_adapted = tower is not None and tower[0] in adapted
        normalises = isinstance(module, _BATCH_NORM)
        if trainable and not any(trainable) and (normalises or not inside_adapted):
            module.eval()
            return
        for child, part in module.named_children():
            visit(part, f"{name}.{child}" if name else child)

    visit(model, "")
