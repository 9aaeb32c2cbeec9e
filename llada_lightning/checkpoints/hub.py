"""A finished folder goes to the Hugging Face Hub. A token is never printed."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any

from llada_lightning.support.errors import UserError, panics_as_exceptions
from llada_lightning.support.printing import shortened

_LOG_IN = "log in with: hf auth login, or set HF_TOKEN to a token with write access (huggingface.co/settings/tokens)"


def check_push(repository: str) -> str:
    """Refuses, before anything is converted, what can only fail; returns the token.

    Args:
        repository: The repository on the Hub, as `user/name`.

    Raises:
        UserError: The name is malformed, no token is found, or the Hub is switched off (``HF_HUB_OFFLINE``).
    """
    from huggingface_hub import constants, get_token  # here and below: other commands do not load it
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    shown = shortened(repository, 120)
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(
            f"--push: '{shown}' is no name of a repository; give USER/NAME of letters, digits, '-', '_' and '.', "
            "which neither part begins or ends with '-' or '.'"
        ) from error
    if repository.count("/") != 1:
        raise UserError(f"--push: '{shown}' names no user or organization; give USER/NAME")
    if constants.HF_HUB_OFFLINE:
        raise UserError("--push: HF_HUB_OFFLINE keeps this machine from the Hub; unset it, or leave --push out")
    token = get_token()
    if token is None:
        raise UserError(f"--push: no token of the Hugging Face Hub was found; {_LOG_IN}")
    return token


def push(folder: Path, repository: str, token: str, private: bool = False) -> str:
    """Uploads a folder to a repository of models, which is made if there is none; returns the address of the commit.

    Files of the repository that the folder lacks stay.

    Args:
        folder: The folder.
        repository: The repository, which :func:`check_push` has let pass.
        token: The token.
        private: Whether a repository that is made now is to be seen by its owner alone.

    Raises:
        UserError: The Hub refuses the token or the repository, or cannot be reached; the message says that the folder
            is kept, and how to upload it again.
    """
    from huggingface_hub import HfApi

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each retry has two lines; the last reason is below
    api = HfApi(token=token, library_name="llada-lightning")
    try:
        with panics_as_exceptions():
            api.create_repo(repository, private=private or None, exist_ok=True)
            message = "Upload a model of llada-lightning"
            done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except Exception as error:  # of the Hub, of the network, and of the library that sends large files
        again = f"hf upload {repository} {shlex.quote(str(folder))} .{' --private' * private}"
        raise UserError(
            f"--push {repository}: {_reason(error, token)}. '{folder}' is complete and kept; upload it with: {again}"
        ) from error
    return str(done.commit_url)


def _reason(error: BaseException, token: str) -> str:
    """Why an upload failed, and what to do about it, without the token."""
    causes, found = [error], error
    while (found := found.__cause__ or found.__context__) is not None:  # type: ignore[assignment]
        causes.append(found)
    responses = (getattr(cause, "response", None) for cause in causes)
    status = next((getattr(response, "status_code", None) for response in responses if response is not None), None)
    if status == 401:
        return f"the Hub refuses the token (401); {_LOG_IN}"
    said = shortened(_server_message(causes).replace(token, "***"))
    if status == 403:
        return f"the token may not write there (403: {said}); take a token with write access to it, or another name"
    if status == 404:
        return "the Hub has no such user, organization or repository for this token (404); correct USER/NAME"
    if status is not None:
        return f"the Hub refuses the upload ({status}: {said})"
    return f"the Hub cannot be reached ({said}); check the network, and HF_ENDPOINT if it is set"


def _server_message(causes: list[BaseException]) -> str:
    """What the server said, else what the first error says that says something."""
    told: list[Any] = [getattr(cause, "server_message", None) for cause in causes]
    own = (f"{type(cause).__name__}: {cause}" for cause in causes if str(cause).strip())
    return str(next(filter(None, told), None) or next(own, type(causes[0]).__name__))
