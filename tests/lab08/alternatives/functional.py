"""Style: everything in float64, eps-free: steps written for x_0 and exponentials of lambda; NumPy where it helps."""
# %%
import itertools

import numpy as np


def lambdas(schedule, t):
    """lambda, infinite at -1."""
    return np.inf if t == -1 else float(schedule.log_snr(float(t)))


def signal(lam):
    """sqrt(alpha_bar) of lambda."""
    return 1.0 if lam == np.inf else float(np.sqrt(1 / (1 + np.exp(-2 * lam))))


def sigma(lam):
    """sqrt(1 - alpha_bar) of lambda."""
    return 0.0 if lam == np.inf else float(np.sqrt(1 / (1 + np.exp(2 * lam))))


def time_grid(schedule, num_steps, spacing="logsnr"):
    """Times with NumPy."""
    last = schedule.num_timesteps - 1
    if spacing not in ("time", "logsnr", "quadratic"):
        raise ValueError(f"unknown spacing {spacing}")
    if num_steps < 1:
        raise ValueError("at least one step is needed")
    if num_steps > last + 1:
        raise ValueError("more steps than timesteps")
    if spacing == "time":
        times = np.rint(np.linspace(last, 0, num_steps))
    elif spacing == "quadratic":
        times = np.linspace(last**0.5, 0, num_steps) ** 2
    else:
        lam = np.linspace(lambdas(schedule, last), lambdas(schedule, 0), num_steps)
        times = np.array([float(schedule.t_of_lambda(v)) for v in np.maximum(lam, lambdas(schedule, last))])
    times[0] = last
    if num_steps > 1:
        times[-1] = 0
    return times.tolist() + [-1.0]


# %%
@add_to_class(DPMSolver)
@torch.no_grad()
def first_order_step(self, x, eps, t, s):
    """DDIM's way."""
    if not (-1 <= s < t):
        raise ValueError(f"cannot go from {t} to {s}")
    now, then = lambdas(self.schedule, t), lambdas(self.schedule, s)
    clean = (x.double() - sigma(now) * eps.double()) / signal(now)
    return (signal(then) * clean + sigma(then) * eps.double()).to(x.dtype)


@add_to_class(DPMSolver)
@torch.no_grad()
def second_order_step(self, x, eps, t, s):
    """Middle in lambda."""
    if s == -1:
        return self.first_order_step(x, eps, t, s)
    m = self.schedule.t_of_lambda(0.5 * (lambdas(self.schedule, t) + lambdas(self.schedule, s))).item()
    noise = self.model(self.first_order_step(x, eps, t, m), torch.tensor([m] * x.shape[0], device=x.device))
    return self.first_order_step(x, noise, t, s)


@add_to_class(DPMSolver)
@torch.no_grad()
def multistep_step(self, x, x_0, t, s, x_0_before=None, t_before=None, eta=0.0):
    """The exact solution for a clean image that is linear in lambda, to second order."""
    if s == -1:
        return x_0.clone()
    now, then = lambdas(self.schedule, t), lambdas(self.schedule, s)
    target = x_0.double()
    if x_0_before is not None:
        slope = (target - x_0_before.double()) / (now - lambdas(self.schedule, t_before))
        target = target + slope * (then - now) / 2
    decay = np.exp(-(then - now))
    x_s = sigma(then) / sigma(now) * decay**eta * x.double() + signal(then) * (1 - decay ** (1 + eta)) * target
    if eta != 0:
        x_s += sigma(then) * (1 - decay ** (2 * eta)) ** 0.5 * torch.randn(x.shape, dtype=torch.float64, device=x.device)
    return x_s.to(x.dtype)


