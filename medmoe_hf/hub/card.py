"""The model card: architecture, training and evaluation, from known facts only.

Paths never appear in a card, only their last part; unknown facts are "not stated".
"""

import importlib.metadata
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import nn

from medmoe_hf.common.files import atomic_write
from medmoe_hf.errors import CardError
from medmoe_hf.hub.card_tasks import TASK_HEADER, rejector_rows, task_rows
from medmoe_hf.model import MedMoEConfig, MedMoEForImageClassification, MedMoEModel
from medmoe_hf.model.modalities_medmoe import MODALITY_ALIASES
from medmoe_hf.model.presets_medmoe import PRESETS

if TYPE_CHECKING:
    from medmoe_hf.evaluation.intervals import Interval
    from medmoe_hf.evaluation.results import Result

NOT_STATED = "not stated"
HAND_WRITTEN = "<!-- Written by hand from here on; medmoe card keeps what follows this line. -->"

_MODELS: dict[str, tuple[Any, str, str]] = {
    "MedMoEModel": (MedMoEModel, "AutoModel", "zero-shot-image-classification"),
    "MedMoEForImageClassification": (
        MedMoEForImageClassification,
        "AutoModelForImageClassification",
        "image-classification",
    ),
}
_MEASURED = ("protocol", "dataset", "N", "variant", "metric", "value", "95 % interval")
# Fields of a configuration that are not compared between models.
_NO_DIFFERENCE = {
    "architectures",
    "auto_map",
    "custom_pipelines",
    "dtype",
    "id2label",
    "label2id",
    "model_type",
    "transformers_version",
}
_ABSOLUTE = re.compile(r"(?<![\w.:/\\])(?:~|[A-Za-z]:)?[/\\](?=[^\s/\\])(?:[^\s/\\]+[/\\])*")

_GLOBAL_FEATURES = {
    "backbone": "of the backbone",
    "expert": "of the expert",
    "both": "of the backbone and the expert, concatenated",
}


def build_card(
    folder: str | Path,
    *,
    training: str | Path | None = None,
    results: str | Path | None = None,
    repo: str | None = None,
    base_model: str | Sequence[str] | None = None,
    license: str | None = None,
    datasets: Sequence[str] | None = None,
) -> ModelCard:
    """Builds the card of a model folder from the template `model_card.md`.

    Args:
        folder: Folder of a dual encoder or an image classifier, as `save_pretrained` writes it.
        training: The run's `training.json`, or its training configuration as YAML (the planned training); `None` for
            the `training.json` in the folder, if there is one.
        results: `results.json` of `medmoe evaluate`; `None` for a card without results.
        repo: Hub id of the model, for the code examples; `None` for examples that load the current folder.
        base_model: Hub ids of the models that this one is based on.
        license: License of the weights as a Hub identifier, for example `apache-2.0`.
        datasets: Hub ids of the training data; `None` for those of the configuration's `hub` sources.

    Returns:
        The card; `write_card` writes it.

    Raises:
        CardError: For a folder of another kind, a file that cannot be read, or an invalid Hub id.
        ConfigError: For a YAML that is no training configuration.

    Example:
        ```python
        from medmoe_hf.hub.card import build_card, write_card

        card = build_card("runs/first", repo="you/medmoe", license="apache-2.0")
        write_card("runs/first", card)
        ```
    """
    folder = Path(folder)
    config, (model_class, auto_class, task) = _read_config(folder)
    if repo is not None:
        _check_repo(repo)
    base_models = [base_model] if isinstance(base_model, str) else list(base_model or ())
    config_of_run, record = _read_training(folder, training)
    sources = _list(config_of_run["data"]["train"]) if config_of_run else []
    if datasets is None:
        datasets = [source["path"] for source in sources if source["kind"] == "hub" and _is_hub_id(source["path"])]
    name = repo.split("/")[-1] if repo else folder.resolve().name
    found = [] if results is None else _read_results(Path(results), {name, folder.resolve().name})
    experts = list(config.vision_config.modalities.values())
    synthetic = bool(sources) and all(source["kind"] == "phantom" for source in sources)
    differences, preset = _nearest_preset(config)
    data = ModelCardData(
        model_name=name,
        license=license,
        library_name="transformers",
        pipeline_tag=task,
        tags=[
            *("medmoe", "medical-imaging", "mixture-of-experts", "image-text-contrastive", "arxiv:2506.08356"),
            *(() if task == "image-classification" else ("sentence-transformers",)),
        ],
        datasets=list(datasets) or None,
        base_model=base_models or None,
        eval_results=[line for result in found for line in result.to_eval_results()] or None,
    )
    if data.eval_results is None:
        # Without results, the Hub does not know this key.
        data.model_name = None
    return ModelCard.from_template(
        data,
        template_str=_template(),
        title=_text(name),
        summary=_summary(experts, task, synthetic),
        base_models=", ".join(_text(one) for one in base_models),
        requirements=_requirements(config),
        repo_id=repo,
        auto_class=auto_class,
        classifies=task == "image-classification",
        **_architecture(config, model_class, folder),
        preset=preset,
        differences_table=markdown_table(("key", preset, "this model"), differences),
        tasks_table=markdown_table(TASK_HEADER, task_rows(folder)),
        rejector_table=markdown_table(("what", "value"), rejector_rows(folder)),
        routing_table=markdown_table(_MEASURED, _measured(found, routing=True)),
        training_table=_training_table(config_of_run, record) if config_of_run else "",
        sources_table=_sources_table(sources),
        synthetic=synthetic,
        evaluation_table=markdown_table(_MEASURED, _measured(found, routing=False)),
        facts_table=markdown_table(("protocol", "dataset", "fact", "value"), _facts(found)),
        held_out_table=markdown_table(("step", "measure", "value"), _held_out(record)),
        hand_written_mark=HAND_WRITTEN,
    )


