"""Records side by side in the terminal, over a comparison written by hand."""

import io

import pytest
from rich.console import Console

from optplan.planner.measured.comparison import ComparedRow, ComparedSide, Comparison, EventDifference, TensorDifference
from optplan.reports.terminal.compare import render_comparison

GIB = 2**30
HOSTILE = "\x1b[31m</script>"


def comparison(label: str = "step.json.gz") -> Comparison:
    return Comparison(
        version="0.1.0",
        sides=[
            ComparedSide(label, "live", {"model": "toy", "gpu": "gpu-20g"}),
            ComparedSide("predicted", "rules", {"model": "toy"}),
        ],
        reference=0,
        rows=[
            ComparedRow("resident", "optimizer_state", "bytes", [2 * GIB, 2 * GIB], [0, 0]),
            ComparedRow("phases", "backward", "bytes", [4 * GIB, 4 * GIB + 512], [0, 512]),
            ComparedRow("totals", "device_bytes", "bytes", [5 * GIB, None], [0, None]),
            ComparedRow("time", "step", "seconds", [0.5, 0.55], [0, 0.05]),
            ComparedRow("time", "optimizer_copy_fraction", "share", [0.85, None], [0, None]),
            ComparedRow("time", "host_launches_per_second", "per second", [81_300.8, None], [0, None]),
        ],
        events=[EventDifference(1, 7, 6, "forward: allocates 1,000 B for gate", None)],
        tensors=[TensorDifference("layers.0.gate", "activations", [1024, None])],
        notes=["predicted is of another step than measured: batch_size 1 -> 2"],
    )


def render(record: Comparison, *, width: int = 120, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", newline="\n")
    render_comparison(record, Console(file=stream, width=width, highlight=False, markup=False, emoji=False))
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


def _line(text: str, start: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.startswith(start))


def test_each_number_with_its_difference() -> None:
    text = render(comparison())
    assert _line(text, "optimizer state") == ["optimizer", "state", "2.00", "GiB", "2.00", "GiB", "equal"]
    assert _line(text, "backward") == ["backward", "4.00", "GiB", "4.00", "GiB", "+512", "B", "+0.00%"]
    assert _line(text, "device, context included") == ["device,", "context", "included", "5.00", "GiB", "-"]
    assert _line(text, "step ") == ["step", "500.00", "ms", "550.00", "ms", "+10.00%"]
    assert _line(text, "optimizer, share of copy bandwidth")[-2:] == ["85.0%", "-"]
    assert _line(text, "host, launches per second")[-2:] == ["81,301", "-"]


def test_where_the_timelines_part() -> None:
    text = render(comparison())
    assert "predicted differs from event 7 on; 6 are equal" in text
    assert "step.json.gz: forward: allocates 1,000 B for gate" in text
    assert "predicted: has ended" in text
    assert _line(text, "layers.0.gate") == ["layers.0.gate", "activations", "1.00", "KiB", "-"]


def test_notes_come_last() -> None:
    assert render(comparison()).splitlines()[-1].endswith("batch_size 1 -> 2")


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_line_is_wider_than_the_terminal(width: int, encoding: str) -> None:
    assert all(len(line) <= width for line in render(comparison(), width=width, encoding=encoding).splitlines())


def test_a_label_cannot_steer_the_terminal() -> None:
    text = render(comparison(HOSTILE))
    assert "\x1b" not in text
    assert "?[31m</script>: live" in text
