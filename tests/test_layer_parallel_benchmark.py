"""The benchmark of layers in parallel, on a tiny model that knows nothing: which figures it gives."""

from __future__ import annotations

import pytest

from benchmarks import layer_parallel
from skipstone import Segment
from skipstone.calibrate import token_batches
from skipstone.segments import measure_segments, middle_segments
from tests import models

pytestmark = pytest.mark.usefixtures("one_thread")


def test_figures_are_named_by_layers_iterations_and_unit() -> None:
    assert layer_parallel.label(Segment(8, 24, 2)) == "16_2_layer"
    assert layer_parallel.label(Segment(8, 20, 1, "two_stage")) == "12_1_two_stage"


@pytest.mark.slow
def test_it_measures_quality_and_counts_costs() -> None:
    program = models.program("deep")
    text = token_batches([models.tokens(3, 16, seed=0)], program.source)
    tried = middle_segments(6, [2, 4])
    rows = {row.metric: row for row in layer_parallel.quality("tiny", program, text, tried)}
    names = [layer_parallel.label(each) for each in tried]
    assert list(rows) == ["tiny_nll_sequential", *(f"tiny_dnll_{name}" for name in names)]
    assert {row.samples for row in rows.values()} == {3}
    _, seen = measure_segments(program, text, tried)[tried[-1]]
    last = rows[f"tiny_dnll_{names[-1]}"]
    changed = last.baseline * (1 + last.value) if last.baseline else 0
    assert changed == pytest.approx(float((seen.nll + seen.increase).sum() / seen.tokens.sum()))
    segment, rise = Segment(1, 5, 2), "tiny_dnll_4_2_layer_iterate_stepwise"
    steps = {row.metric: row.value for row in layer_parallel.stepwise("tiny", program, text, segment)}
    assert list(steps) == [rise, rise.replace("iterate", "last"), rise.replace("iterate", "final")]
    _, at_once = measure_segments(program, text, [segment])[segment]
    assert steps[rise] == pytest.approx(float(at_once.increase.sum() / at_once.nll.sum()), rel=1e-4)
    assert len({round(value, 3) for value in steps.values()}) == 3
    costs = {row.metric: row for row in layer_parallel.costs(program, text, tried)}
    for segment in tried:
        assert costs[f"launches_{layer_parallel.label(segment)}"].value < costs["launches_2_1_layer"].baseline
        assert 0 < costs[f"predicted_vs_sequential_{layer_parallel.label(segment)}"].value < 1.1
    assert costs["critical_path_4_1_layer"].value == 16 and costs["critical_path_4_1_layer"].baseline == 31
