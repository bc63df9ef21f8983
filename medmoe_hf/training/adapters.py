"""LoRA through PEFT: small adapters beside a base model that stays as it is."""

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medmoe_hf.common.files import atomic_dir
from medmoe_hf.data.checkpoint_names import refuse_missing_folder
from medmoe_hf.errors import ArgumentError, MissingPackageError, PathExistsError
from medmoe_hf.model import MedMoEForImageClassification, MedMoEModel, MedMoEProcessor
from medmoe_hf.training.config import LoraSection
from medmoe_hf.training.optimizer import nearest_names, split_tower

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS = "adapter_model.safetensors"
_MODELS = {kind.__name__: kind for kind in (MedMoEModel, MedMoEForImageClassification)}
# What fits this data even where the towers already do, in whichever of the models that have it.
_TRAINED = (
    "router",
    "report_router",
    "visual_projection",
    "local_projection",
    "text_projection",
    "word_projection",
    "classifier",
    "logit_scale",
)
_ATTENTION = re.compile(r"(?:^|\.)(?:self_?)?(?:attn|attentions?)\.")


def add_lora(model: nn.Module, section: LoraSection) -> "PeftModel":
    """Wraps a model with adapters, in place; only these and what `section.train` names are trainable then.

    The adapters begin as no change. What is inside is `get_base_model()`; `merge_and_unload(safe_merge=True)` gives
    the model back with the updates added to its weights.

    Args:
        model: `MedMoEModel`, `MedMoEForImageClassification` or a tower, loaded from a folder or the Hub: an adapter is
            worth nothing without its base, and records where that is. A new model will do with `section.merge`.

    Raises:
        ImportError: without PEFT.
        ValueError: for a name that fits no module, or a model that was never saved.
    """
    peft = _peft()
    base: str | None = getattr(model, "name_or_path", None) or None
    if base is None and not section.merge:
        raise ArgumentError(
            "An adapter needs a base that others can load, and this model is new. Set `model.from_pretrained` to a "
            "saved model, or `lora.merge: true` to save a whole one."
        )
    if base is not None and Path(base).is_dir():
        base = str(Path(base).resolve())  # the adapter may be used from another working directory
    train = _trained(model, section.train)
    parameters = dict(model.named_parameters())
    whole = [name for name in train if name not in parameters]
    targets = [name for name in _targets(model, section.targets) if not _inside(name, whole)]
    if not targets:
        raise ArgumentError(
            "`lora.targets`: all of them lie in what `lora.train` names; what is trained needs no update."
        )
    wrapped = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=section.rank,
            lora_alpha=section.alpha,
            lora_dropout=section.dropout,
            target_modules=targets,
            modules_to_save=whole or None,
        ),
    )
    wrapped.peft_config["default"].base_model_name_or_path = base
    for name in train:
        if name in parameters:
            parameters[name].requires_grad_(True)
    return wrapped


