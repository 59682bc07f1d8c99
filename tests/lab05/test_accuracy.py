"""Is Lab 5 graded right on both sides: does every mistake cost what it should, and nothing else?"""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
import torch

from autograder.checks.runner import checks_of
from tests.lab05.mutants import MUTANTS, Mutant

LAB = "lab05_sampling"
SEED = int(os.environ.get("DIFFLAB_TEST_SEED", "0"))  # `make soak` tries others
REPEATS = int(os.environ.get("DIFFLAB_TEST_REPEATS", "5"))
ALTERNATIVES = sorted((Path(__file__).parent / "alternatives").glob("*.py"))


def _failed(results) -> dict[str, str]:
    return {name: f"[{r.status}] {r.hint}" for name, r in results.items() if r.status != "passed"}


def _mutate(notebook, mutant: Mutant):
    (cell,) = (c for c in notebook.cells if c["id"] == f"{mutant.exercise}-code".replace("_", "-"))
    assert cell.source.count(mutant.old) >= 1, f"{mutant.old!r} is not in the solution of {mutant.exercise}"
    cell.source = cell.source.replace(mutant.old, mutant.new, 1)
    return notebook


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name.replace(" ", "-"))
def test_mutant_loses_exactly_what_it_breaks(mutant, solution, check_here):
    results = check_here(_mutate(solution(LAB), mutant), LAB, seed=SEED)
    failed = _failed(results)
    assert failed.keys() == mutant.fails.keys(), failed
    for name, part in mutant.fails.items():
        assert part in failed[name], failed[name]
        assert "[error]" not in failed[name]


@pytest.mark.parametrize("path", ALTERNATIVES, ids=lambda p: p.stem)
def test_alternative_takes_every_point(path, student, check_here):
    """Does a correct program in another style, pasted below the emptied notebook, take full marks?"""
    notebook = student(LAB)
    notebook.cells = [c for c in notebook.cells if not c.metadata.get("nbgrader", {}).get("solution")]
    for cell in path.read_text(encoding="utf-8").split("\n# %%\n"):
        notebook.cells.append(nbformat.v4.new_code_cell(cell))
    for seed in range(SEED, SEED + 3):
        assert _failed(check_here(notebook, LAB, seed=seed)) == {}


def test_there_are_alternatives():
    assert len(ALTERNATIVES) >= 8


def test_solution_takes_every_point_again_and_again(solution, check_here):
    for seed in range(SEED, SEED + REPEATS):
        assert _failed(check_here(solution(LAB), LAB, seed=seed)) == {}, f"seed {seed}"


def test_untouched_notebook_scores_nothing(student, check_here):
    results = check_here(student(LAB), LAB)
    assert all(r.status == "todo" and r.points == 0 and r.hint.startswith("TODO") for r in results.values()), results


METHODS = {
    "ForwardProcessImpl": ["add_noise", "demonstrate_forward_trajectory"],
    "TrainedModelAnalyzer": ["analyze_noise_prediction_quality", "visualize_noise_predictions"],
    "DDPMSampler": ["compute_posterior_mean", "compute_posterior_variance", "ddpm_step", "sample"],
    "DDIMSampler": ["predict_x0_from_eps", "create_timestep_schedule", "ddim_step", "sample"],
    "StochasticityController": ["compute_stochastic_variance", "analyze_eta_effects"],
    "SamplingOptimizer": [
        "cached_noise_schedule_sampling", "batch_sampling_with_memory_management", "mixed_precision_sampling",
        "choose_num_steps",
    ],
}  # fmt: skip
FUNCTIONS = ["seed_consistency", "compare_samplers", "x0_error_gain", "health_check", "sample_with_fallbacks"]
EMPTY = {
    "None": lambda self, *args, **kwargs: None,
    "zero": lambda self, *args, **kwargs: 0.0,
    "zeros": lambda self, *args, **kwargs: torch.zeros(args[0].shape if isinstance(args[0], torch.Tensor) else args[0]),
    "its first argument": lambda self, *args, **kwargs: args[0],
    "a list": lambda self, *args, **kwargs: [],
    "a string": lambda self, *args, **kwargs: "tensor",
    "NaN": lambda self, *args, **kwargs: torch.full((4,), float("nan")),
}


@pytest.mark.parametrize("answer", EMPTY)
def test_no_check_passes_on_an_empty_answer(answer, student, check_here):
    notebook = student(LAB)
    code = "\n".join(f"for _m in {methods}: setattr({cls}, _m, ANSWER)" for cls, methods in METHODS.items())
    code += f"\nfor _f in {FUNCTIONS}: globals()[_f] = lambda *args, **kwargs: ANSWER(None, *args, **kwargs)"
    notebook.cells.append(
        nbformat.v4.new_code_cell(f"from tests.lab05.test_accuracy import EMPTY\nANSWER = EMPTY[{answer!r}]\n{code}")
    )
    results = check_here(notebook, LAB)
    assert len(results) == len(checks_of(LAB))
    style = results.pop("code_style")  # reads the cells, in which the stubs still stand
    assert style.status == "todo"
    assert all(r.status == "failed" and r.hint for r in results.values()), {
        n: (r.status, r.hint) for n, r in results.items()
    }
