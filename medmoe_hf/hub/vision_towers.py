"""Image towers to start from: a Swin of any origin, or any hierarchical model of timm."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, SwinModel

from medmoe_hf.data.checkpoint_names import refuse_missing_folder
from medmoe_hf.errors import ConvertError
from medmoe_hf.hub.checkpoint_files import read_state_dict
from medmoe_hf.hub.weight_mapping import listed, rename_tensors, swin_fields, swin_from_timm, swin_name, tower_rule
from medmoe_hf.model import MedMoEVisionConfig
from medmoe_hf.model.modeling_medmoe import MedMoETimmBackbone


@dataclass
class VisionTower:
    """An image tower to start from.

    Attributes:
        fields: Fields of `vision_config`.
        tensors: New name inside the backbone -> (old name, tensor).
        dropped: Old name -> why the tensor was dropped.
        image_statistics: `image_mean` and `image_std` of its images, if known.
        notes: Messages for the report.
    """

    fields: dict[str, Any]
    tensors: dict[str, tuple[str, Tensor]]
    dropped: dict[str, str]
    image_statistics: dict[str, Any]
    notes: list[str]


_IMAGENET_NOTE = "images are normalised by ImageNet's statistics: the source does not specify others"
_CLASSIFIER = "a classifier"
_COUNTER = "num_batches_tracked"
_KINDS = frozenset({"weight", "bias", "running_mean", "running_var", _COUNTER})
"""Last parts of names that tell tensors of equal shapes apart."""


def open_vision(source: str) -> VisionTower:
    """Loads an image tower.

    Args:
        source: `timm/<name>` with the weights that timm downloads, `timm/<name>@<file>` with those of a local file, a
            checkpoint file of a Swin, or a folder or Hub id of transformers' Swin.

    Raises:
        ConvertError: If it cannot be loaded, is of another kind, or if the tensors of a file do not match.
    """
    if source.startswith("timm/"):
        return _from_timm(source)
    if Path(source).is_file():
        tensors, dropped = _swin_from_state(read_state_dict(source), source)
        return VisionTower(_swin_tower(swin_fields(tensors)), tensors, dropped, {}, [_IMAGENET_NOTE])
    return _from_transformers(source)


def _swin_tower(swin_config: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    # The backbone of the preset may be another one.
    return {"backbone": "swin", "swin_config": dict(swin_config), **fields}


def _swin_from_state(state: Mapping[str, Tensor], source: str) -> tuple[dict[str, tuple[str, Tensor]], dict[str, str]]:
    """Renames the tensors of a Swin of timm, Microsoft or transformers."""
    state = {re.sub(r"^(module|model)\.", "", name): tensor for name, tensor in state.items()}
    if "patch_embed.proj.weight" in state:
        return swin_from_timm(state)
    marker = "embeddings.patch_embeddings.projection.weight"
    prefix = next((name.removesuffix(marker) for name in state if name.endswith(marker)), None)
    if prefix is None or not any("relative_position_bias_table" in name for name in state):
        raise ConvertError(
            f"{source} holds no Swin, neither with timm's names (patch_embed.proj.weight, ...) nor with "
            f"transformers' ({marker}, ...). Its tensors are {listed(state)}. For weights of another network, add its "
            "name in timm: --vision timm/NAME@FILE."
        )
    tensors, dropped = rename_tensors(state, [(prefix, tower_rule("", swin_name))])
    for name in [name for name in tensors if not name.startswith(("embeddings.", "encoder.", "layernorm."))]:
        dropped[tensors.pop(name)[0]] = "not part of the tower"
    return tensors, dropped


def _from_timm(source: str) -> VisionTower:
    name, at, file = source.removeprefix("timm/").partition("@")
    if at:
        state = read_state_dict(file)
    try:
        network = timm.create_model(name, pretrained=not at)
    except Exception as error:  # timm passes on all errors of its Hub client
        hint = "" if at else ", and whether the Hub can be reached; a local file is given as timm/NAME@FILE"
        raise ConvertError(f'Cannot load "timm/{name}" ({error}). Check the name{hint}.') from error
    settings, own = network.pretrained_cfg, network.state_dict()
    statistics = {"image_mean": list(settings["mean"]), "image_std": list(settings["std"])}
    notes = [f"images are normalised as timm/{name} expects"]
    heads = settings.get("classifier") or ()
    classifiers = (heads,) if isinstance(heads, str) else tuple(heads)
    side = settings["input_size"][-1]
    if isinstance(network, timm.models.swin_transformer.SwinTransformer):
        needed = [key for key in own if not _is_classifier(key, classifiers)]
        parts = {key: key for key in needed}
        fields: dict[str, Any] = {"image_size": side}
    else:
        fields = {"backbone": f"timm/{name}", "image_size": side}
        parts = _pyramid_parts(fields, own)
        needed = list(parts.values())
    if at:
        found, way = match_tensors(state, own, needed, classifiers, file, f"timm's {name}")
        notes.append(f"weights of {Path(file).name}, matched by {way}")
    else:
        found = {key: (key, tensor) for key, tensor in own.items()}
    used = {key: found[key] for key in needed if key in found}
    if isinstance(network, timm.models.swin_transformer.SwinTransformer):
        renamed, dropped = swin_from_timm({key: tensor for key, (_, tensor) in used.items()})
        tensors = {new: (found[old][0], tensor) for new, (old, tensor) in renamed.items()}
        dropped = {found[old][0]: reason for old, reason in dropped.items()}
        fields = _swin_tower(swin_fields(tensors), **fields)
    else:
        tensors = {f"features.{part}": used[key] for part, key in parts.items() if key in used}
        dropped = {}
    for key, (old, _) in found.items():
        if key not in used:
            dropped[old] = _CLASSIFIER if _is_classifier(key, classifiers) else "not part of the pyramid"
    return VisionTower(fields, tensors, dropped, statistics, notes)


def _pyramid_parts(fields: Mapping[str, Any], own: Mapping[str, Tensor]) -> dict[str, str]:
    """Name in timm's feature extractor -> name in its complete network, of which the extractor is a part."""
    try:
        features = MedMoETimmBackbone(MedMoEVisionConfig(**fields)).features
    except ValueError as error:
        raise ConvertError(str(error)) from error
    # An extractor joins the names of nested modules by underscores, or puts the network below `model`.
    flat = {key.replace(".", "_"): key for key in own}
    parts = {}
    for part in features.state_dict():
        key = flat.get(part.replace(".", "_")) or flat.get(part.replace(".", "_").removeprefix("model_"))
        if key is None:
            raise ConvertError(f"{fields['backbone']}: its feature extractor has {part}, which the network lacks.")
        parts[part] = key
    return parts


