# Nothing but Python's own library where it will do, and the kit's own stopwatch.
import math
import random
import statistics
import time
from html import escape

import torch
from markdown_it import MarkdownIt

from difflab import metrics, timing
from difflab.statistics import t_quantile


def run_order(step_counts, runs, seed=0):
    """A generator for each run, seeded by text."""
    orders = []
    for run in range(runs):
        order = list(step_counts)
        random.Random(f"{seed}/{run}").shuffle(order)
        orders.append(order)
    return orders


def time_call(work, repeats=5, warmup=1, *, clock=time.perf_counter, synchronize=wait_for_device):
    """The kit's measure, around work that ends when the device has finished."""

    def finished():
        work()
        synchronize()

    synchronize()
    return timing.measure(finished, repeats, warmup, clock=clock).seconds


def summarise(seconds):
    """statistics.quantiles."""
    if not seconds:
        raise ValueError("no values")
    if len(seconds) == 1:
        q1 = median = q3 = seconds[0]
    else:
        q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "iqr": q3 - q1, "n": len(seconds), "mean": statistics.mean(seconds)}


def ddim_sample(model, schedule, x_T, num_steps):
    """Steps written out, in float64 inside."""
    T = schedule.num_timesteps
    if num_steps < 1 or num_steps > T:
        raise ValueError("num_steps out of range")
    if num_steps == 1:
        timesteps = [T - 1]
    else:
        timesteps = [round((T - 1) * (num_steps - 1 - k) / (num_steps - 1)) for k in range(num_steps)]
    x = x_T.double()
    with torch.inference_mode():
        for k, t in enumerate(timesteps):
            now = schedule.alpha_bar(t).double()
            then = schedule.alpha_bar(timesteps[k + 1] if k + 1 < num_steps else -1).double()
            eps = model(x.to(x_T.dtype), torch.tensor([t] * len(x))).double()
            x = then.sqrt() * (x - (1 - now).sqrt() * eps) / now.sqrt() + (1 - then).sqrt() * eps
    return x.to(x_T.dtype)


def generate(model, schedule, num_steps, num_images=10, seed=0):
    """Images are drawn one after another, and sampled together."""
    generator = torch.Generator()
    generator.manual_seed(seed)
    x_T = torch.cat([torch.randn(1, 1, 28, 28, generator=generator) for _ in range(num_images)])
    return ddim_sample(model, schedule, x_T, num_steps).clamp(min=-1, max=1)


def run_protocol(generate_images, step_counts, runs, seed=0, warmup=1, *, clock=time.perf_counter, synchronize=wait_for_device):
    """Clock read here."""
    orders = iter([(run + 1, n) for run, order in enumerate(run_order(step_counts, runs, seed)) for n in order])
    log = []
    for k in range(warmup):
        generate_images(random.choice(step_counts))
    for run, n in orders:
        synchronize()
        before = clock()
        generate_images(n)
        synchronize()
        log.append({"run": run, "num_steps": n, "seconds": clock() - before})
    return log


def fit_affine(steps, seconds):
    """statistics.linear_regression."""
    n = len(steps)
    if n < 3 or n != len(seconds) or len(set(steps)) == 1:
        raise ValueError("not enough to fit")
    slope, intercept = statistics.linear_regression(steps, seconds)
    s = math.sqrt(sum((y - intercept - slope * x) ** 2 for x, y in zip(steps, seconds)) / (n - 2))
    mean = statistics.fmean(steps)
    S = sum((x - mean) ** 2 for x in steps)
    t = t_quantile(n - 2)
    ea, eb = t * s * math.sqrt(1 / n + mean**2 / S), t * s / math.sqrt(S)
    return {
        "n": n, "slope": slope, "intercept": intercept, "residual_std": s,
        "intercept_interval": [intercept - ea, intercept + ea], "slope_interval": [slope - eb, slope + eb],
    }


def log_log_slope(steps, seconds):
    """math.log refuses what is not positive."""
    return statistics.linear_regression([math.log(n) for n in steps], [math.log(s) for s in seconds]).slope


def decide(steps, seconds):
    """The parabola by what the line leaves of N² (Frisch, Waugh and Lovell)."""
    if len(steps) < 4 or len(set(steps)) < 3:
        raise ValueError("not enough to decide")

    def left(values):
        slope, intercept = statistics.linear_regression(steps, values)
        return [v - intercept - slope * n for n, v in zip(steps, values)]

    bend, rest = left([n * n for n in steps]), left(seconds)
    size = sum(b * b for b in bend)
    c = sum(b * r for b, r in zip(bend, rest)) / size
    s2 = sum((r - c * b) ** 2 for b, r in zip(bend, rest)) / (len(steps) - 3)
    half = t_quantile(len(steps) - 3) * math.sqrt(s2 / size)
    if abs(c) > half:
        law = "super-linear" if c > 0 else "sub-linear"
    else:
        low, high = fit_affine(steps, seconds)["intercept_interval"]
        law = "affine" if low > 0 or high < 0 else "linear"
    return {"law": law, "curvature": c, "curvature_interval": [c - half, c + half], "half": half}


