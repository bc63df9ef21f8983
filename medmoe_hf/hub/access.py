"""Who may write to the Hub, and what its answers mean in plain words; for models and for datasets."""

from collections.abc import Iterator
from contextlib import contextmanager

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

from medmoe_hf.hub.folder_checks import PublishError


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


@contextmanager
def explained(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turns what the Hub and the network answer into a PublishError that says what to do."""
    again = "Nothing is half done: the repo is as it was, or whole and new. Do the same again."
    try:
        yield
    except HFValidationError as error:
        raise PublishError(f'"{repo}" is neither a folder nor a name on the Hub (user/name): {error}') from error
    except OfflineModeIsEnabled as error:
        raise PublishError("The libraries are in offline mode; unset HF_HUB_OFFLINE.") from error
    except GatedRepoError as error:
        raise PublishError(
            f"{repo} is gated, and this token was not let in: ask at {constants.ENDPOINT}/{repo}."
        ) from error
    except RepositoryNotFoundError as error:
        raise PublishError(
            f"There is no repo {repo} at {constants.ENDPOINT} that this token may see. If it is private, log in by "
            "`hf auth login`, or give a token of someone who may."
        ) from error
    except RevisionNotFoundError as error:
        raise PublishError(f"{repo} has no revision {revision}.") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        reason = (getattr(error.response, "headers", None) or {}).get("X-Error-Message") or str(error).split("\n")[0]
        what = {
            401: "the token is not valid (any more). Log in again by `hf auth login`, or give another",
            403: f"this token has no right to that ({reason}). Take a token that may write to {repo.split('/')[0]}",
            409: f"the name is taken ({reason})",
            412: f"somebody else has pushed in the meantime. Look at {constants.ENDPOINT}/{repo}, then push again",
        }.get(status or 0, f"the Hub answered {status}: {reason}. {again}")
        raise PublishError(f"{repo}: {what}.") from error
    except (HTTPError, LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        raise PublishError(
            f"{repo}: the connection to {constants.ENDPOINT} failed or broke off ({type(error).__name__}). {again}"
        ) from error
