"""Say which of the packages and tools that measurements need are on this machine, and save it as JSON.

python benchmarks/list_tools.py --out FILE
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shutil
import subprocess
from pathlib import Path

PACKAGES = (
    "torch", "triton", "transformers", "nvidia-ml-py", "typer", "rich", "msgspec", "pytest", "pytest-xdist",
    "hypothesis", "bitsandbytes", "adam-mini", "ista-daslab-optimizers", "torchao", "liger-kernel",
)  # fmt: skip
TOOLS = ("nvidia-smi", "ncu", "compute-sanitizer", "git")
GPU_FIELDS = "index,name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,power.limit"


def main() -> None:
    """Print and save what is there."""
    parser = argparse.ArgumentParser(description="Say which packages and tools are on this machine.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    out = parser.parse_args().out
    found = {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "tools": {name: _find(name) for name in TOOLS},
        "gpus": _ask("nvidia-smi", f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader"),
        "links": _ask("nvidia-smi", "topo", "-m"),
    }
    out.write_text(json.dumps(found, indent=2) + "\n")
    missing = [name for group in ("packages", "tools") for name, value in found[group].items() if value is None]
    print(f"missing: {', '.join(missing) or 'nothing'}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _find(tool: str) -> bool | None:
    return True if shutil.which(tool) or Path("/usr/local/cuda/bin", tool).exists() else None


def _ask(*command: str) -> list[str]:
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return told.stdout.splitlines()


if __name__ == "__main__":
    main()
