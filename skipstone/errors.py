"""The errors of skipstone; see `skipstone.ir.errors`."""

from skipstone.ir.errors import (
    ArtifactError,
    InternalError,
    InvalidInput,
    InvalidPlan,
    Malformed,
    SkipstoneError,
    Unsupported,
    UserError,
)

__all__ = [
    "ArtifactError",
    "InternalError",
    "InvalidInput",
    "InvalidPlan",
    "Malformed",
    "SkipstoneError",
    "Unsupported",
    "UserError",
]
