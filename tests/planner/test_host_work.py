"""What a step asks of the host, against counts by hand from the classes of transformers."""

from __future__ import annotations

import timeit

import pytest

from optplan.planner.catalog import load_model
from optplan.planner.host_work import HostCalls, host_work, typical_calls
from optplan.planner.request import check_request
from optplan.planner.requested_step import step_options
from optplan.planner.step.families import FAMILIES
from optplan.planner.step.rules import record_step
from optplan.planner.step_time_work import StepWork, step_work


def _work(model: str, **request: object) -> StepWork:
    checked = check_request(load_model(model), gpu="h200", **{"batch_size": 2, "seq_len": 256} | request)
    options = step_options(checked)
    return step_work(checked.model, options, record_step(checked.model, options))


def test_a_layer_of_gpt2() -> None:
    work = host_work("gpt2", "bf16", "sdpa")
    assert work is not None
    (layer,) = work.layers
    # Forward: 2 norms, 4 products, attention, 2 dropouts, 2 sums, and 8 operations of the tanh GELU.
    assert layer.launches == 2 + 4 + 1 + 2 + 2 + 8
    # The block, 2 norms, attention with 2 projections and a dropout, the MLP with 2 more, its activation and a dropout.
    assert layer.modules == 1 + 2 + 4 + 5
    # Under autocast weight, bias and input of each product are cast, and not the output.
    amp = host_work("gpt2", "amp", "sdpa")
    assert amp is not None
    assert amp.layers[0].launches - layer.launches == 4 * 3
    # Attention by hand is scores, scaling, mask, softmax, cast, dropout and product, the last again from contiguous
    # keys and values, instead of one kernel.
    eager = host_work("gpt2", "bf16", "eager")
    assert eager is not None
    assert eager.layers[0].launches > layer.launches + 5


def test_a_layer_of_llama() -> None:
    work = host_work("llama", "bf16", "sdpa")
    assert work is not None
    (layer,) = work.layers
    # 7 products, attention, SiLU, a gate and 2 sums; each norm to fp32, squares, mean, sum, root, product, from fp32,
    # product; queries and keys are each turned by 2 products, a sign, a concatenation and a sum.
    assert layer.launches == 7 + 1 + 1 + 1 + 2 + 2 * 8 + 2 * 5
    # The layer, attention with 4 projections, the MLP with 3 and its activation, 2 norms.
    assert layer.modules == 1 + (1 + 4) + (1 + 3 + 1) + 2
    # Nothing is cast in fp32.
    fp32 = host_work("llama", "fp32", "sdpa")
    assert fp32 is not None
    assert fp32.layers[0].launches == layer.launches - 2 * 2


def test_the_whole_model_is_its_layers_and_the_rest() -> None:
    work, counted = _work("gpt2"), host_work("gpt2", "bf16", "sdpa")
    assert counted is not None
    (layer,), outside = counted.layers, counted.outside
    calls = work.forward.calls
    assert (calls.calls, calls.modules) == (outside.calls + 12 * layer.calls, outside.modules + 12 * layer.modules)
    assert (calls.nodes, calls.kept, calls.waits) == (0, 0, 1)
    assert work.backward.calls == HostCalls(
        nodes=outside.nodes + 12 * layer.nodes,
        backward_launches=outside.backward_launches + 12 * layer.backward_launches,
    )


@pytest.mark.parametrize(
    ("checkpointing", "layers", "hooked"),
    [("none", 0, 0), ("selective", 6, 6), ("full", 12, 12), ("full-reentrant", 12, 0)],
)
def test_what_is_computed_again_is_called_from_python(checkpointing: str, layers: int, hooked: int) -> None:
    work, counted = _work("gpt2", checkpointing=checkpointing), host_work("gpt2", "bf16", "sdpa")
    assert counted is not None
    (layer,) = counted.layers
    calls = work.backward.calls
    assert (calls.calls, calls.launches) == (layers * layer.calls, layers * layer.launches)
    assert calls.modules == layers * layer.modules
    # Every kept tensor goes through a hook in forward, again when it is made again, and when it is asked for.
    assert (work.forward.calls.kept, calls.kept) == (hooked * layer.kept, 2 * hooked * layer.kept)


def test_t5_has_layers_of_two_kinds() -> None:
    work, counted = _work("t5-base"), host_work("t5", "bf16", "sdpa")
    assert counted is not None
    encoder, decoder = counted.layers
    # The decoder attends twice: a norm, four projections, attention, a dropout more, and a module around them.
    assert decoder.modules - encoder.modules == 1 + 1 + 4 + 1 + 1
    assert work.forward.calls.modules == counted.outside.modules + 12 * (encoder.modules + decoder.modules)


@pytest.mark.parametrize(
    ("model", "padding_mask", "waits"),
    [
        ("bert-large", False, False),
        ("bert-large", True, True),
        ("t5-base", False, False),
        ("llama-3.2-1b", False, True),
    ],
)
def test_where_the_host_waits(model: str, padding_mask: bool, waits: bool) -> None:
    # transformers looks at positions of causal models, and at masks, whether it can do without a mask.
    assert (_work(model, padding_mask=padding_mask).forward.calls.waits > 0) == waits


def test_precisions_that_ask_for_the_same() -> None:
    assert host_work("gpt2", "mixed", "flash") == host_work("gpt2", "bf16", "sdpa")
    assert host_work("gpt2", "fp16-amp", "eager") == host_work("gpt2", "amp", "eager")


def test_families_without_counts_are_typical() -> None:
    assert host_work("palm", "bf16", "sdpa") is None
    work, typical = _work("palm-8b"), typical_calls()
    assert work.forward.calls.launches == typical.launches * work.forward.num_launches
    assert work.backward.calls.nodes == typical.nodes * work.backward.num_launches
    # The rules know of nearly every launch, so that the median family has about as many.
    assert 0.8 < typical.launches < 1.25
    assert 0.8 < typical.backward_launches < 1.25


def test_every_other_family_is_counted() -> None:
    without = {name for name in FAMILIES if host_work(name, "bf16", "eager") is None}
    assert without == {"palm"}
    assert {name for name in FAMILIES if host_work(name, "amp", "sdpa") is None} == {"palm", "gemma2"}


def test_reading_takes_less_than_a_millisecond() -> None:
    def read() -> object:
        host_work.cache_clear()
        return host_work("t5", "amp", "eager")

    assert min(timeit.repeat(read, number=1, repeat=20)) < 1e-3