def write_card(folder: str | Path, card: ModelCard, force: bool = False) -> Path:
    """Writes a card as the folder's `README.md`, atomically.

    An existing card's text below the line that marks handwritten text is kept.

    Args:
        folder: Folder of the model.
        card: Of `build_card`.
        force: Whether to replace a `README.md` without that line, which this function did not write.

    Returns:
        Path of the file.

    Raises:
        CardError: If there is such a `README.md` and `force` is `False`.

    Example:
        ```python
        from medmoe_hf.hub.card import build_card, write_card

        write_card("runs/first", build_card("runs/first", license="apache-2.0"))
        ```
    """
    path = Path(folder) / "README.md"
    kept = ""
    if path.exists():
        _, mark, kept = path.read_text(encoding="utf-8").partition(HAND_WRITTEN)
        if not mark and not force:
            raise CardError(
                f"{path} was not written by `medmoe card`. Replace it with `--force`; or insert the line\n"
                f"{HAND_WRITTEN}\nabove the text to keep, and only the text above it will be replaced."
            )
    with atomic_write(path) as partial:
        partial.write_text(str(card).rstrip() + (kept.rstrip() or "") + "\n", encoding="utf-8")
    return path


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in GitHub's Markdown; an empty text without rows.

    Cells are escaped, and absolute paths in them are shortened to their last part.
    """
    if not rows:
        return ""
    lines = [list(header), ["---"] * len(header), *([_text(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(value: Any) -> str:
    """A value as one line of plain text, escaped for Markdown."""
    if value is None or value == "" or value == [] or value == {}:
        return NOT_STATED
    if isinstance(value, (list, tuple)):
        value = ", ".join(str(one) for one in value)
    text = " ".join(str(value).split())
    windows = PureWindowsPath(text)
    # The second pattern does not match folders with spaces; a value that is a single path may have them.
    text = windows.name if windows.root and windows.name else _ABSOLUTE.sub("", text)
    return re.sub(r"([\\`*|\[\]<>])", r"\\\1", text)


def _template() -> str:
    return Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")


# Inputs


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CardError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise CardError(f"{path} is no valid JSON: {error}.") from error


def _read_config(folder: Path) -> tuple[MedMoEConfig, tuple[Any, str, str]]:
    if (folder / "adapter_config.json").is_file():
        raise CardError(f"{folder} holds an adapter, not a model. Merge it first: medmoe merge {folder} OUT")
    content = _read_json(folder / "config.json")
    named = (content.get("architectures") or ["nothing"])[0]
    if named not in _MODELS:
        raise CardError(f"{folder} holds {named}; cards are written for {' and '.join(_MODELS)}.")
    return MedMoEConfig.from_pretrained(folder), _MODELS[named]


def _check_repo(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise CardError(f'`repo` must be a Hub id, as "you/medmoe", got "{repo}".') from error


def _is_hub_id(path: str) -> bool:
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return not Path(path).exists()


def _read_training(folder: Path, training: str | Path | None) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The configuration of a run, with defaults, and its record; `None` if they are unknown."""
    if training is None:
        training = folder / "training.json"
        if not training.is_file():
            return None, None
    # Imported here, as the training package takes seconds to import and is not always needed.
    from medmoe_hf.training.config import TrainConfig

    if Path(training).suffix in (".yaml", ".yml"):
        return TrainConfig.from_yaml(training).model_dump(mode="json"), None
    record = _read_json(Path(training))
    if not isinstance(record, dict) or not {"steps", "samples", "seconds", "config"} <= record.keys():
        raise CardError(f"{training} is no record of a run: expected the `training.json` that `medmoe train` wrote.")
    return TrainConfig.from_dict(record["config"], f"`config` in {training}").model_dump(mode="json"), record


