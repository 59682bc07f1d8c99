"""Part 4: encoder propagation around the U-Net of diffusers, and what its images are measured with.

The submission builds its own copy of a tiny U-Net from weights that come with the question. The expected values come
from this side: of the U-Net called whole, with forward hooks that put old features in the place of new ones, of
diffusers' pipeline, of the solvers' formulas in float64.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autograder.checks import CheckFailed, NotYet, expect, graded
from autograder.checks.oracles import images
from autograder.submission.client import StudentError
from difflab.stable_diffusion import SCHEDULE, TINY_UNET, Clip, require_acceleration, tiny_pipeline

pytestmark = pytest.mark.usefixtures("acceleration")


@pytest.fixture(scope="module")
def acceleration():
    """diffusers and its like are imported before a submission's clock starts, and for these checks only."""
    try:
        require_acceleration()
    except ModuleNotFoundError as error:
        raise NotYet(str(error)) from None


@contextlib.contextmanager
def _asked_of(name: str) -> Iterator[None]:
    """What goes wrong inside is the function's that the student wrote, not the probe's that calls it."""
    try:
        yield
    except StudentError as error:
        raise StudentError(error.kind, error.message, error.where, name) from None


def _choice(rng: torch.Generator) -> random.Random:
    return random.Random(int(torch.randint(2**31, (), generator=rng)))


# -- 4.1, 4.2 ----------------------------------------------------------------------------------------------------------


@graded(points=1, section="Stable Diffusion")
def test_load_stable_diffusion(submission, rng):
    """`load_stable_diffusion` takes the weights of this machine, else the tiny pipeline, and says which in one line."""
    seed = _choice(rng).randrange(1, 10**6)
    x, t, text = images(rng, 2, 4, 8, 8), torch.tensor([20, 700]), images(rng, 2, 5, 16)

    def noise_of(pipeline) -> Tensor:
        with torch.no_grad():
            return pipeline.unet(x, t, text).sample

    tiny, saved = noise_of(tiny_pipeline()), noise_of(tiny_pipeline(seed))
    folder = submission.save_tiny_pipeline(seed)
    for source, there in ((folder, True), (f"nobody/no-such-model-{seed}", False), (f"/no/such/folder/{seed}", False)):
        what = "a folder with weights" if there else "a name that this machine has no weights of"
        with _asked_of("load_stable_diffusion"):
            probe = submission.PipelineProbe(source)
        line = probe.message()
        if not isinstance(line, str) or "\n" in line or not line.strip():
            expect.fail(f"the second value of load_stable_diffusion should be one line of text; got {line!r:.200}")
        if source not in line:
            expect.fail(f"the line should hold the source that was asked for, {source!r}; got {line!r:.200}")
        if ("random" in line.lower()) == there:
            expect.fail(
                f'with {what} the line should {"not " if there else ""}say that the weights are "random"; got {line!r:.200}'
            )
        noise = expect.tensor(probe.noise(x, t, text), "the U-Net's answer", tuple(x.shape))
        if not expect.is_close(noise, saved if there else tiny, 1e-4, 1e-4):
            expect.fail(
                f"with {what} the pipeline should hold {'those weights' if there else 'the weights of tiny_pipeline()'}; "
                f"its U-Net answers otherwise{', as tiny_pipeline() does' if there and expect.is_close(noise, tiny, 1e-4, 1e-4) else ''}."
            )


def _alphas_cumprod(power: float = 0.5, ends: tuple[float, float] | None = None) -> Tensor:
    """Of betas whose powers are evenly spaced between those of the ends; Stable Diffusion's are roots."""
    ends = tuple(end**power for end in ends or (SCHEDULE["beta_start"], SCHEDULE["beta_end"]))
    betas = torch.linspace(*ends, SCHEDULE["num_train_timesteps"], dtype=torch.float64) ** (1 / power)
    return (1 - betas).cumprod(0)


def _solve(
    kind: str, x: Tensor, noises: list[Tensor], t: list[int], a: Tensor, last: float, order: int = 2, clip=False
):
    """The states after each step, in float64; a holds the cumulative products, `last` is what the last step goes to.

    Song et al. 2021, equation 12; Lu et al. 2022, "DPM-Solver++", equations 3.7 and B.1 with multistep differences.
    """
    at = [float(a[int(step)]) for step in t] + [last]
    lam = [math.inf if value == 1 else 0.5 * math.log(value / (1 - value)) for value in at]
    x, states, before = x.double(), [], None
    for i, eps in enumerate(noises):
        eps = eps.double()
        signal, noise, next_signal, next_noise = (math.sqrt(v) for v in (at[i], 1 - at[i], at[i + 1], 1 - at[i + 1]))
        x_0 = (x - noise * eps) / signal
        if clip:
            x_0 = x_0.clamp(-1, 1)
        value, h = (x_0 if kind == "dpm-solver++" else eps), lam[i + 1] - lam[i]
        # diffusers takes the last step of fewer than 15, and one that ends at clean data, at first order.
        first = order == 1 or i == 0 or (i == len(noises) - 1 and (len(noises) < 15 or last == 1))
        slope = 0 if first else (value - before) * h / (lam[i] - lam[i - 1]) / 2
        if kind == "ddim":
            x = next_signal * x_0 + next_noise * eps
        elif kind == "dpm-solver":
            x = next_signal / signal * x - next_noise * math.expm1(h) * (value + slope)
        else:
            x = next_noise / noise * x - next_signal * math.expm1(-h) * (value + slope)
        before = value
        states.append(x)
    return torch.stack(states)


