"""Checkpoints of a run: all that it needs to resume exactly; written atomically, read without unpickling.

A checkpoint `step-00000100` is a model folder (or an adapter's) with a folder `training_state` in it:

    state.json            step, configuration, record, schedule, scaler; per rank the stream's and random state
    optimizer.safetensors `<parameter>/<exp_avg, ...>`
    weights.safetensors   of a model with adapters: trained parameters and buffers
    ema.safetensors       the moving average
    random.safetensors    `<rank>/<generator>`
    manifest.json         size and CRC-32 of every other file in the checkpoint; written last
"""

import json
import os
import random
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medmoe_hf.errors import ResumeError

STATE = "training_state"
MANIFEST = "manifest.json"
# A run may resume with other values of these: the weights do not depend on them.
_FREE = ("output_dir", "log_every", "trackers", "checkpoints", "data.num_workers", "data.max_bad_fraction")
_NAMED = 10  # files listed in a message


def step_name(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:08d}"


def find_checkpoints(folder: Path, up_to: float = float("inf")) -> list[Path]:
    """The checkpoints of a run up to a step, oldest first; `check` tells whether one is complete."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
    return sorted((path for path in found if _step(path) <= up_to), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def check(folder: Path) -> None:
    """Compares a checkpoint with its manifest.

    Raises:
        ResumeError: If files are missing, truncated or changed; the message names each.
    """
    try:
        listed = json.loads((folder / STATE / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        raise ResumeError(
            f"{folder} has no {STATE}/{MANIFEST}, which lists its files: it is incomplete, or of an older version."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(f"{folder}: {STATE}/{MANIFEST} cannot be read ({error}).") from error
    problems = []
    for name, expected in listed.items():
        try:
            found = _facts(folder / name)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            problems.append(f"{name} is missing" if missing else f"{name} cannot be read ({error.strerror})")
            continue
        if found["size"] != expected["size"]:
            problems.append(f"{name} has {found['size']} bytes instead of {expected['size']}")
        elif found != expected:
            problems.append(f"{name} is damaged (its checksum differs)")
    problems += [
        f"{STATE}/{path.name} does not belong to it"
        for path in sorted((folder / STATE).glob("*.safetensors"))
        if f"{STATE}/{path.name}" not in listed
    ]
    if problems:
        raise ResumeError(f"{folder} is not complete: {'; '.join(problems)}.")


def newest_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of a run, and what is wrong with each newer one.

    Returns:
        The checkpoint, or `None` if there is none, and one message per newer, incomplete checkpoint.

    Raises:
        ResumeError: If there are checkpoints, but none is complete.
    """
    problems: list[str] = []
    for path in reversed(find_checkpoints(folder)):
        try:
            check(path)
        except ResumeError as error:
            problems.append(str(error))
            continue
        return path, problems
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ResumeError(
            f"{folder} holds no complete checkpoint:\n{listed}\nRemove them to start again; if the weights are "
            "complete, a new run with another `output_dir` can start from them by `model.from_pretrained`."
        )
    return None, problems


def clean(folder: Path) -> None:
    """Removes temporary folders of interrupted writes. Only for a folder that no run is writing to."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def rotate(folder: Path, keep_last: int, best: int | None, step: int) -> None:
    """Removes all but the newest checkpoints up to this step, and the best.

    Later ones were written before the run was resumed from an older checkpoint, and may be damaged: they are neither
    counted nor removed.
    """
    for path in find_checkpoints(folder, step)[:-keep_last]:
        if _step(path) != best:
            shutil.rmtree(path, ignore_errors=True)


def write_state(folder: Path, state: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
    """Writes `training_state` into a checkpoint and flushes all files to disk.

    Args:
        folder: The checkpoint, not yet renamed; files that are already in it are listed in the manifest.
        state: Content of `state.json`.
        tensors: File name without suffix -> tensors.
    """
    place = folder / STATE
    place.mkdir()
    for name, content in tensors.items():
        if content:
            save_file(
                {key: value.detach().cpu().contiguous() for key, value in content.items()},
                place / f"{name}.safetensors",
            )
    (place / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {path.relative_to(folder).as_posix(): _facts(path) for path in paths}
    manifest = place / MANIFEST
    manifest.write_text(json.dumps({"files": listed}, indent=1) + "\n", encoding="utf-8")
    for path in (*paths, manifest):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _facts(path: Path) -> dict[str, Any]:
    """A file's size and checksum."""
    # CRC-32 detects damage by disks and copies; forgery is not a concern. A cryptographic hash takes two to five
    # times as long, and checkpoints have gigabytes.
    size = checksum = 0
    with path.open("rb") as file:
        while piece := file.read(2**20):
            size += len(piece)
            checksum = zlib.crc32(piece, checksum)
    return {"size": size, "crc32": f"{checksum:08x}"}