def _read_results(path: Path, names: set[str]) -> list["Result"]:
    """The results of this model."""
    # Imported here, as the evaluation package takes seconds to import.
    from medmoe_hf.evaluation.results import Result

    content = _read_json(path)
    try:
        results = [Result.from_json(entry) for entry in content]
    except (KeyError, TypeError, AttributeError) as error:
        raise CardError(
            f"{path} is no list of results as `medmoe evaluate` writes it ({type(error).__name__}: {error})."
        ) from error
    called = {PureWindowsPath(result.model).name for result in results}
    own = called if len(called) == 1 else called & names
    if called and not own:
        raise CardError(
            f"{path} holds results of {', '.join(sorted(called))}, and none of these is called "
            f"{' or '.join(sorted(names))}; leave only this model's results in the file."
        )
    return [result for result in results if PureWindowsPath(result.model).name in own]


# Contents


def _summary(experts: list[str], task: str, synthetic: bool) -> str:
    does = "A medical image classifier" if task == "image-classification" else "A medical image-text model"
    drawn = ", trained on synthetic drawings for demonstration" if synthetic else ""
    return f"{does} with one expert per modality: {', '.join(_text(name) for name in experts)}{drawn}."


def _requirements(config: MedMoEConfig) -> str:
    needed = {"torch", "torchvision", "transformers"}
    if config.vision_config.backbone.startswith("timm/"):
        needed.add("timm")
    listed = importlib.metadata.requires("medmoe_hf") or []
    return " ".join(f'"{line}"' for line in listed if re.split(r"[^\w-]", line)[0] in needed)


