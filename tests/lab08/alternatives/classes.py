"""Style: whole classes written anew, with properties and subclasses; functions as thin shells around them."""
# %%
import math as m
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Level:
    """How noisy a time is."""

    t: float
    lam: float

    @classmethod
    def at(cls, schedule, t):
        """Of a schedule's time."""
        return cls(float(t), m.inf if t == -1 else schedule.log_snr(t).item())

    @property
    def a(self):
        """Signal."""
        return m.sqrt(1 / (1 + m.exp(-2 * self.lam))) if self.lam < m.inf else 1.0

    @property
    def b(self):
        """Noise."""
        return m.sqrt(1 / (1 + m.exp(2 * self.lam))) if self.lam < m.inf else 0.0


class Grid:
    """Times by name."""

    def __init__(self, schedule, num_steps):
        if num_steps < 1 or num_steps > schedule.num_timesteps:
            raise ValueError(f"{num_steps} steps of {schedule.num_timesteps}")
        self.schedule, self.last, self.n = schedule, schedule.num_timesteps - 1, num_steps

    def fractions(self):
        """From 1 to 0."""
        return [1.0] if self.n == 1 else [1 - k / (self.n - 1) for k in range(self.n)]

    def time(self):
        """Whole timesteps."""
        return [float(round(self.last * f)) for f in self.fractions()]

    def quadratic(self):
        """Squares."""
        return [self.last * f * f for f in self.fractions()]

    def logsnr(self):
        """In lambda."""
        low, high = (self.schedule.log_snr(t).item() for t in (self.last, 0))
        return [self.schedule.t_of_lambda(max(low, high - (high - low) * f)).item() for f in self.fractions()]


def time_grid(schedule: NoiseSchedule, num_steps: int, spacing: str = "logsnr") -> list[float]:
    """Times at which a run stops."""
    grid = Grid(schedule, num_steps)
    if spacing.startswith("_") or spacing not in ("time", "quadratic", "logsnr"):
        raise ValueError(f"there is no spacing {spacing!r}")
    inner = getattr(grid, spacing)()
    inner[0] = float(grid.last)
    if len(inner) > 1:
        inner[-1] = 0.0
    return inner + [-1.0]


# %%
class DPMSolver:
    """All methods in one class."""

    def __init__(self, model, schedule):
        self.model, self.schedule = model, schedule

    def at(self, t):
        """Level of a time."""
        return Level.at(self.schedule, t)

    def ask(self, x, t):
        """The network's answer."""
        return self.model(x, torch.zeros(len(x), dtype=torch.float64).to(x.device) + float(t))

    @torch.no_grad()
    def first_order_step(self, x, eps, t, s):
        """With expm1, where it is finite."""
        if s < -1 or s >= t:
            raise ValueError(f"s = {s} must lie below t = {t} and not below -1")
        start, end = self.at(t), self.at(s)
        if end.lam == m.inf:
            return x.div(start.a).sub(eps, alpha=start.b / start.a)
        return x.mul(end.a / start.a).sub(eps, alpha=end.b * m.expm1(end.lam - start.lam))

    @torch.no_grad()
    def second_order_step(self, x, eps, t, s):
        """Two first-order steps and a call."""
        if s == -1:
            return self.first_order_step(x, eps, t, s)
        mean = (self.at(t).lam + self.at(s).lam) / 2
        between = self.schedule.t_of_lambda(mean).item()
        return self.first_order_step(x, self.ask(self.first_order_step(x, eps, t, between), between), t, s)

    @torch.no_grad()
    def multistep_step(self, x, x_0, t, s, x_0_before=None, t_before=None, eta=0.0):
        """2M."""
        start, end = self.at(t), self.at(s)
        if end.lam == m.inf:
            return x_0
        h = end.lam - start.lam
        weight = 0.0 if t_before is None else h / (start.lam - self.at(t_before).lam) / 2
        direction = x_0 if t_before is None else torch.lerp(x_0_before, x_0, 1 + weight)
        result = x * (end.b / start.b * m.exp(-eta * h)) + direction * (end.a * -m.expm1(-(1 + eta) * h))
        return result if eta == 0 else torch.normal(result, end.b * m.sqrt(-m.expm1(-2 * eta * h)))

    @torch.no_grad()
    def sample(self, x_T, times, method="dpm++2m", eta=0.0, on_state=None):
        """Follow the times."""
        walk = {"dpm1": self.walk_first, "dpm2": self.walk_second, "dpm++2m": self.walk_multi}.get(method)
        if walk is None:
            raise ValueError(f"method {method!r} is none of dpm1, dpm2, dpm++2m")
        if eta and method != "dpm++2m":
            raise ValueError("eta belongs to dpm++2m")
        return walk(x_T, [*map(float, times)], on_state or (lambda x, t: x), eta)

    def walk_first(self, x, times, on_state, _eta):
        """Order 1."""
        for k in range(len(times) - 1):
            x = on_state(x, times[k])
            x = self.first_order_step(x, self.ask(x, times[k]), times[k], times[k + 1])
        return x

    def walk_second(self, x, times, on_state, _eta):
        """Order 2."""
        for k in range(len(times) - 1):
            x = on_state(x, times[k])
            x = self.second_order_step(x, self.ask(x, times[k]), times[k], times[k + 1])
        return x

    def walk_multi(self, x, times, on_state, eta):
        """Order 2, multistep."""
        estimates = []
        for k in range(len(times) - 1):
            x = on_state(x, times[k])
            estimates.append(self.first_order_step(x, self.ask(x, times[k]), times[k], -1))
            memory = (estimates[k - 1], times[k - 1]) if k else ()
            x = self.multistep_step(x, estimates[k], times[k], times[k + 1], *memory, eta=eta)
        return x


