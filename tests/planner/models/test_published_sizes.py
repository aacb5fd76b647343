"""The catalogue's sizes against the counts that the models' authors publish, none of them computed here."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

import pytest

from optplan.planner.models.fields import Fields
from optplan.planner.models.registry import family_of
from optplan.planner.models.spec import ModelSpec

OTHER_FAMILIES = ("bert", "bloom", "falcon", "gpt2", "gpt_neox", "opt", "palm", "t5", "vit")


@cache
def _catalogue() -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for family in OTHER_FAMILIES:
        text = files("optplan.planner.data.models").joinpath(f"{family}.toml").read_text(encoding="utf-8")
        rows |= {row["id"]: row for row in tomllib.loads(text)["model"]}
    return rows


@cache
def _spec(name: str) -> ModelSpec:
    row = _catalogue()[name]
    config = row["config"]
    return family_of(config["model_type"]).spec(Fields(config, where=name), name=name, source=row["source"])


@pytest.mark.parametrize(
    ("name", "published"),
    [
        # Counted in a training step on a GPU.
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("bert-large", 335_174_458),
        ("opt-1.3b", 1_315_758_080),
        # Model cards: bigscience/bloom-*, EleutherAI/gpt-neox-20b.
        ("bloom-560m", 559_214_592),
        ("bloom-1b1", 1_065_314_304),
        ("bloom-1b7", 1_722_408_960),
        ("bloom-3b", 3_002_557_440),
        ("bloom-7b1", 7_069_016_064),
        ("bloom-176b", 176_247_271_424),
        ("gpt-neox-20b", 20_554_567_680),
        # torchvision's table of pre-trained weights: ViT_B_16, ViT_L_16, ViT_H_14 (linear).
        ("vit-base", 86_567_656),
        ("vit-large", 304_326_632),
        ("vit-huge", 632_045_800),
    ],
)
def test_total_equals_the_published_count(name: str, published: int) -> None:
    assert _spec(name).num_parameters == published


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("pythia-70m", 18_915_328),
        ("pythia-160m", 85_056_000),
        ("pythia-410m", 302_311_424),
        ("pythia-1b", 805_736_448),
        ("pythia-1.4b", 1_208_602_624),
        ("pythia-2.8b", 2_517_652_480),
        ("pythia-6.9b", 6_444_163_072),
        ("pythia-12b", 11_327_027_200),
    ],
)
def test_pythia_without_embeddings_equals_its_model_card(name: str, published: int) -> None:
    outside = ("token_embedding", "output_head")
    assert sum(p.numel for p in _spec(name).unique_parameters if p.role not in outside) == published


@pytest.mark.parametrize(
    ("name", "published_millions"),
    [
        # OPT: arXiv:2205.01068, table 1 (rounded there); T5: arXiv:1910.10683, section 3.7.
        ("opt-125m", 125),
        ("opt-2.7b", 2_700),
        ("opt-6.7b", 6_700),
        ("opt-13b", 13_000),
        ("opt-30b", 30_000),
        ("opt-66b", 66_000),
        ("t5-small", 60),
        ("t5-base", 220),
        ("t5-large", 770),
        ("t5-3b", 2_800),
        ("t5-11b", 11_000),
        ("gpt2-large", 774),
        ("gpt2-xl", 1_558),
        ("bert-base", 110),
        ("roberta-base", 125),
        ("roberta-large", 355),
        ("falcon-7b", 7_000),
        ("falcon-40b", 40_000),
    ],
)
def test_total_is_within_five_percent_of_the_rounded_figure(name: str, published_millions: int) -> None:
    assert _spec(name).num_parameters / 1e6 == pytest.approx(published_millions, rel=0.05)


@pytest.mark.parametrize(
    ("name", "longest"),
    [
        ("gpt2-xl", 1024),
        ("bert-base", 512),
        ("roberta-base", 512),
        ("opt-350m", 2048),
        ("pythia-12b", 2048),
        ("bloom-7b1", 2048),
        ("falcon-40b", 2048),
        ("t5-base", 512),
        ("vit-base", 197),
        ("vit-huge", 257),
        ("palm-540b", 2048),
    ],
)
def test_longest_sequence(name: str, longest: int) -> None:
    assert _spec(name).max_seq_len == longest


def test_every_row_states_the_count_of_its_inventory() -> None:
    assert {name: _spec(name).num_parameters for name in _catalogue()} == {
        name: row["num_parameters"] for name, row in _catalogue().items()
    }
