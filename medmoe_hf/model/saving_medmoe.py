"""What saved and published folders need: entries of the configuration, what other libraries read, and uploads."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from transformers.utils.hub import cached_file

# What `save_pretrained` of any model writes: a single file, or shards and their index.
_OWN_WEIGHTS = re.compile(r"model(?:-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")

# Arguments of `from_pretrained` that say where files are.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "subfolder")

PROCESSING_AUTO_MAP: dict[str, Any] = {
    "AutoImageProcessor": {
        "torchvision": "image_processing_medmoe.MedMoEImageProcessor",
        "pil": "image_processing_medmoe.MedMoEImageProcessorPil",
    },
    "AutoTokenizer": ["tokenization_medmoe.MedMoETokenizer", None],
    "AutoProcessor": "processing_medmoe.MedMoEProcessor",
}
"""The classes of the processor and its parts, for the `auto_map` of every model's configuration."""

CUSTOM_PIPELINES: dict[str, Any] = {
    "zero-shot-image-classification": {"impl": "pipeline_medmoe.MedMoEZeroShotPipeline", "pt": ["AutoModel"]}
}
"""The pipeline that knows a checkpoint's tasks, by the name of the stock one; for the configuration of models with
tasks."""


SENTENCE_TRANSFORMERS_FILES: dict[str, Any] = {
    # Names that every release since 5.4 resolves, although the modules have moved since.
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Normalize", "type": "sentence_transformers.models.Normalize"},
    ],
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": {
            "text": {"method": "get_text_features", "method_output_name": "pooler_output"},
            "image": {"method": "get_image_features", "method_output_name": "pooler_output"},
        },
        "module_output_name": "sentence_embedding",
    },
    "config_sentence_transformers.json": {
        "model_type": "SentenceTransformer",
        "prompts": {"query": "", "document": ""},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    },
}
"""What `SentenceTransformer(folder)` reads: both towers, then unit length, compared by the cosine."""


def file_beside_weights(
    name: str, file: str, revision: str | None, arguments: Mapping[str, Any] | None = None
) -> str | None:
    """Finds a file that a checkpoint may have beside its weights.

    Args:
        name: Folder or Hub id, as `from_pretrained` takes it.
        file: Name of the file.
        revision: Branch, tag or commit.
        arguments: Those of `from_pretrained`, such as `cache_dir` and `token`.

    Returns:
        Its path; None where there is no such file.
    """
    given = {key: value for key, value in (arguments or {}).items() if key in _HUB_ARGUMENTS and value is not None}
    found: str | None = cached_file(
        name,
        file,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **given,
    )
    return found


def write_sentence_transformers_files(folder: str | Path) -> list[str]:
    """Writes what sentence-transformers reads into the folder of a dual encoder.

    Files that exist stay as they are: sentence-transformers writes its own, with prompts and modules of the user,
    before and after it saves the model.

    Args:
        folder: An existing folder.

    Returns:
        The names of the files that were missing.
    """
    missing = [name for name in SENTENCE_TRANSFORMERS_FILES if not (Path(folder) / name).exists()]
    for name in missing:
        text = json.dumps(SENTENCE_TRANSFORMERS_FILES[name], indent=2) + "\n"
        (Path(folder) / name).write_text(text, encoding="utf-8")
    return missing


def upload_model(
    folder: str | Path,
    repo_id: str,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: bool | str | None = None,
    **commit: Any,
) -> Any:
    """Uploads a saved model in one commit, which also deletes the repository's outdated model weights.

    Otherwise a single file from an earlier upload would be loaded instead of newer shards. Adapters, golden outputs
    and other `.safetensors` files are kept.

    Args:
        folder: The saved model; all files below it are uploaded.
        repo_id: An existing repository of the Hub.
        commit_message: `"Upload model"` by default.
        revision: The branch, created if it does not exist; None for the default branch.
        create_pr: Whether to open a pull request.
        token: Access token for the Hub.
        **commit: Other arguments of `HfApi.create_commit`.

    Returns:
        The `CommitInfo` of huggingface_hub.
    """
    api, folder = HfApi(token=token), Path(folder)
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    parent = api.model_info(repo_id, revision=revision).sha
    new = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    old = {name for name in api.list_repo_files(repo_id, revision=parent) if "/" not in name}
    outdated = {name for name in old - new.keys() if _OWN_WEIGHTS.fullmatch(name)}
    return api.create_commit(
        repo_id,
        [CommitOperationDelete(name) for name in sorted(outdated)]
        + [CommitOperationAdd(name, str(path)) for name, path in new.items()],
        commit_message=commit_message or "Upload model",
        revision=revision,
        parent_commit=parent,
        create_pr=create_pr,
        **commit,
    )
