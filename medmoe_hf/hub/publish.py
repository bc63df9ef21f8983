"""A folder to the Hub in one commit that leaves exactly the folder, and the way back: does what is there still work?

transformers' `push_to_hub` only adds: a `model.safetensors` from before would be loaded in the place of new shards.
`upload_folder` may make several commits of one upload (where hf_xet is installed), so here `create_commit` is used.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from medmoe_hf.hub.access import explained, writable
from medmoe_hf.hub.folder_checks import PublishError, check_folder, published_files
from medmoe_hf.hub.golden import RELATIVE_TOLERANCE, compare_with_golden, write_golden

_MAIN = "main"
# The Hub writes it into a new repo; without it large files would be stored as text.
_KEPT = ".gitattributes"
# What somebody may have put into a repo before its first model.
_HARMLESS = (_KEPT, "README.md", "LICENSE")


@dataclass(frozen=True)
class Change:
    """What a push does to one file.

    Attributes:
        path: in the repo.
        action: "add", "replace", "delete" or "keep".
        size: in bytes, of the new file; of the old one for "delete".
    """

    path: str
    action: str
    size: int

    def __str__(self) -> str:
        return f"{self.action:<8} {_readable(self.size):>9}  {self.path}"


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

    def __str__(self) -> str:
        counts = Counter(change.action for change in self.changes)
        sent = sum(change.size for change in self.changes if change.action in ("add", "replace"))
        lines = [str(change) for change in self.changes if change.action != "keep"]
        lines.append(
            f"{self.repo}, {self.branch}: {counts['add']} added, {counts['replace']} replaced, {counts['delete']} "
            f"deleted, {counts['keep']} unchanged; {_readable(sent)} to send"
            + (" into a new repo." if self.created else ".")
        )
        if self.dry_run:
            return "\n".join([*lines, "Nothing was sent."])
        tagged = f", tagged {self.tag}" if self.tag else ""
        return "\n".join([*lines, f"{self.url} is at {self.commit}{tagged}."])


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
        dry_run: says what would change, and sends nothing.
        token: None: the one that `hf auth login` or HF_TOKEN has set.

    Raises:
        PublishError: for whatever stops the push.
    """
    if create_pr and (branch or tag):
        raise PublishError("A pull request is made for main, and cannot be tagged: leave out the branch and the tag.")
    folder = Path(folder)
    _stop_at(folder, check_folder(folder))
    # Access first: loading a model takes a while.
    remote = _Remote.find(repo, branch, token, dry_run)
    remote.accept(private, create_pr)
    remote.accept_tag(tag, [])
    write_golden(folder)
    differences = compare_with_golden(folder)
    wrong = [name for name, value in differences.items() if value > RELATIVE_TOLERANCE]
    if wrong:
        raise PublishError(
            f"{folder} gives other numbers where medmoe_hf is not installed: {', '.join(wrong)} differ from what this "
            "package gives. Its Python files may be older than the package; save the model and the processor again."
        )
    files = published_files(folder)
    changes = list(remote.changes(files))
    remote.accept_tag(tag, changes)
    report = PublishReport(remote.repo, remote.branch, changes, dry_run, not remote.exists, differences=differences)
    if not dry_run:
        remote.send(files, report, private, tag, message, create_pr)
    return report


