"""Keep of each prompt no more keys and values than those that its end looks at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from skipstone.ir.dialect import (
    CACHED_ATTENTION,
    CACHED_OPS,
    KEPT_START,
    PROMPT_SCORES,
    QUANTIZED_CACHED_ATTENTION,
    START_PLACE,
    Kind,
    kept_rows,
    key_bias_of,
)
from skipstone.ir.errors import InternalError, InvalidPlan, Unsupported
from skipstone.ir.formats import parse
from skipstone.ir.program import ATTENTIONS, Port, Program, Role, provenance
from skipstone.ir.statistics import sites
from skipstone.passes.base import Pass, Remark
from skipstone.passes.kv_cache import check_slots, count_input


@dataclass(frozen=True)
class CompressPrompt(Pass):
    """Read each prompt in full, and keep the most important of its tokens for the decoding behind it.

    Once a prompt is read, every key-value head keeps the `rows` tokens of it that the last `observed` queries attend to
    most, those and the first ones among them, where they stood (SnapKV, arXiv 2404.14469; with `redundancy`, FlowCache,
    arXiv 2602.10825; see `skipstone.ir.kept_prompt`). The others are freed. Shorter prompts stay whole. What is decoded
    is kept in full and sees what is kept, so that steps of one token and of several are the same; the tokens of the
    prompt itself are computed as ever.

    Attributes:
        rows: how many tokens of a prompt are kept.
        observed: the last queries of a prompt, which decide; they are kept themselves.
        sinks: the first tokens of a prompt, which are kept besides (attention sinks).
        pool: odd number of tokens that are as important as the most important of them.
        redundancy: from 0, importance alone, to 1: how much it counts that a token's key is like the others.
        layers: layers to compress; None for all.
    """

    name: ClassVar[str] = "compress_prompt"

    rows: int = 512
    observed: int = 32
    sinks: int = 4
    pool: int = 7
    redundancy: float = 0.0
    layers: tuple[int, ...] | None = None

    def validate(self) -> None:
        """Refuse settings that fit no model.

        Raises:
            InvalidPlan: a number is too small or too large.
        """
        if self.observed < 1 or self.sinks < 0:
            wrong, least = ("sinks", 0) if self.observed >= 1 else ("observed", 1)
            raise InvalidPlan(f"{self.name}: {wrong} is {getattr(self, wrong)}, expected {least} or more.")
        if self.rows <= self.observed + self.sinks:
            always = f"{self.observed} observed ones and {self.sinks} sinks"
            hint = f"Keep {self.observed + self.sinks + 1} rows or more, or observe fewer."
            raise InvalidPlan(f"{self.name}: rows is {self.rows}, which {always} take up already.", hint=hint)
        if self.pool < 1 or self.pool % 2 == 0:
            hint = f"The nearest is {max(1, self.pool - 1)}."
            raise InvalidPlan(f"{self.name}: pool is {self.pool}, expected an odd number.", hint=hint)
        if not 0 <= self.redundancy <= 1:
            hint = "FlowCache takes 0.93."
            raise InvalidPlan(f"{self.name}: redundancy is {self.redundancy}, expected 0 to 1.", hint=hint)

    def check(self, program: Program) -> None:
        """See `Pass.check`."""
        self.validate()
        check_slots(program, self.name)
        for node, site in sites(program).items():
            if self.layers and len(node.meta.get(ATTENTIONS, ())) > 1:
                feature = f"{self.name} of some layers where attentions of several layers are one"
                raise Unsupported(feature, where=site, hint="Compress all of them, or leave fuse_parallel out.")
        known = {node.meta.get("layer") for node in sites(program)}
        for layer in self.layers or ():
            if layer not in known:
                numbers = [each for each in known if each is not None]
                hint = f"The nearest is {min(numbers, key=lambda n: abs(n - layer))}." if numbers else ""
                raise InvalidPlan(f"{self.name}: layer {layer} has no cached attention.", hint=hint)

    def rewrite(self, program: Program) -> list[Remark]:
        """See `Pass.rewrite`."""
        whole, remarks = program.copy(), []
        for node, site in self.sites(program):
            if reason := _refusal(node):
                remarks.append(self.refused(site, reason))
                continue
            slot: Any = node.kwargs["slot"]
            program.add_output(Port(f"scores_{slot}", Role.PROMPT_SCORES, slot), self._scores(program, node))
            remarks.append(self.applied(site, f"{self.rows} rows of a prompt are kept", rows=self.rows))
        if any(port.role == Role.PROMPT_SCORES for port in program.outputs):
            program.continuations = program.continuations or (whole,)
        return remarks or [self.missed("model", "no attention sees all tokens before it")]

    def behind_prompts(self) -> Pass:
        """See `Pass.behind_prompts`."""
        return _GoOn(self)

    def sites(self, program: Program) -> Iterator[tuple[fx.Node, str]]:
        """The attentions that see everything before them; what has a window reads little as it is."""
        for node, site in sites(program).items():
            if node.kwargs["kind"] == Kind.CAUSAL and (self.layers is None or node.meta.get("layer") in self.layers):
                yield node, site

    def _scores(self, program: Program, node: fx.Node) -> fx.Node:
        """How much each row of a prompt is worth keeping to the heads of an attention."""
        options: dict[str, Any] = {name: node.kwargs[name] for name in ("scale", "softcap") if name in node.kwargs}
        options |= {"observed": self.observed, "first": self.sinks, "pool": self.pool, "redundancy": self.redundancy}
        count = count_input(program)
        with provenance(program, self.name, like=node), program.graph.inserting_before(node):
            return program.call(PROMPT_SCORES, *node.args[:2], count, _sinks(node), **options)

    def ensures(self, program: Program) -> None:
        """See `Pass.ensures`."""
        scored = {port.slot for port in program.outputs if port.role == Role.PROMPT_SCORES}
        for part in program.continuations:
            for node in part.nodes(*CACHED_OPS):
                if (kept_rows(node) == self.rows) != (node.kwargs["slot"] in scored):
                    raise InternalError(f"{node.name} does not go on where its prompt's rows end")


@dataclass(frozen=True)
class _GoOn(Pass):
    """Make attentions go on behind the rows that `CompressPrompt` keeps of their prompts."""

    name: ClassVar[str] = "behind_prompt"

    entry: CompressPrompt = CompressPrompt()

    def rewrite(self, program: Program) -> list[Remark]:
        """See `Pass.rewrite`."""
        nodes = {node: site for node, site in self.entry.sites(program) if not _refusal(node)}
        if not nodes:
            return [self.missed("model", "no attention is compressed")]
        start = program.input(Role.START)
        if start is None:
            raise InternalError("a cached program without the input `start`")
        prompt = program.input(Role.DECODE_START)
        if prompt is None:
            prompt = program.add_input(Port("decode_start", Role.DECODE_START), start.meta["val"].clone())
        last = [node for node in program.graph.nodes if node.op == "placeholder"][-1]
        with provenance(program, self.name, like=next(iter(nodes))), program.graph.inserting_after(last):
            place = program.call(KEPT_START, start, prompt, rows=self.entry.rows)
        for node in nodes:
            node.update_arg(START_PLACE, place)
        return [self.applied(site, f"goes on behind {self.entry.rows} rows of a prompt") for site in nodes.values()]


def _sinks(node: fx.Node) -> Any:
    """The sink logits of a cached attention, if it has any."""
    place = 7 if node.target == CACHED_ATTENTION else 9
    return node.args[place] if len(node.args) > place else None


def _refusal(node: fx.Node) -> str:
    """Why an attention keeps all of its prompts, "" if it need not."""
    if key_bias_of(node) is not None:
        return "its keys are kept without their bias, which quantize_kv(condition=True) splits off"
    if node.target == CACHED_ATTENTION:
        if len(node.args) > 6 and node.args[6] is not None:
            return "it adds a bias to its logits, for all columns of the cache"
        return ""
    if node.target != QUANTIZED_CACHED_ATTENTION:
        return "it has a window"
    options: Any = node.kwargs
    if options.get("residual") or options.get("first"):
        return "some rows of its cache are kept in full precision, by their place"
    if any(parse(options[name]).group_tokens > 1 for name in ("k_format", "v_format")):
        return "tokens share their scales in the format of its cache"
    return ""
