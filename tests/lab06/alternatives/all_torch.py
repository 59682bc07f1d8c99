# Tensors everywhere, returned as tensors where a number is asked for; the steps as a table of coefficients.
import html
import random
import re
import time

import mistune
import torch

from difflab.metrics import load_classifier, quality
from difflab.statistics import t_quantile


def run_order(step_counts, runs, seed=0):
    """Sorted by random keys, all runs at once."""
    g = torch.Generator().manual_seed(seed)
    keys = torch.rand(runs, len(step_counts), generator=g, dtype=torch.float64)
    return torch.as_tensor(step_counts)[keys.argsort(dim=1)].tolist()


def time_call(work, repeats=5, warmup=1, *, clock=time.perf_counter, synchronize=wait_for_device):
    """Starts and stops, subtracted at the end."""
    if repeats < 1:
        raise ValueError("repeats")
    if warmup < 0:
        raise ValueError("warmup")
    starts, stops = torch.zeros(2, warmup + repeats, dtype=torch.float64)
    for k in range(warmup + repeats):
        synchronize()
        starts[k] = clock()
        work()
        synchronize()
        stops[k] = clock()
    return (stops - starts)[warmup:].tolist()


def summarise(seconds):
    """torch.quantile."""
    if len(seconds) < 1:
        raise ValueError("nothing to summarise")
    q = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    return {"n": torch.tensor(len(seconds)), "q1": q[0], "median": q[1], "q3": q[2], "iqr": q[2] - q[0]}


@torch.no_grad()
def ddim_sample(model, schedule, x_T, num_steps):
    """Coefficients prepared for all steps."""
    if not 0 < num_steps <= schedule.num_timesteps:
        raise ValueError("num_steps")
    timesteps = torch.linspace(schedule.num_timesteps - 1, 0, num_steps).round().long()
    bar = torch.cat([schedule.alphas_cumprod[timesteps].double(), torch.ones(1, dtype=torch.float64)])
    A = (bar[1:] / bar[:-1]).sqrt()
    B = (1 - bar[1:]).sqrt() - A * (1 - bar[:-1]).sqrt()
    x = x_T
    for t, a, b in zip(timesteps.to(x.device).unsqueeze(1).expand(-1, len(x)), A.tolist(), B.tolist()):
        x = torch.add(a * x, model(x, t), alpha=b)
    return x


def generate(model, schedule, num_steps, num_images=10, seed=0):
    """Noise in place."""
    x_T = torch.empty(num_images, 1, 28, 28).normal_(generator=torch.Generator().manual_seed(seed))
    return torch.clamp(ddim_sample(model, schedule, x_T, num_steps), -1, 1).to("cpu", torch.float32)


def run_protocol(generate_images, step_counts, runs, seed=0, warmup=1, *, clock=time.perf_counter, synchronize=wait_for_device):
    """A queue."""
    queue = [(1 + k, n) for k, order in enumerate(run_order(step_counts, runs, seed)) for n in order]
    for _, n in queue[:warmup]:
        generate_images(n)
    tools = {"clock": clock, "synchronize": synchronize}
    return [{"run": k, "num_steps": n, "seconds": time_call(lambda: generate_images(n), 1, 0, **tools)[0]} for k, n in queue]


class Polynomial:
    """Least squares with intervals."""

    def __init__(self, steps, seconds, degree):
        x, y = torch.tensor(steps, dtype=torch.float64), torch.tensor(seconds, dtype=torch.float64)
        if len(x) != len(y) or len(x) < degree + 2 or len(x.unique()) < degree + 1:
            raise ValueError("too few measurements")
        X = torch.stack([x**k for k in range(degree + 1)], 1)
        inverse = torch.linalg.inv(X.T @ X)
        self.c = inverse @ (X.T @ y)
        self.s = ((y - X @ self.c).square().sum() / (len(x) - degree - 1)).sqrt()
        self.half = t_quantile(len(x) - degree - 1) * self.s * inverse.diagonal().sqrt()

    def interval(self, k):
        """[low, high]"""
        return torch.stack([self.c[k] - self.half[k], self.c[k] + self.half[k]])


def fit_affine(steps, seconds):
    """A polynomial of degree 1."""
    p = Polynomial(steps, seconds, 1)
    return {
        "n": len(steps), "intercept": p.c[0], "slope": p.c[1], "residual_std": p.s,
        "intercept_interval": p.interval(0), "slope_interval": p.interval(1),
    }


def log_log_slope(steps, seconds):
    """The same on logarithms."""
    x, y = torch.tensor([steps, seconds], dtype=torch.float64)
    if bool((x <= 0).any() or (y <= 0).any()):
        raise ValueError("positive values are needed")
    x, y = x.log() - x.log().mean(), y.log()
    return (x @ y) / (x @ x)


def decide(steps, seconds):
    """Of degree 2, then of degree 1."""
    p = Polynomial(steps, seconds, 2)
    signs = p.interval(2).sign().sum().item()
    law = {-2: "sub-linear", 2: "super-linear"}.get(int(signs))
    if law is None:
        law = "affine" if abs(fit_affine(steps, seconds)["intercept_interval"].sign().sum()) == 2 else "linear"
    return {"law": law, "curvature": p.c[2], "curvature_interval": p.interval(2)}


