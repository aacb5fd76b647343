"""The committed example pages hold what the code says now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_examples_are_fresh() -> None:
    command = [sys.executable, str(ROOT / ".ci" / "example_pages.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stderr == ""
    assert result.returncode == 0


def test_the_examples_are_few_and_small() -> None:
    sizes = [path.stat().st_size for path in (ROOT / "docs" / "examples").iterdir()]
    assert sum(sizes) < 16_000_000