# %%
def convergence_order(step_counts, errors):
    """Covariance over variance."""
    table = torch.tensor([[m.log(n), m.log(e)] for n, e in zip(step_counts, errors)], dtype=torch.float64)
    covariance = torch.cov(table.T)
    return float(-covariance[0, 1] / covariance[0, 0])


def adjacent_changes(features):
    """Pair by pair."""

    def norm(f):
        return torch.linalg.vector_norm(f.flatten(1), dim=1)

    return {
        "relative": [float((norm(b - a) / norm(a)).mean()) for a, b in zip(features[:-1], features[1:])],
        "cosine": [
            float(torch.einsum("bi,bi->b", a.flatten(1), b.flatten(1)).div(norm(a) * norm(b)).mean())
            for a, b in zip(features[:-1], features[1:])
        ],
    }


def principal_components(features, num=2):
    """Eigenvectors of the covariance."""
    X = features.reshape(len(features), -1).double()
    X = X - X.mean(dim=0, keepdim=True)
    values, vectors = torch.linalg.eigh(X.T @ X)
    order = values.argsort(descending=True)[:num]
    return X @ vectors[:, order], values[order] / values.sum()


def reuse_error(model, states, times):
    """With EncoderPropagation, the first call of which is the only key step."""
    reuse, errors = EncoderPropagation(model, times, [0]), []
    with torch.no_grad():
        for x, t in zip(states, times):
            at = torch.full((len(x),), float(t))
            pair = torch.stack([reuse.predict(x, at), model(x, at)]).flatten(2)
            errors.append(((pair[0] - pair[1]).norm(dim=1) / pair[1].norm(dim=1)).mean().item())
    return errors


