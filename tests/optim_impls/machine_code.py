"""Compiles kernels for a GPU that need not be there and reads their machine code.

Where kernels are interpreted, triton cannot compile them, so that scripts do it in a process of their own, with
`figures` at hand; the last line that they print is what they found, as JSON.
"""

from __future__ import annotations

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SM90 = 90
"""Of an H100 or H200."""


def run(script: str) -> Any:
    """What a script finds."""
    head = f"import json, runpy\nimport triton.language as tl\nfigures = runpy.run_path({__file__!r})['figures']\n"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", head + script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def figures(
    kernel: Any,
    kinds: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    aligned: Sequence[str] = (),
    arch: int = SM90,
    **options: Any,
) -> dict[str, Any]:
    """Registers, bytes of stack and local memory, and how often each operation stands in the code, with its suffixes.

    Args:
        kernel: Of Triton.
        kinds: Types of arguments that are no fp32 numbers.
        constants: The constants.
        aligned: Pointers that begin at 16 bytes.
        arch: Compute capability, ten times.
        options: Of the compiler, such as `num_warps`.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else kinds.get(name, "fp32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert usage is not None, text[:1000]
    operations = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", text)
    sizes = dict(zip(("registers", "stack", "local"), map(int, usage.groups()), strict=True))
    return {**sizes, "operations": collections.Counter(operations)}


def count(found: Mapping[str, Any], *operations: str) -> int:
    """How many operations have all these dot-separated words in their name, such as `LDG.E.128` or `HFMA2.BF16`."""
    number = 0
    for name, times in found["operations"].items():
        words = name.split(".")
        number += times * any(
            operation.split(".")[0] == words[0] and all(part in name for part in operation.split("."))
            for operation in operations
        )
    return number
