"""The hub: asked once whether it has a model or a dataset, so that a mistyped name or no network is told at once.

The library behind tries again and again before it gives up, for half a minute where nothing answers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
    away, no = ("HF_HUB_OFFLINE is set", None) if constants.HF_HUB_OFFLINE else _ask("model", repo, revision)
    if no is not None:
        raise InputError(
            f"model {spec!r} is no local folder or file, and the hub does not give it ({no}); check the name, and log "
            f"in if it is a private or gated one{hint}"
        )
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


@contextmanager
def for_dataset(name: str, hint: str) -> Iterator[None]:
    """What ``datasets`` is called in to load ``name`` from the hub: from its cache where the hub cannot be reached.

    InputError, with ``hint`` at its end, when the hub has no such dataset.
    """
    import datasets

    offline = datasets.config.HF_HUB_OFFLINE
    away, no = (None, None) if offline else _ask("dataset", name, "")
    if no is not None:
        raise InputError(
            f"{name!r} is no file or folder, and the hub does not give it as a dataset ({no}){hint}"
        )
    if away is not None:
        datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _ask(kind: str, repo: str, revision: str) -> tuple[str | None, str | None]:
    """Ask the hub for a model or a dataset: why it could not be asked, and why it does not give it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import HFValidationError

    answers: list[BaseException | None] = []

    def ask() -> None:
        try:
            getattr(HfApi(), f"{kind}_info")(repo, revision=revision or None, timeout=PATIENCE)
            answers.append(None)
        except BaseException as error:
            answers.append(error)

    # In a thread of its own: no timeout of a connection covers the resolution of its name.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    if not answers:
        return f"no answer in {PATIENCE:.0f} s", None
    error = answers[0]
    status = getattr(getattr(error, "response", None), "status_code", None)
    refused = (
        isinstance(error, HfHubHTTPError)
        and isinstance(status, int)
        and 400 <= status < 500
        and status != 429
    )
    if error is None:
        return None, None
    return (None, _said(error)) if refused or isinstance(error, HFValidationError) else (_said(error), None)


def _said(error: BaseException) -> str:
    """One line of what a library says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