@graded(points=1, section="Stable Diffusion")
def test_make_scheduler(submission, rng):
    """`make_scheduler` gives DDIM, DPM-Solver and DPM-Solver++ with the pinned options, ValueError for other names."""
    a, T = _alphas_cumprod(), SCHEDULE["num_train_timesteps"]
    even, own = _alphas_cumprod(power=1.0), _alphas_cumprod(power=1.0, ends=(1e-4, 0.02))
    for name in ("ddim", "dpm-solver", "dpm-solver++"):
        for num_steps in (10, 20):
            x, noises = images(rng, 2, 4, 3, 3), [images(rng, 2, 4, 3, 3) for _ in range(num_steps)]
            what = f"the walk of {name} with {num_steps} steps"
            with _asked_of("make_scheduler"):
                walked = submission.SchedulerProbe(name).walk(x, noises)
            t, states = expect.tensors(walked, what, 2)
            t = expect.tensor(t, f"the timesteps of {name}", (num_steps,)).double()
            if name == "ddim":
                right = torch.arange(num_steps - 1, -1, -1, dtype=torch.float64) * (T // num_steps)
                if expect.is_close(t, right, 0, 1e-6):
                    expect.fail("the timesteps of ddim lack the offset of 1 that SCHEDULE holds (steps_offset).")
                right = right + 1
            else:
                right = torch.linspace(T - 1, 0, num_steps + 1, dtype=torch.float64)[:-1]
            if not expect.is_close(t, right, 0, 1.0):  # how they are rounded is the library's
                kinds = {"ddim": "DDIMScheduler", "dpm-solver": "DPMSolverMultistepScheduler"}
                expect.fail(
                    f"the timesteps of {name} with {num_steps} steps are {[int(v) for v in t[:3]]} …; expected about "
                    f"{[round(float(v)) for v in right[:3]]} …: is it a {kinds[name.rstrip('+')]}, with timestep_spacing as it is by default?"
                )
            states = [
                expect.tensor(s, f"a state of {name}", tuple(x.shape)) for s in expect.tensors(states, what, num_steps)
            ]
            at, end = [int(v) for v in t], 1.0 if name == "dpm-solver++" else float(a[0])
            right = _solve(name, x, noises, at, a, end)
            mistakes = {
                "ᾱ of evenly spaced betas (beta_schedule is in SCHEDULE)": _solve(name, x, noises, at, even, end),
                "diffusers' own betas, without those in SCHEDULE,": _solve(name, x, noises, at, own, end),
                "solver_order=1": _solve(name, x, noises, at, a, end, order=1),
                "DPM-Solver without ++": _solve("dpm-solver", x, noises, at, a, float(a[0])),
                "DPM-Solver++": _solve("dpm-solver++", x, noises, at, a, 1.0),
                'DPM-Solver++ with final_sigmas_type="sigma_min"': _solve(
                    "dpm-solver++", x, noises, at, a, float(a[0])
                ),
                'final_sigmas_type="sigma_min"': _solve(name, x, noises, at, a, float(a[0])),
                "clip_sample=True": _solve(name, x, noises, at, a, end, clip=True),
            }
            if name == "ddim":
                mistakes |= {
                    "set_alpha_to_one=True": _solve(name, x, noises, at, a, 1.0),
                    "clip_sample=True and set_alpha_to_one=True, the defaults,": _solve(
                        name, x, noises, at, a, 1.0, clip=True
                    ),
                }
            # ᾱ stored as float32 is off by up to 3e-4 in 1 − ᾱ at small t, and a state by as much of its size.
            scale = right.abs().max().item()
            expect.close(torch.stack(states), right, what, mistakes, 0, 1e-3 * scale)
    for name in ("euler", "DDIM", ""):
        with expect.raises_value_error(f"make_scheduler({name!r})"), _asked_of("make_scheduler"):
            submission.SchedulerProbe(name)


# -- 4.3 ---------------------------------------------------------------------------------------------------------------


def _unet(rng: torch.Generator):
    """A tiny U-Net whose every weight counts: as they are made, all norms and biases are the same."""
    from diffusers import UNet2DConditionModel

    seed = int(torch.randint(2**31, (), generator=rng))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**TINY_UNET).eval().requires_grad_(False)
        for parameter in unet.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return unet


def _theirs(submission, unet):
    """The submission's own copy of the U-Net."""
    copy = submission.UNet2DConditionModel(**TINY_UNET)
    copy.load_state_dict(dict(unet.state_dict()))
    return copy


