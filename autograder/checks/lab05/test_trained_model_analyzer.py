"""TrainedModelAnalyzer: what a network makes of noise."""

import torch

from autograder.checks import expect, graded
from autograder.checks.oracles import GaussianOracle, RecordingNetwork, images, random_schedule
from autograder.submission.wire import Figure


class _HalfBlind(GaussianOracle):
    """Predicts the noise only roughly: an exact prediction would hide a wrong formula behind zeros and ones."""

    def __init__(self, schedule, rng):
        super().__init__(schedule)
        self.generator = torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=rng)))

    def predict(self, x, t):
        """The exact prediction, shrunk, shifted and blurred with noise of its own."""
        return 0.7 * super().predict(x, t) + 0.2 + 0.4 * torch.randn(x.shape, generator=self.generator).to(x.dtype)


def _seen_at(submission, network: RecordingNetwork, t: int, x_clean: torch.Tensor):
    """(what the true noise may have been, predicted noise) at timestep t, from what the network was shown.

    Any number of calls will do, and noise may have been added by the right formula or by the student's own add_noise.
    """
    calls = [(x[at == t], eps[at == t]) for x, at, eps in network.calls if bool((at == t).any())]
    if sum(len(x) for x, _ in calls) != len(x_clean):
        shown = sum(len(x) for x, _ in calls)
        expect.fail(f"at t = {t} the network should see each of the {len(x_clean)} images once; it saw {shown}.")
    x_t, predicted = (torch.cat(parts).double() for parts in zip(*calls))
    alpha_bar = network.coefficients.alpha_bar(t)
    coefficients = [(alpha_bar.sqrt(), (1 - alpha_bar).sqrt()), _own_coefficients(submission, network, t)]
    noises = [(x_t - signal * x_clean.double()) / sigma for signal, sigma in coefficients]
    fitting = [eps for eps in noises if expect.noise_problem(eps) is None]
    if not fitting and _draws_normal_noise(submission, network, x_clean, t):
        expect.noise(noises[0], f"the noise added at t = {t}")
    return fitting or noises, predicted


