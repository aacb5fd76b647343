"""Count what forward and backward ask of the host, for every family that the step rules know.

    python benchmarks/count_host_work.py                   # counts, and prints what differs from the committed table
    python benchmarks/count_host_work.py --write           # writes planner/data/host_work.toml
    python benchmarks/count_host_work.py --family gpt2     # that family alone

Needs torch and transformers, but no GPU: the modules are traced without contents as on a CUDA device. Each is built
with one, two and three layers a stack: a layer's share is the difference, which has to be the same twice.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib.metadata import version
from statistics import median

import msgspec
from step_time_cases import ROOT

from optplan.planner.catalog import ModelEntry, load_model, model_entries
from optplan.planner.errors import ConfigError
from optplan.planner.host_work import HostCalls, HostWork, host_work
from optplan.planner.models.reader import read_model
from optplan.planner.models.spec import ModelSpec
from optplan.planner.step.families import FAMILIES
from optplan.planner.step.options import StepOptions
from optplan.planner.step.rules import check_step, record_step
from optplan.planner.step_time_work import num_kernels, num_layers

TABLE = ROOT / "planner" / "data" / "host_work.toml"
PRECISIONS = ("bf16", "fp32", "amp")
ATTENTIONS = ("sdpa", "eager")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
"""Fields that say how many layers a model's first stack has, or its only one."""
_HEADER = """\
# What forward and backward of one micro-step ask of the host: planner/host_work.py says what the seven numbers are.
#
# `python benchmarks/count_host_work.py --write` counted them with transformers {version}, on the catalogue's first
# model of each family, without a GPU but as on one. Below a family: precision-attention = [outside the layers, one
# layer of each stack]. Families without a table (no class, or one that cannot be traced) are taken to be typical: so
# many for each launch that the step rules know of in forward, the last two for each in backward, the waits as they are.
# These are medians of the families.
#
# [calls, launches, modules, kept, waits, nodes, backward_launches]
"""


def count_family(entry: ModelEntry, *, precision: str, attention: str) -> HostWork | None:
    """The counts of a family, None if it cannot be run or its class not be traced so.

    Raises:
        ValueError: The third layer of a stack asks for something else than the second.
    """
    num_stacks = len(num_layers(load_model(entry.id)))
    options = _options(entry, precision, attention)
    try:
        check_step(load_model(entry.id), options)
        base = _count(entry, [2] * num_stacks, options)
        fewer, more = (
            [
                _count(entry, [n if at == stack else 2 for at in range(num_stacks)], options)
                for stack in range(num_stacks)
            ]
            for n in (1, 3)
        )
    except ConfigError:
        return None
    layers = [calls.plus(base, -1) for calls in more]
    if layers != [base.plus(calls, -1) for calls in fewer]:
        raise ValueError(f"{entry.id}, {precision}, {attention}: the third layer is not like the second")
    outside = base
    for layer in layers:
        outside = outside.plus(layer, -2)
    return HostWork(outside, tuple(layers))


def _options(entry: ModelEntry, precision: str, attention: str) -> StepOptions:
    """A small step; what is asked of the host does not depend on its size, but pictures have one size alone."""
    seq_len = load_model(entry.id).max_seq_len if entry.family == "vit" else 128
    return StepOptions(batch_size=2, seq_len=seq_len, precision=precision, attention=attention)


def _count(entry: ModelEntry, counts: list[int], options: StepOptions) -> HostCalls:
    from optplan.profilers.tracing.host_calls import count_host_calls

    return count_host_calls(_with_layers(entry, counts), options)


def _with_layers(entry: ModelEntry, counts: list[int]) -> ModelSpec:
    """The model with so many layers in each stack."""
    config = {**entry.config, **dict.fromkeys(entry.nulls)}
    config |= {name: counts[0] for name in _LAYERS if name in config}
    if len(counts) > 1:
        config["num_decoder_layers"] = counts[1]
    return read_model(config, name=entry.id, source=entry.source, where=f"the catalogue entry '{entry.id}'")


def counted(families: list[str]) -> Iterator[tuple[str, str, HostWork]]:
    """The counts of some families: the family, precision with attention, counts."""
    for entry in first_entries(families):
        for attention in ATTENTIONS:
            for precision in PRECISIONS:
                work = count_family(entry, precision=precision, attention=attention)
                if work is not None:
                    yield entry.family, f"{precision}-{attention}", work


def first_entries(families: list[str]) -> list[ModelEntry]:
    """The catalogue's first model of each family."""
    entries: dict[str, ModelEntry] = {}
    for entry in model_entries():
        entries.setdefault(entry.family, entry)
    return [entries[family] for family in families if family in entries]


def typical(works: dict[tuple[str, str], HostWork]) -> HostCalls:
    """Medians of the families' counts for each launch that the step rules know of."""
    ratios = []
    for (family, key), work in works.items():
        (entry,), (precision, _, attention) = first_entries([family]), key.partition("-")
        spec = load_model(entry.id)
        options = _options(entry, precision, attention)
        forward, backward = num_kernels(record_step(spec, options))
        total = work.outside.plus(work.in_layers(num_layers(spec)))
        shares = HostCalls(*[forward] * 4, 1, *[backward] * 2)
        pairs = zip(msgspec.structs.astuple(total), msgspec.structs.astuple(shares), strict=True)
        ratios.append([count / of for count, of in pairs])
    return HostCalls(*(round(median(column), 2) for column in zip(*ratios, strict=True)))


def table(works: dict[tuple[str, str], HostWork]) -> str:
    """The table's text."""
    lines = [_HEADER.format(version=version("transformers")), "[typical]"]
    lines.append(f"per_launch = {_row(typical(works))}")
    for family in dict.fromkeys(family for family, _ in works):
        lines += ["", f"[{family}]"]
        for (name, key), work in works.items():
            if name == family:
                lines.append(f"{key} = [{', '.join(map(_row, (work.outside, *work.layers)))}]")
    return "\n".join(lines) + "\n"


def _row(calls: HostCalls) -> str:
    return f"[{', '.join(f'{count:g}' for count in msgspec.structs.astuple(calls))}]"


def main() -> None:
    """Count, then write or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(FAMILIES))
    parser.add_argument("--write", action="store_true", help="write the table, of all families")
    arguments = parser.parse_args()
    if arguments.write and arguments.family:
        parser.error("--write needs all families")
    works = {}
    for family, key, work in counted([arguments.family] if arguments.family else sorted(FAMILIES)):
        works[family, key] = work
        print(f"{family:12} {key:11} {_row(work.outside)}  {'  '.join(map(_row, work.layers))}")
        if work != host_work(family, *key.split("-")):
            print(" " * 25 + "unlike the committed table")
    if arguments.write:
        TABLE.write_text(table(works), "utf-8")


if __name__ == "__main__":
    main()