def _is_classifier(name: str, classifiers: Sequence[str]) -> bool:
    return any(name.startswith(f"{classifier}.") for classifier in classifiers)


def match_tensors(
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    needed: Sequence[str],
    classifiers: Sequence[str],
    file: str,
    network: str,
) -> tuple[dict[str, tuple[str, Tensor]], str]:
    """Finds the tensors of a network in a file: by name, or by order if most names differ.

    By order, the file must have as many tensors as the network (with or without its classifier), and each must have
    the same shape and, where both names tell it, the same kind (weight, bias, running mean, ...) as the network's.

    Args:
        state: The file's tensors, in its order.
        own: The network's tensors, in its order.
        needed: Names in the network of the tensors that are used.
        classifiers: Names in the network of its classifiers, whose number of classes may differ.
        file: For messages.
        network: For messages.

    Returns:
        Name in the network -> (name in the file, tensor); and `"name"` or `"order"`. Counters of batches may be
        absent, as in files of early versions of PyTorch. Tensors of the file that the network lacks have their own
        name.

    Raises:
        ConvertError: If the file lacks a tensor, or one differs; the message names the first.
    """
    prefix = next((one for one in ("module.", "model.") if all(name.startswith(one) for name in state)), "")
    named = {name.removeprefix(prefix): (name, tensor) for name, tensor in state.items()}
    required = [name for name in needed if not name.endswith(_COUNTER)]
    if 2 * sum(name in named for name in required) > len(required):
        for name in required:
            if name not in named:
                raise ConvertError(f"{file} lacks {prefix}{name}, which {network} has.")
            _check_shape(named[name], name, own[name], file, network)
        return named, "name"
    counted = any(name.endswith(_COUNTER) for name in state)
    theirs = list(state.items())
    ours = [name for name in own if counted or not name.endswith(_COUNTER)]
    without = [name for name in ours if not _is_classifier(name, classifiers)]
    order = without if len(without) == len(theirs) else ours
    found = {}
    for number, ((old, tensor), name) in enumerate(zip(theirs, order, strict=False), start=1):
        if not _is_classifier(name, classifiers):
            kinds = {old.rpartition(".")[2], name.rpartition(".")[2]}
            if tensor.shape != own[name].shape or (kinds <= _KINDS and len(kinds) > 1):
                raise ConvertError(
                    f"{file} does not fit {network}. Most names differ, and in order tensor {number} is the first "
                    f"that differs: {old} {tuple(tensor.shape)} in the file, {name} {tuple(own[name].shape)} in the "
                    "network."
                )
        found[name] = (old, tensor)
    if len(theirs) != len(order):
        names = [old for old, _ in theirs]
        where, first = ("file", names[len(order)]) if len(names) > len(order) else ("network", order[len(names)])
        raise ConvertError(
            f"{file} does not fit {network}. Most names differ, and it has {len(theirs)} tensors, the network "
            f"{len(order)}: the first without a counterpart is {first} of the {where}."
        )
    return found, "order"


def _check_shape(found: tuple[str, Tensor], name: str, own: Tensor, file: str, network: str) -> None:
    old, tensor = found
    if tensor.shape != own.shape:
        raise ConvertError(
            f"{file} does not fit {network}: {old} has shape {tuple(tensor.shape)}, but {tuple(own.shape)} is "
            "expected."
        )


def _from_transformers(source: str) -> VisionTower:
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
    swin_config = {
        **swin_fields(tensors),
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "drop_path_rate": config.drop_path_rate,
    }
    side = config.image_size if isinstance(config.image_size, int) else max(config.image_size)
    fields = _swin_tower(swin_config, image_size=side)
    try:
        images = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError):
        return VisionTower(fields, tensors, dropped, {}, [_IMAGENET_NOTE])
    statistics = {"image_mean": list(images.image_mean), "image_std": list(images.image_std)}
    return VisionTower(fields, tensors, dropped, statistics, [f"images are normalised as {source} expects"])