@add_to_class(DPMSolver)
@torch.no_grad()
def sample(self, x_T, times, method="dpm++2m", eta=0.0, on_state=None):
    """A table of steps."""

    def first(x, eps, t, s):
        return self.first_order_step(x, eps, t, s)

    def second(x, eps, t, s):
        return self.second_order_step(x, eps, t, s)

    memory = []

    def multi(x, eps, t, s):
        memory.append((self.first_order_step(x, eps, t, -1), t))
        before = memory[-2] if len(memory) > 1 else (None, None)
        return self.multistep_step(x, memory[-1][0], t, s, before[0], before[1], eta)

    steps = {"dpm1": first, "dpm2": second, "dpm++2m": multi}
    if method not in steps or (eta != 0 and method != "dpm++2m"):
        raise ValueError(f"no method {method} with eta {eta}")
    x = x_T.clone()
    for t, s in itertools.pairwise(times):
        x = x if on_state is None else on_state(x, t)
        x = steps[method](x, self.model(x, torch.tensor([float(t)] * len(x))), t, s)
    return x


# %%
def convergence_order(step_counts, errors):
    """Least squares by lstsq."""
    A = np.stack([np.log(step_counts), np.ones(len(errors))], 1)
    return float(-np.linalg.lstsq(A, np.log(errors), rcond=None)[0][0])


def adjacent_changes(features):
    """Image by image."""
    relative, cosine = [], []
    for f, g in itertools.pairwise(features):
        r, c = [], []
        for a, b in zip(f.double().numpy(), g.double().numpy()):
            a, b = a.ravel(), b.ravel()
            r.append(np.linalg.norm(b - a) / np.linalg.norm(a))
            c.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        relative.append(float(np.mean(r)))
        cosine.append(float(np.mean(c)))
    return {"relative": relative, "cosine": cosine}


def principal_components(features, num=2):
    """NumPy's singular values."""
    X = features.numpy().reshape(len(features), -1).astype(np.float64)
    X -= X.mean(axis=0)
    U, S, _ = np.linalg.svd(X, full_matrices=False)
    return torch.from_numpy(U[:, :num] * S[:num]), torch.from_numpy((S**2 / np.sum(S**2))[:num])


@torch.no_grad()
def reuse_error(model, states, times):
    """Every call of its own."""
    count = len(states[0])
    h, skips = model.encode(states[0], torch.tensor([times[0]] * count))
    result = []
    for x, t in zip(states, times):
        at = torch.tensor([t] * count)
        difference = (model.decode(h, skips, at) - model(x, at)).square().sum((1, 2, 3)).sqrt()
        result.append(float((difference / model(x, at).square().sum((1, 2, 3)).sqrt()).mean()))
    return result


