"""The checkpoints that the package contains."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medmoe_hf.errors import ArgumentError, PathNotFoundError

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
"""The folder with a folder per checkpoint."""

PACKAGED = ("small",)
"""Names of the checkpoints; the first one is what commands use when no model is named."""

_MODEL_CODE = Path(__file__).resolve().parents[1] / "model"

# Without any of these a folder does not load; the code files are named by the configuration.
_REQUIRED = ("config.json", "model.safetensors", "processor_config.json", "tokenizer.json")


def pretrained(name: str = PACKAGED[0]) -> str:
    """Finds a checkpoint that the package contains; nothing is downloaded.

    Args:
        name: Name of the checkpoint: `"small"`, trained on openly licensed scans of six modalities. Its `README.md`
            states the sources, the licenses and what was measured.

    Returns:
        Path of its folder, which loads with and without this package like any other model folder.

    Raises:
        ArgumentError: For an unknown name.
        PathNotFoundError: If this copy of the package lacks the checkpoint's files.

    Example:
        ```python
        import medmoe_hf
        from transformers import AutoModel, AutoProcessor

        folder = medmoe_hf.pretrained("small")
        model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        ```
    """
    if name not in PACKAGED:
        raise ArgumentError(f'There is no packaged checkpoint "{name}"; this version contains: {", ".join(PACKAGED)}.')
    folder = CHECKPOINTS / name
    missing = [file for file in _REQUIRED if not (folder / file).is_file()]
    if missing:
        raise PathNotFoundError(
            f'This copy of medmoe_hf lacks {", ".join(missing)} of its checkpoint "{name}" (in {folder}). Install the '
            "package again from a complete source, or name another model."
        )
    return str(folder)


def packaged_folder(name: str | Path) -> str:
    """Replaces the name of a packaged checkpoint by its folder, wherever a model is named.

    Args:
        name: A local folder, the name of a packaged checkpoint, or an id on the Hub. A local folder comes first.

    Returns:
        The folder of a packaged checkpoint; any other name as it is.

    Raises:
        PathNotFoundError: If this copy of the package lacks the checkpoint's files.
    """
    return pretrained(str(name)) if str(name) in PACKAGED and not Path(name).exists() else str(name)


def copy_model_code(folder: Path) -> int:
    """Replaces the code in the folder of a checkpoint by the current code, and adds what other libraries read.

    These are the files of sentence-transformers, and the pipeline in `config.json`.

    Args:
        folder: Folder of a dual encoder. Other Python files, such as those of an expert of one's own, stay.

    Returns:
        The number of files of code.
    """
    # Not at the top: it loads torch, and a folder's name is needed without it.
    from medmoe_hf.model.saving_medmoe import CUSTOM_PIPELINES, write_sentence_transformers_files

    code = [*sorted(_MODEL_CODE.glob("*_medmoe.py")), _MODEL_CODE / "handler.py"]
    for copy in folder.glob("*_medmoe.py"):
        copy.unlink()
    for path in code:
        shutil.copyfile(path, folder / path.name)
    write_sentence_transformers_files(folder)
    _name_pipelines(folder / "config.json", CUSTOM_PIPELINES)
    return len(code)


def _name_pipelines(path: Path, pipelines: Mapping[str, Any]) -> None:
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if config.get("architectures") == ["MedMoEModel"] and config.get("custom_pipelines") != pipelines:
        config = dict(sorted({**config, "custom_pipelines": pipelines}.items()))
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