def _architecture(config: MedMoEConfig, model_class: Any, folder: Path) -> dict[str, Any]:
    """Tables of components, sizes and experts, and the longest text in tokens."""
    with torch.device("meta"):
        model = model_class(config)
    vision, tower = config.vision_config, model.vision_model
    expert_sizes = [_count(expert) for expert in tower.experts]
    hard = vision.mixture == "hard"
    number = "1 for all" if vision.shared_expert else len(expert_sizes)
    parts = [
        ("backbone", _backbone(vision), _count(tower.backbone)),
        ("experts", f"{number}, {vision.expert_type}", sum(expert_sizes)),
        ("image router", f"MLP, hidden width {vision.router_hidden_size}", _count(tower.router)),
    ]
    if vision.pyramid_norm:
        parts.append(("norms of the pyramid", "LayerNorm", _count(tower.level_norms)))
    if model_class is MedMoEModel:
        encoder = config.text_config
        what = f"{encoder.model_type}, {encoder.num_hidden_layers} layers, width {encoder.hidden_size}"
        parts.append(("text encoder", what, _count(model.text_model)))
        if model.report_router is not None:
            parts.append(("report router", "MLP on the report", _count(model.report_router)))
        if config.projection_dim is not None:
            named = ("visual_projection", "local_projection", "text_projection", "word_projection")
            size = sum(_count(getattr(model, name)) for name in named)
            parts.append(("projections", f"to width {config.projection_dim}", size))
    else:
        parts.append(("classifier", f"{config.num_labels} classes", _count(model.classifier)))
    total = _count(model)
    rest = total - sum(size for _, _, size in parts)
    if rest:
        parts.append(("other", "temperature", rest))
    used = _count(tower) - (sum(expert_sizes) - max(expert_sizes) if hard else 0)
    parts.append(("total", "all of these", total))
    parts.append(("used for one image", f"image tower with {'one expert' if hard else 'all experts'}", used))

    max_length = _max_length(folder)
    sizes: list[tuple[str, Any]] = [
        ("image", f"{vision.image_size} x {vision.image_size} pixels (others from 64 up work)"),
        ("local map", f"{_map_side(vision)}, width {vision.local_size}"),
        ("global image embedding", _GLOBAL_FEATURES[vision.global_features]),
        ("expert of an image", "one, by the router" if hard else "all, weighted by the router"),
    ]
    if model_class is MedMoEModel:
        sizes += [
            ("router with a report", {"report": "the report's"}.get(config.router, "the image's")),
            ("shared space", f"width {config.projection_dim or config.text_config.hidden_size}"),
            ("similarity", config.similarity),
            ("text", f"{max_length} tokens" if max_length else None),
            ("vocabulary", f"{config.text_config.vocab_size:,} tokens"),
        ]
    else:
        labels = [config.id2label[index] for index in sorted(config.id2label)]
        sizes += [("classes", labels), ("seen by the classifier", config.classifier_features)]
    by_modality = expert_sizes * (vision.num_experts if vision.shared_expert else 1)
    experts = [
        [index, name, ", ".join(MODALITY_ALIASES.get(name, ())) or "none", f"{size:,}"]
        for (index, name), size in zip(sorted(vision.modalities.items()), by_modality, strict=True)
    ]
    return {
        "parts_table": markdown_table(
            ("part", "what", "parameters"), [[name, what, f"{size:,}"] for name, what, size in parts]
        ),
        "sizes_table": markdown_table(("size", "value"), sizes),
        "experts_table": markdown_table(("expert", "modality", "other names for it", "parameters"), experts),
        "max_length": max_length,
    }


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _backbone(vision: Any) -> str:
    swin = vision.swin_config
    if swin is None:
        return str(vision.backbone)
    return f"Swin, width {swin.embed_dim}, depths {', '.join(map(str, swin.depths))}, window {swin.window_size}"


def _map_side(vision: Any) -> str:
    side = vision.map_size
    if side is None and vision.swin_config is not None:
        side = vision.image_size // vision.swin_config.patch_size
    return f"{side} x {side} regions" if side else "resolution of the backbone's finest level"


def _max_length(folder: Path) -> int | None:
    """Longest text in tokens, from the tokenizer's file; transformers writes 1e30 for "no limit"."""
    path = folder / "tokenizer_config.json"
    length = _read_json(path).get("model_max_length") if path.is_file() else None
    return int(length) if length and length < 1e6 else None


def _nearest_preset(config: MedMoEConfig) -> tuple[list[list[Any]], str]:
    """The preset with the fewest different fields.

    Returns:
        Rows of key, value in the preset, and value in this model; and the name of the preset.
    """
    own = _flat(config.to_dict())
    compared = {}
    for name in PRESETS:
        preset = _flat(MedMoEConfig.from_preset(name).to_dict())
        keys = [key for key in sorted({*own, *preset}) if own.get(key) != preset.get(key)]
        compared[name] = [[key, _shown(preset.get(key)), _shown(own.get(key))] for key in keys]
    nearest = min(compared, key=lambda name: len(compared[name]))
    return compared[nearest], nearest


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if key in _NO_DIFFERENCE or key.startswith("_"):
            continue
        if isinstance(value, Mapping) and key != "modalities":
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return _shown([f"{key} {_shown(entry)}" for key, entry in value.items()])
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) if 0 < len(value) <= 20 else f"{len(value)} values"
    return "none" if value is None else str(value)


