"""Style: the schedulers of Hugging Face diffusers do the work; only what they cannot express is done by hand."""

from fractions import Fraction

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_snr
from difflab import plots


class MeanScheduler(DDPMScheduler):
    """A DDPMScheduler whose step adds no noise, so that it returns the mean."""

    def _get_variance(self, t, predicted_variance=None, variance_type=None):
        return torch.zeros(())


def make(kind, schedule, **settings):
    return kind(
        num_train_timesteps=schedule.num_timesteps,
        trained_betas=schedule.betas64.tolist(),
        clip_sample=False,
        prediction_type="epsilon",
        **settings,
    )


def batch_of(t, x):
    return torch.as_tensor(t, dtype=torch.long, device=x.device).reshape(-1).expand(len(x))


def per_image(function, t, *images):
    """function(t, *images) for an int; for a LongTensor image by image, because the schedulers take one t a call."""
    if not torch.is_tensor(t) or t.ndim == 0:
        return function(int(t), *images)
    rows = [function(ti, *(image[i : i + 1] for image in images)) for i, ti in enumerate(t.tolist())]
    return torch.cat(rows)


def jump(scheduler, eps, t, s, x_t, eta=0.0, noise=None):
    """(x_s, x_0) as a DDIMScheduler sees them."""
    # The scheduler goes from t to t - T // num_inference_steps. With a fraction that is any s, exactly.
    scheduler.num_inference_steps = Fraction(scheduler.config.num_train_timesteps, t - s)
    return scheduler.step(eps, t, x_t, eta=eta, variance_noise=noise, return_dict=False)


def start(model, shape, x_T):
    if x_T is not None:
        return x_T.detach().clone()
    weight = next(model.parameters())
    return torch.randn(tuple(shape), dtype=weight.dtype, device=weight.device)


class ForwardProcessImpl:
    """The forward process q(x_t | x_0) of a noise schedule."""

    def __init__(self, schedule):
        self.schedule = schedule
        self.scheduler = make(DDPMScheduler, schedule)

    def add_noise(self, x_start, t, noise=None):
        """x_t and the noise in it."""
        if noise is None:
            noise = torch.randn_like(x_start)
        return self.scheduler.add_noise(x_start, noise, batch_of(t, x_start)), noise

    def demonstrate_forward_trajectory(self, x_start, timesteps):
        """The first image at each timestep."""
        row = torch.cat([self.add_noise(x_start[:1], t)[0] for t in timesteps])
        return plots.show_images({"noisy": row}, list(map(str, timesteps)), title="forward process")


class TrainedModelAnalyzer:
    """Looks at a trained noise predictor."""

    def __init__(self, model, schedule):
        self.model = model
        self.schedule = schedule
        self.scheduler = make(MeanScheduler, schedule)

    @torch.no_grad()
    def analyze_noise_prediction_quality(self, x_clean, timesteps):
        """Error, correlation and signal-to-noise ratio at each timestep, from one call for all of them."""
        timesteps = torch.as_tensor(timesteps, dtype=torch.long, device=x_clean.device)
        clean = x_clean.repeat(len(timesteps), 1, 1, 1)
        t = timesteps.repeat_interleave(len(x_clean))
        noise = torch.randn_like(clean)
        guess = self.model(self.scheduler.add_noise(clean, noise, t), t.clone())
        noise, guess = (a.double().reshape(len(timesteps), -1) for a in (noise, guess))
        centred = [a - a.mean(1, keepdim=True) for a in (noise, guess)]
        columns = zip(
            timesteps.tolist(),
            (noise - guess).pow(2).mean(1).tolist(),
            torch.cosine_similarity(*centred, dim=1).tolist(),
            compute_snr(self.scheduler, timesteps).tolist(),
        )
        return {t: {"mse": mse, "correlation": r, "snr": snr} for t, mse, r, snr in columns}

    @torch.no_grad()
    def visualize_noise_predictions(self, x_clean, timesteps):
        """A row for each timestep: x_t, the noise, the guess, and the x_0 that the scheduler makes of it."""
        clean, rows = x_clean[:1], {}
        for place, t in enumerate(timesteps, start=1):
            noise = torch.randn_like(clean)
            noisy = self.scheduler.add_noise(clean, noise, batch_of(t, clean))
            guess = self.model(noisy, batch_of(t, clean).clone())
            implied = self.scheduler.step(guess, int(t), noisy).pred_original_sample
            rows[f"{place}: t = {t}"] = torch.cat([noisy, noise, guess, implied])
        return plots.show_images(rows, ["x_t", "noise", "predicted", "x_0"])