def save_adapter(
    model: "PeftModel", processor: Any, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Writes an adapter that `PeftModel.from_pretrained(base, folder)` loads, and the processor, as safetensors.

    PEFT saves updates and whole modules. It knows no single parameters, so the learned scale is added under its full
    name, which PEFT's loading fills in. It is then a part of the base that was loaded: `disable_adapter()` leaves it.

    Args:
        model: from `add_lora`, not wrapped any further.
        processor: saved too, unless None.
        folder: made if it is not there.
        state_dict: the model's, where it has been gathered from several processes.
    """
    folder = Path(folder)
    # Embeddings of a tokenizer that has grown: `add_lora` never resizes them, and asking the Hub takes time.
    model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state_dict)
    state = model.state_dict() if state_dict is None else state_dict
    single = {
        name: state[name].detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not re.search(r"\.lora_|\.modules_to_save\.", name)
    }
    if single:
        save_file(load_file(folder / WEIGHTS) | single, folder / WEIGHTS, metadata={"format": "pt"})
    if processor is not None:
        processor.save_pretrained(folder)


def merge_adapter(adapter: str | Path, out: str | Path, base: str | Path | None = None, force: bool = False) -> None:
    """Adds an adapter to its base, and writes a model folder that needs neither.

    Args:
        adapter: a folder of `save_adapter`.
        out: the folder to make, processor included.
        base: folder or Hub id of the base; None: where the adapter says.
        force: replace `out`.

    Raises:
        ImportError: without PEFT.
        FileExistsError: if `out` exists and `force` is False.
        ValueError: if `adapter` is no such folder, or its base cannot be loaded or has other shapes.
    """
    peft = _peft()
    adapter = Path(adapter)
    if Path(out).exists() and not force:
        raise PathExistsError(f"{out} exists already; choose another folder or remove it.")
    missing = [name for name in ("adapter_config.json", WEIGHTS) if not (adapter / name).is_file()]
    if missing:
        raise ArgumentError(f"{adapter} is no folder of an adapter: it lacks {' and '.join(missing)}.")
    config = peft.PeftConfig.from_pretrained(str(adapter))
    base = base or config.base_model_name_or_path
    if base is None:
        raise ArgumentError(f"{adapter} does not say what it belongs to; name its base.")
    kind = _MODELS.get((config.auto_mapping or {}).get("base_model_class"), MedMoEModel)
    try:
        refuse_missing_folder(base)
        model = kind.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"The base {base} of {adapter} cannot be loaded ({error}); say where it is now."
        ) from error
    try:
        merged = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    except (RuntimeError, KeyError) as error:
        raise ArgumentError(f"{adapter} does not fit {base}; is that its base? {error}") from error
    processor = MedMoEProcessor.from_pretrained(adapter if (adapter / "processor_config.json").is_file() else base)
    with atomic_dir(out, force) as partial:
        merged.save_pretrained(partial)
        processor.save_pretrained(partial)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingPackageError('LoRA needs the peft package: pip install "medmoe_hf[lora]" (or peft).') from error
    return peft


def _fits(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}") or fnmatchcase(name, wanted)


def _inside(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _chosen(key: str, wanted: list[str], names: list[str]) -> list[str]:
    """The names that one of the wanted fits, in their own order.

    Raises:
        ValueError: for one that fits none.
    """
    for item in wanted:
        if not any(_fits(name, item) for name in names):
            near = nearest_names(item if "." in item else f"*{item}", names)
            hint = f" Nearest: {', '.join(near)}." if near else ""
            raise ArgumentError(f'`lora.{key}`: nothing in the model that could be meant by "{item}".{hint}')
    return [name for name in names if any(_fits(name, item) for item in wanted)]


def _targets(model: nn.Module, wanted: list[str] | None) -> list[str]:
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding))
    }
    if wanted is not None:
        return _chosen("targets", wanted, list(layers))
    towers: dict[str, dict[str, nn.Module]] = {}
    for name, module in layers.items():
        if (split := split_tower(name)) is not None:
            towers.setdefault(split[0], {})[name] = module
    kinds: tuple[Callable[[str, nn.Module], bool], ...] = (
        # Swin v2 makes its table of positions by a small network inside the attention.
        lambda name, module: isinstance(module, nn.Linear) and bool(_ATTENTION.search(name)) and "mlp" not in name,
        lambda name, module: isinstance(module, nn.Linear) or getattr(module, "kernel_size", None) == (1, 1),
    )
    found = []
    for tower, members in towers.items():
        for fits in kinds:
            adapted = [name for name, module in members.items() if fits(name, module)]
            if adapted:
                break
        else:
            raise ArgumentError(
                f"{tower} has neither attention nor linear layers nor 1x1 convolutions to adapt: name some of its "
                f"layers by `lora.targets`, such as {', '.join(list(members)[:3])}."
            )
        found += adapted
    return found


def _trained(model: nn.Module, wanted: list[str] | None) -> list[str]:
    """Names of the modules, and of the parameters outside them, that are trained whole."""
    modules = {name: module for name, module in model.named_modules() if name}
    names = [*modules, *(name for name, _ in model.named_parameters())]
    if wanted is None:
        found = [name for name in names if name.removeprefix("vision_model.") in _TRAINED]
    else:
        found = _chosen("train", wanted, names)
    kept: list[str] = []
    # Outer modules come before what is in them.
    for name in found:
        # PEFT refuses lists of modules, whose members are what is called.
        parts = (
            [f"{name}.{part}" for part, _ in modules[name].named_children()] if _is_list(modules.get(name)) else [name]
        )
        kept += [part for part in parts if not _inside(part, kept)]
    return kept


def _is_list(module: nn.Module | None) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict))
