"""Turns a refusal of the Hub into one line that says what to do."""

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
LOG_IN = "log in by `hf auth login`, or set HF_TOKEN"
ADVICE = {
    401: f"the Hub does not know this token: {LOG_IN}",
    403: "this token may not write there: take a token with the role write, or a name space of yours",
    404: "there is no such name space or repository, or this token may not see it",
    413: "a file is too large for the Hub: give a smaller --max_shard_size",
    429: "the Hub asks for fewer requests: try again in some minutes",
}


def check_repo_id(repo_id: str, argument: str = "repo") -> None:
    """Check the name of a repository.

    Args:
        repo_id: such as me/my-moe.
        argument: what the user calls it.

    Raises:
        InputError: it cannot be the name of a repository.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{argument}={repo_id!r}: {first_line(error)}") from error


def check_upload(repo_id: str, argument: str = "repo", token: str | None = None) -> None:
    """Check that whoever is logged in may write into a name space; to be called before work that could be lost.

    Args:
        repo_id: with the name space, or without for the user's own.
        argument: what the user calls it.
        token: None for that of the login.

    Raises:
        InputError: the name is not allowed, nobody is logged in, the Hub cannot be reached, or this token may not
            write there.
    """
    check_repo_id(repo_id, argument)
    with naming_hub_errors(argument, repo_id), _time_limit(PATIENCE):
        user = huggingface_hub.HfApi(token=token).whoami()
    space, _, _ = repo_id.rpartition("/")
    own = [user.get("name"), *(organisation.get("name") for organisation in user.get("orgs") or [])]
    if space and space not in own:
        raise InputError(f"{argument}={repo_id!r}: {space!r} is none of the name spaces of this login, {own}")
    if ((user.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise InputError(f"{argument}={repo_id!r}: the token may only read, {LOG_IN} with a token of the role write")


@contextmanager
def naming_hub_errors(argument: str, repo_id: str) -> Iterator[None]:
    """Turn an error of a request to the Hub into one line.

    Args:
        argument: that `repo_id` was given for.
        repo_id: as the user gave it.

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
    while cause is not None and not isinstance(request, HTTPError):  # the library wraps what breaks in an upload
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
    """Limits each request to the Hub, as the library would wait for an answer without end."""
    session = huggingface_hub.utils.get_session()
    before, session.timeout = session.timeout, seconds
    try:
        yield
    finally:
        session.timeout = before
