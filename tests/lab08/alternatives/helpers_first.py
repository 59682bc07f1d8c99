"""Style: helpers before everything; coefficients as float32 tensors from alpha_bar; the formula with expm1 as printed."""
# %%
from collections import deque


def coefficient(schedule, t, x):
    """(sqrt(alpha_bar), sqrt(1 - alpha_bar), lambda) as 0-dimensional tensors like x."""
    bar = schedule.alpha_bar(torch.tensor(float(t), dtype=torch.float64)).to(x)
    return bar.sqrt(), (1 - bar).sqrt(), (bar.sqrt() / (1 - bar).sqrt()).log()


def times_of(x, t):
    """A time for every image."""
    return torch.full((x.shape[0],), float(t), dtype=torch.float32, device=x.device)


def spaced(first, last, num):
    """num numbers from first to last."""
    return [first + (last - first) * k / max(num - 1, 1) for k in range(num)]


def halfway(schedule, t, s):
    """The middle in lambda."""
    return schedule.t_of_lambda((schedule.log_snr(float(t)) + schedule.log_snr(float(s))) / 2).item()


def pairs(values):
    """Neighbours."""
    return [(values[i], values[i + 1]) for i in range(len(values) - 1)]


def per_image(function):
    """The mean over images of a function of their rows."""
    return lambda *tensors: torch.stack([function(*(t.flatten() for t in rows)) for rows in zip(*tensors)]).mean().item()


distance = per_image(lambda a, b: torch.dist(a, b) / a.norm())
angle = per_image(lambda a, b: torch.dot(a, b) / (a.norm() * b.norm()))
KNOWN_METHODS = {"dpm1", "dpm2", "dpm++2m"}


def refuse(wrong, message):
    """A ValueError where something is wrong."""
    if wrong:
        raise ValueError(message)


# %%
def time_grid(schedule: NoiseSchedule, num_steps: int, spacing: str = "logsnr") -> list[float]:
    """Where to stop."""
    T = schedule.num_timesteps
    refuse(num_steps not in range(1, T + 1), f"num_steps = {num_steps}, T = {T}")
    refuse(spacing not in ("time", "quadratic", "logsnr"), f"spacing {spacing!r}")
    if spacing == "time":
        inner = [float(round(t)) for t in spaced(T - 1, 0, num_steps)]
    elif spacing == "quadratic":
        inner = [root * root for root in spaced((T - 1) ** 0.5, 0, num_steps)]
    else:
        lowest, highest = schedule.log_snr(T - 1).item(), schedule.log_snr(0).item()
        inner = [float(schedule.t_of_lambda(lam)) for lam in spaced(lowest, highest, num_steps)]
    ends = [float(T - 1)] if num_steps == 1 else [float(T - 1), *inner[1:-1], 0.0]
    return [*ends, -1.0]


@torch.no_grad()
def first(self, x, eps, t, s):
    """As printed, and x_0 at the end."""
    refuse(not -1 <= s < t, f"from {t} to {s}")
    a_t, b_t, now = coefficient(self.schedule, t, x)
    if s == -1:
        return (x - b_t * eps) / a_t
    a_s, b_s, then = coefficient(self.schedule, s, x)
    return a_s / a_t * x - b_s * torch.expm1(then - now) * eps


@torch.no_grad()
def second(self, x, eps, t, s):
    """Half a step, a call, a step."""
    if s == -1:
        return first(self, x, eps, t, s)
    m = halfway(self.schedule, t, s)
    return first(self, x, self.model(first(self, x, eps, t, m), times_of(x, m)), t, s)


@torch.no_grad()
def multi(self, x, x_0, t, s, x_0_before=None, t_before=None, eta=0.0):
    """2M with a dial."""
    if s == -1:
        return x_0
    (a_t, b_t, now), (a_s, b_s, then) = coefficient(self.schedule, t, x), coefficient(self.schedule, s, x)
    h, D = then - now, x_0
    if x_0_before is not None:
        r = (now - coefficient(self.schedule, t_before, x)[2]) / h
        D = ((2 * r + 1) * x_0 - x_0_before) / (2 * r)
    x_s = b_s / b_t * torch.exp(-eta * h) * x - a_s * torch.expm1(-(1 + eta) * h) * D
    return x_s + b_s * (1 - torch.exp(-2 * eta * h)).sqrt() * torch.randn_like(x) if eta else x_s