class DDPMSampler:
    """Stochastic sampling (Ho et al. 2020, algorithm 2)."""

    def __init__(self, model, schedule):
        self.model = model
        self.schedule = schedule
        self.scheduler = make(DDPMScheduler, schedule, variance_type="fixed_small")
        self.mean_scheduler = make(MeanScheduler, schedule)

    def compute_posterior_mean(self, x_t, t, predicted_noise):
        """Where the scheduler goes when it adds no noise."""

        def mean(ti, x, eps):
            return self.mean_scheduler.step(eps, ti, x, return_dict=False)[0]

        return per_image(mean, t, x_t, predicted_noise)

    def compute_posterior_variance(self, t):
        """The scheduler's "fixed_small" variance, and 0 at t = 0."""

        def variance(ti):
            # _get_variance clamps to 1e-20 for the sake of a logarithm; at t = 0 the contract wants 0
            return self.scheduler._get_variance(ti) if ti else torch.zeros(())

        if torch.is_tensor(t):
            return torch.stack([variance(ti) for ti in t.reshape(-1).tolist()]).reshape(t.shape).to(t.device)
        return variance(int(t)).clone()

    @torch.no_grad()
    def ddpm_step(self, x_t, t):
        """x_{t-1} from x_t."""
        eps = self.model(x_t, batch_of(t, x_t).clone())
        return self.scheduler.step(eps, int(t), x_t).prev_sample

    @torch.no_grad()
    def sample(self, shape, return_trajectory=False, *, x_T=None):
        """All T steps."""
        x = start(self.model, shape, x_T)
        trajectory = [x]
        for t in self.scheduler.timesteps.tolist():  # T - 1, ..., 0 as long as set_timesteps is never called
            x = self.ddpm_step(x, t)
            trajectory.append(x)
        return (x, trajectory) if return_trajectory else x


def seed_consistency(sampler, shape, seeds):
    """Two runs for each seed, one right after the other."""

    def draw(seed):
        torch.manual_seed(seed)
        return sampler.sample(shape).clone()

    pairs = [(draw(seed), draw(seed)) for seed in seeds]
    return {
        "repeatable": all(torch.equal(*pair) for pair in pairs),
        "mean": [first.double().mean().item() for first, _ in pairs],
        "std": [first.double().std(correction=0).item() for first, _ in pairs],
    }


class DDIMSampler:
    """Sampling with step skipping (Song et al. 2021)."""

    def __init__(self, model, schedule):
        self.model = model
        self.schedule = schedule
        self.scheduler = make(DDIMScheduler, schedule, set_alpha_to_one=True)

    def _step(self, eps, t, s, x_t, eta=0.0, noise=None):
        return jump(self.scheduler, eps, t, s, x_t, eta, noise)

    def predict_x0_from_eps(self, x_t, eps, t):
        """The scheduler's pred_original_sample."""
        return per_image(lambda ti, x, e: self._step(e, ti, -1, x)[1], t, x_t, eps)

    def create_timestep_schedule(self, num_steps, schedule_type="uniform"):
        """num_steps timesteps from T - 1 down to 0."""
        T = self.schedule.num_timesteps
        if schedule_type not in {"uniform", "quadratic"}:
            raise ValueError(f"unknown schedule_type {schedule_type!r}")
        if not 0 < num_steps <= T:
            raise ValueError(f"num_steps must be in 1 ... {T}, not {num_steps}")
        if num_steps == 1:
            return torch.LongTensor([T - 1])
        if schedule_type == "uniform":
            spaced = make(DDPMScheduler, self.schedule, timestep_spacing="linspace")
            spaced.set_timesteps(num_steps)
            return spaced.timesteps
        timesteps, below = [], T
        for left, root in zip(reversed(range(num_steps)), torch.linspace((T - 1) ** 0.5, 0, num_steps).tolist()):
            # Not above the one before, and with `left` numbers still to come below this one.
            below = max(min(round(root * root), below - 1), left)
            timesteps.append(below)
        return torch.LongTensor(timesteps)

    @torch.no_grad()
    def ddim_step(self, x_t, t, s, eta=0.0):
        """x_s from x_t."""
        if not (-1 <= s < t):
            raise ValueError(f"s = {s} is not an earlier timestep than t = {t}")
        eps = self.model(x_t, batch_of(t, x_t).clone())
        sigma = eta * self.scheduler._get_variance(t, s) ** 0.5
        alpha_s = self.scheduler.alphas_cumprod[s] if s >= 0 else self.scheduler.final_alpha_cumprod
        noise = torch.randn_like(x_t)
        if 1 - alpha_s - sigma**2 >= 0:
            return self._step(eps, t, s, x_t, eta, noise)[0]
        # the scheduler would take the root of a rounding error below 0 here, and return nan
        return alpha_s**0.5 * self._step(eps, t, s, x_t)[1] + sigma * noise

    @torch.no_grad()
    def sample(self, shape, timesteps=None, eta=0.0, return_trajectory=False, *, x_T=None):
        """Through the given timesteps, then to clean data."""
        path = self.scheduler.timesteps if timesteps is None else timesteps
        path = [int(t) for t in path] + [-1]
        x = start(self.model, shape, x_T)
        trajectory = [x]
        for t, s in zip(path[:-1], path[1:]):
            x = self.ddim_step(x, t, s, eta)
            trajectory.append(x)
        return (x, trajectory) if return_trajectory else x


