"""The state of a repo on the Hub, what a push would change in it, and the one commit that does it.

`upload_folder` may make several commits of one upload (where hf_xet is installed), so `create_commit` is used here.
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
"""The Hub writes it into a new repo; without it large files would be stored as text."""


@dataclass(frozen=True)
class Change:
    """What a push does to one file.

    Attributes:
        path: in the repo.
        action: "add", "replace", "delete" or "keep"; "send" where the repo's state is unknown.
        size: in bytes, of the new file; of the old one for "delete".
    """

    path: str
    action: str
    size: int

    def __str__(self) -> str:
        return f"{self.action:<8} {readable_size(self.size):>9}  {self.path}"


@dataclass
class Remote:
    """A repo's state when it was read, and what can be done to that state.

    Attributes:
        api: with the token.
        repo: user/name.
        kind: of the repo.
        branch: to commit to.
        exists: whether the repo is there; without it the other attributes are empty.
        private: its visibility.
        parent: the commit that was read: the branch's, or main's for a branch to be made.
        branches: name -> commit.
        tags: name -> commit.
        files: path -> entry, at `parent`.
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
        """Reads the repo, and who the token belongs to.

        Raises:
            PublishError: without a token (a dry run needs none), or with one that only reads.
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
                raise PublishError(f"{repo} has no branch {found.branch} and no {MAIN} to begin one at.")
            listed = api.list_repo_tree(repo, recursive=True, revision=found.parent, repo_type=kind)
            found.files = {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}
        return found

    @property
    def page(self) -> str:
        """The repo's address on the Hub."""
        return page_of(self.repo, self.kind)

    def accept(self, private: bool | None, create_pr: bool) -> None:
        """Checks the visibility that was asked for, and that a pull request has a repo to go to.

        Raises:
            PublishError: if either does not hold.
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

    def read(self, path: str) -> bytes:
        """The content of a file, at `parent`."""
        with explained(self.repo, kind=self.kind):
            place = self.api.hf_hub_download(self.repo, path, revision=self.parent, repo_type=self.kind)
        return Path(place).read_bytes()

    def changes(self, files: dict[str, Path], keep: Iterable[str] = ()) -> Iterator[Change]:
        """What makes the repo hold `files`, by path.

        Args:
            files: path in the repo -> local file.
            keep: what stays of the files that are not among them; all others are deleted.
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
        """Makes the repo and the branch where they are missing, and the commit.

        Returns:
            the id of the commit that holds the files now, and the address of the repo or of the pull request.
        """
        with explained(self.repo, kind=self.kind):
            if not self.exists:
                self.api.create_repo(self.repo, private=private, repo_type=self.kind)
                # The Hub has put a .gitattributes into it.
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
                # If somebody else has pushed since `find`, the Hub refuses, and their push is not undone.
                parent_commit=self.parent,
                create_pr=create_pr,
            )
            return info.oid, info.pr_url or self.page


def _same(path: Path, remote: RepoFile) -> bool:
    """Whether a file is what the Hub has: by sha256 for what lies in LFS, by git's name of it for the others."""
    size = path.stat().st_size
    if size != remote.size:
        return False
    digest = hashlib.sha1(b"blob %d\0" % size) if remote.lfs is None else hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return bool(digest.hexdigest() == (remote.blob_id if remote.lfs is None else remote.lfs.sha256))


def readable_size(size: float) -> str:
    """A number of bytes as people write it."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
