"""Two processes profile one step together over gloo: every rank's bytes, one record, one sentence when it fails.

The ranks run `sharded_profile_case.py` as a script. The figures are of a Llama of two layers, written out below.
"""

import json
import os
import socket
import time
from pathlib import Path

import msgspec
import pytest

from optplan.app import app
from optplan.boundary import run
from optplan.planner.errors import ConfigError
from optplan.planner.measured.measurement import Measurement
from optplan.profilers.live.sharded import Launch, check_launch, find_launch
from optplan.profilers.validation.command import PRELOADED
from optplan.profilers.validation.launching import end, launching

SCRIPT = Path(__file__).with_name("sharded_profile_case.py")
TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 72,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
LAYER = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 72 * 32 + 2 * 32
WHOLE = 2 * LAYER + 32 + 2 * 99 * 32
NUM_TENSORS = 2 * 9 + 3
# Rows are dealt out in halves; of the 99 rows of the vocabulary rank 0 has 50 and rank 1 has 49, stored as 50.
STORED = LAYER + 16 + 2 * 50 * 32
OWNED = (STORED, LAYER + 16 + 2 * 49 * 32)


@pytest.fixture(scope="module")
def launcher():
    """Starts ranks as children of one process that has imported everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SCRIPT.parent), prepend=os.pathsep)
        with launching([(*PRELOADED, "transformers:LlamaForCausalLM")]) as made:
            yield made


def run_ranks(launcher, folder, what, *, timeout=110):
    """Exit statuses and outputs of the two ranks."""
    (folder / "config.json").write_text(json.dumps(TINY))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [launcher.start(SCRIPT.stem, [rank, port, str(folder), what], {}) for rank in "01"]
    deadline = time.monotonic() + timeout
    try:
        assert all(rank.wait(deadline - time.monotonic()) for rank in ranks), [rank.output for rank in ranks]
    finally:
        end(ranks)
    return [rank.status for rank in ranks], [(rank.output, rank.last_words()) for rank in ranks]


@pytest.fixture(scope="module")
def records(launcher, tmp_path_factory):
    """The record of each case by name."""
    folder = tmp_path_factory.mktemp("measured")
    statuses, outputs = run_ranks(launcher, folder, "measure")
    assert statuses == [0, 0], outputs
    return {
        path.stem: msgspec.json.decode(path.read_bytes(), type=Measurement)
        for path in folder.glob("*.json")
        if path.stem != "config"
    }


def bytes_of(record):
    return [
        (row.bytes.parameters, row.bytes.gradients, row.bytes.master_weights, row.bytes.optimizer_state)
        for row in record.ranks
    ]


STEPS = 4 * NUM_TENSORS
EXPECTED = {
    "fsdp2-bf16-adamw": [(2 * STORED, 2 * STORED, 0, 4 * owned + STEPS) for owned in OWNED],
    "fsdp2-noreshard-bf16-adamw": [(2 * STORED, 2 * STORED, 0, 4 * owned + STEPS) for owned in OWNED],
    "fsdp2-mixed-adamw": [(4 * STORED, 4 * STORED, 0, 8 * owned + STEPS) for owned in OWNED],
    "ddp-bf16-adamw": [(2 * WHOLE, 2 * WHOLE, 0, 4 * WHOLE + STEPS)] * 2,
    # Master weights have gradients of their own, in fp32, beside the parameters'.
    "ddp-copies-mixed-adamw": [(2 * WHOLE, (2 + 4) * WHOLE, 4 * WHOLE, 8 * WHOLE + STEPS)] * 2,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_rank_tells_what_it_keeps(records, name):
    record = records[name]
    assert bytes_of(record) == EXPECTED[name]
    assert [row.rank for row in record.ranks] == [0, 1]
    assert record.bytes == record.ranks[0].bytes
    assert (record.config.gpus, record.environment.world_size, record.environment.rank) == (2, 2, 0)
    assert record.notes == [] or all("observing took" in note for note in record.notes)


def test_zero1_ranks_share_the_state(records):
    rows = records["zero1-bf16-adamw"].ranks
    assert sum(row.state_tensors["exp_avg"] for row in rows) == 2 * WHOLE
    assert sum(row.state_tensors["step"] for row in rows) == STEPS
    # Largest first to the rank that has the fewest: the two can differ by no more than the largest tensor.
    assert abs(rows[0].state_tensors["exp_avg"] - rows[1].state_tensors["exp_avg"]) <= 2 * 99 * 32


def test_adam_mini_keeps_its_first_moment_on_shards(records):
    rows = records["fsdp2-bf16-adam-mini"].ranks
    assert all(
        row.bytes.optimizer_state < 0.75 * adamw for row, adamw in zip(rows, (4 * n for n in OWNED), strict=True)
    )


def test_adam_mini_steps_fp32_shards_and_fp32_masters(records):
    sharded, replicated = (records[f"{name}-mixed-adam-mini"].ranks for name in ("fsdp2", "ddp"))
    assert [row.state_tensors["exp_avg"] for row in sharded] == [4 * owned for owned in OWNED]
    assert [row.state_tensors["exp_avg"] for row in replicated] == [4 * WHOLE] * 2
    assert [row.bytes.master_weights for row in replicated] == [4 * WHOLE] * 2


def test_whether_layers_reshard_changes_no_loss(records):
    resharded, kept = (records[f"{name}-bf16-adamw"].losses for name in ("fsdp2", "fsdp2-noreshard"))
    assert resharded == kept
    assert len(set(resharded)) == len(resharded) == 4


def test_a_failure_is_told_once_and_running_out_of_memory_is_a_row(launcher, tmp_path):
    statuses, outputs = run_ranks(launcher, tmp_path, "fail")
    assert statuses == [0, 0], outputs
    assert [out.splitlines() for out, _ in outputs] == [
        [
            "refuse: 2 processes were started, but --sharding says none; allowed: ddp, ddp-copies, zero1, fsdp2, "
            "fsdp2-noreshard",
            "exhaust: ['backward', 'backward']",
            "fail: (another rank tells)",
        ],
        [
            "refuse: (another rank tells)",
            "exhaust: ",
            "fail: rank 1 of 2 failed: RuntimeError: the disk of this rank is gone",
        ],
    ]


LISTENS = (
    "rank 0 of 2 cannot listen on port {port}, where the ranks are to meet: another program does; give them "
    "another MASTER_PORT, or start them with torchrun --standalone, which takes a free one"
)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("{port}", LISTENS),
        (
            "http",
            "rank 0 of 2 did not meet the others at port http (MASTER_PORT): invalid literal for int() with base 10: "
            "'http'",
        ),
        (
            None,
            "rank 0 of 2 did not meet the others: Error initializing torch.distributed using env:// rendezvous: "
            "environment variable MASTER_PORT expected, but not set",
        ),
    ],
    ids=["taken", "malformed", "missing"],
)
def test_ranks_that_cannot_meet_are_told_so_in_one_sentence(given, sentence, tmp_path, monkeypatch, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY))
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        if given is not None:
            monkeypatch.setenv("MASTER_PORT", given.format(port=port))
        step = ["--optimizer", "adamw", "--sharding", "ddp", "--seq-len", "8", "--device", "cpu"]
        status = run(app, ["profile", "--model", str(config), *step])
    assert (status, capsys.readouterr().err.splitlines()[-1]) == (2, f"optplan: {sentence.format(port=port)}")


def test_a_launch_is_read_from_torchruns_variables():
    variables = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    assert find_launch(variables) == Launch(rank=5, local_rank=1, num_ranks=8, num_nodes=2)
    assert find_launch({}) is None
    assert find_launch({"RANK": "0", "WORLD_SIZE": "1"}) is None


@pytest.mark.parametrize(
    ("launch", "sharding", "sentence"),
    [
        (
            None,
            "fsdp2",
            "--sharding fsdp2 is measured by several processes: start them with "
            "torchrun --nproc-per-node 2 -m optplan profile ...",
        ),
        (
            Launch(0, 0, 2, 1),
            "zero2",
            "--sharding zero2 cannot be profiled in this version; allowed: ddp, ddp-copies, zero1, fsdp2, "
            "fsdp2-noreshard",
        ),
    ],
)
def test_a_launch_that_does_not_go_with_the_sharding_is_refused(launch, sharding, sentence):
    with pytest.raises(ConfigError) as raised:
        check_launch(launch, sharding)
    assert str(raised.value) == sentence
