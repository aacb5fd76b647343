"""A `Page` as one HTML document: everything inside, nothing fetched, nothing from a record taken for markup."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
import msgspec
from markupsafe import Markup

from optplan.planner.version import VERSION
from optplan.reports.html import theme
from optplan.reports.html.figures.plot import Figure, Trace
from optplan.reports.html.parts import Drawing, Page, Switches
from optplan.reports.html.text import exact, shown

_SHAPES = {"circle": "round", "circle-open": "hollow", "diamond": "diamond", "line-ns-open": "tick"}
"""Symbol of a trace to the class of its mark in the legend; squares are the rule."""


def render(page: Page) -> str:
    """The document."""
    scripts = [_text("plotly.min.js", package="plotly.package_data"), _text("templates/page.js")]
    return environment().get_template("page.html").render(
        page=page,
        version=VERSION,
        policy=_policy(scripts),
        style=Markup(_style()),
        figures=_embedded({id_: _drawn(figure) for id_, figure in _figures(page)}),
        records=_embedded({name: msgspec.to_builtins(record) for name, record in page.records.items()}),
        scripts=[Markup(script) for script in scripts],
    )  # fmt: skip


@cache
def environment() -> jinja2.Environment:
    """The templates, which take everything that is put into them for text."""
    found = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: _text(f"templates/{name}")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals |= {"shown": shown, "exact": exact, "is_number": _is_number, "legend": legend}
    return found


@cache
def _text(name: str, *, package: str = "optplan.reports.html") -> str:
    # What a browser hashes has its line ends made uniform.
    return files(package).joinpath(name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _style() -> str:
    light, dark = theme.variables(dark=False), theme.variables(dark=True)
    fonts = f"--sans:{theme.FONT};--mono:{theme.MONOSPACE};"
    schemes = (
        f":root{{{fonts}{light}color-scheme:light}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{dark}color-scheme:dark}}}}\n"
        f"@media print{{:root{{{light}color-scheme:light}}}}\n"
        f":root[data-printing]{{{light}color-scheme:light}}\n"
    )
    return schemes + _text("templates/style.css")


def _policy(scripts: list[str]) -> str:
    """Only the page's own scripts run, and nothing is loaded from anywhere."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
        "form-action 'none'"
    )


def _figures(page: Page) -> Iterator[tuple[str, Figure]]:
    for section in page.sections:
        for part in section.parts:
            if isinstance(part, Drawing):
                yield part.id, part.figure
            elif isinstance(part, Switches):
                yield "what-if-plot", part.figure


def _drawn(figure: Figure) -> dict[str, Any]:
    return {"data": figure.data, "layout": {**figure.layout, "showlegend": False}}


def legend(figure: Figure) -> list[tuple[str, str, str]]:
    """Name, colour and dash of each trace that a figure wants listed; it wraps as text does, plotly's own does not."""
    if not figure.layout["showlegend"]:
        return []
    traces = [trace for trace in figure.data if trace.get("name") and trace.get("showlegend") is not False]
    return [(html.unescape(trace["name"]), _colour(trace), _pattern(trace)) for trace in traces]


def _colour(trace: Trace) -> str:
    line, marker = trace.get("line", {}), trace.get("marker", {})
    found = (trace.get("fillcolor"), line.get("color"), marker.get("color"))
    return str(next(filter(None, found)) if trace["type"] == "scatter" else marker["color"])


def _pattern(trace: Trace) -> str:
    if trace["type"] == "bar" and "pattern" in trace["marker"]:
        return "hatched"
    if trace["type"] == "scatter" and trace.get("mode", "").startswith("markers"):
        return _SHAPES.get(trace["marker"].get("symbol", "circle"), "")
    return "dashed" if trace.get("line", {}).get("dash") not in (None, "solid") else ""


def _embedded(document: Any) -> Markup:
    """JSON that no record can break out of: an HTML parser sees neither tags nor entities in it."""
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