def split_step_cost(sample, sample_free, num_steps, repeats=5, *, clock=time.perf_counter, synchronize=wait_for_device):
    """A matrix of medians."""
    tau = torch.tensor(
        [[summarise(time_call(lambda: run(k * num_steps), repeats, clock=clock, synchronize=synchronize))["median"] for k in (1, 2)] for run in (sample, sample_free)],
        dtype=torch.float64,
    )
    step, sampler = tau.diff(dim=1).flatten() / num_steps
    return {"step": step, "network": step - sampler, "sampler": sampler, "fixed": tau[0, 0] - num_steps * step}


def batch_cost(work, batch_sizes, repeats=3, *, clock=time.perf_counter, synchronize=wait_for_device):
    """Rows."""
    rows = []
    for b in batch_sizes:
        s = summarise(time_call(lambda: work(b), repeats, 1, clock=clock, synchronize=synchronize))["median"]
        rows.append({"batch_size": b, "seconds": s, "seconds_per_image": s / b})
    return rows


def quality_against_steps(model, schedule, step_counts, num_images=50, seed=0):
    """One classifier for all."""
    classifier = load_classifier()
    drawn = [generate(model, schedule, n, num_images, seed=seed) for n in step_counts]
    best = drawn[torch.tensor(step_counts).argmax()]
    return [
        {"num_steps": n, "frechet": q.frechet, "recognised": q.recognised, "distance": torch.dist(x, best) / x.numel() ** 0.5}
        for n, x, q in ((n, x, quality(x, classifier)) for n, x in zip(step_counts, drawn))
    ]


def markdown_table(rows, columns):
    """Entities for everything special."""
    def cell(v):
        if isinstance(v, float):
            return f"{v:#.6g}"
        return re.sub(r"[&<>|*_`\\\[\]]", lambda m: f"&#{ord(m[0])};", " ".join(str(v).split("\n")))

    lines = ["", "|" + "---|" * len(columns)]
    lines[0] = "| " + " | ".join(cell(h) for h in columns.values()) + " |"
    for row in rows:
        lines.append("| " + " | ".join(cell(row[k]) for k in columns) + " |")
    return "\n" + "\n".join(lines) + "\n"


class Report:
    """Grows section by section."""

    def __init__(self):
        self.lines = []

    def section(self, heading, *paragraphs):
        """A heading and what is below it."""
        self.lines += [f"## {heading} ##", "", *(line for p in paragraphs for line in (str(p), ""))]

    def __str__(self):
        return "\n".join(self.lines)


def _dict_table(values):
    return markdown_table([{0: k, 1: v} for k, v in values.items()], {0: "quantity", 1: "value"})


def _log_table(records):
    return markdown_table(records, {"run": "run", "num_steps": "number of steps", "seconds": "time (s)"})


def _time_table(records):
    counts, runs = sorted({r["num_steps"] for r in records}), sorted({r["run"] for r in records})
    known = {(r["num_steps"], r["run"]): r["seconds"] for r in records}
    rows = [{0: n} | {k: known.get((n, k), "") for k in runs} for n in counts]
    return markdown_table(rows, {0: "steps"} | {k: f"run {k}" for k in runs})


def build_report(study):
    """All sections."""
    report, fit, decision = Report(), study["fit"], study["decision"]
    report.section("Abstract", f"Device: {study['environment']['device']}", f"n = {fit['n']}, law: {decision['law']}")
    report.section("Introduction", study["hypothesis"])
    report.section("Methodology", _dict_table(study["method"]))
    figures = [f'![{caption}]({address} "{caption}")' for caption, address in study["figures"].items()]
    report.section("Results", _time_table(study["records"]), "Beside it " + study["reference"]["device"], _time_table(study["reference"]["records"]), *figures)
    numbers = {
        "slope": fit["slope"], "slope, from": fit["slope_interval"][0], "slope, to": fit["slope_interval"][1],
        "intercept": fit["intercept"], "intercept, from": fit["intercept_interval"][0], "intercept, to": fit["intercept_interval"][1],
        "residual deviation": fit["residual_std"], "exponent": study["log_log_slope"], "curvature": decision["curvature"],
        "curvature, from": decision["curvature_interval"][0], "curvature, to": decision["curvature_interval"][1], "law": decision["law"],
    }
    tables = [markdown_table(rows, {k: k.replace("_", " ") for k in rows[0]}) for rows in ([study["split"]], study["batches"], study["quality"])]
    report.section("Analysis", "Law: " + decision["law"], _dict_table(numbers), *tables)
    report.section("Conclusion and Future Work", study["conclusion"])
    report.section("Appendix A: Run log", _log_table(study["records"]))
    report.section("Appendix B: Environment", _dict_table(study["environment"]))
    return str(report)


class _Renderer(mistune.HTMLRenderer):
    def image(self, text, url, title=None):
        if not url.startswith("data:image/"):
            raise ValueError("only embedded pictures")
        return f'<figure><img src="{url}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def report_html(markdown, title):
    """A renderer that refuses pictures from elsewhere."""
    body = mistune.create_markdown(renderer=_Renderer(escape=True), plugins=["table", "strikethrough"])(markdown)
    head = f'<meta charset="UTF-8" /><title>{html.escape(title)}</title><style>td {{ padding: 1em }}</style>'
    return f"\n<!doctype html>\n<html><head>{head}</head><body><main>{body}</main></body></html>"
