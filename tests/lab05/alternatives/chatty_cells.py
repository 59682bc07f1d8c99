"""Style: many little cells that talk all the time, on every channel; coefficients for all timesteps at once."""
# %%
import copy
import logging
import sys
import traceback
import warnings

import matplotlib.pyplot as plt
import torch.nn.functional as F
from tqdm import tqdm, trange

print("imports done ✓")
print("and on the other stream", file=sys.stderr)
# %%
log = logging.getLogger("chatty")
log.setLevel(logging.DEBUG)
if not log.handlers:
    log.addHandler(logging.StreamHandler())
log.debug("logging to stderr")
# %%
# This cell is only a comment.
# %%

# %%
schedule.betas[:3], schedule.alphas_cumprod[-1]
# %%
warnings.warn("this notebook talks a lot", stacklevel=1)
CALLS = 0


def say(*words, **more):
    """Print, and count how often."""
    global CALLS
    CALLS += 1
    print(f"[{CALLS}]", *words, **more)


say("hello"); say("hello again", file=sys.stderr)
# %%
def level_table(schedule):
    """alpha_bar for -1, 0, ..., T - 1 in one float64 vector: look t up at t + 1."""
    return F.pad(schedule.alphas_cumprod.double(), (1, 0), value=1.0)


level_table(schedule).shape
# %%
def as_times(t, device=None):
    """Ints, lists and tensors of timesteps, all as a LongTensor."""
    return torch.as_tensor(t, dtype=torch.long, device=device)


def wide(numbers, images):
    """[B] or [] -> [B or 1, 1, 1, 1], of the images' kind."""
    return numbers.to(images)[..., None, None, None]


assert wide(torch.ones(5), x_clean).shape == (5, 1, 1, 1) and wide(torch.ones(()), x_clean).shape == (1, 1, 1)
# %%
def levels_at(schedule, t):
    t = as_times(t)
    return level_table(schedule)[t.cpu() + 1].to(t.device)


for _t in (-1, 0, 500):
    say(f"alpha_bar({_t}) =", levels_at(schedule, _t).item())
# %%
# TODO: my first attempt has only ints
@add_to_class(ForwardProcessImpl)
def add_noise(self, x_start, t, noise=None):
    """Works for one int; replaced in the next cell."""
    noise = torch.randn_like(x_start) if noise is None else noise
    a = float(self.schedule.alphas_cumprod[t])
    return a**0.5 * x_start + (1 - a) ** 0.5 * noise, noise