def split_step_cost(sample, sample_free, num_steps, repeats=5, *, clock=time.perf_counter, synchronize=wait_for_device):
    """A table of medians."""
    tau = {}
    for kind, run in (("free", sample_free), ("real", sample)):
        for n in (2 * num_steps, num_steps):
            times = time_call(lambda: run(n), repeats, 1, clock=clock, synchronize=synchronize)
            tau[kind, n] = statistics.median(times)
    step = (tau["real", 2 * num_steps] - tau["real", num_steps]) / num_steps
    sampler = (tau["free", 2 * num_steps] - tau["free", num_steps]) / num_steps
    return {"fixed": tau["real", num_steps] - step * num_steps, "step": step, "sampler": sampler, "network": step - sampler}


def batch_cost(work, batch_sizes, repeats=3, *, clock=time.perf_counter, synchronize=wait_for_device):
    """A row for each size."""
    def row(size):
        seconds = statistics.median(time_call(lambda: work(size), repeats, clock=clock, synchronize=synchronize))
        return {"batch_size": size, "seconds": seconds, "seconds_per_image": seconds / size}

    return list(map(row, batch_sizes))


def quality_against_steps(model, schedule, step_counts, num_images=50, seed=0):
    """The longest run is drawn first, and once more in its place."""
    best = generate(model, schedule, max(step_counts), num_images, seed)
    rows = []
    for n in step_counts:
        images = generate(model, schedule, n, num_images, seed)
        figures = metrics.quality(images)._asdict()
        rows.append({"num_steps": n, "distance": math.sqrt(torch.mean((images - best) ** 2)), "frechet": figures["frechet"], "recognised": figures["recognised"]})
    return rows


# %%
def markdown_table(rows, columns):
    """Escapes with backslashes."""
    def cell(value):
        if isinstance(value, float):
            return format(value, ".6e")
        text = " ".join(str(value).splitlines())
        return "".join("\\" + c if c in "\\`*_{}[]<>()#+-.!|&~" else c for c in text)

    head = "| " + " | ".join(map(cell, columns.values())) + " |\n|" + ":---|" * len(columns)
    body = ["| " + " | ".join(cell(row[key]) for key in columns) + " |" for row in rows]
    return "\n".join([head, *body])


def _pairs(values):
    return markdown_table([{"k": k, "v": v} for k, v in values.items()], {"k": "name", "v": "value"})


def _seconds(records):
    runs = sorted(set(r["run"] for r in records))
    lines = ["| N | " + " | ".join(f"run {k}" for k in runs) + " | mean |", "|--:|" + "--:|" * (len(runs) + 1)]
    for n in sorted(set(r["num_steps"] for r in records)):
        known = {r["run"]: r["seconds"] for r in records if r["num_steps"] == n}
        cells = [f"{known[k]:.4f} s" if k in known else "" for k in runs]
        lines.append(f"| {n} | " + " | ".join(cells) + f" | {statistics.fmean(known.values()):.4f} |")
    return "\n".join(lines)


def build_report(study):
    """Written out like a letter."""
    fit, decision, split = study["fit"], study["decision"], study["split"]
    pictures = "\n\n".join(f"![{caption}]({address})\n\n*{caption}*" for caption, address in study["figures"].items())
    batches = "\n".join(f"| {r['batch_size']} | {r['seconds']:.5f} | {r['seconds_per_image']:.5f} |" for r in study["batches"])
    qualities = "\n".join(f"| {r['num_steps']} | {r['distance']:.4f} | {100 * r['recognised']:.2f} % | {r['frechet']:.3f} |" for r in study["quality"])
    log = "\n".join(f"| {r['run']} | {r['num_steps']} | {r['seconds']:.6f} |" for r in study["records"])
    a, b, c = fit["intercept_interval"], fit["slope_interval"], decision["curvature_interval"]
    return f"""# Report

Time against steps.

## Abstract

On {study["environment"]["device"]} we made {fit["n"]} measurements. The law is {decision["law"]}.

## Introduction

{study["hypothesis"]}

## Methodology

What was varied and what was held:

{_pairs(study["method"])}

## Results

### Ours

{_seconds(study["records"])}

### {study["reference"]["device"]}

{_seconds(study["reference"]["records"])}

{pictures}

## Analysis

Slope {fit["slope"]:.6f} s ({b[0]:.6f} to {b[1]:.6f}), intercept {fit["intercept"]:.5f} s ({a[0]:.5f} to {a[1]:.5f}),
deviation {fit["residual_std"]:.5f} s. Log-log slope {study["log_log_slope"]:.4f}. Curvature {decision["curvature"]:.3e}
({c[0]:.3e} to {c[1]:.3e}). It is therefore **{decision["law"]}**.

| step | network | sampler | fixed |
|---|---|---|---|
| {split["step"]:.6f} | {split["network"]:.6f} | {split["sampler"]:.3e} | {split["fixed"]:.6f} |

| images | s | s each |
|---|---|---|
{batches}

| N | distance | recognised | Fréchet |
|---|---|---|---|
{qualities}

## Conclusion and Future Work

{study["conclusion"]}

## Appendix A: Run log

| run | N | s |
|---|---|---|
{log}

## Appendix B: Environment

{_pairs(study["environment"])}
"""


def report_html(markdown, title):
    """By markdown-it, which also comes with the environment."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    for token in parser.parse(markdown):
        for child in token.children or []:
            if child.type == "image" and not child.attrs["src"].startswith("data:image/"):
                raise ValueError(f"a picture from elsewhere: {child.attrs['src']}")
    return "\n".join([
        "<!DOCTYPE html>", "<html><head>", '<META CHARSET="UTF-8"/>', f"<title>{escape(title)}</title>", "</head><body>",
        parser.render(markdown), "</body></html>",
    ])
