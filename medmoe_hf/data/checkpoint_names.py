"""Names of checkpoints: a local folder, a checkpoint of the package, or an id on the Hub."""

from difflib import get_close_matches
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from medmoe_hf.common.packaged import packaged_folder
from medmoe_hf.errors import PathNotFoundError


def find_checkpoint(name: str | Path, bare_ids: bool = False) -> str:
    """Finds the folder or Hub id that the name of a model stands for.

    Args:
        name: A local folder, the name of a checkpoint of the package (such as `small`), or an id on the Hub. A local
            folder comes first.
        bare_ids: As for `refuse_missing_folder`.

    Returns:
        The folder of a checkpoint of the package; any other name as it is.

    Raises:
        FileNotFoundError: As `refuse_missing_folder`, and if the package lacks the files of its checkpoint.
    """
    folder = packaged_folder(name)
    refuse_missing_folder(folder, bare_ids)
    return folder


def refuse_missing_folder(name: str | Path, bare_ids: bool = False) -> None:
    """Raises an error for the path of a folder that does not exist, before it is looked up on the Hub.

    transformers treats every name that is not a folder as a Hub id. Without a network, that results in a minute of
    retries and an error that does not mention the name.

    Args:
        name: A folder, a file, or an id on the Hub.
        bare_ids: Whether ids without a user, such as `bert-base-uncased`, are allowed.

    Raises:
        FileNotFoundError: If there is no such folder or file and `name` is not an id: it is not of the form user/name,
            or the part before the slash is a local folder (and the Hub's cache has no such model).
    """
    text, path = str(name), Path(name)
    if path.exists() or _may_be_an_id(text, bare_ids):
        return
    hint = ""
    if path.expanduser().exists():
        hint = f' Did you mean "{path.expanduser()}"?'
    elif path.parent.is_dir():
        beside = sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir())
        near = get_close_matches(path.name, beside, n=1)
        hint = f' Did you mean "{path.parent / near[0]}"?' if near else ""
    else:
        hint = f' There is no folder "{path.parent}" either.'
    raise PathNotFoundError(f'There is no folder "{text}", and an id on the Hub has the form user/name.{hint}')


def _may_be_an_id(text: str, bare_ids: bool) -> bool:
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    user, slash, _ = text.partition("/")
    if slash:
        return not Path(user).is_dir() or isinstance(try_to_load_from_cache(text, "config.json"), str)
    return bare_ids
