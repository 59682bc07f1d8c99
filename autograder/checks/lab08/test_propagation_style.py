"""How the code of Lab 8 reads."""

from autograder.checks import graded
from autograder.checks.lab08 import test_part1_solvers as solvers
from autograder.checks.lab08 import test_part2_features as features
from autograder.checks.lab08 import test_part3_propagation as propagation
from autograder.checks.style import hold_style

EXERCISES = {
    "DPMSolver": {"first_order_step", "second_order_step", "multistep_step", "sample"},
    "EncoderPropagation": {"predict"},
    "SplitUNet": {"encode", "decode"},
    "PropagatedSampler": {"sample"},
    "": {
        "time_grid", "convergence_order", "adjacent_changes", "principal_components", "reuse_error", "key_schedule",
        "hold_key_steps", "network_times", "inject_noise", "faster_sample", "theoretical_saving", "load_stable_diffusion",
        "make_scheduler", "read_coco", "folder_fid", "clip_score",
    },
}  # fmt: skip
QUICK = {
    "time_grid": solvers.test_time_grid,
    "first_order_step": solvers.test_first_order_step,
    "multistep_step": solvers.test_multistep_step,
    "adjacent_changes": features.test_adjacent_changes,
    "key_schedule": propagation.test_key_schedule,
    "predict": propagation.test_propagation_serial,
    "inject_noise": propagation.test_inject_noise,
}


@graded(points=2, section="Code quality")
def test_propagation_style(submission, rng, sources):
    """The functions you completed, at least half, have docstrings, no unused or undefined names, no bare `except:`."""
    hold_style(submission, rng, sources, EXERCISES, QUICK)
