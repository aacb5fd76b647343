"""The committed counts of what a step asks of the host, against a count now."""

from __future__ import annotations

import sys
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest

from optplan.planner.host_work import HostCalls, HostWork, host_work

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def counting() -> ModuleType:
    """The script that counts."""
    pytest.importorskip("transformers")
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    spec = util.spec_from_file_location("count_host_work", ROOT / "benchmarks" / "count_host_work.py")
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(folder)
    return module


@pytest.mark.parametrize(
    ("family", "precision", "attention"),
    [("gpt2", "bf16", "sdpa"), ("llama", "amp", "eager"), ("bert", "fp32", "sdpa"), ("gemma2", "bf16", "eager")],
)
def test_the_committed_counts_are_those_of_a_layer(
    counting: ModuleType, family: str, precision: str, attention: str
) -> None:
    # Versions of transformers differ in a view or two a layer, not in what is launched or which modules are called.
    (entry,) = counting.first_entries([family])
    found = counting.count_family(entry, precision=precision, attention=attention)
    committed = host_work(family, precision, attention)
    assert committed is not None
    (layer,), (expected,) = found.layers, committed.layers
    assert (layer.launches, layer.modules, layer.waits) == (expected.launches, expected.modules, 0)
    assert layer.backward_launches == expected.backward_launches
    for name in ("calls", "kept", "nodes"):
        assert abs(getattr(layer, name) - getattr(expected, name)) <= 2
    assert found.outside.modules == committed.outside.modules
    assert found.outside.waits == committed.outside.waits


def test_the_table_is_written_as_it_is_read(counting: ModuleType) -> None:
    keys = [
        (name, f"{precision}-{attention}")
        for name in sorted(counting.FAMILIES)
        for attention in counting.ATTENTIONS
        for precision in counting.PRECISIONS
    ]
    read = {key: host_work(key[0], *key[1].split("-")) for key in keys}
    works = {key: work for key, work in read.items() if work is not None}
    text = counting.TABLE.read_text("utf-8")
    without_version = [line for line in text.splitlines() if "with transformers" not in line]
    assert [line for line in counting.table(works).splitlines() if "with transformers" not in line] == without_version


def test_the_typical_counts_are_medians(counting: ModuleType) -> None:
    base = host_work("gpt2", "bf16", "sdpa")
    assert base is not None
    # Whole families with as many times the calls of gpt2's, and so many a launch: the middle one counts.
    works = {
        ("gpt2", f"bf16-{name}"): HostWork(HostCalls(), (HostCalls().plus(base.layers[0], times),))
        for name, times in (("sdpa", 1), ("eager", 50))
    } | {("gpt2", "amp-sdpa"): HostWork(HostCalls(), (HostCalls().plus(base.layers[0], 20),))}
    # 12 layers with 19 launches each; the rules' record has a dozen outside the layers too.
    found = counting.typical({("gpt2", "bf16-sdpa"): works["gpt2", "bf16-sdpa"]})
    assert found.launches == pytest.approx(12 * 19 / (12 * 19 + 12), abs=0.05)
    assert found.launches < counting.typical(works).launches < 25
