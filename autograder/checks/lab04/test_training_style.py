"""How the code of Lab 4 reads."""

from autograder.checks import graded
from autograder.checks.lab04 import test_forward_process as forward
from autograder.checks.lab04 import test_network as network
from autograder.checks.lab04 import test_sampling as sampling
from autograder.checks.lab04 import test_training as training
from autograder.checks.style import hold_style

EXERCISES = {
    "ForwardProcess": {"forward_step", "add_noise"},
    "ResidualBlock": {"forward"},
    "EMA": {"update"},
    "Trainer": {"train_step", "train_epoch"},
    "Diffusion": {"ddpm_step", "ddpm_sample", "ddim_timesteps", "ddim_sample"},
    "": {"linear_betas", "prior_mismatch", "time_embedding", "noise_prediction_loss", "compare_samplers"},
}
QUICK = {
    "linear_betas": forward.test_linear_betas,
    "add_noise": forward.test_forward_jump,
    "time_embedding": network.test_time_embedding,
    "noise_prediction_loss": training.test_noise_prediction_loss,
    "ddpm_step": sampling.test_reverse_step,
    "ddim_timesteps": sampling.test_ddim_timesteps,
}


@graded(points=2, section="Code quality")
def test_training_style(submission, rng, sources):
    """The methods you completed, at least half, have docstrings, no unused or undefined names, no bare `except:`."""
    hold_style(submission, rng, sources, EXERCISES, QUICK)
