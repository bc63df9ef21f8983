"""Publishing a folder on the Hub in one commit, and verifying a published checkpoint.

transformers' `push_to_hub` only adds files: an old `model.safetensors` would be loaded instead of new shards.
"""

import json
import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi

from medmoe_hf.common.packaged import packaged_folder
from medmoe_hf.data.checkpoint_names import refuse_missing_folder
from medmoe_hf.errors import HubUnreachableError, PublishError
from medmoe_hf.hub.access import explained, page_of
from medmoe_hf.hub.folder_checks import GOLDEN, check_folder, published_files
from medmoe_hf.hub.golden import RELATIVE_TOLERANCE, compare_with_golden, write_golden
from medmoe_hf.hub.remote import KEPT, MAIN, Change, Remote, readable_size
from medmoe_hf.model import MedMoEModel
from medmoe_hf.model.saving_medmoe import write_sentence_transformers_files

logger = logging.getLogger(__name__)

# Files that a repository may have before its first model.
_HARMLESS = (KEPT, "README.md", "LICENSE")


@dataclass
class PublishReport:
    """What a push did, or would do with `dry_run`.

    Attributes:
        repo: "user/name".
        branch: Branch of the commit.
        changes: Change of each file, sorted by path.
        dry_run: Whether nothing was sent.
        created: Whether the repository is new.
        commit: Id of the commit that holds the folder; `None` for a dry run.
        url: URL of the repository or the pull request.
        tag: Tag of the commit; `None` without one.
        differences: Relative differences of the golden outputs in a process without this package, by tensor.
        unreachable: Why the Hub could not be reached in a dry run; empty if it was reached.
    """

    repo: str
    branch: str
    changes: list[Change]
    dry_run: bool
    created: bool = False
    commit: str | None = None
    url: str = ""
    tag: str | None = None
    differences: dict[str, float] = field(default_factory=dict)
    unreachable: str = ""

    def __str__(self) -> str:
        if self.unreachable:
            return self._local()
        counts = Counter(change.action for change in self.changes)
        sent = sum(change.size for change in self.changes if change.action in ("add", "replace"))
        lines = [str(change) for change in self.changes if change.action != "keep"]
        lines.append(
            f"{self.repo}, {self.branch}: {counts['add']} added, {counts['replace']} replaced, {counts['delete']} "
            f"deleted, {counts['keep']} unchanged; {readable_size(sent)} to send"
            + (" into a new repo." if self.created else ".")
        )
        if self.dry_run:
            return "\n".join([*lines, "Nothing was sent."])
        tagged = f", tagged {self.tag}" if self.tag else ""
        return "\n".join([*lines, f"{self.url} is at {self.commit}{tagged}."])

    def _local(self) -> str:
        total = sum(change.size for change in self.changes)
        return "\n".join(
            [
                *map(str, self.changes),
                f"The folder can be published: its {len(self.changes)} files ({readable_size(total)}) passed every "
                "check that needs no network, and it loads where medmoe_hf is not installed.",
                f"NOT checked, as the Hub was not reached: whether {self.repo} exists, is private and holds a MedMoE "
                "model, which of its files would be replaced or deleted, and whether your token has write access. "
                f"({self.unreachable})",
                "Nothing was sent.",
            ]
        )


@dataclass
class VerifyReport:
    """Whether a checkpoint has the same outputs as when it was published.

    Attributes:
        source: Folder or repository.
        commit: Commit of the repository; `None` for a folder.
        differences: Largest difference of each tensor, relative to its largest value.
        tolerance: Largest allowed difference.
    """

    source: str
    commit: str | None
    differences: dict[str, float]
    tolerance: float = RELATIVE_TOLERANCE

    @property
    def ok(self) -> bool:
        """Whether all differences are within the tolerance."""
        return bool(self.differences) and all(value <= self.tolerance for value in self.differences.values())

    def __str__(self) -> str:
        lines = [
            f"{'ok' if value <= self.tolerance else 'WRONG':<6} {value:8.1e}  {name}"
            for name, value in self.differences.items()
        ]
        location = self.source + (f" at {self.commit}" if self.commit else "")
        verdict = (
            "has the outputs it was published with" if self.ok else "does NOT have the outputs it was published with"
        )
        return "\n".join(
            [*lines, f"{location} {verdict} (relative differences up to {self.tolerance:g} are allowed)."]
        )


