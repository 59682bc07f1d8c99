"""Style: as short as it goes; everything from alpha_bar in float32 tensors, steps by the textbook formulas."""
# %%
import math

import torch as th


def time_grid(schedule, num_steps, spacing="logsnr"):
    """Times."""
    T = schedule.num_timesteps
    if num_steps < 1 or num_steps > T or spacing not in ("time", "logsnr", "quadratic"): raise ValueError("bad arguments")
    if num_steps == 1: return [T - 1, -1]
    u = [k / (num_steps - 1) for k in range(num_steps)]
    hi, lo = float(schedule.log_snr(0)), float(schedule.log_snr(T - 1))
    f = {"time": lambda v: round((T - 1) * (1 - v)), "quadratic": lambda v: (T - 1) * (1 - v) ** 2,
         "logsnr": lambda v: float(schedule.t_of_lambda(max(lo, lo + v * (hi - lo))))}[spacing]
    return [*map(f, u[:-1]), 0, -1]


def lab(self, t):
    """alpha, sigma, lambda in float32."""
    a = self.schedule.alpha_bar(float(t))
    return float(a.sqrt()), float((1 - a).sqrt()), float(0.5 * (a / (1 - a)).log())


def first_order_step(self, x, eps, t, s):
    """Equation 3.7."""
    if s >= t or s < -1: raise ValueError("s")
    a, b, l = lab(self, t)
    if s == -1: return x / a - b / a * eps
    c, d, m = lab(self, s)
    return (c / a * x.double() - d * math.expm1(m - l) * eps.double()).to(x.dtype)


def second_order_step(self, x, eps, t, s):
    """Algorithm 1."""
    if s == -1: return first_order_step(self, x, eps, t, s)
    a, b, l = lab(self, t)
    c, d, m = lab(self, s)
    k = self.schedule.t_of_lambda((l + m) / 2)
    e, f, _ = lab(self, k)
    u = e / a * x - f * math.expm1((m - l) / 2) * eps
    with th.no_grad(): return c / a * x - d * math.expm1(m - l) * self.model(u, k.repeat(len(x)))


def multistep_step(self, x, x_0, t, s, x_0_before=None, t_before=None, eta=0.0):
    """Algorithm 2."""
    if s == -1: return x_0
    (_, b, l), (c, d, m) = lab(self, t), lab(self, s)
    h = m - l
    D = x_0 if x_0_before is None else x_0 + (x_0 - x_0_before) * h / (l - lab(self, t_before)[2]) / 2
    z = th.randn(x.shape).to(x) if eta else 0
    return d / b * math.exp(-eta * h) * x + c * (1 - math.exp(-(1 + eta) * h)) * D + d * (1 - math.exp(-2 * eta * h)) ** 0.5 * z


@th.no_grad()
def sample(self, x_T, times, method="dpm++2m", eta=0.0, on_state=None):
    """The loop."""
    if method not in ("dpm1", "dpm2", "dpm++2m") or (eta and method != "dpm++2m"): raise ValueError(method)
    x, old = x_T, (None, None)
    for t, s in zip(times[:-1], times[1:]):
        x = on_state(x, t) if on_state else x
        eps = self.model(x, th.full(x.shape[:1], float(t)))
        if method == "dpm++2m":
            x_0 = first_order_step(self, x, eps, t, -1)
            x, old = multistep_step(self, x, x_0, t, s, *old, eta), (x_0, t)
        else: x = (first_order_step if method == "dpm1" else second_order_step)(self, x, eps, t, s)
    return x


DPMSolver.first_order_step, DPMSolver.second_order_step = first_order_step, second_order_step
DPMSolver.multistep_step, DPMSolver.sample = multistep_step, sample


def convergence_order(step_counts, errors):
    """Slope."""
    import numpy as np

    return -float(np.polyfit(np.log(step_counts), np.log(errors), 1)[0])