class StochasticityController:
    """Measures what eta does."""

    def __init__(self, ddim_sampler):
        self.ddim_sampler = ddim_sampler
        self.schedule = ddim_sampler.schedule
        self.scheduler = make(DDIMScheduler, self.schedule, set_alpha_to_one=True)

    def compute_stochastic_variance(self, t, s, eta):
        """The scheduler's variance is that of eta = 1."""
        return eta**2 * self.scheduler._get_variance(t, s)

    def analyze_eta_effects(self, shape, eta_values, num_steps):
        """Two runs from one x_T for each eta."""
        x_T = start(self.ddim_sampler.model, shape, None)
        path = self.ddim_sampler.create_timestep_schedule(num_steps)
        effects = {}
        for eta in eta_values:
            run, rerun = [self.ddim_sampler.sample(shape, path, eta, x_T=x_T) for _ in "ab"]
            effects[eta] = {
                "samples": run,
                "repeat_distance": torch.dist(run.double(), rerun.double()).item() / run.numel() ** 0.5,
                "diversity": diversity(run),
            }
        return effects


def compare_samplers(
    ddpm_sampler, ddim_sampler, num_samples=16, step_counts=(200, 100, 50, 20, 10), sample_shape=(1, 28, 28)
):
    """Cost and diversity of DDPM and of DDIM with each number of steps."""
    x_T = start(ddpm_sampler.model, (num_samples, *sample_shape), None)
    T, table = ddpm_sampler.schedule.num_timesteps, []

    def enter(name, sampler, one_step, *arguments):
        peak = peak_memory(one_step, x_T.device)  # and a warm-up
        synchronize(x_T.device)
        with count_calls(sampler.model) as counter:
            begin = time.perf_counter()
            samples = sampler.sample(x_T.shape, *arguments, x_T=x_T)
            synchronize(x_T.device)
            seconds = time.perf_counter() - begin
        table.append(
            dict(
                name=name,
                network_calls=counter.calls,
                seconds=seconds,
                speedup=(table[0]["seconds"] if table else seconds) / seconds,
                peak_memory=peak,
                diversity=diversity(samples),
                samples=samples,
            )
        )

    enter(f"DDPM-{T}", ddpm_sampler, lambda: ddpm_sampler.ddpm_step(x_T, T - 1))
    for n in step_counts:
        path = ddim_sampler.create_timestep_schedule(n)
        enter(f"DDIM-{n}", ddim_sampler, lambda: ddim_sampler.ddim_step(x_T, T - 1, -1), path)
    return table


def x0_error_gain(schedule, timesteps):
    """An error of -1 in the noise, pushed through the scheduler's estimate of x_0."""
    scheduler = make(DDIMScheduler, schedule, set_alpha_to_one=True)
    zero, error = torch.zeros(1), torch.full((1,), -1.0)
    return torch.cat([jump(scheduler, error, int(t), -1, zero)[1] for t in timesteps])