def publish(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    branch: str | None = None,
    tag: str | None = None,
    message: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    token: str | None = None,
) -> PublishReport:
    """Publishes a model folder on the Hub in one commit, after which the repository holds exactly the folder.

    Before anything is sent, the folder is checked (`check_folder`), `golden.safetensors` (`write_golden`) and, for a
    dual encoder, the files of sentence-transformers that it lacks are written into it, and a process without this
    package loads the folder and must compute the same outputs. A push
    that is interrupted leaves the repository unchanged or completely updated; pushing again is safe in both cases.

    Args:
        folder: Folder of a model and its processor, as `save_pretrained` or `medmoe train` writes it; or `small`, the
            checkpoint of the package.
        repo: "user/name", or only the name for the account of the token.
        private: Whether a new repository is private; `None` for the account's default. It must agree with the
            visibility of an existing repository.
        branch: Branch to commit to, created from main if it does not exist; `None` for main.
        tag: New tag for the commit.
        message: Commit message.
        create_pr: Whether to open a pull request instead of committing to main; needs no write access.
        dry_run: Whether to report what would change without sending anything. If the Hub cannot be reached, all local
            checks are done, and the report tells what was not checked.
        token: An access token; `None` for that of `hf auth login` or HF_TOKEN.

    Returns:
        What was changed, or would be changed.

    Raises:
        PublishError: If a check fails, or if the Hub refuses the push.

    Example:
        ```python
        from medmoe_hf.hub import publish

        print(publish("runs/first", "you/medmoe", private=True, dry_run=True))
        ```
    """
    if create_pr and (branch or tag):
        raise PublishError("A pull request is for main, and cannot be tagged: leave out the branch and the tag.")
    folder = Path(packaged_folder(folder))
    _stop_at(folder, check_folder(folder))
    # Access first: loading a model takes a while.
    remote, unreachable = None, ""
    try:
        remote = Remote.find(repo, branch, token, dry_run)
        remote.accept(private, create_pr)
        _accept_model(remote)
        _accept_tag(remote, tag, [])
    except HubUnreachableError as error:
        if not dry_run:
            raise
        remote, unreachable = None, str(error)
    differences = _check_outputs(folder)
    if json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") == [MedMoEModel.__name__]:
        write_sentence_transformers_files(folder)  # a folder that an earlier version saved has none
    files = published_files(folder)
    if remote is None:
        changes = [Change(name, "send", path.stat().st_size) for name, path in files.items()]
        return PublishReport(repo, branch or MAIN, changes, dry_run, differences=differences, unreachable=unreachable)
    changes = list(remote.changes(files))
    _accept_tag(remote, tag, changes)
    report = PublishReport(remote.repo, remote.branch, changes, dry_run, not remote.exists, differences=differences)
    if not dry_run:
        report.commit, report.url = remote.send(
            files, changes, private, message or "Publish a MedMoE checkpoint", create_pr
        )
        if tag is not None and tag not in remote.tags:
            with explained(remote.repo):
                remote.api.create_tag(remote.repo, tag=tag, revision=report.commit)
        report.tag = tag
    return report


def _check_outputs(folder: Path) -> dict[str, float]:
    """Writes the golden outputs, and checks that a process without this package computes the same.

    Raises:
        PublishError: If the folder does not load there, or has other outputs.
    """
    write_golden(folder)
    differences = compare_with_golden(folder)
    # Not `>`, which is false for NaN.
    wrong = [name for name, value in differences.items() if not value <= RELATIVE_TOLERANCE]
    if wrong:
        raise PublishError(
            f"{folder} has other outputs where medmoe_hf is not installed: {', '.join(wrong)} differ from those of "
            "this package. Its Python files may be older than the package; save the model and the processor again."
        )
    return differences