def _encoder(unet) -> list:
    return [unet.conv_in, *unet.down_blocks, unet.mid_block]


@contextlib.contextmanager
def _hooks(modules, hook: Callable) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _features(unet, x: Tensor, t: Tensor, text: Tensor) -> dict:
    """What each module of the encoder gives: module -> its output."""
    kept: dict = {}
    with _hooks(_encoder(unet), lambda module, _inputs, output: kept.__setitem__(module, output)):
        unet(x, t, text)
    return kept


def _from_features(unet, kept: dict, t: Tensor, text: Tensor, x: Tensor) -> Tensor:
    """eps decoded from kept features: the whole U-Net runs, its encoder's answers are exchanged."""
    with _hooks(kept, lambda module, _inputs, _output: kept[module]):
        return unet(torch.zeros_like(x), t, text).sample


@graded(points=3, section="Stable Diffusion")
def test_unet_halves(submission, rng):
    """`encode` then `decode` is the U-Net; decoded at another timestep it is the U-Net with old encoder features."""
    unet = _unet(rng)
    halves = submission.SplitUNet(_theirs(submission, unet))
    unet.double()
    for batch, height, width in ((3, 8, 12), (2, 10, 7)):
        x, text = images(rng, batch, 4, height, width), images(rng, batch, 5, TINY_UNET["cross_attention_dim"])
        x64, text64 = x.double(), text.double()
        t_key, t = (torch.randperm(1000, generator=rng)[:batch] for _ in range(2))
        result = expect.tensors(halves.encode(x, t_key, text), "encode", 2)
        h = expect.tensor(result[0], "the h of encode")
        if not isinstance(result[1], list):
            expect.fail(f"the second value of encode should be the list of skips; got a {type(result[1]).__name__}")
        skips = [expect.tensor(skip, "a skip of encode") for skip in result[1]]

        # float32 against float64 through 30 layers with norms: about 1e-5 of values of size 1.
        with torch.no_grad():
            kept = _features(unet, x64, t_key, text64)
            plain, right = unet(x64, t_key, text64).sample, _from_features(unet, kept, t, text64, x64)
        tolerance = 1e-3 * float(right.abs().max())
        size = f"latents of {height} × {width}"
        for when, expected, what in (
            (t_key, plain, f"decode(*encode(x, t, text), t, text) with {size}"),
            (t, right, f"decode at another timestep than encode, with {size},"),
        ):
            try:
                eps = halves.decode(h, skips, when, text)
            except StudentError as error:
                if error.kind == "RuntimeError" and width % 2:
                    expect.fail(
                        f"decode with {size} raised {error.message}: going up, 4 becomes 8 and not 7; see upsample_size"
                    )
                raise
            eps = expect.tensor(eps, f"decode with {size}", tuple(x.shape))
            if not expect.is_close(eps, expected, 0, tolerance):
                mistakes = _mistakes(unet, kept, x64, t_key, when, text64)
                expect.close(eps, expected, what, mistakes, 0, tolerance)
        _hold_again(halves, x, t_key, t, text, right, tolerance)


@torch.no_grad()
def _mistakes(unet, kept: dict, x: Tensor, t_key: Tensor, t: Tensor, text: Tensor) -> dict[str, Tensor]:
    """What halves that are put together wrongly give."""

    def decoded(kept=kept, t=t, left_out=()) -> Tensor:
        with _hooks(left_out, lambda _module, inputs, _output: inputs[0]):
            return _from_features(unet, kept, t, text, x)

    def encoded(t=t_key, text=text) -> dict:
        return _features(unet, x, t, text)

    first = torch.zeros(len(x), dtype=torch.long)
    return {
        "the time embedding of the key step in the decoder": decoded(t=t_key),
        "a U-Net without its middle block": decoded(kept | {unet.mid_block: kept[unet.down_blocks[-1]][0]}),
        "a decoder without conv_norm_out and conv_act": decoded(left_out=(unet.conv_norm_out, unet.conv_act)),
        "a decoder without conv_act": decoded(left_out=(unet.conv_act,)),
        "a decoder without conv_norm_out": decoded(left_out=(unet.conv_norm_out,)),
        "the first timestep for the whole batch in the decoder": decoded(t=t[first]),
        "the first timestep for the whole batch in the encoder": decoded(encoded(t=t_key[first])),
        "the first timestep for the whole batch": decoded(encoded(t=t_key[first]), t[first]),
        "an encoder whose time is always 0": decoded(encoded(t=first)),
        "an encoder that is given the first text for the whole batch": decoded(encoded(text=text[first])),
    }


