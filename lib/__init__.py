"""Measures what it costs to deploy an open-weight language model on a GPU, and shows the evidence.

Two wings meet in `records`. The measuring wing (`hardware`, `models`, `stacks`, `measure`) may use
torch; the reading wing (`show`, `analysis`, `studies`, `report`) never does, so that anyone can
redo the analysis on a laptop. `run` executes the notebooks of a profile; `python -m lib` is its
command line. `files` and `stats` import nothing of lib.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from types import ModuleType

__version__ = "0.1.0"


def modules_of(
    package: str, path: Sequence[str]
) -> tuple[Callable[[str], ModuleType], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package: a module is imported when it is first named.

    So that `from lib import analysis` is enough in a notebook, and costs nothing before it is used.
    """
    names = sorted(module.name for module in pkgutil.iter_modules(path))

    def module(name: str) -> ModuleType:
        if name not in names:
            raise AttributeError(f"{package} has no module {name!r}; it has {', '.join(names)}")
        return importlib.import_module(f"{package}.{name}")

    return module, lambda: names
