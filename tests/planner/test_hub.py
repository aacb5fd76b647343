"""Repositories on the Hub, with the package's calls replaced: no test touches the network."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from optplan.planner.catalog import load_model
from optplan.planner.errors import ConfigError
from optplan.planner.hub import HubError, fetch_config, is_hub_id

hub = import_module("huggingface_hub")
errors = import_module("huggingface_hub.errors")

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip


class FakeHub:
    """Stands in for the package's functions and notes the calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cached: str | None = None
        self.failure: Exception | None = None
        self.size: int | None = 700
        self.file = ""
        self.calls: list[str] = []
        monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: self.cached)
        monkeypatch.setattr(hub, "get_hf_file_metadata", self.metadata)
        monkeypatch.setattr(hub, "hf_hub_download", self.download)

    def metadata(self, url: str, *, timeout: float) -> SimpleNamespace:
        self.calls.append(f"size of {url} within {timeout} s")
        if self.failure:
            raise self.failure
        return SimpleNamespace(size=self.size)

    def download(self, repository: str, name: str, *, etag_timeout: float) -> str:
        self.calls.append(f"{name} of {repository} within {etag_timeout} s")
        return self.file


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return FakeHub(monkeypatch)


def _failure(kind: str) -> Exception:
    """An error of the package, made without the HTTP response that its constructor wants."""
    return getattr(errors, kind).__new__(getattr(errors, kind))


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    return str(path)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("meta-llama/Llama-2-7b", True),
        ("a/b", True),
        ("a_b/c.d-e", True),
        ("gpt2", False),
        ("a/b/c", False),
        ("./a", False),
        ("../a", False),
        ("/a", False),
        ("a/", False),
        ("a/b.json", False),
        ("a/b\n", False),
        ("é/b", False),
        ("a" * 97 + "/b", False),
    ],
)
def test_the_form_of_a_repository_s_name(name: str, answer: bool) -> None:
    assert is_hub_id(name) is answer


def test_a_repository_is_fetched_with_its_size_asked_first(fake: FakeHub, config: str) -> None:
    fake.file = config
    spec = load_model("someone/some-llama")
    assert spec.name == "someone/some-llama"
    assert spec.source == "https://huggingface.co/someone/some-llama/blob/main/config.json"
    assert spec.num_parameters == 2 * 4656 + 2 * (9216 + 14400 + 96) + 48
    assert fake.calls == [
        f"size of {hub.hf_hub_url('someone/some-llama', 'config.json')} within 5 s",
        "config.json of someone/some-llama within 5 s",
    ]


def test_a_cached_repository_needs_no_network(fake: FakeHub, config: str) -> None:
    fake.cached, fake.failure = config, OSError("no network")
    assert load_model("someone/some-llama").name == "someone/some-llama"
    assert fake.calls == []


def test_a_file_of_a_gigabyte_is_not_downloaded(fake: FakeHub) -> None:
    fake.size = 2**30
    with pytest.raises(ConfigError) as error:
        load_model("someone/some-llama")
    assert str(error.value) == (
        "the config.json of someone/some-llama has 1073741824 bytes; a config.json has at most 1048576"
    )
    assert len(fake.calls) == 1


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("GatedRepoError", "the Hugging Face Hub gives it only to accounts with access; run `hf auth login`"),
        ("RepositoryNotFoundError", "the Hugging Face Hub has no such public repository"),
        ("RemoteEntryNotFoundError", "its repository on the Hugging Face Hub has no config.json"),
        ("OfflineModeIsEnabled", "the Hugging Face Hub cannot be reached"),
    ],
)
def test_why_a_repository_cannot_be_had(fake: FakeHub, kind: str, reason: str) -> None:
    fake.failure = _failure(kind)
    with pytest.raises(ConfigError) as error:
        load_model("meta-llama/Llama-2-7b")
    assert str(error.value) == (
        "unknown model 'meta-llama/Llama-2-7b'; nearest: meta-llama/Llama-2-7b-hf, meta-llama/Llama-2-70b-hf, "
        f"meta-llama/Llama-2-13b-hf; there is no such file or folder, and {reason}"
    )


def test_the_package_s_own_noise_is_off_and_comes_back(fake: FakeHub, config: str) -> None:
    before = hub.utils.logging.get_verbosity()
    seen: list[tuple[int, bool]] = []

    def metadata(*_: object, **__: object) -> SimpleNamespace:
        seen.append((hub.utils.logging.get_verbosity(), hub.utils.are_progress_bars_disabled()))
        return SimpleNamespace(size=None)

    fake.file = config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "get_hf_file_metadata", metadata)
        fetch_config("someone/some-llama")
    assert seen == [(100, True)]
    assert (hub.utils.logging.get_verbosity(), hub.utils.are_progress_bars_disabled()) == (before, False)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HubError) as error:
        fetch_config("someone/some-llama")
    assert str(error.value) == "to fetch it from the Hugging Face Hub, install huggingface-hub"