# %%
def key_schedule(num_calls, kind="uniform", num_keys=1):
    """By name."""
    if kind == "paper":
        keys = []
        for i in PAPER_KEY_STEPS:
            key = (i * num_calls) // 50
            if key not in keys:
                keys.append(key)
        return keys
    if kind == "uniform" and 0 < num_keys <= num_calls:
        return [(k * num_calls) // num_keys for k in range(num_keys)]
    raise ValueError(f"no schedule {kind!r} of {num_keys} among {num_calls}")


def hold_key_steps(key_steps, num_calls):
    """One after the other."""
    before = -1
    for number, key in enumerate(key_steps):
        if number == 0 and key != 0:
            raise ValueError(f"the first key step is {key}; it must be 0")
        if key <= before:
            raise ValueError(f"{key} comes after {before}")
        if key >= num_calls:
            raise ValueError(f"{key} is not below {num_calls}")
        before = key
    if before < 0:
        raise ValueError("no key steps; the first must be 0")
    return [*key_steps]


def network_times(schedule, times, method):
    """Of a dry run."""
    asked = []

    def dry(x, t):
        asked.append(t[0].item())
        return torch.zeros_like(x)

    DPMSolver(dry, schedule).sample(torch.zeros(1, 1, 1, 1), times, method)
    return asked


@dataclass
class EncoderPropagation:
    """Serial and batched in one."""

    model: object
    times: list
    key_steps: list
    batched: bool = False
    call: int = 0
    kept: dict = field(default_factory=dict)

    def start(self):
        """Nothing is left."""
        self.call, self.kept = 0, {}

    def __call__(self, x, t):
        return self.predict(x, t)

    @torch.no_grad()
    def predict(self, x, t):
        """The noise of the next call."""
        now = self.call
        if now in self.key_steps:
            self.kept = {"features": self.model.encode(x, t)}
            if self.batched:
                self.ahead(now, len(x))
        self.call = now + 1
        return self.kept[now] if self.batched else self.model.decode(*self.kept["features"], t)

    def ahead(self, now, size):
        """All calls up to the next key step."""
        end = next((k for k in self.key_steps if k > now), len(self.times))
        h, skips = self.kept["features"]
        times = torch.tensor([self.times[call] for call in range(now, end) for _ in range(size)])

        def copies(f):
            return f.expand(end - now, *f.shape).flatten(0, 1)

        noise = self.model.decode(copies(h), [copies(s) for s in skips], times)
        self.kept |= {call: part for call, part in zip(range(now, end), noise.split(size))}


def inject_noise(x, t, x_T, num_timesteps, strength=0.003):
    """In the second half."""
    late = t < num_timesteps / 2
    return x + x_T * strength if late else x


def faster_sample(model, schedule, x_T, times, method, key_steps, batched=False, strength=0.0):
    """The solver on a network that seldom looks."""
    asked = network_times(schedule, times, method)
    network = EncoderPropagation(model, asked, hold_key_steps(key_steps, len(asked)), batched)
    T = schedule.num_timesteps
    return DPMSolver(network, schedule).sample(x_T, times, method, on_state=lambda x, t: inject_noise(x, t, x_T, T, strength))


def theoretical_saving(num_calls, num_keys, encoder_share):
    """(1 - K/N) f."""
    for name, value, low, high in (("num_keys", num_keys, 1, num_calls), ("encoder_share", encoder_share, 0, 1)):
        if not low <= value <= high:
            raise ValueError(f"{name} = {value} leaves {low} … {high}")
    return (num_calls - num_keys) / num_calls * encoder_share

# %%
def load_stable_diffusion(source: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"):
    """Ask the machine for a pipeline, and be content with a tiny one."""
    options = {"local_files_only": True, "safety_checker": None, "requires_safety_checker": False}
    try:
        found = StableDiffusionPipeline.from_pretrained(source, **options)
        line = f"pretrained weights of {source}"
    except (OSError, ValueError) as problem:
        found = tiny_pipeline()
        line = f"RANDOM weights, because {source} is not on this machine ({type(problem).__name__}): copy it here and name its folder"
    return found, line


# %%
class Schedulers:
    """The three schedulers, one method each."""

    @staticmethod
    def ddim():
        """Deterministic, ends at alpha_bar_0."""
        options = dict(SCHEDULE)
        options.update(clip_sample=False, set_alpha_to_one=False)
        return DDIMScheduler.from_config(options)

    @staticmethod
    def dpm(algorithm: str, end: str):
        """Second order, multistep."""
        return DPMSolverMultistepScheduler.from_config(
            {**SCHEDULE, "algorithm_type": algorithm, "final_sigmas_type": end, "solver_order": 2}
        )


def make_scheduler(name: str):
    """By name."""
    match name:
        case "ddim":
            return Schedulers.ddim()
        case "dpm-solver":
            return Schedulers.dpm("dpmsolver", "sigma_min")
        case "dpm-solver++":
            return Schedulers.dpm("dpmsolver++", "zero")
    raise ValueError(f"unknown scheduler {name}: known are ddim, dpm-solver and dpm-solver++")


# %%
class SplitUNet:
    """The whole class again, with the skips grouped by up block."""

    def __init__(self, unet):
        self.unet = unet

    @torch.no_grad()
    def propagate(self, x, t_key, timesteps, text):
        """As given."""
        h, skips = self.encode(x, t_key, text)
        return [self.decode(h, skips, t, text) for t in timesteps]

    def _time(self, like, t):
        return self.unet.time_embedding(self.unet.get_time_embed(sample=like, timestep=t))

    @staticmethod
    def _call(block, text, **given):
        if getattr(block, "has_cross_attention", False):
            given["encoder_hidden_states"] = text
        return block(**given)

    def encode(self, x, t, text):
        """conv_in, down, middle."""
        time_embedding = self._time(x, t)
        h = self.unet.conv_in(x)
        skips = (h,)
        for block in self.unet.down_blocks:
            h, new = self._call(block, text, hidden_states=h, temb=time_embedding)
            skips = skips + new
        return self.unet.mid_block(h, time_embedding, encoder_hidden_states=text), skips

    def decode(self, h, skips, t, text):
        """up, out."""
        time_embedding = self._time(h, t)
        groups, position = [], len(skips)
        for block in self.unet.up_blocks:
            groups.append(tuple(skips[position - len(block.resnets) : position]))
            position -= len(block.resnets)
        following = groups[1:] + [None]
        for block, group, after in zip(self.unet.up_blocks, groups, following):
            size = None if after is None else after[-1].shape[2:]
            h = self._call(block, text, hidden_states=h, temb=time_embedding, res_hidden_states_tuple=group, upsample_size=size)
        for layer in (self.unet.conv_norm_out, self.unet.conv_act, self.unet.conv_out):
            h = layer(h)
        return h


# %%
class PropagatedSampler:
    """The whole class again; text before null text, and a generator of noises for each run."""

    def __init__(self, network, scheduler):
        self.network, self.scheduler = network, scheduler

    def _noises(self, x, times, text, weights, batched):
        """The combined noise at each of the times, from one pass of the encoder."""
        copies = len(weights)
        rows = copies * len(x)
        h, skips = self.network.encode(torch.cat([x] * copies), torch.full((rows,), int(times[0]), device=x.device), text)

        def combine(eps):
            return sum(w * part for w, part in zip(weights, eps.chunk(copies)))

        if not batched:
            for t in times:
                yield combine(self.network.decode(h, skips, torch.full((rows,), int(t), device=x.device), text))
            return
        tall = lambda value: value.expand(len(times), *value.shape).flatten(0, 1)
        t = times[:, None].expand(-1, rows).flatten()
        for eps in self.network.decode(tall(h), [tall(skip) for skip in skips], t, tall(text)).split(rows):
            yield combine(eps)

    @torch.no_grad()
    def sample(
        self, x_T, text, null_text=None, *, num_steps=50, key_steps=None, guidance_scale=7.5, injection=0.0, batched=False
    ):
        """Latents from noise."""
        keys = list(range(num_steps)) if key_steps is None else [int(k) for k in key_steps]
        if not keys:
            raise ValueError("key_steps is empty; it must at least hold 0")
        if keys[0] != 0 or keys != sorted(set(keys)) or keys[-1] >= num_steps:
            raise ValueError(f"key_steps {keys}: expected a rising list from 0, below {num_steps}")
        weights, both = (1.0,), text
        if null_text is not None:
            weights, both = (guidance_scale, 1 - guidance_scale), torch.cat([text, null_text])
        self.scheduler.set_timesteps(num_steps)
        times, x = self.scheduler.timesteps, x_T
        noises = iter(())
        for i, t in enumerate(times):
            if 2 * t < self.scheduler.config.num_train_timesteps:
                x = x + injection * x_T
            if i in keys:
                later = [k for k in keys if k > i]
                noises = self._noises(x, times[i : later[0] if later else num_steps], both, weights, batched)
            x = self.scheduler.step(next(noises), t, x, return_dict=False)[0]
        return x


# %%
class Coco:
    """COCO 2017's validation captions."""

    def __init__(self, folder):
        self.folder = Path(folder)
        file = self.folder / "annotations/captions_val2017.json"
        try:
            content = json.loads(file.read_bytes())
        except FileNotFoundError:
            raise FileNotFoundError(f"{file} is missing: is this COCO?") from None
        self.names = {entry["id"]: entry["file_name"] for entry in content["images"]}
        self.captions = {}
        for entry in content["annotations"]:
            self.captions.setdefault(entry["image_id"], {})[entry["id"]] = entry["caption"]

    def pairs(self):
        """In order."""
        for i in sorted(self.names):
            texts = self.captions.get(i, {})
            yield str(self.folder.joinpath("val2017", self.names[i])), [texts[j] for j in sorted(texts)]


def read_coco(folder: str):
    """As a list."""
    return list(Coco(folder).pairs())


def folder_fid(real, generated, features, *, size=64, batch_size=32):
    """Without torchmetrics: both Gaussians in float64, the root by eigenvalues of the product."""

    def gaussian(folder):
        with torch.no_grad():
            seen = torch.cat([features(batch) for batch in image_batches(folder, size, batch_size)]).double()
        return seen.mean(0), seen.T.cov()

    (m1, s1), (m2, s2) = gaussian(real), gaussian(generated)
    root = torch.linalg.eigvals(s1 @ s2).sqrt().real.sum()
    return ((m1 - m2) ** 2).sum().add(s1.trace() + s2.trace() - 2 * root).item()


def clip_score(images, prompts, clip, *, batch_size=16):
    """Without torchmetrics' class."""
    if len(prompts) != len(images):
        raise ValueError("one prompt for each image")
    cosines = []
    for image, prompt in zip(images, prompts):
        seen = clip.processor(images=[image], text=[prompt], return_tensors="pt", padding=True)
        a = clip.get_image_features(seen["pixel_values"])
        b = clip.get_text_features(seen["input_ids"], seen["attention_mask"])
        cosines.append(torch.cosine_similarity(a, b).item())
    return max(0.0, 100 * sum(cosines) / len(cosines))
