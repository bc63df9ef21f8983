"""Reads checkpoint files without running code in them: tensors and plain containers only."""

import collections
import io
import pickle
import types
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from medmoe_hf.errors import ConvertError


class _Ignored:
    """Inert replacement for an object of an unknown class: accepts everything, does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Ignored":
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> "_Ignored":
        return _Ignored()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def add(self, item: Any) -> None:
        pass


# The only classes and functions that a file may use: those of tensors and plain containers.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    **{
        ("builtins", kind.__name__): kind
        for kind in (dict, list, tuple, set, frozenset, int, float, complex, bool, str, bytes, bytearray, slice, range)
    },
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        # Anything else is neither imported nor called, but replaced by an inert object.
        return type(name, (_Ignored,), {"__module__": module})


def _load(file: Any, **kwargs: Any) -> Any:
    return _Unpickler(file, **kwargs).load()


# The interface that `torch.load` expects of a pickle module.
_plain_pickle = types.ModuleType("medmoe_plain_pickle")
_plain_pickle.Unpickler = _Unpickler  # type: ignore[attr-defined]
_plain_pickle.load = _load  # type: ignore[attr-defined]
_plain_pickle.loads = lambda data, **kwargs: _load(io.BytesIO(data), **kwargs)  # type: ignore[attr-defined]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint without running code; objects of unknown classes are replaced by inert ones.

    Args:
        path: A `.safetensors` file, or a file of `torch.save` (`.ckpt`, `.pt`, `.pth`, `.bin`; either of its formats).

    Returns:
        The file's dictionary.

    Raises:
        ConvertError: The file is missing, truncated or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise ConvertError(f"{path}: there is no such file.")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
            if any(name.endswith("/constants.pkl") for name in names):
                raise ConvertError("it is a TorchScript program, which contains code; save its `state_dict()`.")
            if not any(name.endswith("data.pkl") for name in names):
                raise ConvertError("it is a zip archive, but not one that `torch.save` wrote.")
        content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_plain_pickle)
    except ConvertError as error:
        raise ConvertError(f"{path}: {error}") from None
    except (
        pickle.UnpicklingError,
        EOFError,
        RuntimeError,
        SafetensorError,
        zipfile.BadZipFile,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        IndexError,
        OSError,
    ) as error:
        raise ConvertError(
            f"{path} cannot be read: it is truncated, or no checkpoint ({type(error).__name__}). Compare its size or "
            "checksum with the source's and download it again."
        ) from error
    if not isinstance(content, dict):
        raise ConvertError(f"{path} holds {type(content).__name__}, not a dictionary of tensors.")
    return content


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Reads the tensors of a checkpoint: a state dict, or the one inside a Lightning or timm file.

    Args:
        path: As for `read_checkpoint`.

    Returns:
        Name -> tensor.

    Raises:
        ConvertError: As `read_checkpoint`, and if there are no tensors.
    """
    content = read_checkpoint(path)
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        listed = ", ".join(str(key) for key in list(content)[:8]) or "nothing"
        raise ConvertError(f"{path} holds no named tensors; its top-level keys are: {listed}.")
    return {name: tensor.detach() for name, tensor in tensors.items()}
