"""What the oldest versions that we support lack, and which tests need."""

from __future__ import annotations

import pytest

from skipstone.runtime.onnx.forms import takes_counts

_REASON = "needs ONNX Runtime 1.32 or later: a GroupQueryAttention that takes the number of new rows"

needs_group_query_attention = pytest.mark.skipif(not takes_counts(), reason=_REASON)


def skip_without_group_query_attention() -> None:
    """For fixtures and parts of a test, as the mark is for tests."""
    if not takes_counts():
        pytest.skip(_REASON)