@torch.no_grad()
def walk(self, x_T, times, method="dpm++2m", eta=0.0, on_state=None):
    """All methods."""
    refuse(method not in KNOWN_METHODS, f"method {method!r}; known are {sorted(KNOWN_METHODS)}")
    refuse(eta != 0 and method != "dpm++2m", "only dpm++2m has an eta")
    x, last = x_T, []
    for t, s in pairs(list(times)):
        if on_state:
            x = on_state(x, t)
        eps = self.model(x, times_of(x, t))
        if method == "dpm++2m":
            x_0 = self.first_order_step(x, eps, t, -1)
            x, last = self.multistep_step(x, x_0, t, s, *last, eta=eta), [x_0, t]
        elif method == "dpm2":
            x = self.second_order_step(x, eps, t, s)
        else:
            x = self.first_order_step(x, eps, t, s)
    return x


for name, function in {
    "first_order_step": first, "second_order_step": second, "multistep_step": multi, "sample": walk,
}.items():  # fmt: skip
    setattr(DPMSolver, name, function)


# %%
def convergence_order(step_counts, errors):
    """Normal equations."""
    n = torch.tensor(step_counts).double().log()
    A = torch.stack([n, torch.ones_like(n)], dim=1)
    return -torch.linalg.solve(A.T @ A, A.T @ torch.tensor(errors).double().log())[0].item()


def adjacent_changes(features):
    """Neighbours, image by image."""
    return {
        "relative": [distance(f, g) for f, g in pairs(features)],
        "cosine": [angle(f, g) for f, g in pairs(features)],
    }


def principal_components(features, num=2):
    """torch.pca_lowrank would be random; the whole decomposition is not."""
    X = features.flatten(1)
    X = X - X.mean(0)
    _, S, Vh = torch.linalg.svd(X, full_matrices=False)
    return X @ Vh[:num].T, (S**2)[:num] / (S**2).sum()


@torch.no_grad()
def reuse_error(model, states, times):
    """Encode once."""
    features = model.encode(states[0], times_of(states[0], times[0]))
    whole = [model(x, times_of(x, t)) for x, t in zip(states, times)]
    reused = [model.decode(*features, times_of(x, t)) for x, t in zip(states, times)]
    return [distance(a, b) for a, b in zip(whole, reused)]


