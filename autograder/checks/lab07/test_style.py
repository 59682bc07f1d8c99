"""How the code of Lab 7 reads."""

from autograder.checks import graded
from autograder.checks.lab07 import test_part1_samplers as samplers
from autograder.checks.lab07 import test_part2_quantization as quantization
from autograder.checks.lab07 import test_part3_pruning as pruning
from autograder.checks.style import hold_style

EXERCISES = {
    "MomentumSampler": {"euler_step", "displacement", "momentum_update", "sample"},
    "QuantizedConv2d": {"forward"},
    "": {
        "noise_prediction_mse",
        "symmetric_scale",
        "fake_quantize",
        "straight_through",
        "calibration_set",
        "one_timestep_set",
        "activation_scales",
        "fake_quantize_split",
        "quantize_model",
        "model_bytes",
        "finetune_quantized",
        "channel_magnitudes",
        "channels_to_prune",
        "taylor_importance",
        "diffusion_gradients",
        "count_macs",
        "prune_model",
        "ratio_for_macs",
        "finetune",
    },
}
QUICK = {
    "euler_step": samplers.test_euler_step,
    "momentum_update": samplers.test_momentum_update,
    "symmetric_scale": quantization.test_symmetric_scale,
    "fake_quantize": quantization.test_fake_quantize,
    "channel_magnitudes": pruning.test_channel_magnitudes,
    "taylor_importance": pruning.test_taylor_importance,
}


@graded(points=2, section="Code quality")
def test_lightweight_style(submission, rng, sources):
    """The methods you completed, at least half, have docstrings, no unused or undefined names, no bare `except:`."""
    hold_style(submission, rng, sources, EXERCISES, QUICK)
