"""LoRA through PEFT: small adapters next to a frozen base model."""

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medmoe_hf.common.files import atomic_dir, check_output
from medmoe_hf.data.checkpoint_names import find_checkpoint
from medmoe_hf.errors import ArgumentError, MissingPackageError
from medmoe_hf.model import MedMoEForImageClassification, MedMoEModel, MedMoEProcessor
from medmoe_hf.training.config import LoraSection
from medmoe_hf.training.optimizer import nearest_names, split_tower

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS = "adapter_model.safetensors"
_MODELS = {kind.__name__: kind for kind in (MedMoEModel, MedMoEForImageClassification)}
# Trained in full by default, in models that have them: they adapt to new data even if the towers need not.
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
    """Adds adapters to a model, in place; afterwards only these and the modules in `section.train` are trainable.

    At first the adapters change nothing. `get_base_model()` of the result is the model inside;
    `merge_and_unload(safe_merge=True)` returns the model with the updates added to its weights.

    Args:
        model: A `MedMoEModel`, `MedMoEForImageClassification` or tower that was loaded from a folder or the Hub,
            since an adapter records the location of its base. With `section.merge` it may be a new model.
        section: Rank, targets and other settings.

    Returns:
        The model, wrapped by PEFT.

    Raises:
        ImportError: If PEFT is not installed.
        ValueError: If a name matches no module, or if the model was never saved.

    Example:
        ```python
        from medmoe_hf import MedMoEModel
        from medmoe_hf.training.adapters import add_lora
        from medmoe_hf.training.config import LoraSection

        model = add_lora(MedMoEModel.from_pretrained("runs/first"), LoraSection(rank=4))
        model.print_trainable_parameters()
        ```
    """
    peft = _peft()
    base: str | None = getattr(model, "name_or_path", None) or None
    if base is None and not section.merge:
        raise ArgumentError(
            "An adapter needs a base that others can load, but this model is new. Set `model.from_pretrained` to a "
            "saved model, or `lora.merge: true` to save a complete model."
        )
    if base is not None and Path(base).is_dir():
        base = str(Path(base).resolve())  # the adapter may be used from another working directory
    train = _trained(model, section.train)
    parameters = dict(model.named_parameters())
    whole = [name for name in train if name not in parameters]
    targets = [name for name in _targets(model, section.targets) if not _inside(name, whole)]
    if not targets:
        raise ArgumentError(
            "`lora.targets`: all of them are inside modules of `lora.train`, which are trained in full."
        )
    wrapped: PeftModel = peft.get_peft_model(
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
    """Saves an adapter for `PeftModel.from_pretrained(base, folder)` as safetensors, and the processor.

    PEFT saves updates and entire modules, but no single parameters. So the learned scale is added under its full name,
    which PEFT's loading fills in. After loading, it belongs to the base: `disable_adapter()` does not reset it.

    Args:
        model: The result of `add_lora`, without further wrappers.
        processor: Saved too, unless it is `None`.
        folder: Created if it does not exist.
        state_dict: The model's state dict if it was gathered from several processes; `None` to take it from the model.
    """
    folder = Path(folder)
    # Embeddings are saved if the tokenizer has grown. `add_lora` never resizes them, and asking the Hub takes time.
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
    """Merges an adapter into its base and saves the result as a model folder.

    The folder needs neither the base nor PEFT.

    Args:
        adapter: Folder of an adapter, as `medmoe train` saves it.
        out: Folder to create; it gets the processor too.
        base: Folder or Hub id of the base; `None` for the one that the adapter names.
        force: Whether to replace `out` if it exists.

    Raises:
        ImportError: If PEFT is not installed.
        FileExistsError: If `out` exists and `force` is `False`.
        ValueError: If `adapter` is no adapter, or if its base cannot be loaded or has other shapes.

    Example:
        ```python
        from medmoe_hf.training.adapters import merge_adapter

        merge_adapter("runs/lora", "models/merged")
        ```
    """
    peft = _peft()
    adapter = Path(adapter)
    check_output(out, force, "config.json", [adapter])
    missing = [name for name in ("adapter_config.json", WEIGHTS) if not (adapter / name).is_file()]
    if missing:
        raise ArgumentError(f"{adapter} is not the folder of an adapter: it lacks {' and '.join(missing)}.")
    config = peft.PeftConfig.from_pretrained(str(adapter))
    base = base or config.base_model_name_or_path
    if base is None:
        raise ArgumentError(f"{adapter} does not name its base; specify it with `--base`.")
    kind = _MODELS.get((config.auto_mapping or {}).get("base_model_class"), MedMoEModel)
    try:
        base = find_checkpoint(base)
        model = kind.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"The base {base} of {adapter} cannot be loaded ({error}); specify its location with `--base`."
        ) from error
    try:
        merged = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    except (RuntimeError, KeyError) as error:
        raise ArgumentError(f"{adapter} does not match {base}; is that its base? {error}") from error
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


def _matches(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}") or fnmatchcase(name, wanted)


def _inside(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _chosen(key: str, wanted: list[str], names: list[str]) -> list[str]:
    """The names that match one of `wanted`, in the order of `names`.

    Raises:
        ValueError: If one of `wanted` matches none.
    """
    for item in wanted:
        if not any(_matches(name, item) for name in names):
            near = nearest_names(item if "." in item else f"*{item}", names)
            hint = f" Nearest: {', '.join(near)}." if near else ""
            raise ArgumentError(f'`lora.{key}`: nothing in the model matches "{item}".{hint}')
    return [name for name in names if any(_matches(name, item) for item in wanted)]


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
        # Swin v2 computes its position table with a small MLP inside the attention.
        lambda name, module: isinstance(module, nn.Linear) and bool(_ATTENTION.search(name)) and "mlp" not in name,
        lambda name, module: isinstance(module, nn.Linear) or getattr(module, "kernel_size", None) == (1, 1),
    )
    found = []
    for tower, members in towers.items():
        for matches in kinds:
            adapted = [name for name, module in members.items() if matches(name, module)]
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
    """Names of the modules, and of the parameters outside them, that are trained in full."""
    modules = {name: module for name, module in model.named_modules() if name}
    names = [*modules, *(name for name, _ in model.named_parameters())]
    if wanted is None:
        found = [name for name in names if name.removeprefix("vision_model.") in _TRAINED]
    else:
        found = _chosen("train", wanted, names)
    kept: list[str] = []
    # Outer modules come before the modules inside them.
    for name in found:
        # PEFT refuses lists of modules, since only their members are called.
        parts = (
            [f"{name}.{part}" for part, _ in modules[name].named_children()] if _is_list(modules.get(name)) else [name]
        )
        kept += [part for part in parts if not _inside(part, kept)]
    return kept


def _is_list(module: nn.Module | None) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict))