def verify(source: str | Path, revision: str | None = None, token: str | None = None) -> VerifyReport:
    """Loads a checkpoint in a process without this package, and compares with its `golden.safetensors`.

    The process runs the Python files of the checkpoint: only for those that you would load anyway.

    Args:
        source: a folder, or a repo on the Hub, which is downloaded.
        revision: branch, tag or commit of a repo.
        token: as for `publish`.

    Raises:
        PublishError: if it cannot be had or does not load. Other numbers are no error, see `VerifyReport.ok`.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise PublishError(f"{source} is a folder, and has no revisions.")
        return VerifyReport(str(source), None, compare_with_golden(source))
    repo = str(source)
    api = HfApi(token=token)
    with explained(repo, revision):
        # Asked for by itself: where there is no access, a download is content with what an older one has left.
        commit = api.model_info(repo, revision=revision).sha
        place = api.snapshot_download(repo, revision=commit)
    return VerifyReport(repo, commit, compare_with_golden(place))


def _stop_at(folder: Path, problems: list[str]) -> None:
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise PublishError(f"{folder} is not to be published:\n{listed}")


@dataclass
class _Remote:
    """A repo's state as it was seen, and what can be done to that state."""

    api: HfApi
    repo: str
    branch: str
    exists: bool
    private: bool | None = None
    parent: str | None = None
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    files: dict[str, RepoFile] = field(default_factory=dict)

    @classmethod
    def find(cls, repo: str, branch: str | None, token: str | None, dry_run: bool) -> "_Remote":
        """Reads the repo, and whose the token is.

        Raises:
            PublishError: without a token (for a dry run one is not needed), or with one that only reads.
        """
        api = HfApi(token=token)
        repo = writable(repo, token, dry_run)
        with explained(repo):
            found = cls(api, repo, branch or _MAIN, exists=True)
            try:
                refs = api.list_repo_refs(repo)
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                found.exists = False
                return found
            found.private = api.model_info(repo).private
            found.branches = {ref.name: ref.target_commit for ref in refs.branches}
            found.tags = {ref.name: ref.target_commit for ref in refs.tags}
            found.parent = found.branches.get(found.branch) or found.branches.get(_MAIN)
            if found.parent is None:
                raise PublishError(f"{repo} has no branch {found.branch} and no {_MAIN} to begin one at.")
            listed = api.list_repo_tree(repo, recursive=True, revision=found.parent)
            found.files = {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}
        return found

    def accept(self, private: bool | None, create_pr: bool) -> None:
        """Whether a MedMoE model may be put here.

        Raises:
            PublishError: if something else has the name, or the repo is not as private as was asked for.
        """
        if not self.exists:
            if create_pr:
                raise PublishError(f"{self.repo} is not there, or not for this token; a pull request needs a repo.")
            return
        if private is not None and private != self.private:
            raise PublishError(
                f"{self.repo} exists and is {'private' if self.private else 'public'}. Change that in its settings on "
                f"the Hub first, or leave out {'--private' if private else '--public'}."
            )
        if "config.json" in self.files:
            with explained(self.repo):
                place = self.api.hf_hub_download(self.repo, "config.json", revision=self.parent)
            try:
                kind = str(json.loads(Path(place).read_text(encoding="utf-8")).get("model_type"))
            except (ValueError, AttributeError):
                kind = "unknown"
        else:
            kind = "" if set(self.files) <= set(_HARMLESS) else "unknown"
        if kind and not kind.startswith("medmoe"):
            raise PublishError(
                f"The name {self.repo} is taken: the repo holds something else (model type {kind}), which a push "
                "would delete. Choose another name, or empty the repo yourself."
            )

    def changes(self, files: dict[str, Path]) -> Iterator[Change]:
        """What makes the repo hold `files` and nothing else, by path."""
        for path in sorted({*files, *self.files}):
            new, old = files.get(path), self.files.get(path)
            if new is None and old is not None:
                yield Change(path, "keep" if path == _KEPT else "delete", old.size)
            elif new is not None:
                action = "add" if old is None else "keep" if _same(new, old) else "replace"
                yield Change(path, action, new.stat().st_size)

    def accept_tag(self, tag: str | None, changes: list[Change]) -> None:
        """Raises a PublishError if a tag names another state than the repo will be in."""
        if tag not in self.tags:
            return
        # A push that was cut off after it had set the tag may be repeated.
        if self.tags[tag] != self.parent or any(change.action != "keep" for change in changes):
            raise PublishError(f"{self.repo} has a tag {tag} already, at {self.tags[tag]}. Choose another.")

    def send(
        self,
        files: dict[str, Path],
        report: PublishReport,
        private: bool | None,
        tag: str | None,
        message: str | None,
        create_pr: bool,
    ) -> None:
        """Makes the repo and the branch where they are missing, the commit, and the tag; fills in the report."""
        with explained(self.repo):
            if not self.exists:
                self.api.create_repo(self.repo, private=private)
                # The Hub has put a .gitattributes into it.
                self.parent = self.api.model_info(self.repo).sha
            if self.branch != _MAIN and self.branch not in self.branches:
                self.api.create_branch(self.repo, branch=self.branch, revision=self.parent)
            operations: list[Any] = [
                CommitOperationDelete(change.path)
                if change.action == "delete"
                else CommitOperationAdd(change.path, str(files[change.path]))
                for change in report.changes
                if change.action != "keep"
            ]
            report.commit, report.url = self.parent, f"{constants.ENDPOINT}/{self.repo}"
            if operations:
                info = self.api.create_commit(
                    self.repo,
                    operations,
                    commit_message=message or "Publish a MedMoE checkpoint",
                    revision=self.branch,
                    # Whoever pushed in the meantime is noticed, and not undone.
                    parent_commit=self.parent,
                    create_pr=create_pr,
                )
                report.commit, report.url = info.oid, info.pr_url or report.url
            if tag is not None and tag not in self.tags:
                self.api.create_tag(self.repo, tag=tag, revision=report.commit)
            report.tag = tag


def _same(path: Path, remote: RepoFile) -> bool:
    """Whether a file is what the Hub has: by sha256 for what lies in LFS, by git's name of it for the others."""
    size = path.stat().st_size
    if size != remote.size:
        return False
    digest = hashlib.sha1(b"blob %d\0" % size) if remote.lfs is None else hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest() == (remote.blob_id if remote.lfs is None else remote.lfs.sha256)


def _readable(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
