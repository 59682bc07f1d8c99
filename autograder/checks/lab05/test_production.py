"""Part 5: SamplingOptimizer, health_check and fallbacks."""

import torch

from autograder.checks import expect, graded
from autograder.checks.lab05.follow_through import ddim_sampler
from autograder.checks.oracles import GaussianOracle, images, random_schedule
from autograder.submission.client import StudentError
from difflab.schedule import NoiseSchedule


@graded(points=4, section="Advanced features")
def test_cached_sampling(submission, rng):
    """`cached_noise_schedule_sampling` equals the plain sampler, also after a change of steps, schedule or sampler."""
    first, second = random_schedule(rng, num_timesteps=120), random_schedule(rng, num_timesteps=120)
    networks = [GaussianOracle(first), GaussianOracle(second), GaussianOracle(first, mean=0.4)]
    samplers = [ddim_sampler(submission, network, network.schedule) for network in networks]
    for network in networks:
        network.grad_enabled = False
    optimizer = submission.SamplingOptimizer(samplers[0])
    for which, num_steps, dtype, shape, when in (
        (0, 12, torch.float32, (3, 1, 8, 8), "in the first call"),
        (0, 12, torch.float32, (3, 1, 8, 8), "in a second call, which may use the cache,"),
        (0, 12, torch.float64, (5, 1, 6, 6), "for another shape and float64"),
        (0, 7, torch.float32, (3, 1, 8, 8), "for another num_steps"),
        (1, 7, torch.float32, (3, 1, 8, 8), "for another schedule"),
        (2, 7, torch.float32, (3, 1, 8, 8), "for another network"),
        (0, 12, torch.float32, (3, 1, 8, 8), "for the first setting again"),
        (0, 1, torch.float32, (3, 1, 8, 8), "with a single step"),
    ):
        sampler, network = samplers[which], networks[which]
        x_T = images(rng, *shape, dtype=dtype)
        network.calls.clear()
        plain = sampler.sample(shape, timesteps=sampler.create_timestep_schedule(num_steps), x_T=x_T)
        plain = expect.tensor(plain, "sample", shape)
        expected_calls = len(network.calls)
        for other in networks:
            other.calls.clear()
        cached = optimizer.cached_noise_schedule_sampling(sampler, shape, num_steps, x_T=x_T)
        cached = expect.tensor(cached, f"cached sampling {when}", shape, dtype)
        if any(other.calls for other in networks if other is not network):
            expect.fail(f"cached sampling {when} asked the network of another sampler than the one it was given.")
        if len(network.calls) not in (expected_calls, num_steps):
            expect.fail(
                f"cached sampling with {num_steps} steps should make {num_steps} network calls; "
                f"{when} it made {len(network.calls)}."
            )
        if network.grad_enabled:
            expect.fail("cached sampling should run without gradients: decorate it with @torch.no_grad().")
        tolerance = 1e-4 if dtype == torch.float32 else 1e-6
        if expect.is_close(cached, plain.double(), tolerance, tolerance) or _every_jump_is_right(network, cached):
            continue
        off = (cached.double() - plain.double()).abs().max().item()
        stale = " Are coefficients of an earlier call used again?" if "first call" not in when else ""
        expect.fail(f"cached sampling {when} differs from the plain sampler by up to {off:.3g}.{stale}")
    x_T = images(rng, 64, 1, 20, 20)
    networks[0].calls.clear()
    optimizer.cached_noise_schedule_sampling(samplers[0], tuple(x_T.shape), 2)
    if networks[0].calls[0][0].shape != x_T.shape:
        expect.fail(
            f"without x_T the network should see images of the given shape, not {list(networks[0].calls[0][0].shape)}."
        )
    expect.noise(networks[0].calls[0][0], "x_T drawn when none is given")


def _every_jump_is_right(network, samples) -> bool:
    """Are all steps, as the network saw them, true DDIM steps? (The student's plain sampler may be wrong.)"""
    c, calls = network.coefficients, network.calls
    states = [x for x, _, _ in calls] + [samples]
    visited = [int(t) for t in network.timesteps] + [-1]
    return all(
        s < t and expect.is_close(x_s, c.ddim_mean(c.predict_x0(x_t, eps, t), eps, t, s), 1e-3, 1e-3)
        for (x_t, _, eps), x_s, t, s in zip(calls, states[1:], visited, visited[1:])
    )


