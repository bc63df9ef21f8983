"""A Hub on this machine, in memory: what the unmodified clients (huggingface_hub, transformers, datasets) ask of one.

Every file goes the "regular" way, inside the commit: the answer to preupload says so, which leaves LFS and Xet out,
unless a test sets `large_files`. Weights are nevertheless listed as the Hub lists them, as LFS files with a sha256.
Commits are atomic: a request that is cut off changes nothing.
"""

import base64
import binascii
import hashlib
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest
import yaml

_DATE = "2026-01-01T00:00:00.000Z"
_LFS = (".safetensors", ".parquet", ".tar", ".bin", ".png")
# What the settings of the clients in the environment begin with.
_CLIENTS = ("HF_", "HUGGING", "TRANSFORMERS_")
_API = re.compile(r"/api/(model|dataset|space)s/(?P<id>[^/]+(?:/[^/]+)?)(?:/(?P<rest>.*))?")
_ACTIONS = (
    r"(?:revision|tree|paths-info|preupload|commit|commits|refs|branch|tag|discussions|settings|xet-write-token)"
)
_RESOLVE = re.compile(r"/(?:(dataset|space)s/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class Account:
    """Whom a token belongs to.

    Attributes:
        name: of the user.
        role: what the token may do, "read" or "write".
        organizations: namespaces that the user may write to, besides their own.
        accepted: gated repos that the user was let into.
    """

    name: str
    role: str = "write"
    organizations: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()

    def writes_to(self, namespace: str) -> bool:
        return self.role == "write" and namespace in (self.name, *self.organizations)


@dataclass
class Commit:
    """One state of a repo: what each path holds."""

    files: dict[str, bytes]
    title: str
    parent: str | None
    author: str

    @property
    def id(self) -> str:
        state = {path: blob_id(content) for path, content in sorted(self.files.items())}
        return hashlib.sha1(json.dumps([state, self.title, self.parent, self.author]).encode()).hexdigest()


@dataclass
class Repo:
    """A repo and its history; `branches`, `tags` and `pull_requests` (by number) name commits."""

    private: bool
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[int, str] = field(default_factory=dict)

    def add(self, commit: Commit) -> str:
        self.commits[commit.id] = commit
        return commit.id

    def find(self, revision: str) -> str | None:
        """The id of the commit that a branch, a tag, a pull request's ref or (the start of) an id names."""
        if revision in self.branches or revision in self.tags:
            return self.branches.get(revision) or self.tags[revision]
        if match := re.fullmatch(r"refs/pr/(\d+)", revision):
            return self.pull_requests.get(int(match[1]))
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            return next((name for name in self.commits if name.startswith(revision)), None)
        return None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """What the repo holds at a revision."""
        found = self.find(revision)
        if found is None:
            raise KeyError(revision)
        return self.commits[found].files


class _Answer(Exception):
    """Ends a request: a status, headers and a body."""

    def __init__(self, status: int, body: Any = b"", **headers: str) -> None:
        super().__init__(status)
        self.status, self.body = status, body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def _refused(status: int, message: str, code: str | None = None, **headers: str) -> _Answer:
    if code is not None:
        headers["X_Error_Code"] = code
    return _Answer(status, {"error": message}, X_Error_Message=message, **headers)


def blob_id(content: bytes) -> str:
    """git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class LoopbackHub:
    """The server; a context manager.

    Attributes:
        url: for `HF_ENDPOINT`.
        accounts: token -> whom it belongs to. There are `hf_write` of "user" and `hf_read` of "user", `hf_other` of
            "other"; a test may add more.
        repos: (type, id) -> repo; type is "model", "dataset" or "space".
        requests: (method, path with query) of every request so far.
        unknown: those of them that the Hub might answer, and this server cannot. A test of a client should find none.
        page_size: entries that a listing of files has a page.
        large_files: whether files that LFS takes go to the storage, which is this server under the name "localhost".
            By LFS, that works; clients with Xet get a token, and then only refusals.
        storage_refusal: a status and a reason, which the storage answers to every upload.
        xet_token_refusal: a status and a reason, which the Hub answers to whoever asks for a token of Xet's.
    """

    def __init__(self) -> None:
        self.accounts = {
            "hf_write": Account("user"),
            "hf_read": Account("user", role="read"),
            "hf_other": Account("other"),
        }
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.unknown: list[tuple[str, str]] = []
        self.page_size = 1000
        self.large_files = False
        self.storage_refusal: tuple[int, str] | None = None
        self.xet_token_refusal: tuple[int, str] | None = None
        self._stored: dict[str, bytes] = {}
        self._lock = threading.RLock()
        self._cuts: dict[int, bool] = {}
        self._commits = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def cut_commit(self, number: int = 1, applied: bool = False) -> None:
        """Resets the connection in the middle of a commit to come.

        Args:
            number: which one, 1 for the next.
            applied: whether the commit is whole when that happens, and only the answer is lost.
        """
        self._cuts[self._commits + number] = applied

    def repo(self, name: str = "user/medmoe", kind: str = "model") -> Repo:
        return self.repos[kind, name]

    def sent(self) -> list[tuple[str, str]]:
        """The requests so far that may change something."""
        return [(method, path) for method, path in self.requests if method not in ("GET", "HEAD")]

    def create(self, name: str, kind: str = "model", private: bool = False, files: Mapping[str, bytes] = {}) -> Repo:
        """Makes a repo as the Hub's website would."""
        repo = self.repos[kind, name] = Repo(private)
        first = Commit({".gitattributes": b"*.safetensors filter=lfs\n", **files}, "initial commit", None, "system")
        repo.branches["main"] = repo.add(first)
        return repo

    def environment(self, home: str | Path, token: str | None = None) -> dict[str, str]:
        """For a process whose clients talk to this Hub.

        Args:
            home: its `HF_HOME`, with all caches.
            token: as if it were logged in.
        """
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_CLIENTS)}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            "OMP_NUM_THREADS": "1",
            **({} if token is None else {"HF_TOKEN": token}),
        }

    def use(self, monkeypatch: pytest.MonkeyPatch, home: str | Path, token: str | None = None) -> None:
        """Makes the clients of this process talk to this Hub: their constants were read when they were imported.

        Args:
            monkeypatch: ends it with the test.
            home: a fresh folder for their cache.
            token: as if logged in.
        """
        from huggingface_hub import constants
        from transformers.utils import hub as transformers_hub

        for name, value in {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(Path(home) / "hub"),
            "HF_TOKEN_PATH": str(Path(home) / "token"),
            "HF_STORED_TOKENS_PATH": str(Path(home) / "stored_tokens"),
            "HF_HUB_DISABLE_TELEMETRY": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(transformers_hub, "_hf_api", None)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        self._body: bytes | None = None
        self.hub.requests.append((self.command, self.path))
        try:
            # The storage has tokens of its own.
            self.account = None if parts.path.startswith("/storage/") else self._account()
            answer = self._answer(parts.path)
        except _Answer as refusal:
            answer = refusal
        except ConnectionResetError:
            # An RST, and not an orderly end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        if self._body is None:
            self._read()
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        self.send_header("Content-Length", answer.headers.pop("Content-Length", str(len(body))))
        if not isinstance(answer.body, bytes):
            self.send_header("Content-Type", "application/json")
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _read(self, share: float = 1.0) -> bytes:
        """The request's body, or its beginning."""
        length = int(int(self.headers.get("Content-Length") or 0) * share)
        self._body = self.rfile.read(length) if length else b""
        return self._body

    def _json(self) -> dict[str, Any]:
        return json.loads(self._read() or b"{}")

    def _account(self) -> Account | None:
        scheme, _, token = (self.headers.get("Authorization") or "").partition(" ")
        if not scheme:
            return None
        if token not in self.hub.accounts:
            raise _refused(401, "Invalid credentials in Authorization header")
        return self.hub.accounts[token]

    def _answer(self, path: str) -> _Answer:
        with self.hub._lock:
            if path == "/api/whoami-v2":
                return self._whoami()
            if path == "/api/repos/create":
                return self._create()
            if path == "/api/validate-yaml":
                return self._validate_yaml()
            if path == "/api/agent-harnesses":
                return _Answer(404)
            if match := re.fullmatch(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
                return self._lfs_batch(self._repo(match[1] or "model", unquote(match[2]), write=True))
            if path.startswith("/storage/"):
                return self._storage(path.removeprefix("/storage/"))
            if match := _RESOLVE.fullmatch(path):
                repo = self._repo(match[1] or "model", unquote(match["id"]), content=True)
                return self._file(repo, unquote(match["revision"]), unquote(match["path"]))
            if match := _API.fullmatch(path):
                name, rest = unquote(match["id"]), match["rest"] or ""
                if "/" in name and re.fullmatch(_ACTIONS, name.split("/")[1]):
                    name, rest = name.split("/")[0], f"{name.split('/')[1]}/{rest}"
                return self._of_repo(match[1], name, rest)
            return self._is_unknown()

    def _is_unknown(self) -> _Answer:
        self.hub.unknown.append((self.command, self.path))
        return _refused(404, "Sorry, we can't find the page you are looking for.")

    # Accounts and repos

    def _whoami(self) -> _Answer:
        if self.account is None:
            raise _refused(401, "Invalid username or password.")
        return _Answer(
            200,
            {
                "type": "user",
                "name": self.account.name,
                "fullname": self.account.name,
                "orgs": [{"type": "org", "name": name} for name in self.account.organizations],
                "auth": {
                    "type": "access_token",
                    "accessToken": {"displayName": "a token", "role": self.account.role, "createdAt": _DATE},
                },
            },
        )

    def _create(self) -> _Answer:
        asked = self._json()
        if self.account is None:
            raise _refused(401, "Invalid username or password.")
        kind, namespace = asked.get("type") or "model", asked.get("organization") or self.account.name
        name = f"{namespace}/{asked['name']}"
        if not self.account.writes_to(namespace):
            raise _refused(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
        prefix = "" if kind == "model" else f"{kind}s/"
        url = f"{self.hub.url}/{prefix}{name}"
        if (kind, name) in self.hub.repos:
            return _Answer(409, {"error": f"You already created this {kind} repo", "url": url})
        self.hub.create(name, kind, private=asked.get("visibility") == "private" or asked.get("private") is True)
        return _Answer(200, {"url": url, "name": name, "id": name})

    def _validate_yaml(self) -> _Answer:
        content = self._json()["content"]
        match = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        try:
            yaml.safe_load(match[1] if match else "")
        except yaml.YAMLError as error:
            return _Answer(400, {"errors": [{"message": f"Metadata is no YAML: {error}"}], "warnings": []})
        return _Answer(200, {"errors": [], "warnings": []})

    def _repo(self, kind: str, name: str, content: bool = False, write: bool = False) -> Repo:
        """The repo, if the account may see it (and read its files, or write to it)."""
        repo, account, namespace = self.hub.repos.get((kind, name)), self.account, name.split("/")[0]
        member = account is not None and namespace in (account.name, *account.organizations)
        if repo is None or (repo.private and not member):
            # To those without a token the Hub does not even say whether there is one.
            message = "Invalid username or password." if account is None else "Repository not found"
            raise _refused(401 if account is None else 404, message, "RepoNotFound")
        if content and repo.gated and not (member or (account is not None and name in account.accepted)):
            message = f"Access to {kind} {name} is restricted. You must have access to it and be authenticated."
            raise _refused(401 if account is None else 403, message, "GatedRepo")
        if write and account is None:
            raise _refused(401, "Invalid username or password.")
        if write and account is not None and not account.writes_to(namespace):
            raise _refused(403, f"Forbidden: you must use a write token to upload to {name}, and have the rights to")
        return repo

    def _commit_id(self, repo: Repo, revision: str) -> str:
        found = repo.find(revision)
        if found is None:
            raise _refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def _of_repo(self, kind: str, name: str, rest: str) -> _Answer:
        action, _, argument = rest.partition("/")
        writes = action in ("commit", "branch", "tag") and self.command != "GET" and "create_pr" not in self.query
        repo = self._repo(kind, name, write=writes)
        if self.command == "GET" and action in ("", "revision"):
            return self._info(repo, kind, name, unquote(argument) or "main")
        if self.command == "GET" and action == "tree":
            revision, _, folder = argument.partition("/")
            return self._tree(repo, unquote(revision), unquote(folder))
        if self.command == "POST" and action == "paths-info":
            return self._paths_info(repo, unquote(argument))
        if self.command == "GET" and action == "refs":
            return self._refs(repo)
        if self.command == "GET" and action == "commits":
            return self._history(repo, unquote(argument))
        if self.command == "GET" and action == "discussions":
            return _Answer(200, {"discussions": [], "count": 0, "start": 0})
        if self.command == "GET" and action == "xet-write-token":
            return self._xet_token()
        if self.command == "POST" and action == "preupload":
            return self._preupload(repo, unquote(argument))
        if self.command == "POST" and action == "commit":
            return self._commit(repo, kind, name, unquote(argument))
        if self.command == "POST" and action == "branch":
            return self._point(repo, repo.branches, unquote(argument), self._json().get("startingPoint") or "main")
        if self.command == "POST" and action == "tag":
            return self._point(repo, repo.tags, self._json()["tag"], unquote(argument))
        return self._is_unknown()

    # Reading

    def _info(self, repo: Repo, kind: str, name: str, revision: str) -> _Answer:
        commit = self._commit_id(repo, revision)
        files = repo.commits[commit].files
        front = re.match(rb"---\n(.*?)\n---", files.get("README.md", b""), re.DOTALL)
        card = (yaml.safe_load(front[1]) if front else None) or {}
        return _Answer(
            200,
            {
                "_id": commit[:24],
                "id": name,
                "modelId": name,
                "author": name.split("/")[0],
                "sha": commit,
                "lastModified": _DATE,
                "createdAt": _DATE,
                "private": repo.private,
                "gated": "auto" if repo.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": card.get("tags") or [],
                "cardData": card,
                "siblings": [{"rfilename": path} for path in sorted(files)],
                **({"pipeline_tag": card.get("pipeline_tag")} if kind == "model" else {}),
            },
        )

    def _entries(self, files: dict[str, bytes]) -> dict[str, dict[str, Any]]:
        """What a listing says of each file and of each folder."""
        entries: dict[str, dict[str, Any]] = {}
        for path, content in sorted(files.items()):
            for end in [match.start() for match in re.finditer("/", path)]:
                folder = path[:end]
                oid = hashlib.sha1(folder.encode()).hexdigest()
                entries.setdefault(folder, {"type": "directory", "oid": oid, "size": 0, "path": folder})
            entries[path] = {"type": "file", "oid": blob_id(content), "size": len(content), "path": path}
            if path.endswith(_LFS):
                digest = hashlib.sha256(content).hexdigest()
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n"
                entries[path]["oid"] = blob_id(pointer.encode())
                entries[path]["lfs"] = {"oid": digest, "size": len(content), "pointerSize": len(pointer)}
        return entries

    def _tree(self, repo: Repo, revision: str, folder: str) -> _Answer:
        files = repo.commits[self._commit_id(repo, revision)].files
        prefix = f"{folder}/" if folder else ""
        found = [entry for path, entry in self._entries(files).items() if path.startswith(prefix)]
        if folder and not found:
            raise _refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        if self.query.get("recursive", "").lower() != "true":
            found = [entry for entry in found if "/" not in entry["path"][len(prefix) :]]
        start = int(self.query.get("cursor", "0"))
        end = start + self.hub.page_size
        headers = {}
        if end < len(found):
            recursive = self.query.get("recursive", "false")
            address = f"{self.hub.url}{urlsplit(self.path).path}?recursive={recursive}&cursor={end}"
            headers["Link"] = f'<{address}>; rel="next"'
        return _Answer(200, found[start:end], **headers)

    def _paths_info(self, repo: Repo, revision: str) -> _Answer:
        files = repo.commits[self._commit_id(repo, revision)].files
        body = self._read()
        if "json" in self.headers.get("Content-Type", ""):
            paths = json.loads(body)["paths"]
        else:
            paths = parse_qs(body.decode()).get("paths", [])
        entries = self._entries(files)
        return _Answer(200, [entries[path] for path in paths if path in entries])

    def _refs(self, repo: Repo) -> _Answer:
        def listed(names: dict[str, str], kind: str) -> list[dict[str, str]]:
            return [
                {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit} for name, commit in names.items()
            ]

        pulls = {str(number): commit for number, commit in repo.pull_requests.items()}
        return _Answer(
            200,
            {
                "branches": listed(repo.branches, "heads"),
                "tags": listed(repo.tags, "tags"),
                "converts": [],
                "pullRequests": listed(pulls, "pr"),
            },
        )

    def _history(self, repo: Repo, revision: str) -> _Answer:
        lines, commit = [], self._commit_id(repo, revision)
        while commit is not None:
            state = repo.commits[commit]
            line = {"id": commit, "title": state.title, "message": "", "date": _DATE}
            lines.append({**line, "authors": [{"user": state.author}]})
            commit = state.parent
        return _Answer(200, lines)

    def _file(self, repo: Repo, revision: str, path: str) -> _Answer:
        commit = self._commit_id(repo, revision)
        content = repo.commits[commit].files.get(path)
        if content is None:
            raise _refused(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit)
        entry = self._entries({path: content})[path]
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {
            "X_Repo_Commit": commit,
            "ETag": f'"{etag}"',
            "Accept_Ranges": "bytes",
            "Content_Type": "application/octet-stream",
            "Content_Disposition": f"inline; filename*=UTF-8''{quote(path.split('/')[-1])}",
        }
        if "lfs" in entry:
            headers |= {"X_Linked_ETag": f'"{etag}"', "X_Linked_Size": str(len(content))}
        status, size = 200, len(content)
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or ""):
            if match[1]:
                start, end = int(match[1]), min(int(match[2] or size - 1), size - 1)
            else:
                start, end = max(size - int(match[2]), 0), size - 1
            if start >= size or end < start:
                return _Answer(416, Content_Range=f"bytes */{size}")
            status, content = 206, content[start : end + 1]
            headers["Content_Range"] = f"bytes {start}-{end}/{size}"
        return _Answer(status, content, **headers)

    # Storage of large files

    @property
    def _storage_url(self) -> str:
        return self.hub.url.replace("127.0.0.1", "localhost") + "/storage"

    def _lfs_batch(self, repo: Repo) -> _Answer:
        objects = []
        for asked in self._json()["objects"]:
            known = asked["oid"] in self.hub._stored
            place = {"upload": {"href": f"{self._storage_url}/{asked['oid']}?X-Amz-Signature=0123"}}
            objects.append({**asked, **({} if known else {"actions": place})})
        return _Answer(200, {"transfer": "basic", "objects": objects})

    def _storage(self, oid: str) -> _Answer:
        content = self._read()
        if self.hub.storage_refusal is not None:
            status, reason = self.hub.storage_refusal
            return _Answer(status, f"<Error><Code>{reason}</Code></Error>".encode(), Content_Type="application/xml")
        if self.command != "PUT" or hashlib.sha256(content).hexdigest() != oid:
            return self._is_unknown()
        self.hub._stored[oid] = content
        return _Answer(200)

    def _xet_token(self) -> _Answer:
        if self.hub.xet_token_refusal is not None:
            raise _refused(*self.hub.xet_token_refusal)
        return _Answer(
            200,
            {"casUrl": self._storage_url, "accessToken": "xet", "exp": 4102444800},
            X_Xet_Cas_Url=self._storage_url,
            X_Xet_Access_Token="xet",
            X_Xet_Token_Expiration="4102444800",
        )

    # Writing

    def _preupload(self, repo: Repo, revision: str) -> _Answer:
        files = repo.commits[self._commit_id(repo, revision)].files
        listed = self._json()["files"]
        oids = {path: blob_id(content) for path, content in files.items()}
        answers = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if self.hub.large_files and file["path"].endswith(_LFS) else "regular",
                "shouldIgnore": False,
                **({"oid": oids[file["path"]]} if file["path"] in oids else {}),
            }
            for file in listed
        ]
        return _Answer(200, {"files": answers, "commitOid": self._commit_id(repo, revision)})

    def _commit(self, repo: Repo, kind: str, name: str, revision: str) -> _Answer:
        self.hub._commits += 1
        applied = self.hub._cuts.pop(self.hub._commits, None)
        if applied is False:
            self._read(share=0.5)
            raise ConnectionResetError
        if self.account is None:
            raise _refused(401, "Invalid username or password.")
        lines = [json.loads(line) for line in self._read().splitlines() if line.strip()]
        if not lines or lines[0]["key"] != "header":
            raise _refused(400, "The first line of a commit must be its header")
        header, pull = lines[0]["value"], "create_pr" in self.query
        branch = revision in repo.branches
        number = re.fullmatch(r"refs/pr/(\d+)", revision)
        if not branch and not (number and int(number[1]) in repo.pull_requests):
            raise _refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        head, parent = self._commit_id(repo, revision), header.get("parentCommit")
        if parent is not None:
            named = self._commit_id(repo, parent)
            if named != head and not pull:
                raise _refused(412, "A commit has happened since. Please refresh and try again.")
            head = named
        commit = Commit(self._changed(repo.commits[head].files, lines[1:]), header["summary"], head, self.account.name)
        if not commit.title:
            raise _refused(400, "A commit needs a summary")
        made = repo.add(commit)
        prefix = "" if kind == "model" else f"{kind}s/"
        answer = {"success": True, "commitOid": made, "commitUrl": f"{self.hub.url}/{prefix}{name}/commit/{made}"}
        if pull:
            new = len(repo.pull_requests) + 1
            repo.pull_requests[new] = made
            answer["pullRequestUrl"] = f"{self.hub.url}/{prefix}{name}/discussions/{new}"
        elif branch:
            repo.branches[revision] = made
        elif number:
            repo.pull_requests[int(number[1])] = made
        if applied:
            raise ConnectionResetError
        return _Answer(200, answer)

    def _changed(self, files: dict[str, bytes], lines: list[dict[str, Any]]) -> dict[str, bytes]:
        files = dict(files)
        for line in lines:
            key, value = line["key"], line["value"]
            path = value["path"]
            if key == "file" and value["encoding"] == "base64":
                try:
                    files[path] = base64.b64decode(value["content"], validate=True)
                except binascii.Error as error:
                    raise _refused(400, f"{path}: content is no base64") from error
            elif key == "deletedFile":
                if path not in files:
                    raise _refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                del files[path]
            elif key == "lfsFile" and value["oid"] in self.hub._stored:
                files[path] = self.hub._stored[value["oid"]]
            elif key == "deletedFolder":
                files = {name: content for name, content in files.items() if not name.startswith(f"{path}/")}
            else:
                raise _refused(400, f"{key}: this Hub takes only regular files, as its preupload says")
        return files

    def _point(self, repo: Repo, names: dict[str, str], name: str, revision: str) -> _Answer:
        """A new branch or tag."""
        commit = self._commit_id(repo, revision)
        if name in repo.branches or name in repo.tags:
            raise _refused(409, f"Reference already exists: {name}")
        names[name] = commit
        return _Answer(200, {})
