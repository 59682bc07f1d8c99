"""How the code of Lab 6 reads."""

from autograder.checks import graded
from autograder.checks.lab06 import test_analysis as analysis
from autograder.checks.lab06 import test_costs as costs
from autograder.checks.lab06 import test_report as report
from autograder.checks.lab06 import test_stopwatch as stopwatch
from autograder.checks.style import hold_style

EXERCISES = {
    "": {
        "run_order", "time_call", "summarise", "ddim_sample", "generate", "run_protocol", "fit_affine", "log_log_slope",
        "decide", "split_step_cost", "batch_cost", "quality_against_steps", "markdown_table", "build_report", "report_html",
    },
}  # fmt: skip
QUICK = {
    "time_call": stopwatch.test_time_call,
    "summarise": stopwatch.test_summarise,
    "fit_affine": analysis.test_fit_affine,
    "log_log_slope": analysis.test_log_log_slope,
    "batch_cost": costs.test_batch_cost,
    "markdown_table": report.test_report_table,
}


@graded(points=2, section="Code quality")
def test_timing_style(submission, rng, sources):
    """The functions you completed, at least half, have docstrings, no unused or undefined names, no bare `except:`."""
    hold_style(submission, rng, sources, EXERCISES, QUICK)