def adjacent_changes(features):
    """Changes."""
    f = th.stack([x.flatten(1) for x in features]).double()
    n = f.norm(dim=-1)
    return {"relative": ((f[1:] - f[:-1]).norm(dim=-1) / n[:-1]).mean(1).tolist(),
            "cosine": ((f[1:] * f[:-1]).sum(-1) / n[1:] / n[:-1]).mean(1).tolist()}


def principal_components(features, num=2):
    """By the Gram matrix."""
    X = features.flatten(1).double()
    X = X - X.mean(0)
    w, V = th.linalg.eigh(X @ X.T)
    w, V = w.flip(0).clamp(min=0), V.flip(1)
    return V[:, :num] * w[:num].sqrt(), w[:num] / w.sum()


@th.no_grad()
def reuse_error(model, states, times):
    """Errors."""
    n = len(states[0])
    kept = model.encode(states[0], th.full((n,), times[0]))
    pairs = [(model.decode(*kept, th.full((n,), t)), model(x, th.full((n,), t))) for x, t in zip(states, times)]
    return [float(((a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).mean()) for a, b in pairs]


def key_schedule(num_calls, kind="uniform", num_keys=1):
    """Keys."""
    if kind == "paper": return sorted({i * num_calls // 50 for i in PAPER_KEY_STEPS})
    if kind != "uniform" or num_keys < 1 or num_keys > num_calls: raise ValueError(f"{kind} {num_keys}")
    return [math.floor(k * num_calls / num_keys + 1e-9) for k in range(num_keys)]


def hold_key_steps(key_steps, num_calls):
    """Held."""
    k = list(key_steps)
    if k and k[0] == 0 and sorted(set(k)) == k and k[-1] < num_calls: return k
    raise ValueError(f"key steps must rise from 0 and end below {num_calls}: {k}")


def network_times(schedule, times, method):
    """Times asked."""
    pairs = list(zip(times, times[1:]))
    if method != "dpm2": return [t for t, _ in pairs]
    middle = lambda t, s: [] if s == -1 else [float(schedule.t_of_lambda((schedule.log_snr(t) + schedule.log_snr(s)) / 2))]
    return sum(([t, *middle(t, s)] for t, s in pairs), [])


@th.no_grad()
def predict(self, x, t):
    """Always decodes a run of calls; serial is a run of one."""
    n = self.call
    self.call += 1
    if n in self.key_steps: self.features = self.model.encode(x, t)
    if not self.batched: return self.model.decode(*self.features, t)
    if n in self.key_steps:
        later = [k for k in self.key_steps if k > n]
        run = range(n, later[0] if later else len(self.times))
        h, skips = (th.cat([f] * len(run)) if th.is_tensor(f) else [th.cat([g] * len(run)) for g in f] for f in self.features)
        eps = self.model.decode(h, skips, th.cat([th.full((len(x),), self.times[i]) for i in run]))
        self.decoded = {i: eps[j * len(x) : (j + 1) * len(x)] for j, i in enumerate(run)}
    return self.decoded[n]


EncoderPropagation.predict = predict
inject_noise = lambda x, t, x_T, num_timesteps, strength=0.003: x + strength * (2 * t < num_timesteps) * x_T


def faster_sample(model, schedule, x_T, times, method, key_steps, batched=False, strength=0.0):
    """All together."""
    asked = network_times(schedule, times, method)
    keys = hold_key_steps(key_steps, len(asked))
    state = lambda x, t: inject_noise(x, t, x_T, schedule.num_timesteps, strength)
    return DPMSolver(EncoderPropagation(model, asked, keys, batched), schedule).sample(x_T, times, method, 0, state)


def theoretical_saving(num_calls, num_keys, encoder_share):
    """Saved."""
    if not (0 < num_keys <= num_calls and 0 <= encoder_share <= 1): raise ValueError("out of range")
    return encoder_share * (num_calls - num_keys) / num_calls

# %%
def load_stable_diffusion(source="stable-diffusion-v1-5/stable-diffusion-v1-5"):
    """From disk, or tiny."""
    try: return StableDiffusionPipeline.from_pretrained(source, local_files_only=True, safety_checker=None), f"{source}: loaded"
    except Exception: return tiny_pipeline(), f"{source}: not here, so random weights; give a folder that has them"


def make_scheduler(name):
    """One of three."""
    if name == "ddim": return DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **SCHEDULE)
    if name not in ("dpm-solver", "dpm-solver++"): raise ValueError("ddim, dpm-solver or dpm-solver++")
    kind = name.replace("-", "")
    return DPMSolverMultistepScheduler(algorithm_type=kind, final_sigmas_type="zero" if kind[-1] == "+" else "sigma_min", **SCHEDULE)


def emb(u, x, t): return u.time_embedding(u.time_proj(t).to(x.dtype))
def words(b, text): return dict(encoder_hidden_states=text) if hasattr(b, "attentions") else {}


def encode(self, x, t, text):
    """Down."""
    u, e, h = self.unet, emb(self.unet, x, t), self.unet.conv_in(x)
    s = [h]
    for b in u.down_blocks:
        h, more = b(h, e, **words(b, text))
        s.extend(more)
    return u.mid_block(h, e, encoder_hidden_states=text), s


def decode(self, h, skips, t, text):
    """Up."""
    u, e, end = self.unet, emb(self.unet, h, t), len(skips)
    for b in u.up_blocks:
        start = end - len(b.resnets)
        h = b(hidden_states=h, temb=e, res_hidden_states_tuple=tuple(skips[start:end]), upsample_size=skips[start - 1].shape[-2:] if start else None, **words(b, text))
        end = start
    return u.conv_out(u.conv_act(u.conv_norm_out(h)))


SplitUNet.encode, SplitUNet.decode = encode, decode


@torch.no_grad()
def sample(self, x_T, text, null_text=None, *, num_steps=50, key_steps=None, guidance_scale=7.5, injection=0.0, batched=False):
    """Every run of steps is decoded in groups: all of it, or one by one."""
    keys = [*range(num_steps)] if key_steps is None else [*key_steps]
    if not keys or keys[0] or sorted({*keys}) != keys or keys[-1] > num_steps - 1: raise ValueError(f"bad key steps {keys}")
    s, n, x = self.scheduler, len(x_T), x_T
    s.set_timesteps(num_steps)
    c = text if null_text is None else torch.cat([text, null_text])
    m = len(c) // n
    for i, t in enumerate(s.timesteps):
        x = x + injection * x_T * (t < s.config.num_train_timesteps / 2)
        if i in keys:
            h, skips = self.network.encode(x.repeat(m, 1, 1, 1), t.repeat(m * n), c)
            end = ([k for k in keys if k > i] + [num_steps])[0]
        if i in keys or not batched:
            ts = s.timesteps[i:end] if batched else t[None]
            k, first = len(ts), i
            r = lambda z: z.repeat(k, *[1] * (z.ndim - 1))
            e = self.network.decode(r(h), [r(z) for z in skips], ts.repeat_interleave(m * n), r(c)).unflatten(0, (k, m, n))
        e_t = e[i - first]
        x = s.step(e_t[0] if m == 1 else e_t[1].lerp(e_t[0], guidance_scale), t, x).prev_sample
    return x


PropagatedSampler.sample = sample


def read_coco(folder):
    """Joined by id."""
    d = json.load(open(f"{folder}/annotations/captions_val2017.json", encoding="utf-8"))
    notes = sorted((a["id"], a["image_id"], a["caption"]) for a in d["annotations"])
    return [(f"{folder}/val2017/{n}", [c for _, j, c in notes if j == i]) for i, n in sorted((m["id"], m["file_name"]) for m in d["images"])]


def folder_fid(real, generated, features, *, size=64, batch_size=32):
    """All at once."""
    m = FrechetInceptionDistance(feature=features)
    for f in (real, generated): m.update(torch.cat([*image_batches(f, size, batch_size)]), f is real)
    return float(m.compute())


def clip_score(images, prompts, clip, *, batch_size=16):
    """All at once; torchmetrics counts."""
    m = CLIPScore(lambda: (clip, clip.processor))
    m.update(images, prompts)
    return float(m.compute())
