"""Build the wheel, install it into a fresh environment away from the sources, and run the main job from it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Exit non-zero if the wheel lacks a file of the sources or does not work on its own."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        wheel = _build(work)
        _check_contents(wheel)
        _check_answers(work, wheel)
    print("the wheel holds every source file and answers on its own")


def _build(work: Path) -> Path:
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(work / "dist"), str(ROOT)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = (work / "dist").glob("*.whl")
    return wheel


def _check_contents(wheel: Path) -> None:
    packaged = set(zipfile.ZipFile(wheel).namelist())
    missing = sorted(name for name in _expected_files() if name not in packaged)
    if missing:
        sys.exit(f"the wheel lacks {', '.join(missing)}")


def _expected_files() -> set[str]:
    folders = {"cli": "optplan"} | {
        name: f"optplan/{name}" for name in ("planner", "profilers", "optim_impls", "reports")
    }
    return {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in folders.items()
        for pattern in ("*.py", "*.toml", "*.html", "*.css", "*.js", "*.json", "py.typed")
        for path in (ROOT / folder).rglob(pattern)
    }


def _check_answers(work: Path, wheel: Path) -> None:
    venv.create(work / "venv", with_pip=True)
    python = work / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", str(wheel)], check=True)
    page = ["--html", str(work / "page.html")]
    command = [work / "venv" / "bin" / "optplan", "estimate", "--model", "gpt2", "--gpu", "h200", "--json", *page]
    result = subprocess.run(command, check=True, capture_output=True, cwd=work)
    if json.loads(result.stdout)["model"]["num_parameters"] != 124_439_808:
        sys.exit("the installed wheel miscounts gpt2")
    if "<title>gpt2 on h200-141g · optplan</title>" not in (work / "page.html").read_text(encoding="utf-8"):
        sys.exit("the installed wheel writes no page")


if __name__ == "__main__":
    main()
