"""Registers the model with the Auto classes of transformers when one of them is first used.

Registering at once, on `import medmoe_hf`, would load transformers and torch.
"""

import functools
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Every way from a folder's files to one of our classes begins in one of these; models begin with AutoConfig.
_ENTRY_POINTS = {
    "transformers.models.auto.configuration_auto": ("AutoConfig", ("from_pretrained", "for_model")),
    "transformers.models.auto.image_processing_auto": ("AutoImageProcessor", ("from_pretrained",)),
    "transformers.models.auto.processing_auto": ("AutoProcessor", ("from_pretrained",)),
    "transformers.models.auto.tokenization_auto": ("AutoTokenizer", ("from_pretrained",)),
}


def register_on_use() -> None:
    """Makes the Auto classes know the model, whether transformers is already imported or will be later."""
    for name in _ENTRY_POINTS:
        if name in sys.modules:
            _patch(sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of the Auto classes by the other finders, and has them patched after their execution."""

    def __init__(self) -> None:
        self._active: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _ENTRY_POINTS or fullname in self._active:
            return None
        self._active.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._active.remove(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _patch(module)

        loader.exec_module = exec_module
        return spec


def _patch(module: ModuleType) -> None:
    name, methods = _ENTRY_POINTS[module.__name__]
    auto_class = getattr(module, name, None)  # None: the module imports this package while it is being executed
    for method in methods if auto_class is not None else ():
        original = vars(auto_class)[method].__func__
        if not hasattr(original, "_registers_medmoe"):
            setattr(auto_class, method, classmethod(_registering(original)))


def _registering(original: Any) -> Any:
    @functools.wraps(original)
    def registered_first(cls: Any, *args: Any, **kwargs: Any) -> Any:
        importlib.import_module("medmoe_hf.model.registration")
        return original(cls, *args, **kwargs)

    registered_first._registers_medmoe = True  # type: ignore[attr-defined]
    return registered_first
