"""The catalogue's rows against transformers, and every way to name a model."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from optplan.planner import catalog
from optplan.planner.catalog import ModelEntry, entry_spec, find_entry, load_model, model_entries, model_ids
from optplan.planner.errors import ConfigError, DataError
from optplan.planner.models.reader import read_model

LAYER_FIELDS = ("num_hidden_layers", "n_layer", "num_layers")
WITHOUT_A_CLASS = {"palm"}
LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip


def _refusal(name: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_model(name)
    return str(error.value)


def _truncated(entry: ModelEntry, num_layers: int) -> dict[str, Any]:
    field = next(name for name in LAYER_FIELDS if name in entry.config)
    return {**copy.deepcopy(entry.config), **dict.fromkeys(entry.nulls), field: num_layers}


def _real_module(architecture: str, config: dict[str, Any]) -> Any:
    torch = import_module("torch")
    transformers = import_module("transformers")
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    fields = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        return getattr(transformers, architecture)._from_config(known[config["model_type"]].from_dict(fields))


def _num_elements(module: Any) -> int:
    return sum(tensor.numel() for tensor in module.parameters())


@pytest.mark.parametrize(
    "entry", [pytest.param(e, id=e.id) for e in model_entries() if e.family not in WITHOUT_A_CLASS]
)
def test_every_row_equals_transformers(entry: ModelEntry) -> None:
    num_layers = next(entry.config[name] for name in LAYER_FIELDS if name in entry.config)
    spec = entry_spec(entry)
    one = _real_module(spec.architecture, _truncated(entry, 1))
    two = _real_module(spec.architecture, _truncated(entry, 2))
    # All layers of a model in the catalogue have the same parameters.
    each = _num_elements(two) - _num_elements(one)
    assert _num_elements(one) + (num_layers - 1) * each == entry.num_parameters == spec.num_parameters
    short = read_model(_truncated(entry, 2), name="", source="", where="")
    real = [(name, tuple(tensor.shape)) for name, tensor in two.named_parameters(remove_duplicate=False)]
    assert [(p.name, p.shape) for p in short.parameters] == real
    assert [(b.name, b.shape) for b in short.buffers] == [(n, tuple(t.shape)) for n, t in two.named_buffers()]


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        # Counted on an H200 after building the transformers class.
        ("tinyllama-1.1b", 1_100_048_384),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-2-7b", 6_738_415_616),
        ("qwen2.5-0.5b", 494_032_768),
        ("gemma-2-2b", 2_614_341_888),
        # Elements of the published safetensors files, as the model pages show them.
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
        ("codellama-34b", 33_743_970_304),
        ("smollm2-135m", 134_515_008),
        ("mistral-7b-v0.1", 7_241_732_096),
        ("mixtral-8x7b", 46_702_792_704),
        ("qwen2.5-72b", 72_706_203_648),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("gemma-7b", 8_537_680_896),
        ("gemma-2-27b", 27_227_128_320),
        ("gemma-3-1b", 999_885_952),
        # Gemma 3 with images less its vision tower (416,866,032) and projector (1152 x hidden + 1152).
        ("gemma-3-4b", 4_300_079_472 - 416_866_032 - 1152 * 2560 - 1152),
        ("gemma-3-12b", 12_187_325_040 - 416_866_032 - 1152 * 3840 - 1152),
        ("gemma-3-27b", 27_432_406_640 - 416_866_032 - 1152 * 5376 - 1152),
        ("phi-2", 2_779_683_840),
        ("phi-3-mini", 3_821_079_552),
        ("phi-4", 14_659_507_200),
        ("olmo-2-7b", 7_298_617_344),
        ("olmoe-1b-7b", 6_919_161_856),
        ("starcoder2-3b", 3_030_371_328),
        ("starcoder2-15b", 15_957_889_024),
    ],
)
def test_totals_that_others_counted(name: str, num_parameters: int) -> None:
    assert load_model(name).num_parameters == num_parameters


def test_the_catalogue_holds_what_it_promises() -> None:
    promised = {
        "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "bert-base", "bert-large", "roberta-base", "opt-125m",
        "opt-66b", "pythia-70m", "pythia-12b", "bloom-7b1", "falcon-7b", "llama-1-7b", "llama-1-65b", "llama-2-70b",
        "llama-3-70b",
        "llama-3.1-405b", "llama-3.2-3b", "codellama-70b", "tinyllama-1.1b", "mistral-7b-v0.3", "mixtral-8x7b",
        "qwen2.5-0.5b", "qwen2.5-72b", "qwen3-32b", "qwen3-30b-a3b", "gemma-2b", "gemma-2-9b", "gemma-3-27b", "phi-2",
        "phi-3-medium", "phi-4", "smollm2-1.7b", "olmo-2-32b", "olmoe-1b-7b", "starcoder2-15b", "vit-huge", "t5-large",
        "palm-540b",
    }  # fmt: skip
    assert promised <= set(model_ids())
    assert len(model_ids()) >= 100
    assert len(set(model_ids())) == len(model_ids())


def test_no_name_stands_for_two_models() -> None:
    owners: dict[str, str] = {}
    for entry in model_entries():
        for name in {entry.id, *entry.aliases, entry.hub_id} - {""}:
            assert owners.setdefault(catalog._plain(name), entry.id) == entry.id, name


def test_every_row_says_where_it_comes_from_and_when() -> None:
    for entry in model_entries():
        assert entry.source.startswith("https://"), entry.id
        assert len(entry.as_of) == 10, entry.id
        assert entry.as_of >= "2026-01-01", entry.id


@pytest.mark.parametrize(
    ("name", "id_"),
    [
        ("llama-2-7b", "llama-2-7b"),
        ("Llama-2-7B", "llama-2-7b"),
        ("llama_2_7b", "llama-2-7b"),
        (" Llama 2 7b ", "llama-2-7b"),
        ("llama2-7b", "llama-2-7b"),
        ("Llama-2-7b-hf", "llama-2-7b"),
        ("meta-llama/Llama-2-7b-hf", "llama-2-7b"),
        ("llama-7b", "llama-1-7b"),
        ("LLAMA-65B", "llama-1-65b"),
        ("meta-llama/Meta-Llama-3.1-8B", "llama-3.1-8b"),
        ("Qwen/Qwen2.5-0.5B", "qwen2.5-0.5b"),
        ("phi-3-14b", "phi-3-medium"),
        ("gemma-7b", "gemma-7b"),
        ("openai-community/gpt2", "gpt2"),
    ],
)
def test_a_model_goes_by_many_names(name: str, id_: str) -> None:
    assert load_model(name).name == id_


@pytest.mark.parametrize("name", ["llama-27b", "gemma-22b", "llama", "", "."])
def test_a_name_is_not_guessed(name: str) -> None:
    assert find_entry(name) is None


def test_the_two_oldest_llamas_differ_in_length_alone() -> None:
    first, second = load_model("llama-7b"), load_model("llama-2-7b")
    assert first.parameters == second.parameters
    assert first.buffers == second.buffers
    assert (first.max_seq_len, second.max_seq_len) == (2048, 4096)
    assert {k: v for k, v in first.config.items() if k != "max_position_embeddings"} == {
        k: v for k, v in second.config.items() if k != "max_position_embeddings"
    }


def test_a_field_published_as_null_stays_null() -> None:
    assert load_model("mistral-7b-v0.3").config["sliding_window"] is None
    assert load_model("mistral-7b-v0.1").config["sliding_window"] == 4096


def test_an_unknown_name() -> None:
    assert _refusal("llama-2-7c") == (
        "unknown model 'llama-2-7c'; nearest: llama-2-7b, llama-2-70b, llama2-7b; "
        "run `optplan models` for the list, or give a config.json"
    )


@pytest.mark.parametrize("name", ["/nowhere/config.json", "nowhere/a/b", "my.json", "./models", "..\\models\\x"])
def test_a_path_to_nothing(name: str) -> None:
    assert _refusal(name) == f"there is no file or folder {name!a}"


def test_a_file_and_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my-llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "small.json").write_text(json.dumps(LLAMA))
    from_folder, from_file, other = (load_model(str(folder / part)) for part in ("", "config.json", "small.json"))
    assert from_folder == from_file
    assert (from_file.name, from_file.source) == ("my-llama", str(folder / "config.json"))
    assert other.name == "small"
    assert other.parameters == from_file.parameters


def test_a_file_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(LLAMA))
    assert load_model("config.json").name == "config"


def test_errors_in_a_file_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.json").write_text(json.dumps({**LLAMA, "hidden_size": -1}))
    assert _refusal("mine.json") == ("'mine.json': the field 'hidden_size' must be between 1 and 1048576, got -1")
    assert _refusal(".") == "there is no file 'config.json'"


def test_a_damaged_file_of_ours_is_our_fault() -> None:
    with pytest.raises(DataError) as error:
        catalog._read_rows("x.toml", '[[model]]\nid = "x"\nas_of = 3\n')
    assert str(error.value) == "the catalogue file x.toml is damaged: Expected `str`, got `int` - at `$[0].as_of`"


def test_loading_is_quick() -> None:
    times = []
    for _ in range(5):
        catalog.model_entries.cache_clear()
        catalog._index.cache_clear()
        start = time.perf_counter()
        load_model("llama-7b")
        times.append(time.perf_counter() - start)
    assert min(times) < 0.025


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from optplan.planner.catalog import load_model; load_model('llama-7b'); "
        "print([m for m in ('torch', 'numpy', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
