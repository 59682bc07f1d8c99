# One class does the timing, one cell each, with a context manager; everything checks its input by hand.
import contextlib
import itertools
import time

import torch


class Stopwatch:
    """Reads a clock when the device has finished."""

    def __init__(self, clock, synchronize):
        self.clock, self.synchronize, self.laps = clock, synchronize, []

    def read(self):
        self.synchronize()
        return self.clock()

    @contextlib.contextmanager
    def lap(self):
        start = self.read()
        yield
        self.laps.append(self.read() - start)


# %%
def run_order(step_counts: list[int], runs: int, seed: int = 0) -> list[list[int]]:
    """Every order is drawn from the list of all orders."""
    from itertools import permutations
    from random import Random

    chance = Random(seed)
    if len(step_counts) > 6:
        return [sorted(step_counts, key=lambda n: chance.random()) for _ in range(runs)]
    orders = list(permutations(step_counts))
    return [list(chance.choice(orders)) for _ in range(runs)]


def time_call(work, repeats=5, warmup=1, *, clock=time.perf_counter, synchronize=wait_for_device):
    """With the class above."""
    if repeats <= 0 or warmup <= -1:
        raise ValueError("repeats must be positive, warmup must not be negative")
    watch = Stopwatch(clock, synchronize)
    for call in range(warmup + repeats):
        with watch.lap():
            work()
    return watch.laps[-repeats:]


def _at(ordered, place):
    """Linear interpolation at a place between 0 and 1."""
    position = place * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def summarise(seconds):
    """By hand."""
    if not seconds:
        raise ValueError("summarise needs at least one value")
    ordered = sorted(seconds)
    result = {"n": len(ordered)}
    for name, place in (("q1", 0.25), ("median", 0.5), ("q3", 0.75)):
        result[name] = _at(ordered, place)
    result["iqr"] = result["q3"] - result["q1"]
    return result


# %%
def _visits(T, N):
    return [T - 1] if N == 1 else [int((T - 1) * (1 - k / (N - 1)) + 0.5) for k in range(N)]


@torch.inference_mode()
def ddim_sample(model, schedule, x_T, num_steps):
    """Pairs of timesteps."""
    if num_steps < 1:
        raise ValueError("at least one step")
    if num_steps > schedule.num_timesteps:
        raise ValueError("more steps than timesteps")
    x = x_T.clone()
    visits = _visits(schedule.num_timesteps, num_steps)
    for t, s in itertools.zip_longest(visits, visits[1:], fillvalue=-1):
        a_t, a_s = schedule.alpha_bar(t).to(x), schedule.alpha_bar(s).to(x)
        eps = model(x, torch.full((x.shape[0],), t, dtype=torch.long, device=x.device))
        x_0 = (x - torch.sqrt(1 - a_t) * eps) / torch.sqrt(a_t)
        x = torch.sqrt(a_s) * x_0 + torch.sqrt(1 - a_s) * eps
    return x