# %%
def key_schedule(num_calls, kind="uniform", num_keys=1):
    """With NumPy."""
    if kind == "uniform":
        if num_keys not in range(1, num_calls + 1):
            raise ValueError("num_keys is out of range")
        return (np.arange(num_keys) * num_calls // num_keys).tolist()
    if kind == "paper":
        return np.unique(np.array(PAPER_KEY_STEPS) * num_calls // 50).tolist()
    raise ValueError(f"no schedule {kind}")


def hold_key_steps(key_steps, num_calls):
    """Checks with NumPy."""
    keys = np.asarray(key_steps, dtype=int)
    if not keys.size or keys[0] != 0:
        raise ValueError("the first key step must be 0")
    if (np.diff(keys) <= 0).any():
        raise ValueError("key steps must rise")
    if keys.max() >= num_calls:
        raise ValueError(f"there are only {num_calls} calls")
    return keys.tolist()


def network_times(schedule, times, method):
    """A generator, listed."""

    def asked():
        for t, s in itertools.pairwise(times):
            yield float(t)
            if method == "dpm2" and s >= 0:
                yield float(schedule.t_of_lambda((lambdas(schedule, t) + lambdas(schedule, s)) / 2))

    return list(asked())


@add_to_class(EncoderPropagation)
@torch.no_grad()
def predict(self, x, t):
    """Image-major batches."""
    call = self.call
    self.call += 1
    if call in self.key_steps:
        self.features = self.model.encode(x, t)
        if self.batched:
            later = [k for k in [*self.key_steps, len(self.times)] if k > call]
            times = torch.tensor(self.times[call : later[0]])
            h, skips = self.features
            k = len(times)
            noise = self.model.decode(
                h.repeat_interleave(k, 0), [s.repeat_interleave(k, 0) for s in skips], times.repeat(len(x))
            )
            self.decoded = {call + i: noise[i::k] for i in range(k)}
    return self.decoded.pop(call) if self.batched else self.model.decode(*self.features, t)


def inject_noise(x, t, x_T, num_timesteps, strength=0.003):
    """Only late."""
    if t >= 0.5 * num_timesteps:
        return x.clone()
    return torch.add(x, x_T, alpha=strength)


def faster_sample(model, schedule, x_T, times, method, key_steps, batched=False, strength=0.0):
    """Refuses first."""
    if method not in ("dpm1", "dpm2", "dpm++2m"):
        raise ValueError(f"no method {method}")
    calls = network_times(schedule, times, method)
    network = EncoderPropagation(model, calls, hold_key_steps(key_steps, len(calls)), batched)
    network.start()

    def on_state(x, t):
        return inject_noise(x, t, x_T, schedule.num_timesteps, strength)

    return DPMSolver(network, schedule).sample(x_T, times, method, on_state=on_state if strength else None)


def theoretical_saving(num_calls, num_keys, encoder_share):
    """(1 - K/N) f."""
    if encoder_share < 0 or encoder_share > 1 or num_keys < 1 or num_keys > num_calls:
        raise ValueError("out of range")
    return encoder_share - encoder_share * num_keys / num_calls

# %%
import functools
import itertools

from torch import nn


class _Stop(Exception):
    """Ends a forward pass once the encoder half is through."""


class _Answer(nn.Module):
    """Stands in for a module, and answers with what it was given at birth."""

    has_cross_attention = False

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, *args, **kwargs):
        return self.value


def first_half(unet, x, t, text):
    """The U-Net's own forward, listened to, and stopped behind the middle block."""
    heard = {}

    def listen(name, _module, _inputs, output):
        heard[name] = output
        if name == "middle":
            raise _Stop

    modules = {"in": unet.conv_in, **dict(enumerate(unet.down_blocks)), "middle": unet.mid_block}
    handles = [module.register_forward_hook(functools.partial(listen, name)) for name, module in modules.items()]
    try:
        unet(x, t, text)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    skips = [heard["in"], *itertools.chain.from_iterable(heard[i][1] for i in range(len(unet.down_blocks)))]
    return heard["middle"], skips


def second_half(unet, h, skips, t, text):
    """The U-Net's own forward, with an encoder that only repeats what it said before."""
    own = unet.conv_in, unet.down_blocks, unet.mid_block
    unet.conv_in, unet.mid_block = _Answer(skips[0]), _Answer(h)
    unet.down_blocks = nn.ModuleList([_Answer((h, tuple(skips[1:])))])
    try:
        return unet(skips[0], t, text, return_dict=False)[0]
    finally:
        unet.conv_in, unet.down_blocks, unet.mid_block = own


SplitUNet.encode = lambda self, x, t, text: first_half(self.unet, x, t, text)
SplitUNet.decode = lambda self, h, skips, t, text: second_half(self.unet, h, skips, t, text)


# %%
def load_stable_diffusion(source="stable-diffusion-v1-5/stable-diffusion-v1-5"):
    """A chain of attempts."""
    attempts = (
        (lambda: StableDiffusionPipeline.from_pretrained(source, local_files_only=True), "found {}"),
        (tiny_pipeline, "{} not found; random weights instead. Put the weights into a folder and pass its path."),
    )
    for attempt, line in attempts:
        try:
            return attempt(), line.format(source)
        except Exception:
            continue


SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False),
    "dpm-solver": lambda: DPMSolverMultistepScheduler(**SCHEDULE, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
    "dpm-solver++": lambda: DPMSolverMultistepScheduler(**SCHEDULE),
}


def make_scheduler(name):
    """From a table."""
    try:
        return SCHEDULERS[name]()
    except KeyError:
        raise ValueError(f"{name!r} is none of {sorted(SCHEDULERS)}") from None


