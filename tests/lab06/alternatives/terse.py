# As short as it goes, NumPy throughout.
import html, random, re, time
import mistune, numpy as np, torch
from difflab.metrics import quality
from difflab.statistics import t_quantile


def run_order(step_counts, runs, seed=0):
    """Permutations."""
    g = np.random.default_rng(seed)
    return [g.permutation(step_counts).tolist() for _ in range(runs)]


def time_call(work, repeats=5, warmup=1, *, clock=time.perf_counter, synchronize=wait_for_device):
    """Calls between two looks at the clock."""
    if repeats < 1 or warmup < 0: raise ValueError("repeats >= 1, warmup >= 0")
    def once():
        synchronize(); t = clock(); work(); synchronize()
        return clock() - t
    return [once() for _ in range(warmup + repeats)][warmup:]


def summarise(seconds):
    """Quantiles."""
    if len(seconds) == 0: raise ValueError("empty")
    q = np.quantile(np.sort(seconds), [0.25, 0.5, 0.75])
    return dict(n=len(seconds), q1=q[0], median=q[1], q3=q[2], iqr=np.diff(q).sum())


@torch.no_grad()
def ddim_sample(model, schedule, x_T, num_steps):
    """x -> A x + B eps."""
    T = schedule.num_timesteps
    if num_steps not in range(1, T + 1): raise ValueError("1 <= num_steps <= T")
    ts = np.rint(np.linspace(T - 1, 0, num_steps)).astype(int).tolist() + [-1]
    x = x_T
    for t, s in zip(ts, ts[1:]):
        a, b = (float(schedule.alpha_bar(k)) for k in (t, s))
        A = (b / a) ** 0.5
        x = A * x + ((1 - b) ** 0.5 - A * (1 - a) ** 0.5) * model(x, torch.full((len(x),), t, device=x.device))
    return x


def generate(model, schedule, num_steps, num_images=10, seed=0):
    """Seed, sample, clip."""
    z = torch.randn((num_images, 1, 28, 28), generator=torch.manual_seed(seed))
    return ddim_sample(model, schedule, z.to(next(model.parameters()).device), num_steps).cpu().clip(-1, 1)


def run_protocol(generate_images, step_counts, runs, seed=0, warmup=1, *, clock=time.perf_counter, synchronize=wait_for_device):
    """One comprehension."""
    for k in range(warmup): generate_images(max(step_counts))
    return [
        dict(seconds=time_call(lambda: generate_images(n), 1, 0, clock=clock, synchronize=synchronize)[0], run=k + 1, num_steps=n)
        for k, order in enumerate(run_order(step_counts, runs, seed)) for n in order
    ]


def _fit(x, y, degree):
    """(coefficients from the constant up, their half-widths, s)"""
    X = np.vander(x, degree + 1, increasing=True)
    c, left, *_ = np.linalg.lstsq(X / X.max(0), y, rcond=None)
    c = c / X.max(0)
    s = np.sqrt(((y - X @ c) ** 2).sum() / (len(x) - degree - 1))
    R = np.linalg.qr(X, mode="r")
    return c, t_quantile(len(x) - degree - 1) * s * np.linalg.norm(np.linalg.inv(R), axis=1), s


def fit_affine(steps, seconds):
    """By QR."""
    if len(steps) < 3 or len(steps) != len(seconds) or len({*steps}) < 2: raise ValueError("too little")
    (a, b), (da, db), s = _fit(np.array(steps, float), np.array(seconds, float), 1)
    return dict(n=len(steps), intercept=a, slope=b, residual_std=s, intercept_interval=(a - da, a + da), slope_interval=(b - db, b + db))


def log_log_slope(steps, seconds):
    """Covariance over variance."""
    if not all(v > 0 for v in [*steps, *seconds]): raise ValueError("positive values only")
    C = np.cov(np.log10(steps), np.log10(seconds))
    return C[0, 1] / C[0, 0]


def decide(steps, seconds):
    """The procedure."""
    if len(steps) < 4 or len({*steps}) < 3: raise ValueError("too little")
    c, w, _ = _fit(np.array(steps, float), np.array(seconds, float), 2)
    low, high = c[2] - w[2], c[2] + w[2]
    lo, hi = fit_affine(steps, seconds)["intercept_interval"]
    law = "sub-linear" if high < 0 else "super-linear" if low > 0 else "affine" if lo * hi > 0 else "linear"
    return {"law": law, "curvature": c[2], "curvature_interval": np.array([low, high]).tolist()}


