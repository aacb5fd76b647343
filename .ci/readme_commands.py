"""Print the README's set-up commands, one a line, so that CI runs what a newcomer copies."""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def setup_commands() -> list[str]:
    """The commands in the console blocks of the section "Set up"."""
    section = README.read_text(encoding="utf-8").partition("\n## Set up\n")[2].partition("\n## ")[0]
    return [line for block in re.findall(r"```console\n(.*?)```", section, re.DOTALL) for line in block.splitlines()]


if __name__ == "__main__":
    commands = setup_commands()
    if len(commands) != 2:
        sys.exit(f"the README has {len(commands)} set-up commands, not 2")
    print("\n".join(commands))
