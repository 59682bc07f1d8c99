"""Is every lab graded right on both sides: does every mistake cost what it should, and nothing else?

A lab is tested as soon as there is a folder `tests/labNN` with its mutants and alternatives.
"""

from __future__ import annotations

import pytest

from autograder.checks.runner import checks_of
from tests.accuracy import (
    EMPTY,
    LABS,
    REPEATS,
    SEED,
    SLOW,
    answer_all,
    checks_at_stake,
    failed,
    mutate,
    with_alternative,
)


def _case(lab, *values, name=""):
    """A test's arguments; `make test-fast` leaves out the labs whose checks take seconds."""
    marks = [pytest.mark.slow] if lab in SLOW else []
    return pytest.param(lab, *values, id="-".join(filter(None, (lab, name))).replace(" ", "-"), marks=marks)


every_lab = pytest.mark.parametrize("lab", [_case(lab.name) for lab in LABS])


@every_lab
def test_there_are_mutants_and_alternatives(lab):
    (found,) = (one for one in LABS if one.name == lab)
    assert found.mutants and found.alternatives
    assert len({mutant.name for mutant in found.mutants}) == len(found.mutants)


@pytest.mark.parametrize(
    ("lab", "mutant"),
    [_case(lab.name, mutant, name=mutant.name) for lab in LABS for mutant in lab.mutants],
)
def test_mutant_loses_exactly_what_it_breaks(lab, mutant, solution, check_here):
    at_stake = checks_at_stake(mutant, lab)
    results = failed(check_here(mutate(solution(lab), mutant), lab, seed=SEED, names=at_stake))
    assert results.keys() == mutant.fails.keys(), results
    for name, part in mutant.fails.items():
        assert part in results[name] and "[error]" not in results[name], results[name]


@pytest.mark.parametrize(
    ("lab", "path"),
    [_case(lab.name, path, name=path.stem) for lab in LABS for path in lab.alternatives],
)
def test_alternative_takes_every_point(lab, path, student, check_here):
    """Does a correct program in another style, pasted below the emptied notebook, take full marks?"""
    notebook = with_alternative(student(lab), path)
    for seed in range(SEED, SEED + 3):
        assert failed(check_here(notebook, lab, seed=seed)) == {}


@every_lab
def test_solution_takes_every_point_again_and_again(lab, solution, check_here):
    for seed in range(SEED, SEED + REPEATS):
        assert failed(check_here(solution(lab), lab, seed=seed)) == {}, f"seed {seed}"


@every_lab
def test_untouched_notebook_scores_nothing(lab, student, check_here):
    results = check_here(student(lab), lab)
    assert all(r.status == "todo" and r.points == 0 and r.hint.startswith("TODO") for r in results.values()), results


@pytest.mark.parametrize("answer", EMPTY)
@every_lab
def test_no_check_passes_on_an_empty_answer(lab, answer, student, check_here):
    results = check_here(answer_all(student(lab), answer), lab)
    assert len(results) == len(checks_of(lab))
    # Style is read from the cells, in which the stubs still stand.
    expected = {name: "todo" if name.endswith("_style") else "failed" for name in results}
    assert {name: r.status for name, r in results.items()} == expected, failed(results)
    assert all(r.hint for r in results.values())