def split_step_cost(sample, sample_free, num_steps, repeats=5, *, clock=time.perf_counter, synchronize=wait_for_device):
    """Differences of medians."""
    m = lambda f, n: np.median(time_call(lambda: f(n), repeats, clock=clock, synchronize=synchronize))
    (a, b), (c, d) = ((m(f, num_steps), m(f, 2 * num_steps)) for f in (sample, sample_free))
    return dict(step=(b - a) / num_steps, sampler=(d - c) / num_steps, network=(b - a - d + c) / num_steps, fixed=2 * a - b)


def batch_cost(work, batch_sizes, repeats=3, *, clock=time.perf_counter, synchronize=wait_for_device):
    """Medians."""
    m = [float(np.median(time_call(lambda: work(b), repeats, clock=clock, synchronize=synchronize))) for b in batch_sizes]
    return [dict(batch_size=b, seconds=s, seconds_per_image=s / b) for b, s in zip(batch_sizes, m)]


def quality_against_steps(model, schedule, step_counts, num_images=50, seed=0):
    """One noise."""
    x = torch.stack([generate(model, schedule, n, num_images, seed) for n in step_counts])
    d = (x - x[int(np.argmax(step_counts))]).flatten(1).square().mean(1) ** 0.5
    q = [quality(batch) for batch in x]
    return [dict(num_steps=n, frechet=a.frechet, recognised=a.recognised, distance=b) for n, a, b in zip(step_counts, q, d.tolist())]


def markdown_table(rows, columns):
    """Pipes."""
    def c(v):
        v = f"{v:.5g}" if isinstance(v, float) else str(v)
        for a, b in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("\n", " ")): v = v.replace(a, b)
        return v
    table = [columns.values(), ["-"] * len(columns)] + [[r[k] for k in columns] for r in rows]
    return "\n".join("|" + "|".join(map(c, line)) + "|" for line in table) + "\n"


def build_report(study):
    """Sections, joined."""
    s, f, d = study, study["fit"], study["decision"]
    two = lambda v: markdown_table([dict(a=k, b=x) for k, x in v.items()], dict(a="what", b="value"))
    def pivot(records):
        runs = sorted({r["run"] for r in records})
        value = {(r["num_steps"], r["run"]): r["seconds"] for r in records}
        rows = [{"n": n, **{str(k): value.get((n, k), "") for k in runs}} for n in sorted({n for n, _ in value})]
        return markdown_table(rows, {"n": "N", **{str(k): f"run {k}" for k in runs}})
    all_of = lambda rows: markdown_table(rows, {k: k for k in rows[0]})
    flat = {k: v for k, v in f.items() if "interval" not in k} | {"log-log slope": s["log_log_slope"], "curvature": d["curvature"]}
    for k, v in (*f.items(), *d.items()):
        if "interval" in k: flat |= {f"{k}, low": v[0], f"{k}, high": v[1]}
    parts = {
        "Abstract": f"{d['law']}; {f['n']} measurements on {s['environment']['device']}.",
        "Introduction": s["hypothesis"], "Methodology": two(s["method"]),
        "Results": pivot(s["records"]) + f"\n{s['reference']['device']}:\n\n" + pivot(s["reference"]["records"])
        + "".join(f"\n![{c}]({u})\n" for c, u in s["figures"].items()),
        "Analysis": f"The law is {d['law']}.\n\n{two(flat)}\n{two(s['split'])}\n{all_of(s['batches'])}\n{all_of(s['quality'])}",
        "Conclusion and Future Work": s["conclusion"], "Appendix A: Run log": markdown_table(s["records"], dict(run="run", num_steps="N", seconds="s")),
        "Appendix B: Environment": two(s["environment"]),
    }
    return "\n".join(f"## {h}\n\n{t}\n" for h, t in parts.items())


def report_html(markdown, title):
    """By mistune."""
    body = mistune.html.__class__(renderer=mistune.HTMLRenderer(escape=True), plugins=[mistune.plugins.import_plugin("table")])(markdown)
    if any(not u.startswith("data:image/") for u in re.findall(r'<img src="([^"]*)"', body)): raise ValueError("picture from elsewhere")
    return f"<!DOCTYPE html><html><head><meta charset=utf-8><title>{html.escape(title)}</title></head><body>{body}</body></html>"