def _own_coefficients(submission, network: RecordingNetwork, t: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the student's own add_noise multiplies image and noise with: if that is wrong, points are lost there."""
    one, none = torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    try:
        process = submission.ForwardProcessImpl(network.schedule)
        signal, sigma = (
            expect.tensor(expect.tensors(process.add_noise(*given), "", 2)[0], "", one.shape).double().mean()
            for given in ((one, t, none), (none, t, one))
        )
    except expect.NOT_WORKING:
        return torch.tensor(1.0), torch.tensor(1.0)
    return signal, sigma if sigma != 0 else torch.tensor(1.0)


def _draws_normal_noise(submission, network: RecordingNetwork, x_clean: torch.Tensor, t: int) -> bool:
    try:
        process = submission.ForwardProcessImpl(network.schedule)
        noise = expect.tensor(expect.tensors(process.add_noise(x_clean, t), "", 2)[1], "", tuple(x_clean.shape))
    except expect.NOT_WORKING:
        return True
    return expect.noise_problem(noise) is None


@graded(points=4, section="Performance analysis")
def test_prediction_quality(submission, rng):
    """`analyze_noise_prediction_quality` gives mse, correlation and signal-to-noise ratio for each timestep."""
    schedule = random_schedule(rng)
    network = _HalfBlind(schedule, rng)
    analyzer = submission.TrainedModelAnalyzer(network, schedule)
    last = schedule.num_timesteps - 1
    x_clean = 0.3**0.5 * images(rng, 32, 1, 28, 28) - 0.7
    timesteps = [0, int(torch.randint(20, last // 2, (), generator=rng)), last // 2, last]
    results = analyzer.analyze_noise_prediction_quality(x_clean, timesteps)
    if not isinstance(results, dict) or sorted(results) != sorted(timesteps):
        keys = list(results) if isinstance(results, dict) else type(results).__name__
        expect.fail(f"the result should be a dict with the timesteps {timesteps} as keys; got {keys}.")
    rows = []
    for t in timesteps:
        row = results[t]
        if not isinstance(row, dict) or not {"mse", "correlation", "snr"} <= row.keys():
            expect.fail(f'results[{t}] should be a dict with "mse", "correlation" and "snr"; got {row!r:.100}')
        noises, predicted = _seen_at(submission, network, t, x_clean)
        values = {key: expect.tensor(row[key], f'results[{t}]["{key}"]', ()) for key in ("mse", "correlation", "snr")}
        errors = [(eps - predicted).square().mean() for eps in noises]
        nearest = min(range(len(noises)), key=lambda i: abs(errors[i] - values["mse"].double()))
        rows.append((values, noises[nearest], predicted, network.coefficients, t))
    for row in rows:
        _hold_to_the_added_noise(*row)
    for row in reversed(rows):  # late timesteps first: there a wrong formula is told from another
        _hold_row(*row)


def _hold_to_the_added_noise(values, eps, predicted, _c, t):
    """Not another draw, with which the prediction does not correlate; told where the right correlation is large."""
    independent = 1 + predicted.square().mean()
    if (
        torch.corrcoef(torch.stack([eps.flatten(), predicted.flatten()]))[0, 1] > 0.5
        and abs(values["correlation"]) < expect.Z / eps.numel() ** 0.5
        and abs(values["mse"] / independent - 1) < 0.1
    ):
        expect.fail(
            f"at t = {t} the prediction is compared with other noise than was added; keep the noise that add_noise used."
        )


def _hold_row(values, eps, predicted, c, t):
    error, a = eps - predicted, c.alpha_bar(t)
    both = torch.stack([eps.flatten(), predicted.flatten()])
    mistakes = {
        "the root of the mean squared error": error.square().mean().sqrt(),
        "the sum in place of the mean": error.square().sum(),
        "the mean absolute error": error.abs().mean(),
        "the mean error, in which signs cancel,": error.mean(),
        "half the squared error": error.square().mean() / 2,
    }
    expect.close(values["mse"], error.square().mean(), f'"mse" at t = {t}', mistakes, 3e-3, 1e-6)
    r = torch.corrcoef(both)[0, 1]
    mistakes = {
        "the squared correlation": r**2,
        "the uncentred product, divided by the norms only,": torch.cosine_similarity(both[0], both[1], dim=0),
        "the covariance, not divided by the standard deviations,": torch.cov(both)[0, 1],
        "the mean product of ε and ε̂": (eps * predicted).mean(),
    }
    expect.close(values["correlation"], r, f'"correlation" at t = {t}', mistakes, 3e-3, 1e-4)
    mistakes = {
        "ᾱ_t alone": a,
        "the ratio upside down": (1 - a) / a,
        "the square root of the ratio": (a / (1 - a)).sqrt(),
        "the ratio in decibels": 10 * (a / (1 - a)).log10(),
        "the logarithm of the ratio": (a / (1 - a)).log(),
        "α_t in place of ᾱ_t": c.alpha(t) / c.beta(t),
    }
    expect.close(values["snr"], a / (1 - a), f'"snr" at t = {t}', mistakes, 1e-3, 1e-9)


@graded(points=0, section="Performance analysis")
def test_noise_predictions(submission, rng):
    """`visualize_noise_predictions` shows x_t, ε, ε̂ and x̂_0 in a row for each timestep."""
    schedule = random_schedule(rng)
    network = GaussianOracle(schedule)
    analyzer = submission.TrainedModelAnalyzer(network, schedule)
    x_clean = 2 * torch.rand(2, 1, 12, 12, generator=rng) - 1
    last = schedule.num_timesteps - 1
    for timesteps in ([last // 10, last // 2], [last // 3]):
        network.calls.clear()
        figure = analyzer.visualize_noise_predictions(x_clean, timesteps)
        if not isinstance(figure, Figure):
            expect.fail("visualize_noise_predictions should return the matplotlib Figure it draws (`return figure`).")
        if len(figure.images) != 4 * len(timesteps):
            expect.fail(
                f"for {len(timesteps)} timestep(s) the figure holds {len(figure.images)} images; expected four for each: "
                "x_t, ε, ε̂ and x̂_0, each drawn with imshow in axes of its own"
            )
