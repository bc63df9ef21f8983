"""Who may write to the Hub, and what its answers mean in plain words; for models and for datasets."""

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
    """A repo's whole name, after a look at the token.

    Args:
        repo: "user/name", or the name alone for the account that the token belongs to.
        token: None: the one that `hf auth login` or HF_TOKEN has set.
        dry_run: whether nothing will be written: then a token need not be there, and may only read.

    Raises:
        PublishError: without a token, or with one that only reads.
    """
    known = token or get_token()
    if known is None and not dry_run:
        raise PublishError(
            "There is no token to publish with. Log in by `hf auth login`, or set HF_TOKEN; tokens that may write "
            f"are made at {constants.ENDPOINT}/settings/tokens."
        )
    with explained(repo):
        account = HfApi(token=token).whoami() if known is not None else {}
    access = (account.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read" and not dry_run:
        raise PublishError(f"The token of {account['name']} only reads; publishing needs one that may write.")
    if "/" in repo:
        return repo
    if not account:
        raise PublishError(f"Whose {repo}? Name it as user/{repo}, or log in.")
    return f"{account['name']}/{repo}"


def page_of(repo: str, kind: str = "model") -> str:
    """The address of a repo on the Hub."""
    return f"{constants.ENDPOINT}/{'' if kind == 'model' else kind + 's/'}{repo}"


_AGAIN = "Nothing is half done: the repo is as it was, or whole and new. Do the same again."
_UNCHANGED = "The repo is as it was: what lies in storage does not count until a commit names it."
# hf_xet raises ConnectionError for every answer that is an error, and says which in its message.
_XET_ANSWER = re.compile(r"HTTP status (?:client|server) error \((\d{3})[^)]*\), domain: (\S+)")
# huggingface_hub raises RuntimeError from the storage's answer to a file, and ValueError for a whole batch of them.
_UPLOADING = re.compile(r"Error while uploading '(.+)' to the Hub")
_BATCH = re.compile(r"LFS batch API returned errors:\s*(?:Encountered error for file with OID \w+: `?)?([^\n`]+)")


@contextmanager
def explained(repo: str, revision: str | None = None, kind: str = "model") -> Iterator[None]:
    """Turns what the Hub, its storage and the network answer into a PublishError that says what to do.

    Args:
        repo: user/name.
        revision: that was asked for.
        kind: of the repo, "model" or "dataset".
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
    """What an error means; None for those that neither the Hub nor the network gives."""
    if isinstance(error, HFValidationError):
        return PublishError(f'"{repo}" is neither a folder nor a name on the Hub (user/name): {error}')
    if isinstance(error, OfflineModeIsEnabled):
        return HubUnreachableError("The libraries are in offline mode; unset HF_HUB_OFFLINE.")
    if isinstance(error, GatedRepoError):
        return PublishError(f"{repo} is gated, and this token was not let in: ask at {page_of(repo, kind)}.")
    if isinstance(error, RepositoryNotFoundError):
        return PublishError(
            f"There is no repo {repo} at {constants.ENDPOINT} that this token may see. If it is private, log in by "
            "`hf auth login`, or give a token of someone who may."
        )
    if isinstance(error, RevisionNotFoundError):
        return PublishError(f"{repo} has no revision {revision}.")
    if (said := _of_storage(error, repo)) is not None:
        return PublishError(f"{repo}: {said}")
    if isinstance(error, HfHubHTTPError):
        status, reason = _answer(error)
        what = {
            401: "the token is not valid (any more). Log in again by `hf auth login`, or give another",
            403: f"this token has no right to that ({reason}). Take a token that may write to {repo.split('/')[0]}",
            409: f"the name is taken ({reason})",
            412: f"somebody else has pushed in the meantime. Look at {page_of(repo, kind)}, then push again",
        }.get(status, f"the Hub answered {status}: {reason}. {_AGAIN}")
        return PublishError(f"{repo}: {what}.")
    # Of an upload, the cause tells what broke.
    cause = error.__cause__ if _UPLOADING.match(str(error)) else error
    if isinstance(cause, (HTTPError, LocalEntryNotFoundError, ConnectionError, TimeoutError)):
        return HubUnreachableError(
            f"{repo}: the connection to {constants.ENDPOINT} failed or broke off ({type(cause).__name__}). {_AGAIN}"
        )
    return None


def _answer(error: HfHubHTTPError) -> tuple[int, str]:
    """The status, and the reason that the server gave."""
    response = error.response
    status = int(getattr(response, "status_code", None) or 0)
    reason = (getattr(response, "headers", None) or {}).get("X-Error-Message") or str(error).split("\n")[0]
    return status, reason


def _of_storage(error: Exception, repo: str) -> str | None:
    """What an answer of the storage for large files means; None for other errors.

    Large files do not go to the Hub itself: it gives signed addresses at other servers (LFS), or a token for those
    (Xet). The addresses are secrets, so only their host is named.
    """
    if refused := _BATCH.search(str(error)):
        return f"the storage for large files takes none of them: {refused[1].strip()}. {_UNCHANGED}"
    other_way = ""
    if found := _XET_ANSWER.search(str(error)):
        other_way = "HF_HUB_DISABLE_XET=1 goes another way, by LFS. "
        status, url, file = int(found[1]), found[2], "the large files"
        if "/xet-write-token/" in url and status in (401, 403):
            return (
                f"the Hub gives this token no right to upload large files (it answered {status}). Either the token "
                f"may not write to this repo (those that are fine-grained have rights repo by repo: see "
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
            f"the storage for large files ({host}) failed with {status}, several times, at {file}. The fault is not "
            f"on this side: look at https://status.huggingface.co, and push again later. {_UNCHANGED}"
        )
    return (
        f"the storage for large files ({host}) answered {status} to {file}, though the Hub itself had accepted the "
        f"token. A proxy or firewall may not let uploads through to {host}; or the address that the Hub signed has "
        f"expired: is this machine's clock right? {other_way}{_UNCHANGED}"
    )
