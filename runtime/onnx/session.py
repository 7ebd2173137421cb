"""Running a lowered program in ONNX Runtime, on torch memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnxruntime
import torch
from onnxruntime import OrtValue
from torch import Tensor

from skipstone.ir.program import Program
from skipstone.runtime.cache import KVCache
from skipstone.runtime.onnx.lower import LoweredModel, lower
from skipstone.runtime.onnx.memory import large_blocks_apart
from skipstone.runtime.session import ProgramSession, cache_layout, check_threads


class OnnxSession(ProgramSession):
    """Runs a program in ONNX Runtime; see `skipstone.runtime.session.Session`.

    Weights, inputs and cache buffers are torch memory that ONNX Runtime reads and writes directly. The cache is updated
    in place: each buffer is bound as an input and as the output that replaces it.

    Args:
        program: in float32, on the CPU.
        threads: threads that one operator may use, None for one a core.
        lowered: the program, lowered before.
    Attributes:
        lowered: what it runs.
    Raises:
        Unsupported: see `skipstone.runtime.onnx.lower.lower`.
    """

    def __init__(self, program: Program, threads: int | None = None, lowered: LoweredModel | None = None) -> None:
        self.program = program
        self.layout = cache_layout(program)
        # ONNX Runtime reads its tensors for as long as it lives.
        self.lowered = lower(program) if lowered is None else lowered
        self._session = _open(self.lowered, threads)
        self._outputs = [port.name for port in program.outputs]

    def run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Session.run`."""
        binding = self._session.io_binding()
        inputs = {port.name: values[port.name].detach().contiguous() for port in self.program.inputs}
        for name, tensor in inputs.items():
            binding.bind_ortvalue_input(name, share(tensor))
        for name in self._outputs:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        return {
            name: torch.from_dlpack(value) for name, value in zip(self._outputs, binding.get_outputs(), strict=True)
        }

    def step_outputs(self, values: Mapping[str, Tensor], cache: KVCache, names: Sequence[str]) -> tuple[Tensor, ...]:
        """See `ProgramSession.step_outputs`."""
        # Kept with the cache: threads that decode with one session have caches of their own.
        binding = cache.lease
        if not isinstance(binding, _StepBinding) or not binding.fits(self._session, values, cache, names):
            cache.lease = binding = _StepBinding(self._session, names, values, cache, self.lowered.written)
        return binding.run(values)


class _StepBinding:
    """The bindings of one step, reused for as long as the sizes and the cache buffers stay the same."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        names: Sequence[str],
        values: Mapping[str, Tensor],
        cache: KVCache,
        written: Mapping[str, str],
    ) -> None:
        self.session, self.names = session, list(names)
        self.binding = session.io_binding()
        with torch.inference_mode(False):  # else it could not be used again outside of that mode
            self.inputs = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in values.items()}
        self.buffers = dict(cache.buffers)
        for name, tensor in self.inputs.items():
            self.binding.bind_ortvalue_input(name, share(tensor))
        shared = {name: share(tensor) for name, tensor in self.buffers.items()}
        for name, value in shared.items():
            self.binding.bind_ortvalue_input(name, value)
        for name, buffer in written.items():
            self.binding.bind_ortvalue_output(name, shared[buffer])

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a deep copy of the cache, in memory or in another process, makes its own

    def fits(
        self,
        session: onnxruntime.InferenceSession,
        values: Mapping[str, Tensor],
        cache: KVCache,
        names: Sequence[str],
    ) -> bool:
        """Whether a step with this session, these inputs, this cache and these outputs can use the binding."""
        if self.session is not session or self.names != list(names):
            return False
        same_cache = all(tensor is cache.buffers[name] for name, tensor in self.buffers.items())
        return same_cache and all(values[name].shape == mine.shape for name, mine in self.inputs.items())

    def run(self, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Run with new input values; the outputs are new tensors."""
        for name, mine in self.inputs.items():
            mine.copy_(values[name])
        for name in self.names:  # last, and anew each time: earlier outputs stay what they were
            self.binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(self.binding)
        return tuple(torch.from_dlpack(value) for value in self.binding.get_outputs()[-len(self.names) :])


def share(tensor: Tensor) -> OrtValue:
    """An OrtValue over the tensor's own memory, which must be contiguous and outlive it."""
    return OrtValue.from_dlpack(tensor.detach())


def _open(lowered: LoweredModel, threads: int | None) -> onnxruntime.InferenceSession:
    check_threads(threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Ever smaller blocks of work: a thread that wakes up late keeps the others waiting for less (1.5% of a step).
    options.add_session_config_entry("session.dynamic_block_base", "4")
    names = list(lowered.tensors)
    options.add_external_initializers(names, [share(lowered.tensors[name]) for name in names])
    with large_blocks_apart():
        return onnxruntime.InferenceSession(lowered.proto, options, providers=["CPUExecutionProvider"])
