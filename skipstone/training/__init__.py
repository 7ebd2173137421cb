"""What is trained: routers that skip by prompt, and models whose layers may run at the same time.

Names are loaded on first use, so that importing the package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skipstone.training.routers import CANDIDATES as CANDIDATES
    from skipstone.training.routers import SMALLEST_SPREAD as SMALLEST_SPREAD
    from skipstone.training.routers import STEP_TOKENS as STEP_TOKENS
    from skipstone.training.routers import TRIALS as TRIALS
    from skipstone.training.routers import Routers as Routers
    from skipstone.training.routers import Step as Step
    from skipstone.training.routers import train_routers as train_routers
    from skipstone.training.snlp import LayerParallelLoss as LayerParallelLoss
    from skipstone.training.snlp import ramp as ramp

_HOME = {
    "CANDIDATES": "skipstone.training.routers",
    "LayerParallelLoss": "skipstone.training.snlp",
    "Routers": "skipstone.training.routers",
    "SMALLEST_SPREAD": "skipstone.training.routers",
    "STEP_TOKENS": "skipstone.training.routers",
    "Step": "skipstone.training.routers",
    "TRIALS": "skipstone.training.routers",
    "ramp": "skipstone.training.snlp",
    "train_routers": "skipstone.training.routers",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'skipstone.training' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
