"""What goes wrong with the Hub, in a sentence: whose fault it is, and what to do."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, errors
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from effconvert.errors import EffconvertError, OptionError
from effconvert.hub.push_options import PushOptions

FULL = re.compile(r"storage|quota|upgrade your plan", re.IGNORECASE)
NETWORK: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # that of httpx or httpx2, whichever huggingface_hub uses
LONGEST = 300  # characters of what the Hub says


@contextmanager
def explained(api: HfApi, token: str, repo: str, options: PushOptions) -> Iterator[None]:
    """Turn what huggingface_hub raises while it pushes to `repo` into errors of ours, which never hold the token.

    Raises:
        OptionError: the token, the repository or the revision does not allow it.
        EffconvertError: the network or the Hub failed.
    """
    try:
        yield
    except (NETWORK, OSError, RuntimeError, ValueError) as error:  # the latter two: of a file's upload, and of what the Hub answered
        raise _explain(error, api, token, repo, options) from None


def _explain(error: Exception, api: HfApi, token: str, repo: str, options: PushOptions) -> EffconvertError:
    uploading = isinstance(error, RuntimeError) and error.__cause__ is not None
    cause = error.__cause__ if uploading else error
    said = _said(cause).replace(token, "(the token)")
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else 0
    if FULL.search(said) and status != 429:
        return EffconvertError(f"the Hub has no room for {repo} ({said}); make some, and the same command goes on where it stopped")
    if not isinstance(cause, HfHubHTTPError) or uploading or status >= 500 or status == 429:
        return EffconvertError(f"pushing to {repo} broke off ({said}); the same command goes on, and what has arrived is not sent again")
    if status == 401 and cause.response.headers.get("X-Error-Code") != "RepoNotFound":
        return OptionError(f"the Hub does not accept the token that is used here ({said}); run `hf auth login` with a new one, or set HF_TOKEN")
    if isinstance(cause, RevisionNotFoundError):
        return OptionError(f"{repo} has no revision {options.revision!r}; look at its branches on the Hub")
    if isinstance(cause, RepositoryNotFoundError):
        instead = "; leave --pr out to make it" if options.pr else ""
        return OptionError(f"the Hub shows no repository {repo} to the owner of this token{instead or '; look at its name, and at who owns it'}")
    if status == 403:
        return OptionError(f"no write access to {repo}: {_reason(api)}")
    return OptionError(f"the Hub refuses this for {repo} ({said})")


def _said(error: BaseException | None) -> str:
    """Return what the Hub said, or else what broke: on one line, and without addresses, which may be signed."""
    text = (error.server_message or f"HTTP {error.response.status_code}") if isinstance(error, HfHubHTTPError) else f"{type(error).__name__}: {error}"
    return re.sub(r"https?://\S+", "an address", " ".join(text.split()))[:LONGEST].rstrip(".")


def _reason(api: HfApi) -> str:
    """Say why a token may not write: because of what it is, or because of whose it is."""
    try:
        who = api.whoami()
        role = who["auth"]["accessToken"]["role"]
    except (NETWORK, OSError, KeyError, TypeError):
        return "use a token with write access to it (`hf auth login`)"
    if role == "read":
        return f"the token of {who['name']} may only read; make one with write access at huggingface.co/settings/tokens, then run `hf auth login`"
    return f"{who['name']} or this token may not write there; push to {who['name']}/…, open a pull request (--pr), or use a token with write access to it"