say("first attempt:", add_noise(ForwardProcessImpl(schedule), x_clean[:1], 10)[0].std())
# %%
# second attempt, for tensors too
@add_to_class(ForwardProcessImpl)
def add_noise(self, x_start: Tensor, t: int | Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Draw x_t from q(x_t | x_0)."""
    if noise is None:
        say("no noise given, drawing some")
        noise = torch.randn_like(x_start)
    a = wide(levels_at(self.schedule, t), x_start.double())
    x_t = torch.addcmul(a.sqrt() * x_start, (1 - a).sqrt(), noise.double()).to(x_start)
    say(f"t = {t}: std of x_t is {x_t.std():.3f}")
    return x_t, noise
# %%
add_noise
# %%
def show_grid(pictures, columns, titles=()):
    rows = -(-len(pictures) // columns)
    figure, axes = plt.subplots(rows, columns, squeeze=False, figsize=(columns, 1.1 * rows))
    for axis, picture in zip(axes.ravel(), tqdm(pictures, desc="drawing")):
        axis.imshow(picture.squeeze().cpu(), cmap="magma")
        axis.set(xticks=[], yticks=[])
    for axis, text in zip(axes[0], titles):
        axis.set_title(text)
    plt.close(figure)
    return figure


show_grid(x_clean[:4], 4)
# %%
@add_to_class(ForwardProcessImpl)
def demonstrate_forward_trajectory(self, x_start: Tensor, timesteps: list[int]):
    """Show progressive noise corruption, all timesteps in one call."""
    many = x_start[:1].expand(len(timesteps), -1, -1, -1)
    noisy, _ = self.add_noise(many, as_times(timesteps, x_start.device))
    return show_grid(noisy, len(timesteps), [f"{t}" for t in timesteps])
# %%
def noise_and_guess(analyzer, images, timesteps):
    """x_t, noise, guess, each [len(timesteps), B, C, H, W], with a single call of the network."""
    t = as_times(timesteps, images.device).repeat_interleave(len(images))
    x_t, noise = ForwardProcessImpl(analyzer.schedule).add_noise(images.repeat(len(timesteps), 1, 1, 1), t)
    with torch.inference_mode():
        guess = analyzer.model(x_t, t).to(x_t)
    return [x.unflatten(0, (len(timesteps), len(images))) for x in (x_t, noise, guess)]


log.info("network looks at %d pictures", 3 * 2)
[part.shape for part in noise_and_guess(TrainedModelAnalyzer(model, schedule), x_clean[:2], [0, 10, 999])]
# %%
@add_to_class(TrainedModelAnalyzer)
def analyze_noise_prediction_quality(self, x_clean: Tensor, timesteps: list[int]) -> dict[int, dict[str, float]]:
    """Compare predicted with true noise, all timesteps at once."""
    _, noise, guess = (x.flatten(1).double() for x in noise_and_guess(self, x_clean, timesteps))
    mse = (noise - guess).pow(2).mean(1)
    r = F.cosine_similarity(noise - noise.mean(1, keepdim=True), guess - guess.mean(1, keepdim=True), dim=1)
    a = levels_at(self.schedule, timesteps)
    table = torch.stack([mse.cpu(), r.cpu(), a / (1 - a)], 1).tolist()
    for t, row in zip(timesteps, table):
        say("t =", t, "→", *(f"{number:.4f}" for number in row), sep="\t")
    return {t: dict(zip(["mse", "correlation", "snr"], row)) for t, row in zip(timesteps, table)}
# %%
@add_to_class(TrainedModelAnalyzer)
def visualize_noise_predictions(self, x_clean: Tensor, timesteps: list[int]):
    """Show x_t, the true noise, the predicted noise, and the implied x_0 of the first image."""
    x_t, noise, guess = (part[:, 0] for part in noise_and_guess(self, x_clean[:1], timesteps))
    a = wide(levels_at(self.schedule, timesteps), x_t)
    x_0 = (x_t - (1 - a).sqrt() * guess) / a.sqrt()
    return show_grid(torch.stack([x_t, noise, guess, x_0], 1).flatten(0, 1), 4, ["x_t", "ε", "ε̂", "x̂₀"])
# %%
"""A string alone in a cell: now comes DDPM."""
# %%
def ddpm_numbers(schedule):
    """For every t at once: what to divide by, what of eps to take off, and the variance."""
    beta, level = schedule.betas.double(), level_table(schedule)
    before, now = level[:-1], level[1:]
    return {"root": (1 - beta).sqrt(), "off": beta / (1 - now).sqrt(), "variance": beta * (1 - before) / (1 - now)}


{name: (numbers[0].item(), numbers[-1].item()) for name, numbers in ddpm_numbers(schedule).items()}
# %%
@add_to_class(DDPMSampler)
def compute_posterior_mean(self, x_t: Tensor, t: int | Tensor, predicted_noise: Tensor) -> Tensor:
    """Mean of p(x_{t-1} | x_t)."""
    numbers, at = ddpm_numbers(self.schedule), as_times(t).cpu()
    return (x_t - wide(numbers["off"][at], x_t) * predicted_noise) / wide(numbers["root"][at], x_t)
# %%
@add_to_class(DDPMSampler)
def compute_posterior_variance(self, t: int | Tensor) -> Tensor:
    """Variance of p(x_{t-1} | x_t)."""
    at = as_times(t)
    variance = ddpm_numbers(self.schedule)["variance"][at.cpu()].float()
    say("variance at", t, "is", variance)
    return variance.to(at.device)
# %%
def same_time(x, t):
    return as_times(t, x.device).expand(x.shape[0]).contiguous()


def ask(model, x, t):
    eps = model(x, same_time(x, t))
    print("·", end="" if t % 50 else "\n", flush=True)
    return eps
# %%
@add_to_class(DDPMSampler)
@torch.no_grad()
def ddpm_step(self, x_t: Tensor, t: int) -> Tensor:
    """Draw x_{t-1} from p(x_{t-1} | x_t)."""
    print("step", t, file=sys.stderr)
    mean = self.compute_posterior_mean(x_t, t, ask(self.model, x_t, t))
    if t == 0:
        warnings.warn("t = 0: this is the last step, no noise", stacklevel=2)
        return mean
    return mean + self.compute_posterior_variance(t).sqrt().to(mean) * torch.randn_like(mean)
# %%
def first_noise(model, shape, x_T=None):
    if x_T is not None:
        return x_T.detach().clone()
    weight = next(model.parameters())
    log.info("drawing x_T of shape %s as %s", list(shape), weight.dtype)
    return torch.randn(list(shape), dtype=weight.dtype, device=weight.device)


first_noise(model, [1, 1, 2, 2])
# %%
@add_to_class(DDPMSampler)
@torch.no_grad()
def sample(self, shape: tuple[int, ...], return_trajectory: bool = False, *, x_T: Tensor | None = None):
    """Draw samples with all T steps."""
    numbers = {name: row.tolist() for name, row in ddpm_numbers(self.schedule).items()}
    states = [first_noise(self.model, shape, x_T)]
    for t in trange(self.schedule.num_timesteps - 1, -1, -1, desc="DDPM"):
        x = (states[-1] - numbers["off"][t] * ask(self.model, states[-1], t)) / numbers["root"][t]
        if t > 0:
            x = x + numbers["variance"][t] ** 0.5 * torch.randn_like(x)
        tqdm.write(f"after {t}: {x.std().item():.4f}")
        states = [*states, x] if return_trajectory else [x]
    if return_trajectory:
        return states[-1], states
    return states[-1]
# %%
del _t
# %%
def seed_consistency(sampler: DDPMSampler, shape: tuple[int, ...], seeds: list[int]) -> dict:
    """Sample twice with each seed."""
    answer = dict(repeatable=True, mean=[], std=[])
    for seed in tqdm(seeds, file=sys.stdout):
        runs = []
        for which in ("first", "second"):
            say("seed", seed, which, "run")
            torch.manual_seed(seed)
            runs.append(sampler.sample(shape))
        answer["repeatable"] = answer["repeatable"] and runs[0].equal(runs[1])
        std, mean = torch.std_mean(runs[0].double())
        answer["mean"].append(mean.item()), answer["std"].append(std.item())
    say(answer)
    return answer
# %%
# DDIM
DDIMSampler.__doc__
# %%
@add_to_class(DDIMSampler)
def predict_x0_from_eps(self, x_t: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
    """The clean image that x_t would come from if its noise were eps."""
    a = levels_at(self.schedule, t)
    return wide(a.rsqrt(), x_t) * x_t - wide((1 / a - 1).sqrt(), x_t) * eps
# %%
CURVES = {
    "uniform": lambda u: u,
    "quadratic": lambda u: u**2,
}
list(CURVES)
# %%
@add_to_class(DDIMSampler)
def create_timestep_schedule(self, num_steps: int, schedule_type: str = "uniform") -> Tensor:
    """The timesteps that a sampler with num_steps network calls visits."""
    T = self.schedule.num_timesteps
    if schedule_type not in CURVES:
        log.error("unknown schedule %r", schedule_type)
        raise ValueError(f"unknown schedule_type {schedule_type!r}, choose from {list(CURVES)}")
    if num_steps < 1 or num_steps > T:
        log.error("%s steps?!", num_steps)
        raise ValueError(f"num_steps = {num_steps} is not in 1 ... {T}")
    if num_steps == 1:
        return as_times([T - 1])
    wanted = ((T - 1) * CURVES[schedule_type](torch.linspace(0, 1, num_steps, dtype=torch.float64))).round().long()
    # every timestep that is wanted, and the smallest that are not, until there are enough
    taken = torch.zeros(T, dtype=torch.bool)
    taken[wanted] = True
    missing = num_steps - int(taken.sum())
    if missing:
        warnings.warn(f"{missing} repeats moved", stacklevel=2)
        taken[(~taken).nonzero()[:missing]] = True
    return taken.nonzero().flatten().flip(0)
# %%
[DDIMSampler(model, schedule).create_timestep_schedule(n, kind) for n in (1, 2, 5) for kind in CURVES]
# %%
def sigma_squared(level_t, level_s, eta):
    return eta**2 * (1 - level_s) / (1 - level_t) * (1 - level_t / level_s)
# %%
def jump_numbers(schedule, t, s, eta):
    """x_s = A x_t + B eps + C z for any number of jumps at once: [..., 3]."""
    level_t, level_s = levels_at(schedule, t), levels_at(schedule, s)
    variance = sigma_squared(level_t, level_s, eta)
    A = (level_s / level_t).sqrt()
    B = (1 - level_s - variance).clamp(min=0).sqrt() - A * (1 - level_t).sqrt()
    return torch.stack([A, B, variance.sqrt()], -1)


jump_numbers(schedule, [999, 500, 0], [500, 0, -1], 1.0)
# %%
def jump(model, x, t, numbers):
    A, B, C = numbers
    x = A * x + B * ask(model, x, t).to(x)
    if C:
        x = x + C * torch.randn_like(x)
    return x
# %%
@add_to_class(DDIMSampler)
@torch.no_grad()
def ddim_step(self, x_t: Tensor, t: int, s: int, eta: float = 0.0) -> Tensor:
    """Jump from timestep t to an earlier one."""
    if not (s >= -1 and s < t):
        say("refused:", t, "→", s, file=sys.stderr)
        raise ValueError(f"s must be in [-1, {t}), got {s}")
    return jump(self.model, x_t, t, jump_numbers(self.schedule, t, s, eta).tolist())
# %%
@add_to_class(DDIMSampler)
@torch.no_grad()
def sample(
    self,
    shape: tuple[int, ...],
    timesteps=None,
    eta: float = 0.0,
    return_trajectory: bool = False,
    *,
    x_T: Tensor | None = None,
):
    """Draw samples, visiting only the given timesteps."""
    t = as_times(range(self.schedule.num_timesteps) if timesteps is None else timesteps).cpu()
    if timesteps is None:
        t = t.flip(0)
    rows = jump_numbers(self.schedule, t, F.pad(t[1:], (0, 1), value=-1), eta).tolist()
    states = [first_noise(self.model, shape, x_T)]
    with tqdm(total=len(rows), desc="DDIM", leave=False) as bar:
        for now, row in zip(t.tolist(), rows):
            states.append(jump(self.model, states[-1], now, row))
            if not return_trajectory:
                states.pop(0)
            bar.set_postfix(t=now)
            bar.update()
    print()
    return (states[-1], states) if return_trajectory else states[-1]
# %%
if __name__ == "__main__":
    say("the notebook is running as the main program")
# %%
@add_to_class(StochasticityController)
def compute_stochastic_variance(self, t: int, s: int, eta: float) -> Tensor:
    """Variance of the noise in a DDIM step."""
    return sigma_squared(*levels_at(self.schedule, [t, s]), eta)
# %%
def rms(a, b):
    return F.mse_loss(a.double(), b.double()).sqrt().item()


rms(torch.zeros(3), torch.ones(3))
# %%
@add_to_class(StochasticityController)
def analyze_eta_effects(self, shape: tuple[int, ...], eta_values: list[float], num_steps: int) -> dict[float, dict]:
    """Sample twice from one x_T for each eta, and compare."""
    start = first_noise(self.ddim_sampler.model, shape)
    effects = {}
    for eta in (bar := tqdm(eta_values)):
        bar.set_description(f"eta = {eta}")
        runs = []
        for _ in range(2):
            steps = self.ddim_sampler.create_timestep_schedule(num_steps)
            runs += [self.ddim_sampler.sample(shape, steps, eta=eta, x_T=start)]
        effects[eta] = {
            "samples": runs[0],
            "repeat_distance": rms(*runs),
            "diversity": diversity(runs[0]),
        }
        say({name: effects[eta][name] for name in ("repeat_distance", "diversity")})
    return effects
# %%
def stopwatch(work, device):
    """(what work() returns, seconds)"""
    synchronize(device)
    before = time.perf_counter()
    result = work()
    synchronize(device)
    return result, time.perf_counter() - before


stopwatch(lambda: "nothing", "cpu")
# %%
def compare_samplers(
    ddpm_sampler: DDPMSampler,
    ddim_sampler: DDIMSampler,
    num_samples: int = 16,
    step_counts: tuple[int, ...] = (200, 100, 50, 20, 10),
    sample_shape: tuple[int, ...] = (1, 28, 28),
) -> list[dict]:
    """Run DDPM with all steps, and DDIM with each of step_counts, all from one x_T."""
    start = first_noise(ddpm_sampler.model, [num_samples, *sample_shape])
    device, rows = start.device, []

    def report(name, sampler, run, one_step):
        with count_calls(sampler.model) as counter:
            samples, seconds = stopwatch(run, device)
        row = {"name": name, "network_calls": counter.calls, "seconds": seconds, "samples": samples}
        row["speedup"] = rows[0]["seconds"] / seconds if rows else 1.0
        row["diversity"] = diversity(samples)
        row["peak_memory"] = peak_memory(one_step, device)
        say({key: value for key, value in row.items() if key != "samples"}, file=sys.stderr)
        rows.append(row)

    last = ddpm_sampler.schedule.num_timesteps - 1
    report(
        f"DDPM-{last + 1}",
        ddpm_sampler,
        lambda: ddpm_sampler.sample(tuple(start.shape), x_T=start),
        lambda: ddpm_sampler.ddpm_step(start, last),
    )
    for count in step_counts:
        report(
            f"DDIM-{count}",
            ddim_sampler,
            lambda: ddim_sampler.sample(
                tuple(start.shape), ddim_sampler.create_timestep_schedule(count), x_T=start  # noqa: B023
            ),
            lambda: ddim_sampler.sample(tuple(start.shape), [last], x_T=start),
        )
    return rows
# %%
def x0_error_gain(schedule: NoiseSchedule, timesteps: list[int]) -> Tensor:
    """How many times larger an error in the predicted noise gets in the estimate of x_0."""
    a = levels_at(schedule, timesteps)
    gain = ((1 - a) / a).sqrt().float()
    say(*zip(timesteps, gain.tolist()), sep="\n")
    return gain
# %%
x0_error_gain(schedule, [0, 999])
# %%
def coefficients(cache, sampler, num_steps):
    """From the cache, or new ones into it."""
    t = sampler.create_timestep_schedule(num_steps)
    key = (tuple(t.tolist()), tuple(sampler.schedule.alphas_cumprod.tolist()))
    try:
        found = cache[key]
        say("cache hit")
    except KeyError:
        say("cache miss, working it out")
        found = cache[key] = jump_numbers(sampler.schedule, t, F.pad(t[1:], (0, 1), value=-1), 0.0).tolist()
    return list(zip(key[0], found))
# %%
@add_to_class(SamplingOptimizer)
@torch.no_grad()
def cached_noise_schedule_sampling(
    self, ddim_sampler: DDIMSampler, shape: tuple[int, ...], num_steps: int, *, x_T: Tensor | None = None
) -> Tensor:
    """DDIM sampling with coefficients prepared once and kept for later calls."""
    x = first_noise(ddim_sampler.model, shape, x_T)
    for t, numbers in tqdm(coefficients(self.cache, ddim_sampler, num_steps), desc="cached"):
        x = jump(ddim_sampler.model, x, t, numbers)
    return x
# %%
def halves(size):
    """8, 4, 2, 1"""
    while size:
        yield size
        size //= 2


list(halves(11))
# %%
@add_to_class(SamplingOptimizer)
def batch_sampling_with_memory_management(
    self,
    total_samples: int,
    batch_size: int,
    *,
    num_steps: int = 50,
    sample_shape: tuple[int, ...] = (1, 28, 28),
) -> Tensor:
    """Draw samples in batches, smaller ones when memory runs out."""
    steps = self.ddim_sampler.create_timestep_schedule(num_steps)
    batches, problem, left = [torch.empty(0, *sample_shape)] * (total_samples == 0), None, total_samples
    with tqdm(total=total_samples, unit="digit") as bar:
        for size in halves(batch_size):
            try:
                while left:
                    batches.append(self.ddim_sampler.sample([min(size, left), *sample_shape], steps).cpu())
                    left -= len(batches[-1])
                    bar.update(len(batches[-1]))
                return torch.cat(batches)
            except torch.OutOfMemoryError as error:
                log.warning("%d do not fit: %s", size, error)
                problem = error
    raise problem
# %%
class Drowsy(torch.nn.Module):
    """A network that is asked in bfloat16 and answers in float32."""

    def __init__(self, network, kind):
        super().__init__()
        self.network, self.kind = network, kind

    def forward(self, x, t):
        with torch.autocast(self.kind, dtype=torch.bfloat16):
            eps = self.network(x, t)
        print(end=f"{eps.dtype} ", file=sys.stderr)
        return eps.float()


Drowsy(torch.nn.Identity(), "cpu")
# %%
@add_to_class(SamplingOptimizer)
@torch.no_grad()
def mixed_precision_sampling(self, shape: tuple[int, ...], num_steps: int, *, x_T: Tensor | None = None) -> Tensor:
    """DDIM sampling: the network in bfloat16 under autocast, everything else in float32."""
    start = first_noise(self.ddim_sampler.model, shape, x_T).float()
    sleepy = copy.copy(self.ddim_sampler)
    sleepy.model = Drowsy(self.ddim_sampler.model, start.device.type)
    return sleepy.sample(shape, sleepy.create_timestep_schedule(num_steps), x_T=start)
# %%
@add_to_class(SamplingOptimizer)
@torch.no_grad()
def choose_num_steps(self, seconds: float, shape: tuple[int, ...], *, clock=time.perf_counter) -> int:
    """The largest number of DDIM steps for which a batch of that shape takes at most `seconds`."""
    start, T = first_noise(self.ddim_sampler.model, shape), self.ddim_sampler.schedule.num_timesteps
    timing = measure(lambda: self.ddim_sampler.ddim_step(start, T - 1, -1), 6, 2, start.device, clock)
    say("one step takes", timing)
    if timing.median * T <= seconds:
        return T
    return max(1, int(seconds / timing.median + 1e-9))
# %%
def trouble_with_schedule(sampler):
    a = sampler.schedule.alphas_cumprod
    if not bool((a[1:] < a[:-1]).all()):
        yield "alphas_cumprod is not strictly decreasing"
    if not bool(((a > 0) & (a < 1)).all()):
        yield "alphas_cumprod leaves (0, 1)"


def trouble_with_samples(sampler):
    digits = sampler.sample((2, 1, 28, 28), [sampler.schedule.num_timesteps - 1])
    if list(digits.shape) != [2, 1, 28, 28]:
        yield f"samples have shape {list(digits.shape)}, asked for [2, 1, 28, 28]"
    if bool(torch.isnan(digits).any() | torch.isinf(digits).any()):
        yield "samples are not finite"
# %%
def health_check(sampler: DDIMSampler) -> list[str]:
    """What is wrong with a sampler."""
    lines = []
    for look in (trouble_with_schedule, trouble_with_samples):
        try:
            for line in look(sampler):
                log.error(line)
                lines.append(line)
        except Exception as error:
            traceback.print_exc()
            lines.append(f"{type(error).__name__} in {look.__name__}")
    say("health:", lines or "fine")
    return lines
# %%
health_check(DDIMSampler(FreeNoise(), schedule)) if "FreeNoise" in globals() else "no free network here"
# %%
def sample_with_fallbacks(attempts: dict) -> tuple[Tensor, str, list[str]]:
    """Samples from the first attempt that works."""
    failed = {}
    for name in tqdm(attempts):
        say("trying", name)
        try:
            samples = attempts[name]()
            if not torch.isfinite(samples).all():
                raise FloatingPointError("samples are not finite")
        except Exception as error:
            log.exception("%s failed", name)
            warnings.warn(f"{name} failed", stacklevel=2)
            failed[name] = f"{name}: {type(error).__name__}"
        else:
            return samples, name, list(failed.values())
    raise RuntimeError(f"none of {', '.join(failed)} worked")
# %%
sample_with_fallbacks({"zeros": lambda: torch.zeros(1)})
# %%
print(f"{CALLS} lines said", flush=True); sys.stderr.flush()
# %%
# the end
