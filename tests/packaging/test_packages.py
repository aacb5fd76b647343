"""What pyproject.toml says of the package is what the folders hold."""

from __future__ import annotations

import tomllib
from importlib.metadata import version
from pathlib import Path

import optplan

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = PROJECT["tool"]["setuptools"]["package-dir"]


def test_every_folder_with_code_is_listed() -> None:
    found = set()
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *path.parent.relative_to(ROOT / folder).parts]))
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_every_module_belongs_to_a_package() -> None:
    for folder in FOLDERS.values():
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


def test_tests_have_no_packages() -> None:
    # With --import-mode=importlib an __init__.py would make two files of one name collide with the installed package.
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_the_version_is_said_once() -> None:
    assert optplan.__version__ == PROJECT["project"]["version"] == version("optplan")


def test_the_constraints_pin_every_test_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    groups = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *groups["gpu"], *groups["hf"], *groups["test"]]
    names = {requirement.split(";")[0].split(">")[0].split("=")[0].strip() for requirement in wanted}
    assert {name.lower() for name in names if not name.startswith("optplan[")} <= pinned
