"""Where a record is made: GPU, driver, versions, settings, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from optplan.planner.measured.measurement import Environment
from optplan.planner.version import VERSION

ALLOC_CONF_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Where torch reads its allocator's settings from, the newer name first."""

COMMIT_VARIABLE = "OPTPLAN_COMMIT"
"""Names the commit where the code is no checkout, such as a copy of one on another machine."""
NOTE_VARIABLE = "OPTPLAN_RECORD_NOTE"
"""What records must say of the circumstances under which they are made."""


def read_environment(
    *, command: str | None = None, driver: str | None = None, other_processes_bytes: int | None = None
) -> Environment:
    """The environment of this process on the current device.

    Args:
        command: What made the record; this process's own when None, see `command_line`.
        driver: Version of the GPU's driver, where it is known.
        other_processes_bytes: Device memory that other processes hold.
    """
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device()) if torch.cuda.is_available() else None
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return Environment(
        gpu=gpu.name if gpu else None,
        gpu_total_bytes=gpu.total_memory if gpu else None,
        other_processes_bytes=other_processes_bytes,
        driver=driver,
        cuda=torch.version.cuda,
        python=platform.python_version(),
        torch=str(torch.__version__),
        triton=_version("triton"),
        transformers=_version("transformers"),
        optplan=VERSION,
        alloc_conf=alloc_conf(),
        command=command or command_line(),
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit=_commit(),
        world_size=torch.distributed.get_world_size() if distributed else 1,
        rank=torch.distributed.get_rank() if distributed else 0,
    )


def is_first_rank() -> bool:
    """Whether this process is the first of its group, or alone."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


def given_notes() -> list[str]:
    """What whoever started this process wants its records to say."""
    return [os.environ[NOTE_VARIABLE]] if os.environ.get(NOTE_VARIABLE) else []


def alloc_conf() -> str:
    """The settings of torch's CUDA allocator that this process was started with."""
    return next((os.environ[name] for name in ALLOC_CONF_VARIABLES if os.environ.get(name)), "")


def command_line() -> str:
    """This process's command as a shell would take it again; of absolute paths, which are the user's, the last part."""
    program = Path(sys.argv[0])
    launcher = _launcher()
    name = [program.name]
    if program.name == "__main__.py":  # `python -m package`, whatever folder the package was read from
        spec = getattr(sys.modules.get("__main__"), "__spec__", None)
        package = spec.name.removesuffix(".__main__") if spec else program.parent.name
        name = ["-m", package] if launcher else [package]
    return shlex.join([*launcher, *name, *map(_without_folders, sys.argv[1:])])


def _launcher() -> list[str]:
    """What starts this process and the others that train with it, nothing if it trains alone."""
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if "RANK" not in os.environ or num_ranks == 1:
        return []
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
    nodes = [] if on_this_machine == num_ranks else ["--nnodes", str(num_ranks // on_this_machine)]
    return ["torchrun", *nodes, "--nproc-per-node", str(on_this_machine)]


def _without_folders(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return option + equals + (Path(value).name if Path(value).is_absolute() else value)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit named to this process, or that of the checkout that optplan runs from; None for an installed package."""
    if os.environ.get(COMMIT_VARIABLE):
        return os.environ[COMMIT_VARIABLE]
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"]
    try:
        # A package installed beneath somebody else's checkout is not of that checkout.
        tracked = ["git", "-C", str(folder), "ls-files", "--error-unmatch", Path(__file__).name]
        if subprocess.run(tracked, capture_output=True, timeout=10, check=False).returncode:
            return None
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
