"""Files that are no configuration: each refused in one sentence, within a second and a few times the size limit."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optplan.planner.configfile import MAX_BYTES, parse_config, read_config
from optplan.planner.errors import ConfigError

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="needs devices and pipes")


@contextmanager
def _bounded(*, seconds: float = 1.0, num_bytes: int = 64 * 2**20) -> Iterator[None]:
    """Fail where the body takes longer or allocates more at once."""
    tracemalloc.start()
    start = time.process_time()
    try:
        yield
        assert time.process_time() - start < seconds
        assert tracemalloc.get_traced_memory()[1] < num_bytes
    finally:
        tracemalloc.stop()


def _refusal(path: Path | str) -> str:
    with _bounded(), pytest.raises(ConfigError) as error:
        read_config(path)
    return str(error.value)


def _parse_refusal(text: str) -> str:
    with _bounded(seconds=3.0), pytest.raises(ConfigError) as error:
        parse_config(text, where="config.json")
    return str(error.value)


@pytest.fixture(autouse=True)
def _short_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_an_object_is_read() -> None:
    Path("config.json").write_text('{"hidden_size": 4096, "name": "\\u00e9", "x": [1.5, null, {"y": true}]}', "utf-8")
    assert read_config("config.json") == {"hidden_size": 4096, "name": "é", "x": [1.5, None, {"y": True}]}


def test_a_missing_file() -> None:
    assert _refusal("config.json") == "there is no file 'config.json'"


def test_a_folder() -> None:
    Path("model").mkdir()
    assert _refusal("model") == "'model' is a folder; give the config.json in it"


def test_a_path_that_no_system_has() -> None:
    assert _refusal("a\0b") == "'a\\x00b' cannot be read: not a valid path"


@POSIX
def test_a_path_that_is_too_long() -> None:
    assert _refusal("a" * 5000) == f"'{'a' * 195}...' cannot be read: File name too long"


@POSIX
@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
def test_a_device(device: str) -> None:
    assert _refusal(device) == f"'{device}' is not a regular file"


@POSIX
def test_a_pipe_without_a_writer() -> None:
    os.mkfifo("pipe")
    assert _refusal("pipe") == "'pipe' is not a regular file"


def test_a_file_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("config.json").write_text("{}")

    def deny(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", deny)
    assert _refusal("config.json") == "'config.json' cannot be read: Permission denied"


def test_a_gigabyte_is_refused_unread() -> None:
    with Path("model.safetensors").open("wb") as file:
        file.truncate(2**30)
    assert (
        _refusal("model.safetensors") == "'model.safetensors' has 1073741824 bytes; a config.json has at most 1048576"
    )


def test_a_file_at_the_limit_is_read_and_one_byte_more_is_not() -> None:
    padding = " " * (MAX_BYTES - len('{"a": 1}'))
    Path("config.json").write_text('{"a": 1}' + padding)
    assert read_config("config.json") == {"a": 1}
    Path("config.json").write_text('{"a": 1} ' + padding)
    assert _refusal("config.json") == "'config.json' has 1048577 bytes; a config.json has at most 1048576"


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps({"hidden_size": 4096}),
        struct.pack("<Q", 60) + b'{"weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}  ' + b"\0\0\0\0",
        b"PK\x03\x04" + bytes(range(256)),
        '{"hidden_size": 4096}'.encode("utf-16"),
        b'{"name": "caf\xe9"}',
    ],
    ids=["pickle", "safetensors", "zip", "utf-16", "latin-1"],
)
def test_a_file_that_is_not_utf8_text(data: bytes) -> None:
    Path("config.json").write_bytes(data)
    assert _refusal("config.json") == ("'config.json' is not UTF-8 text; give the model's config.json, not its weights")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "config.json is not JSON: Expecting value at line 1 column 1"),
        ('{"a": 1', "config.json is not JSON: Expecting ',' delimiter at line 1 column 8"),
        ('{"a": "b', "config.json is not JSON: Unterminated string at line 1 column 7"),
        ("{'a': 1}", "config.json is not JSON: Expecting property name enclosed in double quotes at line 1 column 2"),
        ("{}\n{}", "config.json is not JSON: Extra data at line 2 column 1"),
        ("[" * 10**6, "config.json is nested more than 32 deep, which no configuration is"),
        ('{"a":' * 200_000, "config.json is nested more than 32 deep, which no configuration is"),
        ('["\\"[", ' + "[" * 32, "config.json is nested more than 32 deep, which no configuration is"),
        ('{"a": NaN}', "config.json holds NaN, which is not a JSON number"),
        ('{"a": -Infinity}', "config.json holds -Infinity, which is not a JSON number"),
        ('{"a": 1e999}', "config.json holds the number '1e999', which is beyond a 64-bit float"),
        ('{"a": ' + "9" * 10**6 + "}", "config.json holds an integer of 1000000 digits; at most 100 are read"),
        ('{"a": -' + "9" * 101 + "}", "config.json holds an integer of 101 digits; at most 100 are read"),
        ('{"a": {"b": 1, "b": 2}}', "config.json holds the field 'b' twice"),
        ('["a"]', "config.json must hold one JSON object, got ['a']"),
        ('"a"', "config.json must hold one JSON object, got 'a'"),
        ("null", "config.json must hold one JSON object, got None"),
        ("[" + "[]," * 340_000 + "[]]", "config.json must hold one JSON object, got " + "[[]" + ", []" * 13 + ",...]"),
        ('"' + '\\"' * 500_000, "config.json is not JSON: Unterminated string at line 1 column 1"),
    ],
    ids=lambda value: value[:24],
)
def test_text_that_is_no_configuration(text: str, sentence: str) -> None:
    assert _parse_refusal(text) == sentence


def test_brackets_in_strings_are_not_nesting() -> None:
    text = json.dumps({"a": "[" * 100, "b": '"' + "{" * 100})
    assert parse_config(text, where="config.json") == {"a": "[" * 100, "b": '"' + "{" * 100}


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet='[]{}":,\\0123456789.eE+-truefalsn \n\u00e9', max_size=60))
def test_any_text_is_an_object_or_one_sentence(text: str) -> None:
    try:
        assert isinstance(parse_config(text, where="config.json"), dict)
    except ConfigError as error:
        assert "\n" not in str(error)