def read_state(
    folder: Path, config: dict[str, Any], world_size: int
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Reads what `write_state` wrote, if it belongs to the same configuration. `check` the folder first.

    Args:
        folder: The checkpoint.
        config: Configuration of the run to resume, as JSON.
        world_size: Number of processes of the run to resume.

    Returns:
        The content of `state.json`, and tensors by file name without suffix.

    Raises:
        ResumeError: If it cannot be read or belongs to another configuration; the message names each different key.
    """
    place = folder / STATE
    try:
        state = json.loads((place / "state.json").read_text(encoding="utf-8"))
        tensors = {path.stem: load_file(path) for path in sorted(place.glob("*.safetensors"))}
    except (OSError, ValueError, SafetensorError) as error:
        raise ResumeError(f"{folder} is no checkpoint that training can resume from: {error}.") from error
    then, now = _flat(state["config"]), _flat(config)
    different = [
        f"  {key}: {then.get(key, 'not set')} then, {now.get(key, 'not set')} now"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key) and not any(key == free or key.startswith(f"{free}.") for free in _FREE)
    ]
    if state["world_size"] != world_size:
        different.append(f"  processes: {state['world_size']} then, {world_size} now")
    if different:
        raise ResumeError(
            f"{folder} is of another configuration, and would not lead to the same weights:\n"
            + "\n".join(different)
            + "\nUse that configuration; or start a new run with another `output_dir` from these weights by "
            f"`model.from_pretrained: {folder}`."
        )
    return state, tensors


def read_weights(folder: Path, averaged: bool = False) -> dict[str, Tensor]:
    """The weights of a checkpoint: of a model with adapters, those that are trained, and buffers.

    Args:
        folder: The checkpoint. `check` it first.
        averaged: Whether to read the moving average instead.
    """
    own = folder / STATE / ("ema.safetensors" if averaged else "weights.safetensors")
    weights: dict[str, Tensor] = load_file(own if averaged or own.exists() else folder / "model.safetensors")
    return weights


def compare_content(checkpoint: Path, part: str, then: list[list[Any]], now: list[list[Any]]) -> None:
    """Compares the data files that a checkpoint was trained on with the present ones.

    Args:
        checkpoint: The checkpoint's folder, for the message.
        part: Name of the data: "training" or "held-out".
        then: `content_checksums` of each source when the checkpoint was written.
        now: The same now.

    Raises:
        ResumeError: If they differ; the message names the files.
    """
    lines: list[str] = []
    for old, new in zip(then, now, strict=False):
        if old == new:
            continue
        before, after = ({name: facts for name, *facts in files} for files in (old, new))
        lines += [f"  {name}: not there any more" for name in before if name not in after]
        lines += [f"  {name}: new" for name in after if name not in before]
        lines += [
            f"  {name}: {_describe(before[name])} then, {_describe(after[name])} now"
            for name in before
            if name in after and before[name] != after[name]
        ]
        if not lines:
            lines.append("  the same files in another order, or some of them twice")
    if lines:
        more = [f"  ... and {len(lines) - _NAMED} more"] if len(lines) > _NAMED else []
        raise ResumeError(
            f"{checkpoint} is of other {part} data: it would continue with other samples. Files differ:\n"
            + "\n".join([*lines[:_NAMED], *more])
            + "\nRestore them; or start a new run with another `output_dir` from these weights by "
            f"`model.from_pretrained: {checkpoint}`."
        )


def _describe(facts: list[Any]) -> str:
    size, checksum = facts
    return "missing" if size is None else f"{size} bytes (checksum {checksum})"


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, dict):
        return {prefix: config}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as `<parameter name>/<key>` -> tensor, unsharded. Every process must call this."""
    found = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}/{key}"] = value.full_tensor() if hasattr(value, "full_tensor") else value
    return wait_for_async(found)


def wait_for_async(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Waits for tensors that are still being gathered from other processes (FSDP returns asynchronous ones)."""
    return {name: value.wait() if hasattr(value, "wait") else value for name, value in tensors.items()}


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restores the state of `optimizer_tensors` in an optimizer that has not taken a step."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        name, kind = key.rsplit("/", 1)
        parameter: Any = parameters[name]
        if value.dim() and hasattr(parameter, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
        elif value.dim():
            # A copy: a view of the file may be aligned differently, and vector instructions then round differently.
            value = value.clone().to(parameter.device)
        optimizer.state[parameter][kind] = value


def random_state() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """State of the random number generators of Python, NumPy and torch.

    Returns:
        What JSON can hold, and tensors.
    """
    version, numbers, gauss = random.getstate()
    legacy: Any = np.random.get_state()  # noqa: NPY002  # libraries may use it
    name, keys, position, has_gauss, cached = legacy
    plain = {"python": [version, list(numbers), gauss], "numpy": [name, int(position), int(has_gauss), float(cached)]}
    tensors = {"numpy": torch.from_numpy(keys.astype(np.int64)), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return plain, tensors


def set_random_state(plain: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Restores the random number generators to a state of `random_state`."""
    version, numbers, gauss = plain["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