def _hold_again(halves, x, t_key, t, text, right, tolerance: float) -> None:
    """The same h and skips are decoded twice in the submission's process."""
    message = (
        "decode changes the list of skips (or a tensor) it is given, so that it cannot be decoded again at the next step: "
        "work on a copy of the list, list(skips)"
    )
    try:
        twice = halves.propagate(x, t_key, [t, t], text)
    except StudentError as error:
        if error.kind == "NotImplementedError":
            raise
        expect.fail(f"{message} ({error.kind}: {error.message}).")
    for eps in expect.tensors(twice, "propagate with two timesteps", 2):
        if not expect.is_close(expect.tensor(eps, "decode", tuple(x.shape)), right, 0, tolerance):
            expect.fail(f"{message}.")


# -- 4.4 ---------------------------------------------------------------------------------------------------------------


class _Network:
    """A network in two halves whose every row depends on its own x, t and text; it remembers how it was called."""

    MAX_CALLS = 2000

    def __init__(self, rng: torch.Generator):
        self.phase = images(rng, 4, dtype=torch.float64)
        self.encoded: list[Tensor] = []  # t of each call
        self.decoded: list[Tensor] = []
        self.rows: list[int] = []  # of each call of the encoder
        self.known: dict[bytes, tuple[Tensor, Tensor]] = {}  # a row of h -> (its skip, its text)

    def reset(self) -> None:
        self.encoded, self.decoded, self.rows, self.known = [], [], [], {}

    # the functions themselves, for float64 as for float32

    def features(self, x: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        t, c = t.to(x.dtype).view(-1, 1, 1, 1), text.to(x.dtype).mean((1, 2)).view(-1, 1, 1, 1)
        p = self.phase.to(x.dtype)
        return (0.5 * x + p[0] + 3 * c + 0.002 * t).sin(), (0.3 * x + p[1] + 0.003 * t).cos()[:, :, ::2, ::2]

    def noise(self, h: Tensor, skip: Tensor, t: Tensor, text: Tensor) -> Tensor:
        t, c = t.to(h.dtype).view(-1, 1, 1, 1), text.to(h.dtype).mean((1, 2)).view(-1, 1, 1, 1)
        p = self.phase.to(h.dtype)
        wide = F.interpolate(skip, h.shape[2:])
        return (h + 0.5 * wide) * (0.005 * t + p[2]).cos() + 0.5 * (4 * c + 0.01 * t + p[3]).sin()

    # what the submission calls

    def encode(self, x, t, text):
        self._hold(x, t, text, "encode")
        self.encoded.append(t)
        self.rows.append(len(x))
        h, skip = self.features(x.double(), t, text)
        h, skip = h.to(x.dtype), skip.to(x.dtype)
        for row in range(len(x)):
            self.known[h[row].numpy().tobytes()] = (skip[row], text[row])
        return [h, [skip]]

    def decode(self, h, skips, t, text):
        self._hold(h, t, text, "decode")
        if not (isinstance(skips, list) and len(skips) == 1 and isinstance(skips[0], Tensor)):
            raise ValueError("decode(h, skips, t, text) takes as many skips as encode returned, in a list")
        if len(skips[0]) != len(h):
            raise ValueError(f"decode was given h of {len(h)} rows and a skip of {len(skips[0])}: repeat both alike")
        for row in range(len(h)):
            skip, words = self.known.get(h[row].contiguous().numpy().tobytes(), (None, None))
            if skip is None:
                raise ValueError("decode was given an h that encode did not return")
            if not torch.equal(skip, skips[0][row]):
                raise ValueError(
                    f"row {row} of decode has the h of one latent and the skip of another: repeat both alike"
                )
            if not torch.equal(words, text[row]):
                raise ValueError(f"row {row} of decode has the h of one text and another text: repeat both alike")
        self.decoded.append(t)
        return self.noise(h.double(), skips[0].double(), t, text).to(h.dtype)

    def _hold(self, x, t, text, name: str) -> None:
        if len(self.encoded) + len(self.decoded) > self.MAX_CALLS:
            raise ValueError("the network was called far more often than the steps need")
        if not all(isinstance(value, Tensor) for value in (x, t, text)) or x.ndim != 4 or text.ndim != 3:
            raise ValueError(f"{name} takes tensors: x or h [n, C, h, w], t [n] and text [n, L, D]")
        if t.shape != (len(x),) or len(text) != len(x):
            raise ValueError(
                f"{name} was given {len(x)} rows of x or h, t of shape {list(t.shape)} and {len(text)} texts; all need "
                "one for each row"
            )


def _loop(
    network: _Network, scheduler, x_T, text, null_text, num_steps, keys, w, injection, *,
    stale: bool = False, key_time: bool = False, when: str = "late", guide: str = "right",
) -> Tensor:  # fmt: skip
    """The propagated loop in float64, or with a mistake in it."""
    scheduler.set_timesteps(num_steps)
    half = scheduler.config.num_train_timesteps / 2
    x_T, x, kept, t_key = x_T.double(), x_T.double(), None, None
    for i, t in enumerate(scheduler.timesteps):
        inject = {"late": t < half, "early": t >= half, "always": True, "after": False, "never": False}[when]
        x = x + injection * x_T if inject else x
        rows = len(x)
        if i in keys and not (stale and kept is not None):
            kept = [
                network.features(x, t.expand(rows), words.double()) for words in (text, null_text) if words is not None
            ]
            t_key = t
        time = (t_key if key_time else t).expand(rows)
        each = [network.noise(*features, time, words.double()) for features, words in zip(kept, (text, null_text))]
        with_text = each[0]
        if null_text is None or guide == "none":
            eps = with_text
        else:
            null = each[1]
            eps = {
                "right": null + w * (with_text - null),
                "from the text": with_text + w * (with_text - null),
                "exchanged": with_text + w * (null - with_text),
                "scaled": w * with_text,
            }[guide]
        x = scheduler.step(eps, t, x).prev_sample.double()
        if when == "after" and t < half:
            x = x + injection * x_T
    return x


def _schedulers(submission) -> Iterator[tuple[str, object, object]]:
    """(name, the submission's scheduler, one of ours), made of the classes directly: 4.2 has a check of its own."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    ddim = SCHEDULE | {"clip_sample": False, "set_alpha_to_one": False}
    yield "ddim", submission.DDIMScheduler(**ddim), DDIMScheduler(**ddim)
    for kind, end in (("dpmsolver", "sigma_min"), ("dpmsolver++", "zero")):
        options = SCHEDULE | {"algorithm_type": kind, "final_sigmas_type": end}
        yield kind, submission.DPMSolverMultistepScheduler(**options), DPMSolverMultistepScheduler(**options)


def _keys(choose: random.Random, num_steps: int) -> list[int]:
    """A key schedule with runs of one step and of several: 0, 1 and some more."""
    return [0, 1, *sorted(choose.sample(range(4, num_steps - 1), 2))]


def _hold_sample(submission, rng, batched: bool) -> None:
    choose = _choice(rng)
    num_steps = choose.randrange(10, 14)
    way = "sample with batched=True" if batched else "sample"
    for case, (name, theirs, ours) in enumerate(_schedulers(submission)):
        x_T, text, null_text = images(rng, 2, 4, 6, 6), images(rng, 2, 5, 8), images(rng, 2, 5, 8)
        keys, w, injection = _keys(choose, num_steps), choose.uniform(2, 8), choose.uniform(0.05, 0.2)
        if case == 1:
            null_text = None
        network = _Network(rng)
        # Two functions, not bound methods: what the submission holds is a name for them, no more.
        halves = submission.Halves(lambda *a, n=network: n.encode(*a), lambda *a, n=network: n.decode(*a))
        sampler = submission.PropagatedSampler(halves, theirs)
        given = {"num_steps": num_steps, "guidance_scale": w, "injection": injection, "batched": batched}
        guided = [] if null_text is None else [null_text]
        for number, key_steps in enumerate((keys, keys, None) if case == 2 else (keys,)):
            network.reset()
            what = f"{way} with {name}, key_steps = {key_steps}{'' if guided else ', without null_text'},"
            options = given if key_steps is None else given | {"key_steps": key_steps}
            try:
                latents = sampler.sample(x_T, text, *guided, **options)
            except StudentError as error:
                if number:  # a multistep solver counts its steps and remembers its last noise
                    expect.fail(
                        f"sample works once, and raised {error.kind}: {error.message} when it was called again: call "
                        "scheduler.set_timesteps at the start of each sample"
                    )
                raise
            latents = expect.tensor(latents, what, tuple(x_T.shape))
            run = list(range(num_steps)) if key_steps is None else key_steps
            ours.set_timesteps(num_steps)
            _hold_calls(network, what, ours.timesteps, run, len(x_T) * (1 + len(guided)), batched)
            loop = (network, ours, x_T, text, null_text, num_steps, run, w, injection)
            right = _loop(*loop)
            # Bounded noise, ten steps: float32 stays within 1e-5 of the latents' size.
            tolerance = 1e-3 * float(right.abs().max())
            if expect.is_close(latents, right, 0, tolerance):
                continue
            mistakes = {
                "the time of the key step in the decoder": _loop(*loop, key_time=True),
                "the features of step 0 throughout": _loop(*loop, stale=True),
                "no noise injection": _loop(*loop, when="never"),
                "noise injection at t ≥ T/2": _loop(*loop, when="early"),
                "noise injection at every step": _loop(*loop, when="always"),
                "noise injection after the step": _loop(*loop, when="after"),
            }
            if guided:
                mistakes |= {
                    "guidance from the prompt's ε, ε(text) + w (ε(text) − ε(null)),": _loop(
                        *loop, guide="from the text"
                    ),
                    "text and null text exchanged": _loop(*loop, guide="exchanged"),
                    "w · ε(text) in place of guidance": _loop(*loop, guide="scaled"),
                    "no guidance": _loop(*loop, guide="none"),
                }
            try:
                expect.close(latents, right, what, mistakes, 0, tolerance)
            except CheckFailed as failed:
                if batched and "is off by" in str(failed):
                    expect.fail(f"{failed} Do h, skips, text, t and the parts of the answer all go in one order?")
                raise


def _hold_calls(network: _Network, what: str, timesteps: Tensor, keys: list[int], rows: int, batched: bool) -> None:
    """The encoder ran at the key steps, the decoder at every step or once for each run."""
    encoded = [set(t.tolist()) for t in network.encoded]
    at_keys = [{int(timesteps[k])} for k in keys]
    doubled = [size for size in network.rows if size != rows]
    if doubled and len(encoded) == 2 * len(keys):
        expect.fail(f"{what} should ask for text and null text in one call of encode with {rows} rows.")
    if len(encoded) != len(keys):
        expect.fail(
            f"{what} should run the encoder {len(keys)} times, at the key steps; it ran {len(encoded)} times"
            f"{', at every step' if len(encoded) == len(timesteps) else ''}."
        )
    if doubled:
        expect.fail(f"{what} should call encode with {rows} rows (2B with guidance, else B); got {doubled[0]}.")
    if encoded != at_keys:
        expect.fail(
            f"{what} should run the encoder at the scheduler's timesteps {[t for s in at_keys for t in s]}; it ran at "
            f"{[sorted(s)[0] for s in encoded]}. Is set_timesteps called first, and are key steps counted from 0?"
        )
    ends = [*keys[1:], len(timesteps)] if batched else range(1, len(timesteps) + 1)
    starts = keys if batched else range(len(timesteps))
    runs = [sorted(timesteps[a:b].repeat_interleave(rows).tolist()) for a, b in zip(starts, ends)]
    if len(network.decoded) != len(runs):
        each = "once for each key step" if batched else "once for each step"
        expect.fail(f"{what} should call decode {each}, {len(runs)} times in all; got {len(network.decoded)} calls.")
    for number, (t, run) in enumerate(zip(network.decoded, runs)):
        if sorted(t.tolist()) != run:
            got, wanted = sorted(set(t.tolist())), sorted(set(run))
            hint = " (the time of the key step?)" if not batched and got[0] in {int(timesteps[k]) for k in keys} else ""
            expect.fail(
                f"{what}: call {number + 1} of decode should be for t = {wanted}, {rows} rows of each; it was for "
                f"t = {got}, {len(t)} rows in all{hint}."
            )


@graded(points=3, section="Stable Diffusion")
def test_propagated_sampling(submission, rng):
    """`sample` runs the encoder at key steps only, decodes at every step, with guidance and noise injection."""
    _hold_sample(submission, rng, batched=False)
    network = _Network(rng)
    halves = submission.Halves(lambda *a: network.encode(*a), lambda *a: network.decode(*a))
    _, theirs, _ = next(_schedulers(submission))
    sampler = submission.PropagatedSampler(halves, theirs)
    x_T, text = images(rng, 1, 4, 6, 6), images(rng, 1, 5, 8)
    for keys, why in (
        ([1, 3], "without step 0"),
        ([], "empty"),
        ([0, 5, 3], "unsorted"),
        ([0, 3, 3, 5], "with a step twice"),
        ([0, 4, 10], "with a step that is not below num_steps = 10"),
        ([-1, 0, 4], "with a negative step"),
        ([0, -2, 4], "with a negative step"),
    ):
        with expect.raises_value_error(f"sample with key_steps {keys}, {why},"):
            sampler.sample(x_T, text, num_steps=10, key_steps=keys)
        if network.encoded:
            expect.fail(f"sample should look at key_steps ({keys}, {why}) before it asks the network anything.")


@graded(points=2, section="Stable Diffusion")
def test_batched_decoding(submission, rng):
    """With `batched=True` all steps from one key step up to the next are decoded in one call, to the same latents."""
    _hold_sample(submission, rng, batched=True)


@graded(points=1, section="Stable Diffusion")
def test_same_as_pipeline(submission, rng):
    """Your halves in your loop give what diffusers' pipeline gives; with key steps, what it gives with old features."""
    unet, num_steps, w, keys = _unet(rng), 4, 4.0, [0, 2]
    pipeline = tiny_pipeline()
    pipeline.unet = unet
    x_T, text, null_text = images(rng, 1, 4, 12, 12), images(rng, 1, 5, 16), images(rng, 1, 5, 16)
    split = submission.SplitUNet(_theirs(submission, unet))
    chosen = _choice(rng).randrange(3)
    for number, (name, theirs, ours) in enumerate(_schedulers(submission)):
        sampler = submission.PropagatedSampler(split, theirs)
        pipeline.scheduler = ours

        def run():
            return pipeline(
                num_inference_steps=num_steps, guidance_scale=w, latents=x_T, prompt_embeds=text,
                negative_prompt_embeds=null_text, output_type="latent",
            ).images.double()  # fmt: skip

        plain = run()
        cases = [(None, False, plain)]
        if number == chosen:
            propagated = _with_old_features(unet, keys, run)
            cases += [(keys, False, propagated), (keys, True, propagated)]
        tolerance = 2e-3 * float(plain.abs().max())  # guidance enlarges what float32 loses in each of the steps
        for key_steps, batched, right in cases:
            options = {"num_steps": num_steps, "guidance_scale": w, "key_steps": key_steps, "batched": batched}
            what = f"sample with {name}, key_steps = {key_steps}, batched = {batched}, on the tiny U-Net"
            latents = expect.tensor(sampler.sample(x_T, text, null_text, **options), what, tuple(x_T.shape))
            other = {} if right is plain else {"the plain pipeline": plain}
            expect.close(latents, right, what, other, 0, tolerance)


def _with_old_features(unet, keys: list[int], run: Callable[[], Tensor]) -> Tensor:
    """What `run` gives when the U-Net's encoder answers as at the last key step."""
    kept: dict = {}
    step = -1

    def hook(module, _inputs, output):
        nonlocal step
        step += module is unet.conv_in
        if step in keys:
            kept[module] = output
        return kept[module]

    with _hooks(_encoder(unet), hook):
        return run()


# -- 4.5 – 4.7 ---------------------------------------------------------------------------------------------------------


@graded(points=1, section="Stable Diffusion")
def test_read_coco(submission, rng):
    """`read_coco` joins images and captions by id, all captions of an image, in the order of the ids."""
    choose = _choice(rng)
    counts = [5, 6, 5, 7, 5, 5]
    choose.shuffle(counts)
    captions = [[f"caption {choose.randrange(10**9)}" for _ in range(count)] for count in counts]
    pictures = torch.randint(256, (len(counts), 3, 8, 8), generator=rng, dtype=torch.uint8)
    folder = submission.save_coco(pictures, captions)
    pairs = expect.tensors(submission.read_coco(folder), f"read_coco of {len(counts)} images", len(counts))
    files = [f"{139 + 146 * number:012}.jpg" for number in range(len(counts))]
    got = []
    for pair in pairs:
        path, texts = expect.tensors(pair, "an entry of read_coco", 2)
        if not isinstance(path, str) or not isinstance(texts, list):
            expect.fail(f"an entry of read_coco should be (path, list of captions); got {pair!r:.120}")
        got.append((path.replace("\\", "/").rsplit("/", 1)[-1], texts))
    if sorted(name for name, _ in got) != files:
        expect.fail(f"the files should be {files[0]}, {files[1]} …; got {[name for name, _ in got][:2]} …")
    if any(len(texts) == 1 for _, texts in got):
        expect.fail("read_coco should return all captions of an image, five or more; got one.")
    if sorted(map(sorted, (texts for _, texts in got))) != sorted(map(sorted, captions)):
        expect.fail(
            "captions are joined in the wrong way: an annotation belongs to the image whose id is its image_id."
        )
    if [name for name, _ in got] != files:
        expect.fail("the images should be in the order of their ids.")
    if [sorted(texts) for _, texts in got] != [sorted(texts) for texts in captions]:
        expect.fail("captions belong to other images: an annotation belongs to the image whose id is its image_id.")
    if [texts for _, texts in got] != captions:
        expect.fail("the captions of an image should be in the order of the annotations' ids.")
    if any(not path.replace("\\", "/").endswith(f"/val2017/{name}") for (path, _), name in zip(pairs, files)):
        expect.fail(f"the path of an image should be FOLDER/val2017/NAME; got {pairs[0][0]!r:.120}")
    try:
        submission.read_coco("/no/such/folder")
    except StudentError as error:
        if error.kind == "NotImplementedError":
            raise
        if error.kind != "FileNotFoundError" or "captions_val2017.json" not in error.message or "\n" in error.message:
            expect.fail(
                "without annotations/captions_val2017.json read_coco should raise a FileNotFoundError whose one line names "
                f"that file; it raised {error.kind}: {error.message}"
            )
    else:
        expect.fail("without annotations/captions_val2017.json read_coco should raise a FileNotFoundError; it did not.")


def _frechet(a: Tensor, b: Tensor, *, unbiased: bool = True, spread: bool = True) -> float:
    """Of the features [N, D] of two sets (Heusel et al. 2017, equation 6), in float64."""
    distance = (a.mean(0) - b.mean(0)).square().sum()
    if spread:
        first, second = (torch.cov(x.T, correction=int(unbiased)) for x in (a, b))
        values, vectors = torch.linalg.eigh(first)
        root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
        distance = distance + first.trace() + second.trace()
        distance = distance - 2 * torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return float(distance)


@graded(points=1, section="Stable Diffusion")
def test_folder_fid(submission, rng):
    """`folder_fid` is the Fréchet distance of the features of all images in two folders."""
    weights, size, batch = images(rng, 6, 3, 4, 4), 12, 10
    first, second = (torch.randint(256, (n, 3, size, size), generator=rng, dtype=torch.uint8) for n in (37, 25))
    second = (second.float() * 0.5 + torch.linspace(0, 60, len(second)).view(-1, 1, 1, 1)).to(torch.uint8)

    def features(pictures: Tensor) -> Tensor:
        x = pictures.double() / 127.5 - 1
        return F.conv2d(x, weights.double(), stride=2).relu().mean((2, 3))

    a, b = features(first), features(second)
    folders = submission.save_images(first), submission.save_images(second)
    extractor = submission.RandomFeatures(weights)
    value = submission.folder_fid(*folders, extractor, size=size, batch_size=batch)
    if not isinstance(value, float):
        expect.fail(f"folder_fid should return a plain float; got a {type(value).__name__}")
    right = _frechet(a, b)
    full = [len(x) // batch * batch for x in (a, b)]
    mistakes = {
        "only the first batch of each folder": _frechet(a[:batch], b[:batch]),
        "only the last batch of each folder": _frechet(a[full[0] :], b[full[1] :]),
        "the images without the last, smaller batch": _frechet(a[: full[0]], b[: full[1]]),
        "the distance of the means alone": _frechet(a, b, spread=False),
        "the square root of the distance": math.sqrt(right),
        "covariances divided by N in place of N − 1": _frechet(a, b, unbiased=False),
        "one folder against itself": 0.0,
    }
    # Features in float32, sums of squares in float64: 1e-6 of their size, which the roots of small eigenvalues enlarge.
    scale = float(torch.cov(a.T).trace() + torch.cov(b.T).trace())
    tensors = {name: torch.tensor(mistake, dtype=torch.float64) for name, mistake in mistakes.items()}
    expect.close(
        expect.tensor(value, "folder_fid", ()), torch.tensor(right, dtype=torch.float64),
        f"folder_fid of {len(a)} and {len(b)} images in batches of {batch}", tensors, 1e-3, 1e-4 * scale,
    )  # fmt: skip


@graded(points=1, section="Stable Diffusion")
def test_clip_score(submission, rng):
    """`clip_score` is the mean over all images of 100 cos between an image's and its prompt's embedding."""
    choose = _choice(rng)
    clip = Clip()
    weights = {
        name: value + 0.3 * images(rng, *value.shape) if value.is_floating_point() else value
        for name, value in clip.state_dict().items()
    }
    clip.load_state_dict(weights)
    pictures = torch.randint(256, (7, 3, 30, 26), generator=rng, dtype=torch.uint8)
    pictures = (pictures * torch.rand(7, 3, 1, 1, generator=rng)).to(torch.uint8)  # of different colours
    words = ["a red bus", "two cats", "an old man and a boat", "snow", "horses on a hill", "a plate of food", "rain"]
    prompts = [f"{word} {choose.randrange(1000)}" for word in choose.sample(words, len(words))]
    cosines = _cosines(clip, pictures, prompts)
    if cosines.mean() < 0:  # where the mean is negative the score is 0 and says little
        weights["model.text_projection.weight"] = -weights["model.text_projection.weight"]
        clip.load_state_dict(weights)
        cosines = -cosines
    theirs = submission.Clip()
    theirs.load_state_dict(weights)
    batch = 3
    value = submission.clip_score(pictures, prompts, theirs, batch_size=batch)
    if not isinstance(value, float):
        expect.fail(f"clip_score should return a plain float; got a {type(value).__name__}")
    right = 100 * cosines.mean()
    other = _cosines(clip, pictures, prompts[1:] + prompts[:1]), _cosines(clip, pictures, [prompts[0]] * len(prompts))
    mistakes = {
        "the cosine without the factor 100": right / 100,
        "the scale 2.5 · cos": right / 40,
        "the mean of the batches' means": 100 * torch.stack([part.mean() for part in cosines.split(batch)]).mean(),
        "only the first batch": 100 * cosines[:batch].mean(),
        "only the last batch": 100 * cosines[len(cosines) // batch * batch :].mean(),
        "the images without the last, smaller batch": 100 * cosines[: len(cosines) // batch * batch].mean(),
        "the prompts of other images": 100 * other[0].mean(),
        "the first prompt for every image": 100 * other[1].mean(),
        "the sum over the images": right * len(cosines),
    }
    # Embeddings in float32: a cosine to 1e-6, times 100.
    expect.close(
        expect.tensor(value, "clip_score", ()),
        right,
        f"clip_score of 7 images in batches of {batch}",
        mistakes,
        0,
        2e-3,
    )
    for count in (3, 9):
        with expect.raises_value_error(f"clip_score of 7 images and {count} prompts"):
            submission.clip_score(pictures, (prompts + prompts)[:count], theirs, batch_size=batch)


def _cosines(clip: Clip, pictures: Tensor, prompts: list[str]) -> Tensor:
    """cos of the embeddings of each image and prompt, one by one, in float64."""
    values = []
    for picture, prompt in zip(pictures, prompts):
        image = clip.processor(images=[picture], return_tensors="pt")
        text = clip.processor(text=[prompt], return_tensors="pt")
        with torch.no_grad():
            a = clip.get_image_features(image["pixel_values"]).double()
            b = clip.get_text_features(text["input_ids"], text["attention_mask"]).double()
        values.append(F.cosine_similarity(a, b)[0])
    return torch.stack(values)