class _SmallMemory(GaussianOracle):
    """Runs out of memory on batches of more than `limit` images, or fails in another way."""

    limit = 10**9
    failures = 0
    broken = False

    def forward(self, x, t, grad_enabled, autocast=None):
        """Predicted noise, or torch.OutOfMemoryError."""
        if self.broken:
            self.failures += 1
            raise RuntimeError("device lost (played by the check)")
        if len(x) > self.limit:
            self.failures += 1
            raise torch.OutOfMemoryError("out of memory (played by the check)")
        return super().forward(x, t, grad_enabled, autocast)

    def batches(self) -> list[int]:
        """The sizes of the batches that were sampled: a new one starts where t does not fall."""
        sizes, before = [], -1
        for x, t, _ in self.calls:
            if before <= t[0].item():
                sizes.append(len(x))
            before = t[0].item()
        return sizes


@graded(points=4, section="Advanced features")
def test_batch_sampling(submission, rng):
    """`batch_sampling_with_memory_management` draws exactly as many as asked, and halves the batch when memory runs out."""
    schedule = random_schedule(rng, num_timesteps=30)
    network = _SmallMemory(schedule)
    optimizer = submission.SamplingOptimizer(ddim_sampler(submission, network, schedule))
    shape = (1, 6, 6)

    def draw(total: int, batch: int, num_steps: int = 3) -> torch.Tensor:
        network.calls.clear()
        network.failures = 0
        samples = optimizer.batch_sampling_with_memory_management(
            total, batch, num_steps=num_steps, sample_shape=list(shape)
        )
        return expect.tensor(samples, f"{total} samples in batches of {batch}", (total, *shape))

    samples = draw(10, 4)
    if network.batches() != [4, 4, 2]:
        expect.fail(f"10 samples in batches of 4 should be batches of 4, 4 and 2; the network saw {network.batches()}.")
    if len({tuple(sample.flatten().tolist()) for sample in samples}) < 10:
        expect.fail("samples repeat: every batch needs noise of its own.")
    short = len(network.calls)
    draw(10, 4, num_steps=7)
    if len(network.calls) <= short:
        expect.fail("num_steps = 7 makes as many network calls as num_steps = 3: is it passed on?")
    draw(3, 8)
    if network.batches() != [3]:
        expect.fail(f"3 samples fit into one batch of 8; the network saw batches {network.batches()}.")
    network.limit = 3
    draw(11, 8)
    if network.failures != 2:
        expect.fail(
            "when 3 images fit, batches of 8 and of 4 fail once each and 2 goes on from there (8 → 4 → 2); "
            f"memory ran out {network.failures} times."
        )
    if max(network.batches()) > 2:
        expect.fail(f"after 8 and 4 did not fit, batches should have 2 images; the network saw {network.batches()}.")
    draw(4, 1)
    network.limit = 0
    _expect_error(lambda: draw(4, 4), "OutOfMemoryError", "when not even one image fits, torch.OutOfMemoryError")
    network.limit, network.broken = 10**9, True
    _expect_error(lambda: draw(4, 4), "RuntimeError", "an error that is not about memory (here a RuntimeError)")
    if network.failures > 1:
        expect.fail(
            f"an error that is not about memory should be let through at once; it was tried {network.failures} times."
        )


def _expect_error(work, kind: str, what: str) -> None:
    try:
        work()
    except StudentError as error:
        if error.kind == "NotImplementedError":
            raise
        if error.kind != kind:
            expect.fail(f"{what} should be let through; {error.kind} came instead: {error.message[:200]}")
        return
    expect.fail(f"{what} should be let through; it was swallowed.")


@graded(points=0, section="Advanced features")
def test_mixed_precision(submission, rng):
    """`mixed_precision_sampling` runs the network in bfloat16 and stays within 0.005 of float32."""
    schedule = random_schedule(rng, num_timesteps=200)
    network = GaussianOracle(schedule)
    sampler = ddim_sampler(submission, network, schedule)
    shape, num_steps = (8, 1, 12, 12), 30
    x_T = images(rng, *shape)
    plain = sampler.sample(shape, timesteps=sampler.create_timestep_schedule(num_steps), x_T=x_T)
    plain = expect.tensor(plain, "sample", shape)
    network.calls.clear()
    network.autocast.clear()
    low = submission.SamplingOptimizer(sampler).mixed_precision_sampling(shape, num_steps, x_T=x_T)
    if any(dtype != "torch.bfloat16" for dtype in network.autocast) or not network.autocast:
        expect.fail("every network call should run under torch.autocast(device_type, torch.bfloat16).")
    seen = network.calls[-1][0].dtype
    if isinstance(low, torch.Tensor) and bool(low.isnan().any()) and seen != torch.float32:
        expect.fail(f"the samples hold NaN: x is kept in {seen}; only the network should be in bfloat16.")
    low = expect.tensor(low, "mixed_precision_sampling", shape, torch.float32)
    distance = (low.double() - plain.double()).square().mean().sqrt().item()
    # Where the student's own step is so wrong that numbers grow without bound, rounding grows with them.
    if distance > 0.005 and plain.double().square().mean() < 9:
        expect.fail(f"the samples are {distance:.3g} away from those in float32 (at most 0.005): is x itself rounded?")
    low = submission.SamplingOptimizer(sampler).mixed_precision_sampling(shape, 3)
    expect.tensor(low, "samples without x_T", shape, torch.float32)


