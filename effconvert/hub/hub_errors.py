"""Errors of the Hub in one sentence: the cause, and what to do."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, errors
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from effconvert.errors import EffconvertError, OptionError
from effconvert.hub.push_options import PushOptions

FULL = re.compile(r"storage|quota|upgrade your plan", re.IGNORECASE)
NETWORK: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # of httpx or httpx2, whichever huggingface_hub uses
LONGEST = 300  # most characters of the Hub's message


@contextmanager
def explain_errors(api: HfApi, token: str, repo: str, options: PushOptions) -> Iterator[None]:
    """Turn exceptions of huggingface_hub while pushing to `repo` into our errors, which never contain the token.

    Raises:
        OptionError: the token, the repository or the revision does not allow the push.
        EffconvertError: the network or the Hub failed.
    """
    try:
        yield
    except (NETWORK, OSError, RuntimeError, ValueError) as error:  # the last two: of a file's upload, and of the Hub's answer
        raise _explain(error, api, token, repo, options) from None


def _explain(error: Exception, api: HfApi, token: str, repo: str, options: PushOptions) -> EffconvertError:
    uploading = isinstance(error, RuntimeError) and error.__cause__ is not None
    cause = error.__cause__ if uploading else error
    message = _message(cause).replace(token, "(the token)")
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else 0
    if FULL.search(message) and status != 429:
        return EffconvertError(f"the Hub has no space for {repo} ({message}); free some, and run the same command again: it resumes")
    if not isinstance(cause, HfHubHTTPError) or uploading or status >= 500 or status == 429:
        return EffconvertError(f"pushing to {repo} failed ({message}); run the same command again: it resumes, and does not send files twice")
    if status == 401 and cause.response.headers.get("X-Error-Code") != "RepoNotFound":
        return OptionError(f"the Hub does not accept this machine's token ({message}); run `hf auth login` with a new one, or set HF_TOKEN")
    if isinstance(cause, RevisionNotFoundError):
        return OptionError(f"{repo} has no revision {options.revision!r}; look at its branches on the Hub")
    if isinstance(cause, RepositoryNotFoundError):
        advice = "leave --pr out to create it" if options.pr else "check its name and owner"
        return OptionError(f"the Hub shows no repository {repo} to the owner of this token; {advice}")
    if status == 403:
        return OptionError(f"no write access to {repo}: {_reason(api)}")
    return OptionError(f"the Hub refuses this for {repo} ({message})")


def _message(error: BaseException | None) -> str:
    """Return the Hub's message, or else the exception: on one line, and without addresses, which may be signed."""
    text = (error.server_message or f"HTTP {error.response.status_code}") if isinstance(error, HfHubHTTPError) else f"{type(error).__name__}: {error}"
    return re.sub(r"https?://\S+", "an address", " ".join(text.split()))[:LONGEST].rstrip(".")


def _reason(api: HfApi) -> str:
    """Return why a token may not write: its role, or its owner."""
    try:
        who = api.whoami()
        role = who["auth"]["accessToken"]["role"]
    except (NETWORK, OSError, KeyError, TypeError):
        return "use a token with write access to it (`hf auth login`)"
    if role == "read":
        return f"the token of {who['name']} may only read; create one with write access at huggingface.co/settings/tokens, then run `hf auth login`"
    return f"{who['name']} or this token may not write there; push to {who['name']}/…, open a pull request (--pr), or use a token with write access to it"
