"""`optplan show`: what a command has saved or printed as JSON, a measurement beside what today's rules say of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from optplan import options, output

if TYPE_CHECKING:
    import msgspec

_RENDERERS = {
    "optplan.estimate/1": "estimate:render_estimate",
    "optplan.measurement/1": "measurement:render_measurement",
    "optplan.recommend/1": "recommend:render_recommend",
    "optplan.sweep/1": "sweep:render_sweep",
    "optplan.timeline/1": "timeline:render_timeline",
    "optplan.explain/1": "explain:render_explanation",
    "optplan.compare/1": "compare:render_comparison",
    "optplan.validation/1": "validation:render_validation",
    "optplan.replay/1": "replay:render_replay",
    "optplan.models/1": "listings:render_models",
    "optplan.gpus/1": "listings:render_gpus",
    "optplan.optimizers/1": "listings:render_optimizers",
    "optplan.published/1": "published:render_published",
}
"""Where each schema's printer is, within `optplan.reports.terminal`."""


def show(
    record: Annotated[str, typer.Argument(metavar="RECORD", help="File that --json, --out or profile have written.")],
    html: options.Html = None,
    md: options.Markdown = None,
    json: options.Json = False,
) -> None:
    """Show a saved record.

    What a command has printed with --json, as it was printed; a measured or traced step beside today's estimate of it,
    with the differences. --html and --md take the records of steps: estimates and measurements.
    """
    from optplan.planner.measured.record_files import load_answer, load_record

    output.check_targets(html, md)
    loaded = load_answer(record) if html is None and md is None else load_record(record)
    if json:
        output.print_json(loaded)
    else:
        output.print_terminal(_renderer(loaded), loaded)
    output.write_page(html, lambda: _page(loaded))
    output.write_page(md, lambda: _markdown(loaded))


def _renderer(record: Any) -> Any:
    from importlib import import_module

    module, _, name = _RENDERERS[record.schema].partition(":")
    return getattr(import_module(f"optplan.reports.terminal.{module}"), name)


def _page(record: msgspec.Struct) -> str:
    from optplan.reports.html.documents import record_page

    return record_page(record)  # type: ignore[arg-type]  # a step's record where a page is asked for


def _markdown(record: msgspec.Struct) -> str:
    from optplan.reports.markdown.documents import record_markdown

    return record_markdown(record)  # type: ignore[arg-type]
