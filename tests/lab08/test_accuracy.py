"""Is Lab 8 graded right on both sides: does every mistake cost what it should, and nothing else?"""

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
from tests.lab08.mutants import MUTANTS

LAB = "lab08_encoder_propagation"
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


def test_there_are_mutants_and_alternatives():
    assert len(MUTANTS) >= 30 and len(ALTERNATIVES) >= 4


def test_solution_takes_every_point_again_and_again(solution, check_here):
    for seed in range(SEED, SEED + REPEATS):
        assert failed(check_here(solution(LAB), LAB, seed=seed)) == {}, f"seed {seed}"


def test_untouched_notebook_scores_nothing(student, check_here):
    results = check_here(student(LAB), LAB)
    assert all(r.status == "todo" and r.points == 0 and r.hint.startswith("TODO") for r in results.values()), results


METHODS = {
    "DPMSolver": ["first_order_step", "second_order_step", "multistep_step", "sample"],
    "EncoderPropagation": ["predict"],
    "SplitUNet": ["encode", "decode"],
    "PropagatedSampler": ["sample"],
}
FUNCTIONS = [
    "time_grid", "convergence_order", "adjacent_changes", "principal_components", "reuse_error", "key_schedule",
    "hold_key_steps", "network_times", "inject_noise", "faster_sample", "theoretical_saving", "load_stable_diffusion",
    "make_scheduler", "read_coco", "folder_fid", "clip_score",
]  # fmt: skip


@pytest.mark.parametrize("answer", EMPTY)
def test_no_check_passes_on_an_empty_answer(answer, student, check_here):
    results = check_here(answer_all(student(LAB), answer, METHODS, FUNCTIONS), LAB)
    assert len(results) == len(checks_of(LAB))
    style = results.pop("propagation_style")  # reads the cells, in which the stubs still stand
    assert style.status == "todo"
    assert all(r.status == "failed" and r.hint for r in results.values()), {
        n: (r.status, r.hint) for n, r in results.items()
    }


def test_points():
    assert sum(check.points for check in checks_of(LAB).values()) == 86  # and 14 given by a person
