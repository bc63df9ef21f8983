"""Variants of a training recipe, each trained by `medmoe train` in a process of its own."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from medmoe_hf.common.files import atomic_write
from medmoe_hf.errors import ConfigError
from medmoe_hf.training import TrainConfig

Overrides = Mapping[str, Any]


def merged(base: Mapping[str, Any], changes: Overrides) -> dict[str, Any]:
    """Returns `base` with nested changes."""
    result = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if nested else value
    return result


def without_sources(recipe: Mapping[str, Any], excluded: Sequence[str]) -> dict[str, Any]:
    """Returns a recipe whose training and held-out pairs leave out rows by their column `source`.

    Args:
        recipe: A training configuration as plain values.
        excluded: Cells of the column.

    Raises:
        ConfigError: If a source of pairs is no table, whose rows can be selected.
    """
    if not excluded:
        return dict(recipe)
    data = dict(recipe["data"])
    for part in ("train", "evaluation"):
        if data.get(part) is None:
            continue
        listed = data[part] if isinstance(data[part], list) else [data[part]]
        for source in listed:
            if source["kind"] not in ("csv", "jsonl"):
                raise ConfigError(f"Rows of a {source['kind']} source have no column `source` to leave some out by.")
        data[part] = [_without(source, excluded) for source in listed]
    return {**recipe, "data": data}


def _without(source: Mapping[str, Any], excluded: Sequence[str]) -> dict[str, Any]:
    refused = dict(source.get("where_not") or {})
    return {**source, "where_not": {**refused, "source": [*(refused.get("source") or ()), *excluded]}}


def read_recipe(path: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Reads a training YAML with all defaults, as plain values.

    Args:
        path: The file.
        settings: Overrides as `key=value`, as of `medmoe train --set`.
    """
    recipe: dict[str, Any] = TrainConfig.from_yaml(path, settings).model_dump(mode="json")
    return recipe


def train(recipe: Mapping[str, Any], folder: Path) -> Path:
    """Trains a recipe unless its folder already holds the trained model.

    Args:
        recipe: A training configuration; its `output_dir` is replaced.
        folder: Folder of the trained model. The configuration is written beside it.

    Returns:
        The folder.

    Raises:
        subprocess.CalledProcessError: If the training fails.
    """
    if (folder / "training.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f"{folder.name}.yaml")
    with atomic_write(path) as partial:
        partial.write_text(yaml.safe_dump({**recipe, "output_dir": str(folder)}, sort_keys=False), encoding="utf-8")
    command("train", str(path), "--resume", "auto")
    return folder


def command(*arguments: str) -> None:
    """Runs `medmoe` with arguments.

    Raises:
        subprocess.CalledProcessError: If it fails.
    """
    subprocess.run([sys.executable, "-m", "medmoe_hf", *arguments], check=True)
