"""Tell PyTorch of the backend as soon as both packages are imported, in whichever order, without importing PyTorch.

An installed package has an entry point for that. This is for a package that is only on the path.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

REGISTRY = "torch._dynamo.backends.registry"


def skipstone(graph: Any, example_inputs: Any, **settings: Any) -> Callable[..., Any]:
    """`skipstone.backend.backend`, which is imported when it is first needed."""
    from skipstone.backend import backend

    return backend(graph, example_inputs, **settings)


def register() -> None:
    """Register the backend with PyTorch, now or when PyTorch's registry of backends is imported."""
    if REGISTRY in sys.modules:
        _add(sys.modules[REGISTRY])
    else:
        sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]


def _add(registry: ModuleType) -> None:
    if skipstone.__name__ not in registry._COMPILER_FNS:
        registry.register_backend(skipstone)


class _Finder:
    """Finds that one module as it would be found anyway, and registers the backend once it has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _add(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
