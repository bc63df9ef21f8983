"""The state of a repository on the Hub, what a push would change in it, and the commit that does it.

`upload_folder` may split an upload into several commits (if hf_xet is installed), so `create_commit` is used here.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from medmoe_hf.errors import PublishError
from medmoe_hf.hub.access import explained, page_of, writable

MAIN = "main"
KEPT = ".gitattributes"
"""Created by the Hub in a new repository; without it large files would be stored as text."""


@dataclass(frozen=True)
class Change:
    """What a push does to one file.

    Attributes:
        path: Path in the repository.
        action: "add", "replace", "delete" or "keep"; "send" if the repository's state is unknown.
        size: Size in bytes of the new file; of the old one for "delete".
    """

    path: str
    action: str
    size: int

    def __str__(self) -> str:
        return f"{self.action:<8} {readable_size(self.size):>9}  {self.path}"


@dataclass
class Remote:
    """The state of a repository, and operations on it.

    Attributes:
        api: The Hub's API, with the token.
        repo: "user/name".
        kind: "model" or "dataset".
        branch: Branch to commit to.
        exists: Whether the repository exists; if not, the following attributes are empty.
        private: Whether it is private.
        parent: The commit that was read: that of the branch, or of main for a new branch.
        branches: Name -> commit.
        tags: Name -> commit.
        files: Path -> entry, at `parent`.
    """

    api: HfApi
    repo: str
    kind: Literal["model", "dataset"]
    branch: str
    exists: bool
    private: bool | None = None
    parent: str | None = None
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    files: dict[str, RepoFile] = field(default_factory=dict)

    @classmethod
    def find(
        cls,
        repo: str,
        branch: str | None = None,
        token: str | None = None,
        dry_run: bool = False,
        kind: Literal["model", "dataset"] = "model",
    ) -> "Remote":
        """Reads the state of a repository.

        Args:
            repo: "user/name", or only the name for the account of the token.
            branch: Branch to commit to; `None` for main.
            token: An access token; `None` for that of `hf auth login` or HF_TOKEN.
            dry_run: Whether nothing will be written; then no token is needed.
            kind: "model" or "dataset".

        Raises:
            PublishError: Without a token, with a read-only one, or without a branch to start from.
        """
        api = HfApi(token=token)
        repo = writable(repo, token, dry_run)
        with explained(repo, kind=kind):
            found = cls(api, repo, kind, branch or MAIN, exists=True)
            try:
                refs = api.list_repo_refs(repo, repo_type=kind)
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                found.exists = False
                return found
            found.private = api.repo_info(repo, repo_type=kind).private
            found.branches = {ref.name: ref.target_commit for ref in refs.branches}
            found.tags = {ref.name: ref.target_commit for ref in refs.tags}
            found.parent = found.branches.get(found.branch) or found.branches.get(MAIN)
            if found.parent is None:
                raise PublishError(f"{repo} has no branch {found.branch} and no {MAIN} to create it from.")
            listed = api.list_repo_tree(repo, recursive=True, revision=found.parent, repo_type=kind)
            found.files = {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}
        return found

    @property
    def page(self) -> str:
        """URL of the repository on the Hub."""
        return page_of(self.repo, self.kind)

    def accept(self, private: bool | None, create_pr: bool) -> None:
        """Checks the requested visibility, and that a pull request has a repository.

        Args:
            private: Requested visibility; `None` for any.
            create_pr: Whether a pull request will be opened.

        Raises:
            PublishError: If the visibility differs, or if there is no repository for a pull request.
        """
        if not self.exists:
            if create_pr:
                raise PublishError(f"{self.repo} does not exist for this token; a pull request needs a repo.")
            return
        if private is not None and private != self.private:
            raise PublishError(
                f"{self.repo} exists and is {'private' if self.private else 'public'}. Change that in its settings on "
                f"the Hub first, or leave out {'--private' if private else '--public'}."
            )

    def read(self, path: str) -> bytes:
        """Content of a file, at `parent`."""
        with explained(self.repo, kind=self.kind):
            path_here = self.api.hf_hub_download(self.repo, path, revision=self.parent, repo_type=self.kind)
        return Path(path_here).read_bytes()

    def changes(self, files: dict[str, Path], keep: Iterable[str] = ()) -> Iterator[Change]:
        """The changes after which the repository holds `files`, sorted by path.

        Args:
            files: Path in the repository -> local file.
            keep: Other files to keep; all files that are neither here nor in `files` are deleted.
        """
        kept = {KEPT, *keep}
        for path in sorted({*files, *self.files}):
            new, old = files.get(path), self.files.get(path)
            if new is None and old is not None:
                yield Change(path, "keep" if path in kept else "delete", old.size)
            elif new is not None:
                action = "add" if old is None else "keep" if _same(new, old) else "replace"
                yield Change(path, action, new.stat().st_size)

    def send(
        self,
        files: dict[str, Path],
        changes: Iterable[Change],
        private: bool | None,
        message: str,
        create_pr: bool = False,
    ) -> tuple[str | None, str]:
        """Commits changes; creates the repository and the branch if they do not exist.

        Args:
            files: Path in the repository -> local file.
            changes: Of `changes()`.
            private: Visibility of a new repository; `None` for the account's default.
            message: Commit message.
            create_pr: Whether to open a pull request instead.

        Returns:
            Id of the commit that holds the files now, and URL of the repository or the pull request.
        """
        with explained(self.repo, kind=self.kind):
            if not self.exists:
                self.api.create_repo(self.repo, private=private, repo_type=self.kind)
                # The Hub has created a .gitattributes in it.
                self.parent = self.api.repo_info(self.repo, repo_type=self.kind).sha
            if self.branch != MAIN and self.branch not in self.branches:
                self.api.create_branch(self.repo, branch=self.branch, revision=self.parent, repo_type=self.kind)
            operations: list[Any] = [
                CommitOperationDelete(change.path)
                if change.action == "delete"
                else CommitOperationAdd(change.path, str(files[change.path]))
                for change in changes
                if change.action != "keep"
            ]
            if not operations:
                return self.parent, self.page
            info = self.api.create_commit(
                self.repo,
                operations,
                commit_message=message,
                revision=self.branch,
                repo_type=self.kind,
                # If somebody else has pushed since `find`, the Hub refuses, so that their push is not reverted.
                parent_commit=self.parent,
                create_pr=create_pr,
            )
            return info.oid, info.pr_url or self.page


def _same(path: Path, remote: RepoFile) -> bool:
    """Whether a file equals the one on the Hub, by SHA-256 (LFS) or git's blob id (others)."""
    size = path.stat().st_size
    if size != remote.size:
        return False
    digest = hashlib.sha1(b"blob %d\0" % size) if remote.lfs is None else hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return bool(digest.hexdigest() == (remote.blob_id if remote.lfs is None else remote.lfs.sha256))


def readable_size(size: float) -> str:
    """A number of bytes with a unit."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
