"""Attributes of packages that are imported when they are first used (PEP 562), so that `import medmoe_hf` is fast."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_attributes(package: str, exports: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], Any], list[str]]:
    """What a package needs to import its public names on first use.

    Args:
        package: `__name__` of the package.
        exports: Module -> the names that the package exports from it.

    Returns:
        The package's `__getattr__` and its `__all__`.

    Example:
        ```python
        __getattr__, __all__ = lazy_attributes(__name__, {"medmoe_hf.training.plan": ["Plan", "plan"]})
        ```
    """
    homes = {name: module for module, names in exports.items() for name in names}

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return load, sorted(homes)
