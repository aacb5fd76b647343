"""The registry of optimizers: ids, options read strictly, one sentence for every mistake."""

from __future__ import annotations

import subprocess
import sys

import pytest

from optplan.planner.errors import ConfigError
from optplan.planner.optimizers.options import Option
from optplan.planner.optimizers.registry import OPTIMIZERS, build_optimizer, optimizer_ids

EVERY = [(entry.id, kind) for entry in OPTIMIZERS.values() for kind in entry.implementations]


def test_ids_stand_in_the_order_of_the_tables() -> None:
    assert " ".join(optimizer_ids()) == (
        "adamw micro-adam adam-mini adapprox sgd adafactor lion muon adamw-8bit adamw-4bit adamw-fp8 paged-adamw-8bit "
        "galore apollo came sm3 soap flash-adamw"
    )


def test_first_implementation_is_the_default() -> None:
    defaults = {id_: OPTIMIZERS[id_].default_implementation for id_ in optimizer_ids()[:8]}
    assert defaults == {
        "adamw": "fused",
        "micro-adam": "optplan",
        "adam-mini": "optplan",
        "adapprox": "optplan",
        "sgd": "fused",
        "adafactor": "torch",
        "lion": "pytorch_optimizer",
        "muon": "torch",
    }


@pytest.mark.parametrize(("id_", "implementation"), EVERY)
def test_every_implementation_builds_with_its_declared_defaults(id_: str, implementation: str) -> None:
    model = build_optimizer(id_, {"implementation": implementation})
    assert (model.id, model.implementation) == (id_, implementation)
    declared = OPTIMIZERS[id_].options(implementation)
    assert model.options == {option.name: option.default for option in declared}
    for option in declared:
        assert option.help
        assert option.default is None or option.parse(option.default, owner=id_) == option.default


def test_options_are_read_from_text_and_equal_models_are_equal() -> None:
    model = build_optimizer("micro-adam", {"window": "20", "density": "2e-2", "block": "+4096"})
    defaults = {"bucket": 64, "alpha": 0.0, "capturable": False}
    assert model.options == {"window": 20, "density": 0.02, "block": 4096} | defaults
    same = build_optimizer("micro-adam", {"window": 20, "density": 0.02, "block": 4096})
    assert model == same
    assert hash(model) == hash(same)
    assert model != build_optimizer("micro-adam")
    assert repr(build_optimizer("adapprox", {"rank": "4"})) == (
        "Adapprox('adapprox', implementation='optplan', rank=4, beta1=0.9, mode='fast')"
    )


MICRO = "micro-adam: "
SEE = "run `optplan optimizers` for the list"
MISTAKES = [
    ("adam", {}, f"unknown optimizer 'adam'; nearest: adamw, adamw-fp8, adam-mini; {SEE}"),
    ("qqqq", {}, f"unknown optimizer 'qqqq'; known: adamw, micro-adam, adam-mini, adapprox and 14 more; {SEE}"),
    ("adamw", {"implementation": "fuse"}, "unknown implementation of adamw 'fuse'; nearest: fused"),
    ("adamw", {"implementation": 3}, "adamw: implementation must be a name, got 3"),
    ("adamw", {"amsgrd": "true"}, "unknown option of adamw 'amsgrd'; nearest: amsgrad"),
    ("adamw", {"amsgrad": "yes"}, "adamw: amsgrad must be true or false, got 'yes'"),
    (
        "adam-mini",
        {"dim": "64"},
        "adam-mini: option 'dim' needs implementation=official, got implementation=optplan",
    ),
    ("adam-mini", {"lr": "1"}, "unknown option of adam-mini 'lr'; known: implementation"),
    (
        "adam-mini",
        {"implementation": "official", "version": "1.1"},
        "adam-mini: version must be 1.1.1, 1.0.5 or 1.0.4, got '1.1'",
    ),
    ("micro-adam", {"window": "0"}, MICRO + "window must be an integer from 1 to 1000, got '0'"),
    ("micro-adam", {"window": "10.0"}, MICRO + "window must be an integer from 1 to 1000, got '10.0'"),
    ("micro-adam", {"window": "1" * 99}, MICRO + f"window must be an integer from 1 to 1000, got '{'1' * 55}...'"),
    ("micro-adam", {"window": True}, MICRO + "window must be an integer from 1 to 1000, got True"),
    ("micro-adam", {"density": "0"}, MICRO + "density must be a number above 0 to 1, got '0'"),
    ("micro-adam", {"density": "nan"}, MICRO + "density must be a number above 0 to 1, got 'nan'"),
    ("micro-adam", {"density": float("inf")}, MICRO + "density must be a number above 0 to 1, got inf"),
    ("micro-adam", {"density": "1e999"}, MICRO + "density must be a number above 0 to 1, got '1e999'"),
    ("micro-adam", {"bucket": "96"}, MICRO + "bucket must be a multiple of 8 and divide block=2048, got 96"),
    ("micro-adam", {"block": "32769"}, MICRO + "block must be an integer from 64 to 32768, got '32769'"),
    (
        "micro-adam",
        {"implementation": "official", "alpha": "1"},
        MICRO + "alpha must be -2 or a number from 0 below 1, got '1'",
    ),
    ("micro-adam", {"alpha": "-2"}, MICRO + "alpha must be a number from 0 below 1, got '-2'"),
    ("adapprox", {"rank": "most"}, "adapprox: rank must be min, max or an integer from 1 to 1048576, got 'most'"),
    ("sgd", {"nesterov": "true", "momentum": "0"}, "sgd: nesterov=true needs a momentum above 0, got momentum=0"),
]


@pytest.mark.parametrize(("id_", "options", "sentence"), MISTAKES)
def test_mistakes_are_one_sentence(id_: str, options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_optimizer(id_, options)
    assert str(caught.value) == sentence


def test_words_of_choices_are_taken_beside_numbers() -> None:
    alpha = Option("alpha", "number", 0.0, "x", low=0, high=1, high_exclusive=True, choices=("-2",))
    assert [alpha.parse(value, owner="o") for value in ("-2", -2, ".5", 0)] == ["-2", "-2", 0.5, 0.0]


def test_asking_for_one_optimizer_loads_neither_the_others_nor_torch() -> None:
    program = (
        "import sys; from optplan.planner.optimizers.registry import build_optimizer; build_optimizer('lion');"
        "print(sorted(m.rpartition('.')[2] for m in sys.modules if m.startswith('optplan.planner.optimizers.')));"
        "print([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert shown == "['base', 'lion', 'options', 'parts', 'registry', 'scratch']\n[]\n"
