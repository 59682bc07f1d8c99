"""What a sampling loop costs beside its network: bare calls, plain and cached DDIM of Lab 5, diffusers' DDIM scheduler.

    python benchmarks/cached_loop.py [--num-steps 50] [--batch-size 16] [--repeats 7]

All on one U-Net (mnist-small), in turns, in one run. A second table replaces the U-Net by a network that costs nothing:
there the sampler's own work a step can be read off in microseconds. On a GPU the network runs in bfloat16, and the
cached loop is also recorded once as a CUDA graph and replayed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDIMScheduler

from difflab.checkpoints import load_pretrained
from difflab.notebook import load_notebook
from difflab.timing import Timing, measure_in_turns

ROOT = Path(__file__).resolve().parents[1]


class FreeNetwork(torch.nn.Module):
    """Answers at once with the same numbers."""

    def __init__(self, eps: torch.Tensor):
        super().__init__()
        self.eps = eps

    def forward(self, _x: torch.Tensor, _t: torch.Tensor) -> torch.Tensor:
        """The numbers it was given."""
        return self.eps


def loops(lab: dict, model: torch.nn.Module, schedule, x_T: torch.Tensor, num_steps: int) -> dict[str, Callable]:
    """The contestants, each a function without arguments."""
    ddim = lab["DDIMSampler"](model, schedule)
    optimizer = lab["SamplingOptimizer"](ddim)
    timesteps = ddim.create_timestep_schedule(num_steps)
    batches = timesteps.to(x_T.device)[:, None].expand(-1, len(x_T))

    scheduler = DDIMScheduler(
        num_train_timesteps=schedule.num_timesteps,
        trained_betas=schedule.betas.numpy(),
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(num_steps, device=x_T.device)

    @torch.no_grad()
    def bare():
        for t in batches:
            model(x_T, t)

    @torch.no_grad()
    def diffusers():
        x = x_T
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t.expand(len(x))), t, x).prev_sample
        return x

    contestants = {
        "bare network calls": bare,
        "cached": lambda: optimizer.cached_noise_schedule_sampling(ddim, x_T.shape, num_steps, x_T=x_T),
        "plain": lambda: ddim.sample(x_T.shape, timesteps, x_T=x_T),
        "diffusers": diffusers,
    }
    if x_T.device.type == "cuda":
        contestants["cached, CUDA graph"] = _recorded(contestants["cached"])
    return contestants


def _recorded(work: Callable) -> Callable:
    """The work as one CUDA graph: recorded after three warm-up runs, replayed with one launch."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def report(title: str, timings: dict[str, Timing], num_steps: int) -> None:
    """Microseconds a step, and ratios within this run."""
    bare = timings["bare network calls"].median
    diffusers = timings["diffusers"].median
    print(f"\n{title}\n{'':22} {'a step':>12} {'work beside network':>21} {'of bare':>9} {'faster than diffusers':>23}")
    for name, timing in timings.items():
        step, work = (1e6 * seconds / num_steps for seconds in (timing.median, timing.median - bare))
        ratios = f"{timing.median / bare:>9.4f} {diffusers / timing.median:>21.2f} ×"
        print(f"{name:22} {step:>9.1f} µs {work:>18.1f} µs {ratios}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lab = load_notebook(ROOT / "solutions" / "lab05_sampling" / "lab05_sampling.ipynb")
    model, schedule = load_pretrained("mnist-small", device=device)
    x_T = torch.randn(arguments.batch_size, 1, 28, 28, device=device)
    print(f"{arguments.num_steps} steps, batch {arguments.batch_size}, {device}, {torch.get_num_threads()} CPU threads")
    for title, network, steps, low in (
        ("with the U-Net", model, arguments.num_steps, device == "cuda"),
        ("with a network that costs nothing", FreeNetwork(torch.randn_like(x_T)), 20 * arguments.num_steps, False),
    ):
        with torch.autocast(device, torch.bfloat16, enabled=low):
            contestants = loops(lab, network, schedule, x_T, min(steps, 1000))
            measured = measure_in_turns(list(contestants.values()), repeats=arguments.repeats, device=device)
        report(title, dict(zip(contestants, measured)), min(steps, 1000))


if __name__ == "__main__":
    main()
