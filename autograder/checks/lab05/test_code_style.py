"""How the code reads, as far as a program can tell: from the text of the notebook's cells, which is not run here."""

from autograder.checks import graded
from autograder.checks.lab05 import test_ddim_sampler as ddim
from autograder.checks.lab05 import test_ddpm_sampler as ddpm
from autograder.checks.lab05 import test_forward_process as forward
from autograder.checks.style import hold_style

EXERCISES = {
    "ForwardProcessImpl": {"add_noise"},
    "TrainedModelAnalyzer": {"analyze_noise_prediction_quality"},
    "DDPMSampler": {"compute_posterior_mean", "compute_posterior_variance", "ddpm_step", "sample"},
    "DDIMSampler": {"predict_x0_from_eps", "create_timestep_schedule", "ddim_step", "sample"},
    "StochasticityController": {"compute_stochastic_variance", "analyze_eta_effects"},
    "SamplingOptimizer": {"cached_noise_schedule_sampling", "batch_sampling_with_memory_management"},
    "": {"compare_samplers", "health_check"},
}
# Some quick checks, to tell code that works from code that only looks tidy.
QUICK = {
    "add_noise": forward.test_add_noise,
    "compute_posterior_mean": ddpm.test_ddpm_posterior_mean,
    "compute_posterior_variance": ddpm.test_ddpm_posterior_variance,
    "predict_x0_from_eps": ddim.test_ddim_predict_x0,
    "create_timestep_schedule": ddim.test_ddim_uniform_schedule,
    "ddim_step": ddim.test_ddim_deterministic_step,
}


@graded(points=2, section="Code quality")
def test_code_style(submission, rng, sources):
    """The methods you completed, at least half, have docstrings, no unused or undefined names, no bare `except:`."""
    hold_style(submission, rng, sources, EXERCISES, QUICK)
