"""Is Lab 7 graded right on both sides: does every mistake cost what it should, and nothing else?"""

from __future__ import annotations

import pytest

from autograder.checks.runner import checks_of
from tests.accuracy import (
    EMPTY,
    REPEATS,
    SEED,
    alternatives,
    answer_all,
    checks_at_stake,
    failed,
    mutate,
    with_alternative,
)
from tests.lab07.mutants import MUTANTS

LAB = "lab07_lightweight"
ALTERNATIVES = alternatives(__file__)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name.replace(" ", "-"))
def test_mutant_loses_exactly_what_it_breaks(mutant, solution, check_here):
    at_stake = checks_at_stake(mutant, LAB)
    results = failed(check_here(mutate(solution(LAB), mutant), LAB, seed=SEED, names=at_stake))
    assert results.keys() == mutant.fails.keys(), results
    for name, part in mutant.fails.items():
        assert part in results[name] and "[error]" not in results[name], results[name]


@pytest.mark.parametrize("path", ALTERNATIVES, ids=lambda p: p.stem)
def test_alternative_takes_every_point(path, student, check_here):
    """Does a correct program in another style, pasted below the emptied notebook, take full marks?"""
    notebook = with_alternative(student(LAB), path)
    for seed in range(SEED, SEED + 3):
        assert failed(check_here(notebook, LAB, seed=seed)) == {}


def test_there_are_alternatives():
    assert len(ALTERNATIVES) >= 4


def test_solution_takes_every_point_again_and_again(solution, check_here):
    for seed in range(SEED, SEED + REPEATS):
        assert failed(check_here(solution(LAB), LAB, seed=seed)) == {}, f"seed {seed}"


def test_untouched_notebook_scores_nothing(student, check_here):
    results = check_here(student(LAB), LAB)
    assert all(r.status == "todo" and r.points == 0 and r.hint.startswith("TODO") for r in results.values()), results


METHODS = {
    "MomentumSampler": ["euler_step", "displacement", "momentum_update", "sample"],
    "QuantizedConv2d": ["forward"],
}
FUNCTIONS = [
    "noise_prediction_mse", "symmetric_scale", "fake_quantize", "straight_through", "calibration_set",
    "one_timestep_set", "activation_scales", "fake_quantize_split", "quantize_model", "model_bytes",
    "finetune_quantized", "channel_magnitudes", "channels_to_prune", "taylor_importance", "diffusion_gradients",
    "count_macs", "prune_model", "ratio_for_macs", "finetune",
]  # fmt: skip


@pytest.mark.parametrize("answer", EMPTY)
def test_no_check_passes_on_an_empty_answer(answer, student, check_here):
    notebook = answer_all(student(LAB), answer, METHODS, FUNCTIONS)
    results = check_here(notebook, LAB)
    assert len(results) == len(checks_of(LAB))
    style = results.pop("lightweight_style")  # reads the cells, in which the stubs still stand
    assert style.status == "todo"
    assert all(r.status == "failed" and r.hint for r in results.values()), {
        n: (r.status, r.hint) for n, r in results.items()
    }
