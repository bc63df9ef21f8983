"""All that a run needs to go on exactly: written whole, read without unpickling anything.

A checkpoint `step-00000100` is the model's folder (or the adapter's) with a folder `training_state` in it:

    state.json            step, configuration, record, schedule, scaler, by rank the stream's state and random numbers
    optimizer.safetensors `<parameter>/<exp_avg, ...>`
    weights.safetensors   of a model with adapters, what is trained, and the buffers
    ema.safetensors       the moving average
    random.safetensors    `<rank>/<generator>`
"""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

STATE = "training_state"
# A run may go on with other values of these: nothing that is learned depends on them.
_FREE = ("output_dir", "log_every", "trackers", "checkpoints", "data.num_workers", "data.max_bad_fraction")


class ResumeError(ValueError):
    """A checkpoint that a run cannot go on from; the message says why and what to do."""


def find_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("step-*") if (path / STATE / "state.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def clean(folder: Path) -> None:
    """Removes what an interrupted write has left. Only for a folder that no run is writing to."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def rotate(folder: Path, keep_last: int, best: int | None) -> None:
    """Removes all but the newest checkpoints, and the best."""
    for path in find_checkpoints(folder)[:-keep_last]:
        if best is None or path.name != f"step-{best:08d}":
            shutil.rmtree(path, ignore_errors=True)


def write_state(folder: Path, state: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
    """Writes `training_state` into a checkpoint, and makes sure that the disk has it all.

    Args:
        folder: the checkpoint, not yet in its place.
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
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def read_state(
    folder: Path, config: dict[str, Any], world_size: int
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """What `write_state` wrote, if it is of the same run.

    Args:
        config: of the run that wants to go on, as JSON.
        world_size: its number of processes.

    Raises:
        ResumeError: if there is none, or it belongs to another configuration; names each key that differs.
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
    return arrived(found)


def arrived(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
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
