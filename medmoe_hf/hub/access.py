"""Access to the Hub, and plain messages for its errors; for models and datasets."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from medmoe_hf.errors import HubUnreachableError, PublishError


def writable(repo: str, token: str | None = None, dry_run: bool = False) -> str:
    """The full name of a repository, after checking the token.

    Args:
        repo: "user/name", or only the name for the account of the token.
        token: An access token; `None` for that of `hf auth login` or HF_TOKEN.
        dry_run: Whether nothing will be written; then no token or a read-only one is enough.

    Returns:
        "user/name".

    Raises:
        PublishError: Without a token, or with a read-only one.
    """
    known = token or get_token()
    if known is None and not dry_run:
        raise PublishError(
            "There is no token to publish with. Log in with `hf auth login`, or set HF_TOKEN; tokens with write "
            f"access are created at {constants.ENDPOINT}/settings/tokens."
        )
    with explained(repo):
        account = HfApi(token=token).whoami() if known is not None else {}
    access = (account.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read" and not dry_run:
        raise PublishError(f"The token of {account['name']} is read-only; publishing needs one with write access.")
    if "/" in repo:
        return repo
    if not account:
        raise PublishError(f"The owner of {repo} is missing: use user/{repo}, or log in.")
    return f"{account['name']}/{repo}"


def page_of(repo: str, kind: str = "model") -> str:
    """URL of a repository on the Hub."""
    return f"{constants.ENDPOINT}/{'' if kind == 'model' else kind + 's/'}{repo}"


_AGAIN = "The repo is either unchanged or completely updated. Run the same command again."
_UNCHANGED = "The repo is unchanged: uploaded files do not count until a commit refers to them."
# hf_xet raises ConnectionError for every HTTP error, with the status in its message.
_XET_ANSWER = re.compile(r"HTTP status (?:client|server) error \((\d{3})[^)]*\), domain: (\S+)")
# huggingface_hub raises RuntimeError if the storage refuses a file, and ValueError if it refuses a batch.
_UPLOADING = re.compile(r"Error while uploading '(.+)' to the Hub")
_BATCH = re.compile(r"LFS batch API returned errors:\s*(?:Encountered error for file with OID \w+: `?)?([^\n`]+)")


@contextmanager
def explained(repo: str, revision: str | None = None, kind: str = "model") -> Iterator[None]:
    """Turns errors of the Hub, its storage and the network into a PublishError that says what to do.

    Args:
        repo: "user/name".
        revision: The requested revision.
        kind: "model" or "dataset".
    """
    try:
        yield
    except PublishError:
        raise
    except Exception as error:
        explanation = _explanation(error, repo, revision, kind)
        if explanation is None:
            raise
        raise explanation from error


def _explanation(error: Exception, repo: str, revision: str | None, kind: str) -> PublishError | None:
    """The error to raise instead; `None` for errors of neither the Hub nor the network."""
    if isinstance(error, HFValidationError):
        return PublishError(f'"{repo}" is neither a folder nor the id of a repo on the Hub (user/name): {error}')
    if isinstance(error, OfflineModeIsEnabled):
        return HubUnreachableError("The libraries are in offline mode; unset HF_HUB_OFFLINE.")
    if isinstance(error, GatedRepoError):
        return PublishError(f"{repo} is gated, and this token has no access: request it at {page_of(repo, kind)}.")
    if isinstance(error, RepositoryNotFoundError):
        return PublishError(
            f"There is no repo {repo} at {constants.ENDPOINT} that this token can read. If it is private, log in with "
            "`hf auth login`, or use a token with access."
        )
    if isinstance(error, RevisionNotFoundError):
        return PublishError(f"{repo} has no revision {revision}.")
    if (said := _of_storage(error, repo)) is not None:
        return PublishError(f"{repo}: {said}")
    if isinstance(error, HfHubHTTPError):
        status, reason = _answer(error)
        what = {
            401: "the token is not valid (any more). Log in again with `hf auth login`, or use another token",
            403: f"this token has no permission ({reason}). Use a token with write access to {repo.split('/')[0]}",
            409: f"the name is taken ({reason})",
            412: f"somebody else has pushed in the meantime. Look at {page_of(repo, kind)}, then push again",
        }.get(status, f"the Hub answered {status}: {reason}. {_AGAIN}")
        return PublishError(f"{repo}: {what}.")
    # The cause of an upload error tells what failed.
    cause = error.__cause__ if _UPLOADING.match(str(error)) else error
    if isinstance(cause, (HTTPError, LocalEntryNotFoundError, ConnectionError, TimeoutError)):
        return HubUnreachableError(
            f"{repo}: the connection to {constants.ENDPOINT} failed or broke off ({type(cause).__name__}). {_AGAIN}"
        )
    return None


def _answer(error: HfHubHTTPError) -> tuple[int, str]:
    """HTTP status and the server's reason."""
    response = error.response
    status = int(getattr(response, "status_code", None) or 0)
    reason = (getattr(response, "headers", None) or {}).get("X-Error-Message") or str(error).split("\n")[0]
    return status, reason


def _of_storage(error: Exception, repo: str) -> str | None:
    """Message for an error of the storage for large files; `None` for other errors.

    Large files are not sent to the Hub itself: it returns signed URLs of other servers (LFS), or a token for those
    (Xet). The URLs are secrets, so only their host is named.
    """
    if refused := _BATCH.search(str(error)):
        return f"the storage for large files refuses them: {refused[1].strip()}. {_UNCHANGED}"
    other_way = ""
    if found := _XET_ANSWER.search(str(error)):
        other_way = "HF_HUB_DISABLE_XET=1 uses LFS instead. "
        status, url, file = int(found[1]), found[2], "the large files"
        if "/xet-write-token/" in url and status in (401, 403):
            return (
                f"this token has no permission to upload large files (HTTP status {status}). Either it has no write "
                f"access to this repo (fine-grained tokens have permissions per repo: see "
                f"{constants.ENDPOINT}/settings/tokens), or {repo.split('/')[0]} has no storage left "
                f"({constants.ENDPOINT}/settings/billing). {_UNCHANGED}"
            )
    else:
        uploading = _UPLOADING.match(str(error))
        answer = error.__cause__ if uploading else error
        if not isinstance(answer, HfHubHTTPError):
            return None
        url = str(answer.response.request.url)
        if uploading is None and urlsplit(url).netloc == urlsplit(constants.ENDPOINT).netloc:
            return None
        status, file = _answer(answer)[0], uploading[1] if uploading else "the file"
    host = urlsplit(url).netloc or url
    if status >= 500:
        return (
            f"the storage for large files ({host}) failed repeatedly with status {status} at {file}. The fault is on "
            f"the server: see https://status.huggingface.co, and push again later. {_UNCHANGED}"
        )
    return (
        f"the storage for large files ({host}) answered {status} to {file}, although the Hub accepted the token. "
        f"A proxy or firewall may block uploads to {host}; or the signed URL has expired: check this machine's clock. "
        f"{other_way}{_UNCHANGED}"
    )