class _Ticking(GaussianOracle):
    """Every call costs `cost` seconds on a clock of its own; the first one ten times as much."""

    def __init__(self, schedule, cost):
        super().__init__(schedule)
        self.cost, self.now = cost, 0.0

    def predict(self, x, t):
        """The exact prediction; the clock moves on."""
        self.now += self.cost * (1 if self.calls else 10)
        return super().predict(x, t)


@graded(points=0, section="Advanced features")
def test_choose_num_steps(submission, rng):
    """`choose_num_steps` measures a step, without the slow first call, and fills the budget."""
    schedule = random_schedule(rng, num_timesteps=150)
    for fitting, expected in ((37.4, 37), (1000.0, 150), (0.3, 1)):
        network = _Ticking(schedule, cost=0.02)
        optimizer = submission.SamplingOptimizer(ddim_sampler(submission, network, schedule))
        steps = optimizer.choose_num_steps(
            fitting * network.cost, [2, 1, 8, 8], clock=lambda network=network: network.now
        )
        if type(steps) is not int:
            expect.fail(f"choose_num_steps should return an int; got {type(steps).__name__}.")
        if not network.calls:
            expect.fail("choose_num_steps should measure what a step costs; it never called the network.")
        if len(network.calls) > 20:
            expect.fail(f"the measurement should take at most 20 network calls; it took {len(network.calls)}.")
        if not 0.7 * expected <= steps <= expected:
            warm = " (the first call of a network is slow, and should not be counted)" if steps < 0.7 * expected else ""
            expect.fail(
                f"{fitting:g} steps fit into the budget and T is 150, so {expected} was expected; got {steps}{warm}."
            )


def _problems(submission, sampler, what: str) -> list[str]:
    problems = submission.health_check(sampler)
    if not isinstance(problems, list) or not all(isinstance(problem, str) for problem in problems):
        expect.fail(f"health_check should return a list of strings, also {what}; got {problems!r:.80}.")
    return problems


@graded(points=2, section="Advanced features")
def test_health_check(submission, rng):
    """`health_check` finds what is wrong with a sampler, finds nothing wrong with a healthy one, and never raises."""
    for total in (1000, 25, 2):
        schedule = random_schedule(rng, num_timesteps=total) if total > 2 else _two_steps()
        network = GaussianOracle(schedule)
        sampler = ddim_sampler(submission, network, schedule)
        if not _works(sampler, schedule):  # a sampler of the student's own that is ill: a healthy `sample` for it
            submission.set(sampler, "sample", lambda shape, *_, **__: torch.randn(list(shape)))
        network.calls.clear()
        problems = _problems(submission, sampler, "for a healthy sampler")
        if problems:
            expect.fail(f"a healthy sampler with T = {total} is reported as ill: {problems[0][:200]}")
        if len(network.calls) > 50:
            expect.fail(f"health_check should be quick; it called the network {len(network.calls)} times.")

    for what, sampler in _ill(submission, rng):
        try:
            problems = _problems(submission, sampler, f"for {what}")
        except StudentError as error:
            if error.kind == "NotImplementedError":
                raise
            expect.fail(f"health_check must never raise; for {what} it raised {error.kind}: {error.message[:200]}")
        if not problems:
            expect.fail(f"health_check finds nothing wrong with {what}.")


def _two_steps():
    """A schedule of two timesteps: shorter than the few steps a check may want to take."""
    return NoiseSchedule(torch.tensor([0.3, 0.9]))


def _works(sampler, schedule) -> bool:
    shape = (2, 1, 28, 28)
    try:
        timesteps = sampler.create_timestep_schedule(min(3, schedule.num_timesteps))
        expect.tensor(sampler.sample(shape, timesteps=timesteps), "", shape)
    except expect.NOT_WORKING:
        return False
    return True


