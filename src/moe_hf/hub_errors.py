"""Turns an error of the Hub into one line that says what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

import huggingface_hub
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from .errors import InputError, first_line

# Seconds that the Hub may take to say who is logged in.
PATIENCE = 30
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
ADVICE = {
    401: f"the Hub does not know this token: {LOG_IN}",
    403: "this token may not write there: use a token with the role 'write', or your own namespace",
    404: "this namespace or repository does not exist, or this token may not see it",
    413: "a file is too large for the Hub: use a smaller --max_shard_size",
    429: "the Hub asks for fewer requests: try again in a few minutes",
}


def check_repo_id(repo_id: str, argument: str = "repo") -> None:
    """Check the name of a repository.

    Args:
        repo_id: the name, such as me/my-moe.
        argument: the argument's name in error messages.

    Raises:
        InputError: `repo_id` is not a valid name of a repository.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{argument}={repo_id!r}: {first_line(error)}") from error


def check_upload(repo_id: str, argument: str = "repo", token: str | None = None) -> None:
    """Check that the user who is logged in may write into a namespace. Call it before work that could be lost.

    Args:
        repo_id: the repository's name. Without a namespace, the user's namespace is meant.
        argument: the argument's name in error messages.
        token: the Hub token; None for the token of the login.

    Raises:
        InputError: the name is not allowed, nobody is logged in, the Hub cannot be reached, or the token may not write
            there.
    """
    check_repo_id(repo_id, argument)
    with naming_hub_errors(argument, repo_id), _time_limit(PATIENCE):
        user = huggingface_hub.HfApi(token=token).whoami()
    space, _, _ = repo_id.rpartition("/")
    own = [user.get("name"), *(organisation.get("name") for organisation in user.get("orgs") or [])]
    if space and space not in own:
        raise InputError(f"{argument}={repo_id!r}: {space!r} is not a namespace of this login, use one of {own}")
    if ((user.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise InputError(f"{argument}={repo_id!r}: the token may only read, {LOG_IN} with a token of the role 'write'")


@contextmanager
def naming_hub_errors(argument: str, repo_id: str) -> Iterator[None]:
    """Turn an error of a request to the Hub into one line.

    Args:
        argument: the argument's name in error messages.
        repo_id: the argument's value.

    Raises:
        InputError: the request failed.
    """
    try:
        with _time_limit(300):
            yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{argument}={repo_id!r}: {_advice(error)}") from error


def _advice(error: Exception) -> str:
    if isinstance(error, LocalTokenNotFoundError):
        return f"nobody is logged in: {LOG_IN}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be uploaded"
    cause, request = error, None
    while cause is not None and not isinstance(request, HTTPError):  # the library wraps errors of an upload
        request, cause = cause, cause.__cause__
    if isinstance(request, HfHubHTTPError):
        status = request.response.status_code
        if status in ADVICE:
            return ADVICE[status]
        return f"the Hub answered {status} ({first_line(request)})" + ("; try again later" if status >= 500 else "")
    if isinstance(request, HTTPError):
        url, kind = huggingface_hub.constants.ENDPOINT, type(request).__name__
        return f"{url} does not answer ({kind}: {first_line(request)}); check the network"
    return first_line(error)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Limit the time of each request to the Hub: the library would wait for an answer forever."""
    session = huggingface_hub.utils.get_session()
    before, session.timeout = session.timeout, seconds
    try:
        yield
    finally:
        session.timeout = before
