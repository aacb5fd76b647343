"""Build `.types/optplan/`: links shaped like the installed package, for tools that read files and do not import."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Link every file of `cli/` and every mapped folder into one package folder."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        mapping: dict[str, str] = tomllib.load(file)["tool"]["setuptools"]["package-dir"]
    package = ROOT / ".types" / "optplan"
    shutil.rmtree(package.parent, ignore_errors=True)
    package.mkdir(parents=True)
    for entry in (ROOT / mapping["optplan"]).iterdir():
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    for name, folder in mapping.items():
        if name != "optplan":
            (package / name.removeprefix("optplan.")).symlink_to(ROOT / folder)


if __name__ == "__main__":
    main()
