"""Errors of the libraries that load checkpoints, as errors of ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medmoe_hf.errors import ArgumentError, MedMoEError


@contextmanager
def explain_loading(name: str | Path) -> Iterator[None]:
    """Turns what transformers and safetensors raise for a broken checkpoint into an `ArgumentError` that names it.

    Args:
        name: Folder or Hub id of the checkpoint or data set.

    Raises:
        ArgumentError: If the block raises a `ValueError` or an error of a configuration or a weights file.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except MedMoEError:
        raise
    except (ValueError, StrictDataclassError, SafetensorError) as error:
        raise ArgumentError(f"Cannot load {name}: {error}") from error