def verify(
    source: str | Path, revision: str | None = None, token: str | None = None, record: bool = False
) -> VerifyReport:
    """Loads a checkpoint in a process without this package, and compares its outputs with `golden.safetensors`.

    Warning: the process runs the Python files of the checkpoint. Verify only checkpoints that you would load. If no
    revision of a repository is named, a warning names its commit before anything is run.

    Args:
        source: A folder, `small`, or a repository on the Hub, which is downloaded.
        revision: Branch, tag or commit of a repository.
        token: An access token; `None` for that of `hf auth login` or HF_TOKEN.
        record: Whether to first write `golden.safetensors` into a folder that has none, or one of other weights, with
            the outputs of this package.

    Returns:
        The differences; different outputs are no error, see `VerifyReport.ok`.

    Raises:
        PublishError: If the checkpoint cannot be downloaded or does not load.

    Example:
        ```python
        from medmoe_hf.hub import verify

        report = verify("runs/first", record=True)
        print(report.ok)
        ```
    """
    source = packaged_folder(source)
    if Path(source).is_dir():
        if revision is not None:
            raise PublishError(f"{source} is a folder, and has no revisions.")
        if record:
            write_golden(source)
        return VerifyReport(str(source), None, compare_with_golden(source))
    repo = str(source)
    if record:
        raise PublishError(f"--record writes {GOLDEN} into a folder, but {repo} is not one. Download the repo first.")
    api = HfApi(token=token)
    try:
        refuse_missing_folder(source)
    except FileNotFoundError as error:
        raise PublishError(str(error)) from None
    with explained(repo, revision):
        # Asked for separately: without access, a download would silently use an older one from the cache.
        commit = api.model_info(repo, revision=revision).sha
        downloaded = api.snapshot_download(repo, revision=commit)
    if revision is None:
        _warn_of_code(repo, commit)
    return VerifyReport(repo, commit, compare_with_golden(downloaded))


def _warn_of_code(repo: str, commit: str | None) -> None:
    """Warns before code is run that nobody has pinned. No other command runs code of a checkpoint."""
    logger.warning(
        "The Python files of %s are run as they are now, and its owner can change them at any time. "
        "Review them at %s, and pin what you reviewed: --revision %s",
        *(repo, f"{page_of(repo)}/tree/{commit}", commit),
    )


def _stop_at(folder: Path, problems: list[str]) -> None:
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise PublishError(f"{folder} cannot be published:\n{listed}")


def _accept_model(remote: Remote) -> None:
    """Checks that a repository holds a MedMoE model or nothing.

    Raises:
        PublishError: If it holds something else.
    """
    if "config.json" in remote.files:
        try:
            kind = str(json.loads(remote.read("config.json")).get("model_type"))
        except (ValueError, AttributeError):
            kind = "unknown"
    else:
        kind = "" if set(remote.files) <= set(_HARMLESS) else "unknown"
    if kind and not kind.startswith("medmoe"):
        raise PublishError(
            f"The name {remote.repo} is taken: the repo holds something else (model type {kind}), which a push "
            "would delete. Choose another name, or empty the repo yourself."
        )


def _accept_tag(remote: Remote, tag: str | None, changes: list[Change]) -> None:
    """Raises a `PublishError` if a tag exists at another state of the repository."""
    if tag not in remote.tags:
        return
    # A push that was interrupted after setting the tag may be repeated.
    if remote.tags[tag] != remote.parent or any(change.action != "keep" for change in changes):
        raise PublishError(f"{remote.repo} has a tag {tag} already, at {remote.tags[tag]}. Choose another.")