class Bfloat16Network(torch.nn.Module):
    """Another network, called under autocast; its answers are float32."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, t):
        with torch.autocast(x.device.type, torch.bfloat16):
            eps = self.network(x, t)
        return eps.float()


class SamplingOptimizer:
    """DDIM sampling with a budget of time and memory."""

    def __init__(self, ddim_sampler):
        self.ddim_sampler = ddim_sampler
        self.cache = {}

    def _coefficients(self, schedule, path):
        """[A, B] of every jump: what becomes of an image of 1 without noise, and of a noise of 1 without an image."""
        key = (*path, *schedule.alphas_cumprod.tolist())
        if key not in self.cache:
            scheduler = make(DDIMScheduler, schedule, set_alpha_to_one=True)
            scheduler.alphas_cumprod = schedule.alphas_cumprod.double()
            image, noise = torch.eye(2, dtype=torch.float64)
            self.cache[key] = [jump(scheduler, noise, t, s, image)[0].tolist() for t, s in zip(path, path[1:])]
        return self.cache[key]

    @torch.no_grad()
    def cached_noise_schedule_sampling(self, ddim_sampler, shape, num_steps, *, x_T=None):
        """DDIM by coefficients that are kept."""
        path = [*ddim_sampler.create_timestep_schedule(num_steps).tolist(), -1]
        x = start(ddim_sampler.model, shape, x_T)
        for t, (a, b) in zip(path, self._coefficients(ddim_sampler.schedule, path)):
            x = a * x + b * ddim_sampler.model(x, batch_of(t, x).clone())
        return x

    def batch_sampling_with_memory_management(
        self, total_samples, batch_size, *, num_steps=50, sample_shape=(1, 28, 28)
    ):
        """Batches on the CPU, smaller ones once memory has run out."""
        path = self.ddim_sampler.create_timestep_schedule(num_steps)
        images = torch.empty(0, *sample_shape)
        while len(images) < total_samples:
            count = min(batch_size, total_samples - len(images))
            try:
                batch = self.ddim_sampler.sample((count, *sample_shape), path).cpu()
            except torch.OutOfMemoryError:
                if batch_size == 1:
                    raise
                batch_size //= 2
            else:
                images = torch.cat([images.to(batch.dtype), batch])
        return images

    @torch.no_grad()
    def mixed_precision_sampling(self, shape, num_steps, *, x_T=None):
        """The scheduler in float32, the network in bfloat16."""
        model = self.ddim_sampler.model
        sampler = DDIMSampler(Bfloat16Network(model), self.ddim_sampler.schedule)
        path = self.ddim_sampler.create_timestep_schedule(num_steps)
        return sampler.sample(shape, path, x_T=start(model, shape, x_T).float())

    @torch.no_grad()
    def choose_num_steps(self, seconds, shape, *, clock=time.perf_counter):
        """What eight steps take, after two that do not count."""
        x, T = start(self.ddim_sampler.model, shape, None), self.ddim_sampler.schedule.num_timesteps

        def cost(steps):
            synchronize(x.device)
            begin = clock()
            for _ in range(steps):
                self.ddim_sampler.ddim_step(x, T - 1, -1)
            synchronize(x.device)
            return (clock() - begin) / steps

        cost(2)
        each = cost(8)
        return T if each * T <= seconds else max(1, int(seconds / each))


def health_check(sampler):
    """Problems of the schedule, then of two images in three steps."""
    problems, shape = [], (2, 1, 28, 28)
    try:
        kept = sampler.schedule.alphas_cumprod
        if not all(later < earlier for earlier, later in zip(kept[:-1], kept[1:])):
            problems.append("alphas_cumprod does not fall strictly")
        if not all(0 < value < 1 for value in kept):
            problems.append("alphas_cumprod leaves (0, 1)")
    except Exception as error:
        problems.append(f"the schedule cannot be read: {error!r}")
    try:
        path = sampler.create_timestep_schedule(min(3, sampler.schedule.num_timesteps))
        images = sampler.sample(shape, path)
        if tuple(images.shape) != shape:
            problems.append(f"samples of shape {tuple(images.shape)} instead of {shape}")
        if not images.isfinite().all():
            problems.append("samples are not finite")
    except Exception as error:
        problems.append(f"sampling fails: {error!r}")
    return problems


def sample_with_fallbacks(attempts):
    """The first that works, its name, and what went wrong before."""
    failures = []
    for name, attempt in attempts.items():
        try:
            images = attempt()
            if images.isfinite().all():
                return images, name, failures
            failures.append(f"{name}: samples are not finite")
        except Exception as error:
            failures.append(f"{name}: {error!r}")
    raise RuntimeError("no attempt worked; " + "; ".join(failures))