# %%
def keys_or_error(keys, num_steps):
    """Pairs (start, end) of runs."""
    keys = tuple(range(num_steps)) if keys is None else tuple(keys)
    edges = (*keys, num_steps)
    if edges[0] != 0 or len(keys) == 0 or not all(a < b for a, b in itertools.pairwise(edges)):
        raise ValueError(f"key steps {keys} must rise from 0 to below {num_steps}")
    return list(itertools.pairwise(edges))


def guided(eps, scale):
    """eps [2, B, …] or [1, B, …], null first."""
    return eps[-1] if len(eps) == 1 else eps[0] + scale * (eps[1] - eps[0])


def stacked(values, k):
    """k copies, one below the other."""
    return torch.cat(list(itertools.repeat(values, k)))


def sample(self, x_T, text, null_text=None, *, num_steps=50, key_steps=None, guidance_scale=7.5, injection=0.0, batched=False):
    """A fold over the runs."""
    runs = keys_or_error(key_steps, num_steps)
    self.scheduler.set_timesteps(num_steps)
    T = self.scheduler.config["num_train_timesteps"]
    texts = torch.cat([c for c in (null_text, text) if c is not None])
    copies = len(texts) // len(text)

    def noisy(x, t):
        return x + (injection if t < T / 2 else 0.0) * x_T

    def advance(x, run):
        times = self.scheduler.timesteps[slice(*run)]
        seen = noisy(x, times[0])
        h, skips = self.network.encode(stacked(seen, copies), times[:1].repeat(len(texts)), texts)
        groups = [times] if batched else times.split(1)
        answers = (
            self.network.decode(
                stacked(h, len(g)), [stacked(s, len(g)) for s in skips], g.repeat_interleave(len(texts)), stacked(texts, len(g))
            ).reshape(len(g), copies, *x.shape)
            for g in groups
        )
        for number, (t, eps) in enumerate(zip(times, itertools.chain.from_iterable(answers))):
            x = noisy(x, t) if number else seen
            x = self.scheduler.step(guided(eps, guidance_scale), t, x).prev_sample
        return x

    with torch.no_grad():
        return functools.reduce(advance, runs, x_T)


PropagatedSampler.sample = sample


# %%
def read_coco(folder):
    """groupby over sorted annotations."""
    content = json.loads(Path(folder, "annotations", "captions_val2017.json").read_text())
    ordered = sorted(content["annotations"], key=lambda a: (a["image_id"], a["id"]))
    texts = {i: [a["caption"] for a in group] for i, group in itertools.groupby(ordered, key=lambda a: a["image_id"])}
    names = {image["id"]: image["file_name"] for image in content["images"]}
    return [(f"{Path(folder, 'val2017', names[i])}", texts.get(i, [])) for i in sorted(names)]


def folder_fid(real, generated, features, *, size=64, batch_size=32):
    """The images of both folders in one stream."""
    metric = FrechetInceptionDistance(feature=features, reset_real_features=False).set_dtype(torch.float64)
    real_ones = ((batch, True) for batch in image_batches(real, size, batch_size))
    others = ((batch, False) for batch in image_batches(generated, size, batch_size))
    for batch, flag in itertools.chain(real_ones, others):
        metric.update(batch, real=flag)
    return metric.compute().item()


def clip_score(images, prompts, clip, *, batch_size=16):
    """Texts in one go, images in batches, cosines by hand."""
    if len(prompts) != len(images):
        raise ValueError("as many prompts as images, please")
    unit = functools.partial(torch.nn.functional.normalize, dim=-1)
    tokens = clip.processor(text=prompts, return_tensors="pt", padding=True)
    words = unit(clip.get_text_features(tokens["input_ids"], tokens["attention_mask"]))
    seen = [clip.processor(images=list(part), return_tensors="pt")["pixel_values"] for part in images.split(batch_size)]
    pictures = unit(torch.cat([clip.get_image_features(part) for part in seen]))
    return max(100 * (pictures * words).sum(-1).mean().item(), 0.0)
