"""Fetching a model's `config.json` from the Hugging Face Hub, where the `huggingface-hub` package is installed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from optplan.planner.configfile import MAX_BYTES
from optplan.planner.errors import ConfigError

TIMEOUT_SECONDS = 5
_SILENT = 100  # above every level of `logging`

_REPOSITORY = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)


class HubError(Exception):
    """Why a repository's configuration cannot be had, as the second half of a sentence."""


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `owner/repository`."""
    return bool(_REPOSITORY.fullmatch(name)) and not name.endswith(".json")


def fetch_config(repository: str) -> str:
    """Path of the repository's `config.json` in the local cache of the Hub, fetched if it is not there yet.

    Raises:
        HubError: The package is missing, the Hub does not answer within seconds, or it has no such file for us.
        ConfigError: The file is larger than any configuration.
    """
    try:
        import huggingface_hub as hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError:
        raise HubError("to fetch it from the Hugging Face Hub, install huggingface-hub") from None
    with _quiet(hub):
        try:
            return _cached(hub, repository) or _download(hub, repository)
        except ConfigError:
            raise
        except Exception as error:  # the package's failures share no base class: HTTP, sockets, caches, its own
            raise HubError(_reason(hub.errors, error)) from None


@contextmanager
def _quiet(hub: Any) -> Iterator[None]:
    """Without the package's own warnings and progress bars; what matters of them is said by our one sentence."""
    verbosity, bars_were_off = hub.utils.logging.get_verbosity(), hub.utils.are_progress_bars_disabled()
    hub.utils.logging.set_verbosity(_SILENT)
    if not bars_were_off:
        hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        hub.utils.logging.set_verbosity(verbosity)
        if not bars_were_off:
            hub.utils.enable_progress_bars()


def _cached(hub: Any, repository: str) -> str | None:
    path = hub.try_to_load_from_cache(repository, "config.json")
    return path if isinstance(path, str) else None


def _download(hub: Any, repository: str) -> str:
    """The size is asked for first: the question fails at once where there is no network, a download tries for long."""
    url = hub.hf_hub_url(repository, "config.json")
    size = hub.get_hf_file_metadata(url, timeout=TIMEOUT_SECONDS).size
    if size is not None and size > MAX_BYTES:
        raise ConfigError(f"the config.json of {repository} has {size} bytes; a config.json has at most {MAX_BYTES}")
    return str(hub.hf_hub_download(repository, "config.json", etag_timeout=TIMEOUT_SECONDS))


def _reason(errors: Any, error: Exception) -> str:
    if isinstance(error, errors.GatedRepoError):
        return "the Hugging Face Hub gives it only to accounts with access; run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the Hugging Face Hub has no such public repository"
    if isinstance(error, errors.EntryNotFoundError):
        return "its repository on the Hugging Face Hub has no config.json"
    return "the Hugging Face Hub cannot be reached"
