"""Write the generated documents: the README's picture and table, the command reference, the pages of records.

`--check` compares instead and exits 1 if one of them is stale.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from accuracy_page import accuracy_page
from kernels_page import kernels_page
from readme_page import readme_page
from situations_section import recommend_page
from speed_page import speed_page
from training_page import training_page

if TYPE_CHECKING:
    from optplan.planner.listings import ImplementationItem

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (
    "estimate",
    "recommend",
    "sweep",
    "explain",
    "timeline",
    "profile",
    "validate",
    "compare",
    "show",
    "report",
    "models",
    "gpus",
    "optimizers",
    "published",
    "replay",
)


def picture() -> str:
    """The README's terminal picture: the real output of the main job."""
    from rich.console import Console
    from rich.text import Text

    from optplan.planner.estimate import estimate
    from optplan.reports.terminal.estimate import render_estimate

    console = Console(
        record=True,
        width=128,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
    )
    console.print(Text("$ optplan estimate --model llama-7b --gpu a100-40g", "bold"))
    render_estimate(estimate("llama-7b", gpu="a100-40g"), console)
    svg = console.export_svg(title="optplan", unique_id="optplan")
    # The picture must not fetch anything: the default style names a web font.
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


def command_reference() -> str:
    """Every command with its help, as `optplan COMMAND --help` prints it."""
    head = ["# Command line\n", "Written by `make docs` from the commands' own help.\n"]
    sections = [
        f"## `{' '.join(['optplan', *args])}`\n\n```text\n{_help(args)}```\n"
        for args in ([], *([command] for command in COMMANDS))
    ]
    return "\n".join(head + sections)


SCHEMAS = {
    "estimate": "optplan.planner.records:EstimateReport",
    "recommend": "optplan.planner.search.records:SearchReport",
    "sweep": "optplan.planner.sweep_records:SweepReport",
    "explain": "optplan.planner.explanation:Explanation",
    "compare": "optplan.planner.measured.comparison:Comparison",
    "measurement": "optplan.planner.measured.measurement:Measurement",
    "validation": "optplan.planner.measured.validation:ValidationReport",
    "timeline": "optplan.planner.timeline_report:TimelineReport",
    "models": "optplan.planner.listings:ModelListing",
    "gpus": "optplan.planner.listings:GpuListing",
    "optimizers": "optplan.planner.listings:OptimizerListing",
    "published": "optplan.planner.published:PublishedReport",
    "replay": "optplan.planner.history.report:HistoryReport",
}


def json_schema(path: str) -> str:
    """The JSON Schema of what a command prints with `--json`."""
    import msgspec

    module, _, name = path.partition(":")
    schema = msgspec.json.schema(getattr(import_module(module), name))
    return json.dumps(schema, indent=2) + "\n"


def optimizer_table() -> str:
    """`docs/optimizers.md`: every optimizer with its evidence, implementations and options."""
    from optplan.planner.listings import list_optimizers

    lines = [
        "# What each optimizer keeps",
        "",
        "Written by `make docs` from the registry and `planner/data/optimizers.toml`. `optplan explain --optimizer ID`"
        " fills the formulas in for a model.",
    ]
    for item in list_optimizers().optimizers:
        lines += ["", f"## {item.title} (`{item.id}`)", "", item.facts.evidence, "", f"Source: {item.facts.source}", ""]
        lines += _options_table(item.implementations)
    return "\n".join(lines) + "\n"


def _options_table(implementations: list[ImplementationItem]) -> list[str]:
    rows = ["| implementation | option | default | allowed | what it sets |", "|---|---|---|---|---|"]
    for item in implementations:
        name = f"`{item.name}`" + (" (default)" if item.default else "")
        rows += [
            f"| {name} | `{option.name}` | {_default(option.default)} | {option.allowed} | {option.help} |"
            for option in item.options
        ] or [f"| {name} | | | | |"]
    return rows


def _default(value: object) -> str:
    return "from the model" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _help(args: list[str]) -> str:
    from optplan.app import app
    from optplan.boundary import run

    os.environ["COLUMNS"] = "80"
    text = io.StringIO()
    with redirect_stdout(text):
        run(app, [*args, "--help"])
    return "".join(line.rstrip() + "\n" for line in text.getvalue().strip().splitlines())


DOCUMENTS: dict[str, Callable[[], str]] = {
    "README.md": readme_page,
    "docs/estimate.svg": picture,
    "docs/accuracy.md": accuracy_page,
    "docs/cli.md": command_reference,
    "docs/kernels.md": kernels_page,
    "docs/speed.md": speed_page,
    "docs/training.md": training_page,
    "docs/optimizers.md": optimizer_table,
    "docs/recommend.md": recommend_page,
    **{f"docs/schemas/{name}.json": partial(json_schema, path) for name, path in SCHEMAS.items()},
}


def main() -> int:
    """Write or check every generated document; the number of stale ones decides the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [name for name, write in DOCUMENTS.items() if not _settle(ROOT / name, write(), check=check)]
    for name in stale:
        print(f"{name} is stale: run `make docs`", file=sys.stderr)
    return 1 if stale else 0


def _settle(path: Path, text: str, *, check: bool) -> bool:
    if check:
        return path.exists() and path.read_text(encoding="utf-8") == text
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return True


if __name__ == "__main__":
    sys.exit(main())
