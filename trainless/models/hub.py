"""The hub: asked once whether it has a model, so that a mistyped name or a missing network is told at once.

The library behind tries again and again before it gives up, for half a minute where nothing answers.
"""

from __future__ import annotations

import threading
from pathlib import Path

from ..errors import InputError

PATIENCE = 5.0  # seconds for the hub's first answer, name resolution included
# What a description needs; weights come later, and only for the model that is really run.
_SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*/*.json", "*/*.model", "*/*.txt"]


def small_files(spec: str, hint: str) -> tuple[Path, bool]:
    """The folder with the small files of the hub id ``spec``, and whether the hub was asked for them.

    What lies in the local cache serves where the hub cannot be reached. InputError, with ``hint`` at its end, when
    there is no such model, or no way to it.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    repo, _, revision = spec.partition("@")
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise InputError(
            f"model {spec!r}: there is no such folder or file, and it is no hub id{hint}"
        ) from None
    away = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _asked(spec, repo, revision, hint)
    try:
        folder = snapshot_download(
            repo, revision=revision or None, allow_patterns=_SMALL_FILES, local_files_only=away is not None
        )
        return Path(folder), away is None
    except Exception as error:
        if away is not None:
            raise InputError(
                f"model {spec!r} is no local folder or file; the hub cannot be asked ({away}), and its cache on this "
                f"machine does not have it{hint}"
            ) from error
        raise InputError(
            f"model {spec!r} is no local folder or file, and could not be had from the hub ({_said(error)}); check "
            f"the name, or download it and give its folder{hint}"
        ) from error


def _asked(spec: str, repo: str, revision: str, hint: str) -> str | None:
    """Ask for the model: None when the hub has it, or why it could not be asked. InputError when it says no."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    answers: list[BaseException | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(repo, revision=revision or None, timeout=PATIENCE)
            answers.append(None)
        except BaseException as error:
            answers.append(error)

    # In a thread of its own: no timeout of a connection covers the resolution of its name.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    if not answers:
        return f"no answer in {PATIENCE:.0f} s"
    error = answers[0]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if (
        isinstance(error, HfHubHTTPError)
        and isinstance(status, int)
        and 400 <= status < 500
        and status != 429
    ):
        raise InputError(
            f"model {spec!r} is no local folder or file, and the hub does not give it ({_said(error)}); check the "
            f"name, and log in if it is a private or gated one{hint}"
        ) from error
    return None if error is None else _said(error)


def _said(error: BaseException) -> str:
    """One line of what a library says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