def _training_table(run: dict[str, Any], record: dict[str, Any] | None) -> str:
    model, step = run["model"], run["batch_size"] * run["gradient_accumulation_steps"]
    if model["preset"] is not None:
        origin = f"new weights of the preset {model['preset']}"
    else:
        origin = f"the checkpoint {PureWindowsPath(model['from_pretrained']).name}"
    rows = [("started from", origin)]
    if record is None:
        rows += [
            ("steps", f"{run['max_steps']} planned; the number done is {NOT_STATED}"),
            ("pairs per step", f"{step} on each process; the number of processes is {NOT_STATED}"),
        ]
    else:
        rows += [
            ("steps", f"{record['steps']} of {run['max_steps']}"),
            ("pairs seen", f"{record['samples']:,}"),
            ("pairs per step", str(record["samples"] // record["steps"]) if record["steps"] else NOT_STATED),
            ("time", f"{record['seconds'] / 3600:.2f} h"),
            ("unreadable samples", f"{sum(record.get('skipped', {}).values())} in the main process"),
        ]
    lora = run["lora"]
    rows += [
        (
            "contrasted with",
            {"micro_batch": "its micro-batch", "ranks": "all processes"}.get(run["negatives"], "the entire step"),
        ),
        ("optimizer", f"AdamW, betas {_shown(list(run['betas']))}, weight decay {run['weight_decay']}"),
        (
            "learning rate",
            f"{run['learning_rate']:g}, {run['schedule']}, {run['warmup_steps']} steps of warm-up",
        ),
        ("layer decay", run["layer_decay"]),
        ("maximal gradient norm", run["max_grad_norm"]),
        ("moving average of weights", run["ema_decay"] or "none"),
        ("precision", "float32" if run["mixed_precision"] == "no" else run["mixed_precision"]),
        ("frozen", run["freeze"] or "nothing"),
        ("low-rank adapters", "none" if lora is None else f"rank {lora['rank']}, alpha {lora['alpha']:g}, merged"),
        ("seed", str(run["seed"])),
    ]
    return markdown_table(("setting", "value"), rows)


def source_name(source: Mapping[str, Any]) -> str | None:
    """Name of a source in a card: its name or Hub id, but never its file names, which may be sensitive.

    Args:
        source: Fields of a source of `medmoe_hf.data.sources`.
    """
    if source["name"] is None and source["kind"] == "hub" and _is_hub_id(source["path"]):
        return str(source["path"])
    if source["name"] is None and source["kind"] == "phantom":
        return f"synthetic phantoms, seed {source['seed']}"
    return None if source["name"] is None else str(source["name"])


def _sources_table(sources: list[dict[str, Any]]) -> str:
    rows = []
    for source in sources:
        modality = source["modality"] or source.get("modalities")
        rows.append([source_name(source), source["kind"], modality, source["caption_rule"], f"{source['weight']:g}"])
    return markdown_table(("source", "kind", "modality", "caption rule", "weight"), rows)


def _held_out(record: dict[str, Any] | None) -> list[list[Any]]:
    """Rows of the run's last evaluation: step, metric, value."""
    if not record or not record.get("evaluations"):
        return []
    last = dict(record["evaluations"][-1])
    step = int(last.pop("step"))
    return [[step, name, value if isinstance(value, int) else f"{value:.3f}"] for name, value in last.items()]


def _measured(results: Sequence["Result"], routing: bool) -> list[list[Any]]:
    """Rows of the evaluation that concern routing, or the others."""
    return [
        [result.protocol, result.dataset, result.rows_of(interval), variant, metric, *_value_and_interval(interval)]
        for result in results
        for variant, metrics in result.by_variant().items()
        for metric, interval in metrics.items()
        if ("routing" in f"{result.protocol} {variant} {metric}") == routing
    ]


def _value_and_interval(interval: "Interval") -> tuple[str, str]:
    if math.isnan(interval.value):
        return "not defined", NOT_STATED
    if math.isnan(interval.low) or math.isnan(interval.high):
        return f"{interval.value:.3f}", NOT_STATED
    return f"{interval.value:.3f}", f"{interval.low:.3f} to {interval.high:.3f}"


def _facts(results: Sequence["Result"]) -> list[list[Any]]:
    """Rows of what a reader needs to interpret the numbers."""
    return [
        [result.protocol, result.dataset, name, _shown(value)]
        for result in results
        for name, value in result.facts.items()
        if name != "title" and value not in (None, "", [], {})
    ]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
