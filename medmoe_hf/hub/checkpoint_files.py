"""Reads checkpoint files without running code in them: tensors and plain containers only."""

import collections
import io
import pickle
import types
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import torch
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


def _of_content(kind: Any) -> Any:
    """Makes a constructor that takes content, but neither a size nor something that becomes large as text."""

    def construct(*arguments: Any) -> Any:
        if not all(isinstance(one, (str, bytes, bytearray, list)) for one in arguments):
            raise pickle.UnpicklingError(f"{kind.__name__} of something else than content")
        return kind(*arguments)

    return construct


# The only classes and functions that a file may use: those of tensors and plain containers. Not `range`, of which a
# few bytes make lists of any length.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    **{
        ("builtins", kind.__name__): kind
        for kind in (dict, list, tuple, set, frozenset, int, float, complex, bool, slice)
    },
    **{("builtins", kind.__name__): _of_content(kind) for kind in (str, bytes, bytearray)},
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}


_MAX_RATIO = 100
_MAX_REPEATED = 2**20  # numbers of a tensor that may have fewer in memory
_MAX_WEIGHT = 100_000  # parts of a tuple, counted as often as they occur in it


# In Python, because the one in C reserves memory for the largest number of an object that a file mentions.
class _Unpickler(pickle._Unpickler):
    dispatch: ClassVar[Any] = dict(pickle._Unpickler.dispatch)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._weights: dict[int, tuple[int, Any]] = {}

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module  # as Python 2 named it
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        # Anything else is neither imported nor called, but replaced by an inert object.
        return type(name, (_Ignored,), {"__module__": module})

    def load_build(self) -> None:
        state = self.stack.pop()  # type: ignore[attr-defined]
        target = self.stack[-1]  # type: ignore[attr-defined]
        # Never of a class or function, which would stay changed.
        if isinstance(target, collections.OrderedDict) and isinstance(state, dict):
            target.__dict__.update((name, value) for name, value in state.items() if isinstance(name, str))

    dispatch[pickle.BUILD[0]] = load_build

    def _weigh(self) -> None:
        """Refuses tuples of tuples of tuples, which take ages to be hashed."""
        made = self.stack[-1]  # type: ignore[attr-defined]
        if isinstance(made, tuple):
            weight = 1 + sum(self._weights.get(id(part), (1, None))[0] for part in made)
            if weight > _MAX_WEIGHT:
                raise pickle.UnpicklingError("a tuple that contains itself too often")
            self._weights[id(made)] = weight, made


def _then_weigh(load: Any) -> Any:
    def loaded(unpickler: Any) -> None:
        load(unpickler)
        unpickler._weigh()

    return loaded


for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.REDUCE):
    _Unpickler.dispatch[_code[0]] = _then_weigh(_Unpickler.dispatch[_code[0]])


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
                inflated = sum(entry.file_size for entry in archive.infolist())
            if any(name.endswith("/constants.pkl") for name in names):
                raise ConvertError("it is a TorchScript program, which contains code; save its `state_dict()`.")
            if not any(name.endswith("data.pkl") for name in names):
                raise ConvertError("it is a zip archive, but not one that `torch.save` wrote.")
            if inflated > _MAX_RATIO * path.stat().st_size:
                raise ConvertError(f"it inflates to more than {_MAX_RATIO} times its size; save it uncompressed.")
        content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_plain_pickle)
    except ConvertError as error:
        raise ConvertError(f"{path}: {error}") from None
    except Exception as error:  # readers of damaged files raise almost anything
        raise ConvertError(
            f"{path} cannot be read: it is truncated, or no checkpoint ({type(error).__name__}). Compare its size or "
            "checksum with the source's and download it again."
        ) from error
    if not isinstance(content, dict):
        raise ConvertError(f"{path} holds {type(content).__name__}, not a dictionary of tensors.")
    return content


def _repeats(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.numel() <= _MAX_REPEATED:
        return False
    return tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()


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
    for name, value in content.items():
        if isinstance(value, Tensor) and _repeats(value):
            raise ConvertError(f"{path}: {str(name)[:80]!r} repeats a few values many times; save it `.contiguous()`.")
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        listed = ", ".join(str(key) for key in list(content)[:8]) or "nothing"
        raise ConvertError(f"{path} holds no named tensors; its top-level keys are: {listed}.")
    return {name: tensor.detach() for name, tensor in tensors.items()}