def generate(model, schedule, num_steps, num_images=10, seed=0):
    """The global generator, kept as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x_T = torch.randn(num_images, 1, 28, 28)
    device = next(model.parameters()).device
    images = ddim_sample(model, schedule, x_T.to(device), num_steps)
    return torch.minimum(torch.maximum(images, torch.tensor(-1.0)), torch.tensor(1.0)).cpu()


def run_protocol(generate_images, step_counts, runs, seed=0, warmup=1, *, clock=time.perf_counter, synchronize=wait_for_device):
    """One stopwatch for the whole series."""
    for _ in range(warmup):
        generate_images(min(step_counts))
    watch, plan = Stopwatch(clock, synchronize), run_order(list(step_counts), runs, seed)
    log = []
    for run in range(runs):
        for position in range(len(step_counts)):
            with watch.lap():
                generate_images(plan[run][position])
            log.append(dict(run=run + 1, num_steps=plan[run][position], position=position, seconds=watch.laps[-1]))
    return log


# %%
import math

from difflab.statistics import t_quantile


def _solve(matrix, vector):
    """Gauss and Jordan; the inverse comes along."""
    size = len(vector)
    rows = [list(row) + [v] + [float(i == j) for j in range(size)] for i, (row, v) in enumerate(zip(matrix, vector))]
    for i in range(size):
        pivot = max(range(i, size), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [v / rows[i][i] for v in rows[i]]
        for j in range(size):
            if j != i:
                rows[j] = [a - rows[j][i] * b for a, b in zip(rows[j], rows[i])]
    return [row[size] for row in rows], [row[size + 1 :] for row in rows]


def _least_squares(steps, seconds, degree):
    """[(coefficient, half-width)], residual deviation; in N − mean, scaled, which is then undone for the line only."""
    n, scale = len(steps), max(steps)
    X = [[(x / scale) ** k for k in range(degree + 1)] for x in steps]
    gram = [[math.fsum(row[i] * row[j] for row in X) for j in range(degree + 1)] for i in range(degree + 1)]
    right = [math.fsum(row[i] * y for row, y in zip(X, seconds)) for i in range(degree + 1)]
    c, inverse = _solve(gram, right)
    left = math.fsum((y - sum(a * b for a, b in zip(c, row))) ** 2 for row, y in zip(X, seconds))
    s = math.sqrt(left / (n - degree - 1))
    t = t_quantile(n - degree - 1)
    return [(c[k] / scale**k, t * s * math.sqrt(inverse[k][k]) / scale**k) for k in range(degree + 1)], s


def fit_affine(steps, seconds):
    """Normal equations by hand."""
    if len(steps) != len(seconds):
        raise ValueError("lists of different lengths")
    if len(steps) <= 2 or min(steps) == max(steps):
        raise ValueError("too few measurements")
    ((a, da), (b, db)), s = _least_squares(steps, seconds, 1)
    return {"n": len(steps), "intercept": a, "slope": b, "residual_std": s, "intercept_interval": (a - da, a + da), "slope_interval": (b - db, b + db)}


def log_log_slope(steps, seconds):
    """In logarithms to the base 2."""
    if any(v <= 0 for v in itertools.chain(steps, seconds)):
        raise ValueError("logarithms need positive numbers")
    return fit_slope([math.log2(n) for n in steps], [math.log2(s) for s in seconds])


def fit_slope(x, y):
    """The slope alone, also for two points."""
    n = len(x)
    return (n * math.fsum(a * b for a, b in zip(x, y)) - sum(x) * sum(y)) / (n * math.fsum(a * a for a in x) - sum(x) ** 2)


def decide(steps, seconds):
    """As written in the text."""
    if len(steps) < 4 or len(set(steps)) < 3:
        raise ValueError("too few measurements for a curvature")
    (_, _, (c, half)), _ = _least_squares(steps, seconds, 2)
    answer = {"curvature": c, "curvature_interval": [c - half, c + half]}
    if c < -half:
        return answer | {"law": "sub-linear"}
    if c > half:
        return answer | {"law": "super-linear"}
    low, high = fit_affine(steps, seconds)["intercept_interval"]
    return answer | {"law": "linear" if low <= 0 and 0 <= high else "affine"}


# %%
def split_step_cost(sample, sample_free, num_steps, repeats=5, *, clock=time.perf_counter, synchronize=wait_for_device):
    """All four kinds in turns, so that a slow minute slows all."""
    kinds = [(f, n) for f in (sample, sample_free) for n in (num_steps, 2 * num_steps)]
    seconds = [[] for _ in kinds]
    for turn in range(repeats + 1):
        for (run, n), times in zip(kinds, seconds):
            watch = Stopwatch(clock, synchronize)
            with watch.lap():
                run(n)
            if turn:
                times += watch.laps
    short, long, free_short, free_long = (summarise(times)["median"] for times in seconds)
    step, sampler = (long - short) / num_steps, (free_long - free_short) / num_steps
    return {"step": step, "network": step - sampler, "sampler": sampler, "fixed": short - num_steps * step}


def batch_cost(work, batch_sizes, repeats=3, *, clock=time.perf_counter, synchronize=wait_for_device):
    """From the largest batch to the smallest, and put back in order."""
    rows = {}
    for size in sorted(batch_sizes, reverse=True):
        median = summarise(time_call(lambda: work(size), repeats, clock=clock, synchronize=synchronize))["median"]
        rows[size] = {"seconds": median, "seconds_per_image": median / size, "batch_size": size}
    return [rows[size] for size in batch_sizes]


def quality_against_steps(model, schedule, step_counts, num_images=50, seed=0):
    """Longest first."""
    from difflab.metrics import quality

    pictures = {}
    for n in sorted(step_counts, reverse=True):
        pictures[n] = generate(model, schedule, n, num_images=num_images, seed=seed)
    reference = next(iter(pictures.values()))
    result = []
    for n in step_counts:
        q = quality(pictures[n])
        error = torch.nn.functional.mse_loss(pictures[n], reference).item() ** 0.5
        result.append({"num_steps": n, "frechet": q.frechet, "recognised": q.recognised, "distance": error, "n": q.n})
    return result


# %%
import html as markup
from string import Template

import mistune


def _shown(value):
    if isinstance(value, float):
        value = f"{value:.8f}" if 1e-3 < abs(value) < 1e4 else f"{value:.4e}"
    return markup.escape(" ".join(str(value).split())).replace("|", r"\|")


def markdown_table(rows, columns):
    """Aligned, for people who read the source."""
    lines = [[_shown(h) for h in columns.values()]] + [[_shown(row[k]) for k in columns] for row in rows]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(columns))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(text)


TEXT = Template("""# A lab report