# %%
def key_schedule(num_calls, kind="uniform", num_keys=1):
    """Two kinds."""
    refuse(kind not in ("uniform", "paper"), f"kind {kind!r}")
    if kind == "paper":
        return sorted(set(map(lambda i: i * num_calls // 50, PAPER_KEY_STEPS)))
    refuse(num_keys not in range(1, num_calls + 1), f"{num_keys} keys of {num_calls} calls")
    return [divmod(k * num_calls, num_keys)[0] for k in range(num_keys)]


def hold_key_steps(key_steps, num_calls):
    """Refuse in turn."""
    keys = list(key_steps)
    refuse(not keys or keys[0] != 0, f"{keys} does not start with 0")
    refuse(any(b <= a for a, b in pairs(keys)), f"{keys} does not rise")
    refuse(keys[-1] > num_calls - 1, f"{keys} leaves the {num_calls} calls")
    return keys


def network_times(schedule, times, method):
    """With middles."""
    asked = []
    for t, s in pairs(list(times)):
        asked += [t] if method != "dpm2" or s == -1 else [t, halfway(schedule, t, s)]
    return asked


@add_to_class(EncoderPropagation)
@torch.no_grad()
def predict(self, x, t):
    """A queue of what was decoded ahead."""
    if self.call == 0:
        self.queue = deque()
    if self.call in self.key_steps:
        self.features = self.model.encode(x, t)
        upcoming = [k for k in self.key_steps if k > self.call] + [len(self.times)]
        self.queue = deque(self.times[self.call : upcoming[0]])
        if self.batched:
            self.queue = self.together(len(x))
    self.call += 1
    following = self.queue.popleft()
    return following if self.batched else self.model.decode(*self.features, times_of(x, following))


@add_to_class(EncoderPropagation)
def together(self, size):
    """The noise of all times in the queue, by one call."""
    h, skips = self.features
    count = len(self.queue)
    when = torch.tensor(list(self.queue)).repeat_interleave(size)
    noise = self.model.decode(h.tile(count, 1, 1, 1), [f.tile(count, 1, 1, 1) for f in skips], when)
    return deque(noise.chunk(count))


def inject_noise(x, t, x_T, num_timesteps, strength=0.003):
    """Late."""
    return torch.lerp(x, x + x_T, strength) if 2 * t < num_timesteps else x


@torch.no_grad()
def faster_sample(model, schedule, x_T, times, method, key_steps, batched=False, strength=0.0):
    """Refuse, then run."""
    refuse(method not in KNOWN_METHODS, f"method {method!r}")
    calls = network_times(schedule, times, method)
    seldom = EncoderPropagation(model, calls, hold_key_steps(key_steps, len(calls)), batched)
    solver = DPMSolver(seldom.predict, schedule)
    if strength == 0:
        return solver.sample(x_T, times, method)
    return solver.sample(
        x_T, times, method, on_state=lambda x, t: inject_noise(x, t, x_T, schedule.num_timesteps, strength)
    )


def theoretical_saving(num_calls, num_keys, encoder_share):
    """Held to their ranges."""
    refuse(not 1 <= num_keys <= num_calls, f"{num_keys} keys of {num_calls} calls")
    refuse(not 0 <= encoder_share <= 1, f"a share of {encoder_share}")
    return encoder_share * (1 - num_keys / num_calls)

# %%
import collections
import os

KNOWN = ("ddim", "dpm-solver", "dpm-solver++")


def repeat_rows(value: Tensor, times: int) -> Tensor:
    """Row by row: a a a b b b."""
    return value.repeat_interleave(times, dim=0)


def hold_keys(keys, num_steps: int) -> list[int]:
    """The key steps, if they are in order."""
    keys = list(range(num_steps) if keys is None else keys)
    problems = {
        "is empty": not keys,
        "does not start with 0": bool(keys) and keys[0] != 0,
        "does not rise strictly": any(b <= a for a, b in zip(keys, keys[1:])),
        f"leaves 0 … {num_steps - 1}": any(not 0 <= key < num_steps for key in keys),
    }
    for problem, there in problems.items():
        if there:
            raise ValueError(f"key_steps {problem}: {keys}")
    return keys


def time_of(unet, like: Tensor, t: Tensor) -> Tensor:
    """The embedding."""
    return unet.time_embedding(unet.time_proj(t).to(dtype=like.dtype))


def run_block(block, text, **given):
    """With text where the block reads it."""
    return block(**given, encoder_hidden_states=text) if getattr(block, "has_cross_attention", False) else block(**given)


# %%
def load_stable_diffusion(source: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"):
    """Weights of this machine or none."""
    from diffusers import DiffusionPipeline

    pipeline = None
    try:
        pipeline = DiffusionPipeline.from_pretrained(source, local_files_only=True, safety_checker=None)
    except (ValueError, EnvironmentError):
        pass
    if pipeline is None:
        return tiny_pipeline(seed=0), "Random weights stand in for " + source + "; download it to see pictures."
    return pipeline, "Weights of " + source + "."


def make_scheduler(name: str):
    """Options by name."""
    if name not in KNOWN:
        raise ValueError("expected one of " + ", ".join(KNOWN))
    options = {
        "ddim": {"clip_sample": False, "set_alpha_to_one": False},
        "dpm-solver": {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "lower_order_final": True},
        "dpm-solver++": {"algorithm_type": "dpmsolver++"},
    }[name]
    return (DDIMScheduler if name == "ddim" else DPMSolverMultistepScheduler)(**(SCHEDULE | options))


# %%
@add_to_class(SplitUNet)
def encode(self, x, t, text):
    """Looks."""
    embedding, h = time_of(self.unet, x, t), self.unet.conv_in(x)
    groups = [[h]]
    for block in self.unet.down_blocks:
        h, group = run_block(block, text, hidden_states=h, temb=embedding)
        groups.append(list(group))
    return self.unet.mid_block(h, embedding, encoder_hidden_states=text), sum(groups, [])


@add_to_class(SplitUNet)
def decode(self, h, skips, t, text):
    """Paints, with a deque."""
    embedding, left = time_of(self.unet, h, t), collections.deque(skips)
    for block in self.unet.up_blocks:
        taken = [left.pop() for _ in block.resnets][::-1]
        h = run_block(
            block, text, hidden_states=h, temb=embedding, res_hidden_states_tuple=tuple(taken),
            upsample_size=tuple(left[-1].shape[-2:]) if left else None,
        )
    return self.unet.conv_out(F_silu(self.unet.conv_norm_out(h)))


def F_silu(h):
    """SiLU, as in conv_act."""
    return h * torch.sigmoid(h)


# %%
@add_to_class(PropagatedSampler)
@torch.no_grad()
def sample(self, x_T, text, null_text=None, *, num_steps=50, key_steps=None, guidance_scale=7.5, injection=0.0, batched=False):
    """Runs of steps; in a batch the steps of one row lie together."""
    keys = hold_keys(key_steps, num_steps)
    scheduler, network = self.scheduler, self.network
    scheduler.set_timesteps(num_steps)
    texts = [text] if null_text is None else [null_text, text]
    condition, copies = torch.cat(texts), len(texts)
    half = scheduler.config.num_train_timesteps / 2
    steps = [int(t) for t in scheduler.timesteps]

    def inject(x, t):
        return torch.add(x, x_T, alpha=injection) if t < half else x

    def guide(eps):
        parts = eps.unflatten(0, (copies, len(x_T)))
        return parts[0] if copies == 1 else (1 - guidance_scale) * parts[0] + guidance_scale * parts[1]

    x = x_T
    for number, key in enumerate(keys):
        run = steps[key : keys[number + 1] if number + 1 < len(keys) else None]
        x = inject(x, run[0])
        rows = copies * len(x)
        h, skips = network.encode(x.repeat(copies, 1, 1, 1), torch.tensor(run[:1] * rows), condition)
        if batched:
            k = len(run)
            tall = network.decode(repeat_rows(h, k), [repeat_rows(s, k) for s in skips], torch.tensor(run * rows), repeat_rows(condition, k))
            noises = list(tall.unflatten(0, (rows, k)).unbind(1))
        else:
            noises = [network.decode(h, skips, torch.tensor([t] * rows), condition) for t in run]
        for i, (t, eps) in enumerate(zip(run, noises)):
            x = inject(x, t) if i else x
            x = scheduler.step(guide(eps), t, x).prev_sample
    return x


# %%
def read_coco(folder: str):
    """With os.path and a defaultdict."""
    file = os.path.join(folder, "annotations", "captions_val2017.json")
    if not os.path.exists(file):
        raise FileNotFoundError(file + " is not there")
    with open(file, encoding="utf-8") as opened:
        content = json.load(opened)
    texts = collections.defaultdict(list)
    for note in content["annotations"]:
        texts[note["image_id"]].append((note["id"], note["caption"]))
    result = []
    for image in sorted(content["images"], key=lambda entry: entry["id"]):
        result.append([os.path.join(folder, "val2017", image["file_name"]), [c for _, c in sorted(texts[image["id"]])]])
    return result


def folder_fid(real, generated, features, *, size=64, batch_size=32):
    """One image at a time."""
    metric = FrechetInceptionDistance(feature=features, normalize=False)
    for is_real, folder in enumerate((generated, real)):
        for batch in image_batches(folder, size, batch_size):
            for image in batch:
                metric.update(image[None], real=bool(is_real))
    return float(metric.compute())


def clip_score(images, prompts, clip, *, batch_size=16):
    """Batches zipped."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images, {len(prompts)} prompts")
    metric = CLIPScore(model_name_or_path=lambda: (clip, clip.processor))
    for image, prompt in zip(images.split(batch_size), [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]):
        metric.update(list(image), prompt)
    return metric.compute().item()
