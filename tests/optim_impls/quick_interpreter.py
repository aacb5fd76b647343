"""Triton's interpreter, made quicker: the language is prepared once for each module of a launch, not at every call.

The interpreter replaces the whole language in a function's module each time that one device function calls another,
which takes a third of a test.
"""

from __future__ import annotations

from typing import Any

import pytest


def prepare_once(patch: pytest.MonkeyPatch) -> None:
    """Replace the interpreter's launches and calls of device functions, until the patch is undone."""
    from triton.runtime import interpreter

    plain, prepared = interpreter.GridExecutor.__call__, set[int]()

    def launch(self: Any, *arguments: Any, **more: Any) -> None:
        prepared.clear()
        plain(self, *arguments, **more)

    def call(self: Any, *arguments: Any, **more: Any) -> Any:
        if id(self.fn.__globals__) not in prepared:
            prepared.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*arguments, **more)

    patch.setattr(interpreter.GridExecutor, "__call__", launch)
    patch.setattr(interpreter.InterpretedFunction, "__call__", call)
