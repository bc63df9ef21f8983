"""All that a run needs to go on exactly: written whole, read without unpickling anything.

A checkpoint `step-00000100` is the model's folder (or the adapter's) with a folder `training_state` in it:

    state.json            step, configuration, record, schedule, scaler, by rank the stream's state and random numbers
    optimizer.safetensors `<parameter>/<exp_avg, ...>`
    weights.safetensors   of a model with adapters, what is trained, and the buffers
    ema.safetensors       the moving average
    random.safetensors    `<rank>/<generator>`
    manifest.json         size and CRC-32 of every other file of the checkpoint; written last
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
# A run may go on with other values of these: nothing that is learned depends on them.
_FREE = ("output_dir", "log_every", "trackers", "checkpoints", "data.num_workers", "data.max_bad_fraction")


_NAMED = 10  # files that a message names


def step_name(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:08d}"


def find_checkpoints(folder: Path, up_to: float = float("inf")) -> list[Path]:
    """The checkpoints of a run up to a step, oldest first; `check` says whether one is whole."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
    return sorted((path for path in found if _step(path) <= up_to), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def check(folder: Path) -> None:
    """Compares a checkpoint with its manifest.

    Raises:
        ResumeError: if a file is missing, cut off or changed; names each.
    """
    try:
        listed = json.loads((folder / STATE / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        raise ResumeError(
            f"{folder} has no {STATE}/{MANIFEST}, which lists its files: it is not whole, or of an older version."
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
            problems.append(f"{name} has {found['size']} bytes in place of {expected['size']}")
        elif found != expected:
            problems.append(f"{name} is damaged (its checksum differs)")
    problems += [
        f"{STATE}/{path.name} does not belong to it"
        for path in sorted((folder / STATE).glob("*.safetensors"))
        if f"{STATE}/{path.name}" not in listed
    ]
    if problems:
        raise ResumeError(f"{folder} is not whole: {'; '.join(problems)}.")


def newest_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run that is whole, and what is wrong with each newer one.

    Raises:
        ResumeError: if there are checkpoints, and none is whole.
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
            f"{folder} holds no checkpoint that is whole:\n{listed}\nRemove them to begin anew; where the weights are "
            "whole, a new run with another `output_dir` can begin from them by `model.from_pretrained`."
        )
    return None, problems


def clean(folder: Path) -> None:
    """Removes what an interrupted write has left. Only for a folder that no run is writing to."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def rotate(folder: Path, keep_last: int, best: int | None, step: int) -> None:
    """Removes all but the newest checkpoints up to this step, and the best.

    Later ones are of before the run was taken up at an older checkpoint, and may be damaged: they neither count nor
    go.
    """
    for path in find_checkpoints(folder, step)[:-keep_last]:
        if _step(path) != best:
            shutil.rmtree(path, ignore_errors=True)


def write_state(folder: Path, state: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
    """Writes `training_state` into a checkpoint, and makes sure that the disk has it all.

    Args:
        folder: the checkpoint, not yet in its place; whatever is in it already is listed in the manifest.
        state: for `state.json`.
        tensors: by name of a file, without its ending.
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
    # CRC-32 finds what disks and copies do to a file, and nobody forges a checkpoint; a cryptographic hash takes two
    # to five times as long, and checkpoints have gigabytes.
    size = checksum = 0
    with path.open("rb") as file:
        while piece := file.read(2**20):
            size += len(piece)
            checksum = zlib.crc32(piece, checksum)
    return {"size": size, "crc32": f"{checksum:08x}"}


def read_state(
    folder: Path, config: dict[str, Any], world_size: int
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """What `write_state` wrote, if it is of the same run. `check` first whether it is whole.

    Args:
        config: of the run that wants to go on, as JSON.
        world_size: its number of processes.

    Raises:
        ResumeError: if it cannot be read, or belongs to another configuration; names each key that differs.
    """
    place = folder / STATE
    try:
        state = json.loads((place / "state.json").read_text(encoding="utf-8"))
        tensors = {path.stem: load_file(path) for path in sorted(place.glob("*.safetensors"))}
    except (OSError, ValueError, SafetensorError) as error:
        raise ResumeError(f"{folder} is no checkpoint that training can go on from: {error}.") from error
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
            f"{folder} is of another configuration, and would not go on to the same weights:\n"
            + "\n".join(different)
            + "\nUse that configuration; or begin a new run with another `output_dir`, from these weights by "
            f"`model.from_pretrained: {folder}`."
        )
    return state, tensors


def compare_content(checkpoint: Path, part: str, then: list[list[Any]], now: list[list[Any]]) -> None:
    """Compares the files behind the data of a checkpoint with those that are there now.

    Args:
        part: what the data are called.
        then, now: for each source its `content_facts`.

    Raises:
        ResumeError: if they differ; names the files.
    """
    lines: list[str] = []
    for old, new in zip(then, now, strict=False):
        if old == new:
            continue
        before, after = ({name: facts for name, *facts in files} for files in (old, new))
        lines += [f"  {name}: not there any more" for name in before if name not in after]
        lines += [f"  {name}: new" for name in after if name not in before]
        lines += [
            f"  {name}: {_in_words(before[name])} then, {_in_words(after[name])} now"
            for name in before
            if name in after and before[name] != after[name]
        ]
        if not lines:
            lines.append("  the same files in another order, or some of them twice")
    if lines:
        more = [f"  ... and {len(lines) - _NAMED} more"] if len(lines) > _NAMED else []
        raise ResumeError(
            f"{checkpoint} is of other {part} data: its place in them would mean other samples. Files differ:\n"
            + "\n".join([*lines[:_NAMED], *more])
            + "\nBring them back; or begin a new run with another `output_dir`, from these weights by "
            f"`model.from_pretrained: {checkpoint}`."
        )


def _in_words(facts: list[Any]) -> str:
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
    """An optimiser's state by the names of its parameters, whole where it is sharded. Every process must call this."""
    found = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}/{key}"] = value.full_tensor() if hasattr(value, "full_tensor") else value
    return wait_for_async(found)


def wait_for_async(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, none of them still under way from other processes: what sharding gathers may be a promise."""
    return {name: value.wait() if hasattr(value, "wait") else value for name, value in tensors.items()}


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Gives an optimiser that has done no step the state of `optimizer_tensors`."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        name, kind = key.rsplit("/", 1)
        parameter: Any = parameters[name]
        if value.dim() and hasattr(parameter, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
        elif value.dim():
            # A copy: what was read may be a view of the file, and lie where vector instructions round otherwise.
            value = value.clone().to(parameter.device)
        optimizer.state[parameter][kind] = value


def random_state() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The generators of Python, numpy and torch: what JSON takes, and tensors."""
    version, numbers, gauss = random.getstate()
    legacy: Any = np.random.get_state()  # noqa: NPY002  # others may use it
    name, keys, position, has_gauss, cached = legacy
    plain = {"python": [version, list(numbers), gauss], "numpy": [name, int(position), int(has_gauss), float(cached)]}
    tensors = {"numpy": torch.from_numpy(keys.astype(np.int64)), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return plain, tensors


def set_random_state(plain: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Puts the generators where `random_state` found them."""
    version, numbers, gauss = plain["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