## Abstract
$n measurements on **$device** say that time is *$law* in the number of steps.

## Introduction
$hypothesis

## Methodology
$method

## Results
$results

## Analysis
$analysis

## Conclusion and Future Work
$conclusion

## Appendix A: Run log
$log

## Appendix B: Environment
$environment
""")


def _listed(values):
    return markdown_table([{"": k, "value": v} for k, v in values.items()], {"": "name", "value": "value"})


def _wide(records):
    runs = sorted({r["run"] for r in records})
    table = {n: {"steps": n, **dict.fromkeys(runs, "")} for n in sorted({r["num_steps"] for r in records})}
    for r in records:
        table[r["num_steps"]][r["run"]] = r["seconds"]
    return markdown_table(table.values(), {"steps": "steps", **{k: f"run {k}, s" for k in runs}})


def build_report(study):
    """Fill the template."""
    fit, decision = study["fit"], study["decision"]
    between = "between {:.6g} and {:.6g}".format
    analysis = [
        f"The law is *{decision['law']}*.",
        f"- slope {fit['slope']:.6g} s, {between(*fit['slope_interval'])}",
        f"- intercept {fit['intercept']:.6g} s, {between(*fit['intercept_interval'])}",
        f"- curvature {decision['curvature']:.6g}, {between(*decision['curvature_interval'])}",
        f"- deviation {fit['residual_std']:.6g} s, log-log slope {study['log_log_slope']:.6g}",
    ]
    tables = [_listed(study["split"])]
    tables += [markdown_table(study[what], {k: k for k in study[what][0]}) for what in ("batches", "quality")]
    pictures = "".join(f"\n\n![{c}][{k}]\n\n[{k}]: {a}" for k, (c, a) in enumerate(study["figures"].items()))
    return TEXT.substitute(
        n=fit["n"], device=study["environment"]["device"], law=decision["law"], hypothesis=study["hypothesis"],
        method=_listed(study["method"]), conclusion=study["conclusion"], environment=_listed(study["environment"]),
        results=_wide(study["records"]) + f"\n\n*{study['reference']['device']}*\n\n" + _wide(study["reference"]["records"]) + pictures,
        analysis="\n".join(analysis) + "\n\n" + "\n\n".join(tables),
        log=markdown_table(study["records"], {"run": "run", "num_steps": "steps", "seconds": "seconds"}),
    )


def report_html(markdown, title):
    """The parser's own tree is searched for pictures."""
    from html.parser import HTMLParser

    class Pictures(HTMLParser):
        addresses = ()

        def handle_starttag(self, tag, attributes):
            if tag == "img":
                self.addresses = (*self.addresses, dict(attributes).get("src") or "")

    body = mistune.create_markdown(plugins=["table"])(markdown)  # escapes by default
    found = Pictures()
    found.feed(body)
    if not all(address.startswith("data:image/") for address in found.addresses):
        raise ValueError("the report shows a picture from elsewhere")
    return Template(
        "<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><title>$title</title></head><body>$body</body></html>"
    ).substitute(title=markup.escape(title), body=body)
