"""Which parameters are trained and how: freezing, AdamW's parameter groups, training mode."""

import re
from collections.abc import Iterable
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

_IN_FRONT: tuple[int, ...] = ()
"""The place of a tower's embeddings or stem: it sorts before the numbers of any layer."""


def split_tower(name: str) -> tuple[str, str] | None:
    """The tower that a parameter or module belongs to, and its name in there; None for routers, experts, projections.

    Works for the dual encoder, the classifier and the towers alone, wrapped (DDP, PEFT) or not.
    """
    found = _TOWER.search(name)
    if found is None:
        return None
    return "vision_model" if found["vision"] else "text_model", found["inside"]


def parameter_groups(
    model: nn.Module, weight_decay: float, learning_rate: float | None = None, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Trainable parameters as AdamW's groups: what is decayed, and how fast each layer learns.

    No weight decay on:

    - norms, biases and temperatures: one dimension or none, and pulling them to zero only hurts;
    - tables of positions, relative or not, and of segments: each row is an offset that is added, a bias of its place.
      A place that the training texts or images never reach has no gradient, and decay alone would wipe it out.

    Word embeddings are decayed, as in BERT's own training: they are added too, but they are most of the text tower's
    weights and hold what it knows.

    With `layer_decay` below 1 a layer learns at `learning_rate * layer_decay ** distance`. The distance is 0 for
    experts, routers, projections, temperatures and a tower's final norm, 1 for a tower's last layer (a block of the
    Swin, a layer of the text encoder), and grows by one a layer down to the embeddings, which learn slowest. What
    merges patches after a stage belongs to the stage's last block. Layers are found by their numbers, in most
    encoders and timm backbones; a tower in which none are found lies at distance 1 as a whole.

    Args:
        model: frozen and wrapped (PEFT) already, if it is to be.
        weight_decay: of the groups that are decayed.
        learning_rate: at distance 0; None leaves it to the optimiser.
        layer_decay: factor from one layer to the next below, in (0, 1].

    Returns:
        groups with `name`, `params`, `weight_decay` and (with a `learning_rate`) `lr`: the full rate first, then the
        towers from the top down. None is empty, and each parameter is in exactly one.

    Raises:
        ValueError: if nothing is trainable, or for a `layer_decay` out of range or without a `learning_rate`.
    """
    if not 0 < layer_decay <= 1:
        raise ArgumentError(f"`layer_decay` must lie in (0, 1], 1 for one rate everywhere; got {layer_decay}.")
    if layer_decay < 1 and learning_rate is None:
        raise ArgumentError("`layer_decay` needs a `learning_rate` to start from.")
    towers: dict[str, dict[str, tuple[str, nn.Parameter]]] = {"vision_model": {}, "text_model": {}}
    for name, parameter in model.named_parameters():  # which gives a shared one once
        if layer_decay < 1 and (split := split_tower(name)) is not None:
            towers[split[0]][name] = split[1], parameter
    places: dict[str, tuple[int, int, str]] = {}  # order of the tower, distance from the top, title
    for order, (tower, members) in enumerate(towers.items(), start=1):
        for name, (distance, layer) in _distances(members).items():
            if distance:
                places[name] = order, distance, f"{tower} {layer}"

    full_rate = 0, 0, "all" if layer_decay == 1 else "full rate"
    groups: dict[tuple[int, int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        order, distance, title = places.get(name, full_rate)
        decayed = parameter.ndim > 1 and not _NO_DECAY.search(name)
        group = groups.setdefault((order, distance, not decayed), {})
        if not group:
            group["name"] = f"{title}, {'decayed' if decayed else 'not decayed'}"
            group["params"] = []
            group["weight_decay"] = weight_decay if decayed else 0.0
            if learning_rate is not None:
                group["lr"] = learning_rate * layer_decay**distance
        group["params"].append(parameter)
    if not groups:
        raise ArgumentError("No parameter is trainable: `freeze` covers the whole model. Leave something out of it.")
    return [groups[key] for key in sorted(groups)]


def _distances(members: dict[str, tuple[str, nn.Parameter]]) -> dict[str, tuple[int, str]]:
    """For each parameter of one tower its distance from the top, and what to call its layer.

    Args:
        members: full name -> (name inside the tower, parameter), in the order of registration.
    """
    numbers = {name: found for name, (inside, _) in members.items() if (found := _LAYER.search(inside))}
    order = {name: position for position, name in enumerate(members)}
    last = max((order[name] for name in numbers), default=len(order))
    blocks: dict[int, list[tuple[int, int]]] = {}  # stage -> (block, where it is registered first)
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
            else:  # merges patches: timm registers that before a stage's blocks, transformers behind them
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
    """Makes the parameters that a pattern fits untrainable.

    Args:
        model: for one with adapters, what is inside: `peft_model.get_base_model()`.
        patterns: names of parameters or of modules (`text_model`, `vision_model.backbone.embeddings`), in which `*`,
            `?` and `[...]` have their meaning for file names (`*.experts.2`, `*.experts.[0-2].*`). A name must be
            whole between its dots: `layer.1` is not `layer.10`.

    Raises:
        ValueError: for a pattern that fits nothing; names the parts of the model and the nearest names.
    """
    # Under all of its names, if it is shared.
    parameters = list(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        whole = pattern.rstrip(".")
        fitting = [
            parameter for name, parameter in parameters if fnmatchcase(name, whole) or fnmatchcase(name, f"{whole}.*")
        ]
        if not fitting:
            names = [name for name, _ in parameters]
            top = sorted({name.split(".")[0] for name in names})
            near = nearest_names(whole, names)
            hint = f" Nearest: {', '.join(near)}." if near else ""
            raise ArgumentError(
                f'`freeze`: no parameter begins with "{pattern}", or fits it as a pattern. '
                f"The model has {', '.join(top)}.{hint}"
            )
        for parameter in fitting:
            parameter.requires_grad_(False)


def nearest_names(pattern: str, names: Iterable[str]) -> list[str]:
    """Up to three names, of these or of the modules above them, that look most like a pattern that fits none."""
    paths = {path for name in names for path in accumulate(name.split("."), "{}.{}".format)}
    if pattern.startswith("*"):  # then what is meant is an end, and ends are compared
        pattern = pattern.strip("*.")
        length = pattern.count(".") + 1
        paths = {".".join(path.split(".")[-length:]) for path in paths}
    return get_close_matches(pattern, sorted(paths), n=3)


def train_mode(model: nn.Module) -> None:
    """As `model.train()`, but what is frozen as a whole stays in evaluation mode.

    A frozen BatchNorm that goes on adapting its statistics is not frozen, and dropout in a frozen part adds noise that
    nothing learns to bear. To be called again after everything that calls `model.train()`.

    Adapters change the second half of this. In a tower that has some (PEFT's LoRA layers), dropout and stochastic
    depth go on as if the tower were trained, since its output is: they are what regularises it, and half of them
    (those in modules that happen to hold no adapter) would be another network than the one that was pretrained. Its
    frozen BatchNorms stay as they are. The dropout of an adapter itself is always active.
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
        tower = split_tower(f"{name}.weight")  # with an end: the tower's own module belongs to it too
        inside_adapted = tower is not None and tower[0] in adapted
        normalises = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if trainable and not any(trainable) and (normalises or not inside_adapted):
            module.eval()
            return
        for child, part in module.named_children():
            visit(part, f"{name}.{child}" if name else child)

    visit(model, "")