class _Ill(GaussianOracle):
    """Answers with something wrong."""

    def __init__(self, schedule, answer):
        super().__init__(schedule)
        self.answer = answer

    def predict(self, x, t):
        """Whatever this network was made to answer."""
        return self.answer(super().predict(x, t))


def _fail(_eps):
    raise RuntimeError("no kernel image is available (played by the check)")


def _ill(submission, rng):
    """(what is wrong, a sampler that has it), one after another."""
    schedule = random_schedule(rng, num_timesteps=60)
    for what, answer in (
        ("a network that answers with NaN", lambda eps: eps * float("nan")),
        ("a network that answers with infinity", lambda eps: eps + float("inf")),
        ("a network that raises an error", _fail),
        ("a network whose answers have two channels", lambda eps: eps.repeat(1, 2, 1, 1)),
    ):
        yield what, submission.DDIMSampler(_Ill(schedule, answer), schedule)
    good = schedule.alphas_cumprod
    swapped, equal, high, zero = (good.clone() for _ in range(4))
    swapped[[20, 21]] = good[[21, 20]]
    equal[31] = good[30]
    high[0] = 1.0
    zero[-1] = 0.0
    for what, values in (
        ("alphas_cumprod with two entries swapped", swapped),
        ("alphas_cumprod with two equal entries (it must decrease strictly)", equal),
        ("alphas_cumprod with an entry of exactly 1", high),
        ("alphas_cumprod with an entry of exactly 0", zero),
        ("alphas_cumprod of None", None),
    ):
        broken = submission.NoiseSchedule(schedule.betas64)
        sampler = submission.DDIMSampler(GaussianOracle(schedule), broken)
        submission.set(broken, "alphas_cumprod", values)
        submission.set(sampler, "sample", lambda shape, *_, **__: torch.randn(list(shape)))
        yield what, sampler
    for what, samples in (
        ("a sampler that returns NaN", lambda shape: torch.full(list(shape), float("nan"))),
        ("a sampler that returns infinity", lambda shape: torch.full(list(shape), float("inf"))),
        ("a sampler that returns one image too few", lambda shape: torch.randn(list(shape))[1:]),
        ("a sampler that returns None", lambda shape: None),
    ):
        sampler = submission.DDIMSampler(GaussianOracle(schedule), schedule)
        submission.set(sampler, "sample", lambda shape, *_, make=samples, **__: make(shape))
        yield what, sampler


@graded(points=0, section="Advanced features")
def test_sample_with_fallbacks(submission, rng):
    """`sample_with_fallbacks` returns the first attempt that works, and says what failed before it."""
    good, spare = images(rng, 2, 1, 4, 4), images(rng, 2, 1, 4, 4)
    asked: list[str] = []

    def attempt(name, answer):
        def run():
            asked.append(name)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return run

    infinite = good.clone()
    infinite[1, 0, 2, 2] = float("inf")
    answers = {
        "fast": torch.OutOfMemoryError("out of memory (played by the check)"), "half": good * float("nan"),
        "large": infinite, "other": ValueError("played by the check"), "plain": good, "spare": spare,
    }  # fmt: skip
    for names in (["plain", "spare"], ["fast", "plain"], ["half", "large", "other", "plain", "spare"]):
        asked.clear()
        attempts = {name: attempt(name, answers[name]) for name in names}
        result = expect.tensors(submission.sample_with_fallbacks(attempts), "sample_with_fallbacks", 3)
        failed = names.index("plain")
        if result[1] != "plain":
            expect.fail(
                f"of {names} the first that works is 'plain'; got {result[1]!r:.40}. (An attempt that raises does not work, "
                "nor does one whose samples hold NaN or infinity.)"
            )
        expect.same(
            expect.tensor(result[0], "the samples", good.shape),
            good,
            f"of {names}, the samples should be those of 'plain'.",
        )
        if not isinstance(result[2], list) or len(result[2]) != failed:
            expect.fail(
                f"of {names}, {failed} attempt(s) failed before 'plain'; a line for each was expected, got {result[2]!r:.80}."
            )
        if asked != names[: failed + 1]:
            expect.fail(
                f"the attempts should be tried in order, up to the first that works: {asked} of {names} were tried."
            )
    try:
        submission.sample_with_fallbacks({name: attempt(name, answers[name]) for name in ("fast", "half")})
    except StudentError as error:
        if error.kind != "RuntimeError" or not all(name in error.message for name in ("fast", "half")):
            expect.fail(
                f"when nothing works, a RuntimeError should name every attempt; got {error.kind}: {error.message[:200]}"
            )
    else:
        expect.fail("when nothing works, a RuntimeError should be raised.")
