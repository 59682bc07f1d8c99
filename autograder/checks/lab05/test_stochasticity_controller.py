"""StochasticityController: what eta does to one step, and to a batch of samples."""

import torch

from autograder.checks import expect, graded
from autograder.checks.lab05.follow_through import ddim_sampler
from autograder.checks.oracles import Coefficients, GaussianOracle, SteadyNetwork, images, random_schedule


@graded(points=3, section="DDIM")
def test_ddim_stochastic_variance(submission, rng):
    """`compute_stochastic_variance` is σ² of a DDIM step: η² inside, 0 for η = 0 and at s = −1."""
    schedule = random_schedule(rng)
    c = Coefficients(schedule)
    network = SteadyNetwork(schedule, rng)
    controller = submission.StochasticityController(submission.DDIMSampler(network, schedule))
    last = schedule.num_timesteps - 1
    high = int(torch.randint(last // 2, last, (), generator=rng))
    for t, s, eta in (
        (high, high // 3, 0.5), (high, high // 3, 1.0), (last, 0, 0.7), (high, high - 1, 0.5), (high, -1, 1.0),
        (high, high // 2, 0.0),
    ):  # fmt: skip
        value = expect.tensor(controller.compute_stochastic_variance(t, s, eta), f"σ² from t = {t} to s = {s}", ())
        a_t, a_s, unit = c.alpha_bar(t), c.alpha_bar(s), c.ddim_variance(t, s, 1.0)
        wrapped = schedule.alphas_cumprod.double()[s]
        mistakes = {
            "alphas_cumprod[−1] for s = −1 (it wraps to the noisiest timestep)":
            eta**2 * (1 - wrapped) / (1 - a_t) * (1 - a_t / wrapped),
            "η left out": unit,
            "η in place of η²": eta * unit,
            "η applied twice (η⁴)": eta**4 * unit,
            "the standard deviation σ in place of σ²": eta * unit.sqrt(),
            "(1 − ᾱ_t)/(1 − ᾱ_s) upside down": eta**2 * (1 - a_t) / (1 - a_s).clamp(min=1e-12) * (1 - a_t / a_s),
            "the factor 1 − ᾱ_t/ᾱ_s left out": eta**2 * (1 - a_s) / (1 - a_t),
            "the factor (1 − ᾱ_s)/(1 − ᾱ_t) left out": eta**2 * (1 - a_t / a_s),
            "β_t of one step in place of 1 − ᾱ_t/ᾱ_s": eta**2 * (1 - a_s) / (1 - a_t) * c.beta(t),
        }  # fmt: skip
        # In float32 few digits are left of 1 − ᾱ_t/ᾱ_s for neighbours, and of 1 − ᾱ_s near clean data.
        rtol = 2e-3 if t - s == 1 or s < 20 else 3e-4
        expect.close(value, eta**2 * unit, f"σ² from t = {t} to s = {s} with η = {eta}", mistakes, rtol, 1e-9)


@graded(points=4, section="Performance analysis")
def test_eta_effects(submission, rng):
    """`analyze_eta_effects` compares two runs from one x_T for each η, and the samples of one run with each other."""
    schedule = random_schedule(rng, num_timesteps=50)
    network = GaussianOracle(schedule)
    sampler = ddim_sampler(submission, network, schedule)
    controller = submission.StochasticityController(sampler)
    shape, etas, num_steps = (5, 1, 20, 20), [0.0, 0.4, 1.0], 6
    # How many calls a run makes is the sampler's business: its own check holds it to num_steps.
    x_T = images(rng, *shape)
    sampler.sample(shape, timesteps=sampler.create_timestep_schedule(num_steps), x_T=x_T)
    per_run = len(network.calls)
    network.calls.clear()

    effects = controller.analyze_eta_effects(shape, etas, num_steps)
    if not isinstance(effects, dict) or sorted(effects) != etas:
        got = list(effects) if isinstance(effects, dict) else type(effects).__name__
        expect.fail(f"the result should be a dict with the etas {etas} as keys; got {got}.")
    runs = _runs(network.calls, per_run, len(x_T))
    if len(runs) != 2 * len(etas):
        expect.fail(
            f"two runs of {num_steps} steps for each of {len(etas)} etas are {2 * len(etas) * per_run} network calls; "
            f"there were {len(network.calls)}."
        )
    for run in runs[1:]:
        expect.same(run[0][0], runs[0][0][0], "all runs should start from one x_T, or their distance mixes it with η.")
    for eta in etas:
        row = effects[eta]
        if not isinstance(row, dict) or not {"samples", "repeat_distance", "diversity"} <= row.keys():
            expect.fail(f'effects[{eta}] should be a dict with "samples", "repeat_distance" and "diversity".')
        samples = expect.tensor(row["samples"], f'effects[{eta}]["samples"]', shape).double()
        distance = expect.tensor(row["repeat_distance"], f'effects[{eta}]["repeat_distance"]', ())
        spread = expect.tensor(row["diversity"], f'effects[{eta}]["diversity"]', ())
        pairs, pixels = torch.pdist(samples.flatten(1)), samples[0].numel()
        mean = pairs.mean() / pixels**0.5
        mistakes = {
            "the mean squared distance": (pairs**2).mean() / pixels,
            "the root of the mean squared distance (each pair's root comes first, then the mean)":
            ((pairs**2).mean() / pixels).sqrt(),
            "the Euclidean distance, not divided by the number of pixels,": pairs.mean(),
            "a mean over all pairs, each image with itself among them,": mean * (len(samples) - 1) / len(samples),
            "the standard deviation of the pixels": samples.std(),
        }  # fmt: skip
        expect.close(spread, mean, f'"diversity" at η = {eta}', mistakes, 1e-3, 1e-5)
        true = [run for run in runs if _is_run_of(network, run, eta)]
        if _fits(sampler, network, true, samples, distance, eta):
            continue
        own = [run for run in runs if _is_own_run_of(sampler, run, eta)]  # the student's step or sample may be wrong
        if not _fits(sampler, network, own, samples, distance, eta):
            _explain(sampler, network, max(own, true, key=len), samples, distance, eta)


def _runs(calls, per_run, batch):
    """The runs among the network calls, in whatever order; two may also have shared their calls, as one large batch."""
    runs = []
    for first in range(0, len(calls), max(1, per_run)):
        run = calls[first : first + per_run]
        for part in range(0, len(run[0][0]), batch):
            runs.append([tuple(value[part : part + batch] for value in call) for call in run])
    return runs


def _is_run_of(network, run, eta) -> bool:
    """Is the first jump of a run a draw of the true DDIM step with this eta?"""
    (x_t, t, eps), (x_s, s, _) = run[0], run[min(1, len(run) - 1)]
    t, s, c = int(t[0]), int(s[0]), network.coefficients
    deviation = x_s.double() - c.ddim_mean(c.predict_x0(x_t, eps, t), eps, t, s, eta)
    if eta == 0:
        return bool(deviation.abs().max() < 1e-3)
    return expect.noise_problem(deviation / c.ddim_variance(t, s, eta).sqrt()) is None


def _is_own_run_of(sampler, run, eta) -> bool:
    """Is the first jump of a run a draw of what the student's own ddim_step or sample makes of this eta?"""
    timesteps = [int(t[0]) for _, t, _ in run]
    x_t, x_s = run[0][0], run[min(1, len(run) - 1)][0]

    def first_jump():
        result = sampler.sample(list(x_t.shape), timesteps=timesteps, eta=eta, return_trajectory=True, x_T=x_t)
        return expect.tensors(expect.tensors(result, "", 2)[1], "", len(run) + 1)[1]

    step = (lambda: sampler.ddim_step(x_t, *timesteps[:2], eta)) if len(run) > 1 else first_jump
    return expect.matches_own_draws(x_s, step, x_t) or expect.matches_own_draws(x_s, first_jump, x_t)


def _fits(sampler, network, runs, samples, distance, eta) -> bool:
    """Are the samples the end of one of these runs, and the distance that to the end of another?"""
    return any(
        expect.is_close(distance, difference.square().mean().sqrt(), 1e-3, 1e-4)
        for difference in _differences(sampler, network, runs, samples, eta)
    )


def _explain(sampler, network, runs, samples, distance, eta):
    """Why `_fits` said no."""
    if len(runs) < 2:
        expect.fail(f"there are no two runs with η = {eta}: is it passed to sample?")
    apart = _differences(sampler, network, runs, samples, eta)
    if not apart:
        expect.fail(f'"samples" at η = {eta} are not what a run with this η ended in.')
    mistakes = {
        "the mean squared difference": apart[0].square().mean(),
        "the mean absolute difference": apart[0].abs().mean(),
        "the Euclidean norm, not divided by the number of pixels,": apart[0].norm(),
        "the norm of each image's difference, averaged,": apart[0].flatten(1).norm(dim=1).mean(),
    }
    expect.close(distance, apart[0].square().mean().sqrt(), f'"repeat_distance" at η = {eta}', mistakes, 1e-3, 1e-4)


def _differences(sampler, network, runs, samples, eta) -> list[torch.Tensor]:
    """The samples minus the ends of the other runs, for every run that may have ended in them.

    Where a run ended is told by what the network was shown last: the jump to clean data has no noise.
    """
    ends = [_end(sampler, network, run[-1], eta) for run in runs]
    mine = [i for i, end in enumerate(ends) if expect.is_close(samples, end, 1e-3, 1e-3)]
    return [samples - other for i in mine for k, other in enumerate(ends) if k != i]


def _end(sampler, network, last_call, eta):
    x, t, eps = last_call
    truth = network.coefficients.predict_x0(x, eps, int(t[0]))
    try:
        own = expect.tensor(sampler.ddim_step(x, int(t[0]), -1, eta), "", tuple(x.shape)).double()
    except expect.NOT_WORKING:
        return truth
    return own
