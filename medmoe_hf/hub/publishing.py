"""A folder to the Hub in one commit that leaves exactly the folder, and the way back: does what is there still work?

transformers' `push_to_hub` only adds: a `model.safetensors` from before would be loaded in the place of new shards.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi

from medmoe_hf.data.checkpoint_names import refuse_missing_folder
from medmoe_hf.errors import HubUnreachableError, PublishError
from medmoe_hf.hub.access import explained
from medmoe_hf.hub.folder_checks import GOLDEN, check_folder, published_files
from medmoe_hf.hub.golden import RELATIVE_TOLERANCE, compare_with_golden, write_golden
from medmoe_hf.hub.remote import KEPT, MAIN, Change, Remote, readable_size

# What somebody may have put into a repo before its first model.
_HARMLESS = (KEPT, "README.md", "LICENSE")


@dataclass
class PublishReport:
    """What a push did, or with `dry_run` would do.

    Attributes:
        repo: user/name.
        branch: that was committed to.
        changes: of every file, by path.
        dry_run: whether nothing was sent.
        created: whether the repo is new.
        commit: the id of the state that holds the folder; None for a dry run.
        url: of the repo, or of the pull request.
        tag: that names the commit now.
        differences: of the golden outputs in a clean process (`compare_with_golden`).
        unreachable: of a dry run, why the Hub could not be asked; empty if it was.
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
                f"The folder may be published: its {len(self.changes)} files ({readable_size(total)}) passed every "
                "check that needs no network, and it loads where medmoe_hf is not installed.",
                f"NOT checked, for the Hub was not reached: whether {self.repo} exists, is private and holds a MedMoE "
                "model, which of its files would be replaced or deleted, and whether your token may write to it. "
                f"({self.unreachable})",
                "Nothing was sent.",
            ]
        )


@dataclass
class VerifyReport:
    """Whether a checkpoint gives what it gave when it was published.

    Attributes:
        source: folder or repo.
        commit: of a repo.
        differences: by tensor, the largest difference relative to its largest value.
        tolerance: how large these may be.
    """

    source: str
    commit: str | None
    differences: dict[str, float]
    tolerance: float = RELATIVE_TOLERANCE

    @property
    def ok(self) -> bool:
        return bool(self.differences) and all(value <= self.tolerance for value in self.differences.values())

    def __str__(self) -> str:
        lines = [
            f"{'ok' if value <= self.tolerance else 'WRONG':<6} {value:8.1e}  {name}"
            for name, value in self.differences.items()
        ]
        place = self.source + (f" at {self.commit}" if self.commit else "")
        verdict = "gives what it was published with" if self.ok else "does NOT give what it was published with"
        return "\n".join([*lines, f"{place} {verdict} (relative differences up to {self.tolerance:g} are allowed)."])


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
    """Makes a repo on the Hub hold exactly what a folder holds (and its own `.gitattributes`), in one commit.

    First the folder is checked (`check_folder`), `golden.safetensors` is written into it (`write_golden`), and a
    process without this package loads it and must give the same. Only then something is sent. A push that breaks off
    leaves the repo as it was, or whole and new; pushing again ends right in both cases.

    Args:
        folder: a model and its processor, as `save_pretrained` or `medmoe train` wrote them.
        repo: "user/name", or the name alone for the account that the token belongs to.
        private: whether a new repo is private; None: as the account has it by default. For a repo that exists it must
            be what it is.
        branch: made from main if it is not there; None: main.
        tag: a new name for the commit.
        message: of the commit.
        create_pr: opens a pull request in the place of a commit to main; no right to write is needed.
        dry_run: says what would change, and sends nothing. Where the Hub cannot be reached, everything that can be
            checked without it is checked, and the report says what was not.
        token: None: the one that `hf auth login` or HF_TOKEN has set.

    Raises:
        PublishError: for whatever stops the push.
    """
    if create_pr and (branch or tag):
        raise PublishError("A pull request is made for main, and cannot be tagged: leave out the branch and the tag.")
    folder = Path(folder)
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
    """Writes the golden outputs, and checks that a process without this package gives the same.

    Raises:
        PublishError: if it does not load there, or gives other numbers.
    """
    write_golden(folder)
    differences = compare_with_golden(folder)
    # Not `>`, which a NaN would pass.
    wrong = [name for name, value in differences.items() if not value <= RELATIVE_TOLERANCE]
    if wrong:
        raise PublishError(
            f"{folder} gives other numbers where medmoe_hf is not installed: {', '.join(wrong)} differ from what this "
            "package gives. Its Python files may be older than the package; save the model and the processor again."
        )
    return differences


def verify(
    source: str | Path, revision: str | None = None, token: str | None = None, record: bool = False
) -> VerifyReport:
    """Loads a checkpoint in a process without this package, and compares with its `golden.safetensors`.

    The process runs the Python files of the checkpoint: only for those that you would load anyway.

    Args:
        source: a folder, or a repo on the Hub, which is downloaded.
        revision: branch, tag or commit of a repo.
        token: as for `publish`.
        record: first writes `golden.safetensors` into a folder that lacks it, or whose file belongs to other weights,
            from what this package makes of the model.

    Raises:
        PublishError: if it cannot be downloaded or does not load. Other numbers are no error, see `VerifyReport.ok`.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise PublishError(f"{source} is a folder, and has no revisions.")
        if record:
            write_golden(source)
        return VerifyReport(str(source), None, compare_with_golden(source))
    repo = str(source)
    if record:
        raise PublishError(f"--record writes {GOLDEN} into a folder, and {repo} is none. Download the repo first.")
    api = HfApi(token=token)
    try:
        refuse_missing_folder(source)
    except FileNotFoundError as error:
        raise PublishError(str(error)) from None
    with explained(repo, revision):
        # Asked for by itself: where there is no access, a download is content with what an older one has left.
        commit = api.model_info(repo, revision=revision).sha
        place = api.snapshot_download(repo, revision=commit)
    return VerifyReport(repo, commit, compare_with_golden(place))


def _stop_at(folder: Path, problems: list[str]) -> None:
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise PublishError(f"{folder} is not to be published:\n{listed}")


def _accept_model(remote: Remote) -> None:
    """Checks that a repo holds a MedMoE model, or nothing yet.

    Raises:
        PublishError: if something else has the name.
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
    """Raises a PublishError if a tag names another state than the repo will be in."""
    if tag not in remote.tags:
        return
    # A push that was cut off after it had set the tag may be repeated.
    if remote.tags[tag] != remote.parent or any(change.action != "keep" for change in changes):
        raise PublishError(f"{remote.repo} has a tag {tag} already, at {remote.tags[tag]}. Choose another.")
