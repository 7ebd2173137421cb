"""skipstone: graph rewrites that make transformer inference cheaper, and never silently wrong.

Names are loaded on first use, so that importing the package does not import torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from skipstone.registration import register

if TYPE_CHECKING:
    from skipstone import errors as errors
    from skipstone.artifact import load as load
    from skipstone.backend import backend as backend
    from skipstone.budget import Budget as Budget
    from skipstone.budget import Certificate as Certificate
    from skipstone.calibrate import tokenize as tokenize
    from skipstone.export import export_onnx as export_onnx
    from skipstone.find import find_adaptive_ffn as find_adaptive_ffn
    from skipstone.find import find_compress_kv as find_compress_kv
    from skipstone.find import find_compress_prompt as find_compress_prompt
    from skipstone.find import find_layer_parallel as find_layer_parallel
    from skipstone.find import find_self_speculate as find_self_speculate
    from skipstone.find import find_skip_by_prompt as find_skip_by_prompt
    from skipstone.masking import mask_tokens as mask_tokens
    from skipstone.optimize import optimize as optimize
    from skipstone.passes.compress_kv import CompressKV as CompressKV
    from skipstone.passes.compress_kv import StreamingHeads as StreamingHeads
    from skipstone.passes.compress_prompt import CompressPrompt as CompressPrompt
    from skipstone.passes.fuse_parallel import FuseParallel as FuseParallel
    from skipstone.passes.layer_parallel import LayerParallel as LayerParallel
    from skipstone.passes.layer_parallel import Segment as Segment
    from skipstone.passes.quantize_kv import FormatChoice as FormatChoice
    from skipstone.passes.quantize_kv import QuantizeKV as QuantizeKV
    from skipstone.passes.quantize_weights import QuantizeWeights as QuantizeWeights
    from skipstone.passes.self_speculate import SelfSpeculate as SelfSpeculate
    from skipstone.passes.skip_by_prompt import SkipByPrompt as SkipByPrompt
    from skipstone.passes.skip_ffn_adaptive import SkipFFNAdaptive as SkipFFNAdaptive
    from skipstone.passes.skip_sublayers import SkipSublayers as SkipSublayers
    from skipstone.plan import Plan as Plan
    from skipstone.report import Report as Report
    from skipstone.runtime.executable import Executable as Executable
    from skipstone.segments import compare_segments as compare_segments
    from skipstone.training import Routers as Routers
    from skipstone.training import train_routers as train_routers

__version__ = "0.1.0"

_HOME = {
    "Budget": "skipstone.budget",
    "Certificate": "skipstone.budget",
    "CompressKV": "skipstone.passes.compress_kv",
    "CompressPrompt": "skipstone.passes.compress_prompt",
    "Executable": "skipstone.runtime.executable",
    "FormatChoice": "skipstone.passes.quantize_kv",
    "FuseParallel": "skipstone.passes.fuse_parallel",
    "LayerParallel": "skipstone.passes.layer_parallel",
    "Plan": "skipstone.plan",
    "QuantizeKV": "skipstone.passes.quantize_kv",
    "QuantizeWeights": "skipstone.passes.quantize_weights",
    "Report": "skipstone.report",
    "Routers": "skipstone.training",
    "Segment": "skipstone.passes.layer_parallel",
    "SelfSpeculate": "skipstone.passes.self_speculate",
    "SkipByPrompt": "skipstone.passes.skip_by_prompt",
    "SkipFFNAdaptive": "skipstone.passes.skip_ffn_adaptive",
    "SkipSublayers": "skipstone.passes.skip_sublayers",
    "StreamingHeads": "skipstone.passes.compress_kv",
    "backend": "skipstone.backend",
    "compare_segments": "skipstone.segments",
    "export_onnx": "skipstone.export",
    "find_adaptive_ffn": "skipstone.find",
    "find_compress_kv": "skipstone.find",
    "find_compress_prompt": "skipstone.find",
    "find_layer_parallel": "skipstone.find",
    "find_self_speculate": "skipstone.find",
    "find_skip_by_prompt": "skipstone.find",
    "load": "skipstone.artifact",
    "mask_tokens": "skipstone.masking",
    "optimize": "skipstone.optimize",
    "tokenize": "skipstone.calibrate",
    "train_routers": "skipstone.training",
}

__all__ = [*sorted(_HOME), "__version__", "errors"]


class _Package(ModuleType):
    """This package. `optimize` and `backend` stay functions after the submodules of these names are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("backend", "optimize") and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "errors":
            return import_module("skipstone.errors")
        if name not in _HOME:
            raise AttributeError(f"module 'skipstone' has no attribute {name!r}")
        value = getattr(import_module(_HOME[name]), name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return __all__


sys.modules[__name__].__class__ = _Package
register()
