"""The command `difflab`: train a noise predictor, sample with a notebook's sampler, measure what came out."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from difflab import datasets, metrics
from difflab.checkpoints import load_checkpoint, save_checkpoint
from difflab.compression_table import PARTS, CompressionTable, Measurement, compression_table
from difflab.paths import data_path, ensure_writable
from difflab.schedule import NoiseSchedule
from difflab.timing import count_calls, synchronize
from difflab.unet import UNet, low_precision


def main(argv: list[str] | None = None) -> int:
    """Run a `difflab` command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except (ValueError, OSError) as error:
        print(f"difflab: {error}", file=sys.stderr)
        return 2
    except NotImplementedError as error:  # from an exercise that is not written yet
        print(f"difflab: the notebook is not finished: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("difflab: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="difflab", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a noise predictor on MNIST; run again to resume")
    train.add_argument("--out", type=Path, default=Path("."), help="folder for checkpoints/ and samples/")
    train.add_argument("--timesteps", type=int, default=1000)
    train.add_argument("--schedule", choices=["linear", "scaled_linear", "cosine"], default=None,
                       help="default: linear for 1000 timesteps, scaled_linear for any other number")  # fmt: skip
    train.add_argument("--channels", type=int, nargs="+", default=[32, 64, 128])
    train.add_argument("--time-dim", type=int, default=64)
    train.add_argument("--epochs", type=int, default=20)
    train.add_argument("--batch-size", type=int, default=128)
    train.add_argument("--lr", type=float, default=1e-3)
    train.add_argument("--ema-decay", type=float, default=0.999)
    train.add_argument("--min-snr-gamma", type=float, default=None)
    train.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--device", default=_default_device())
    train.add_argument("--init", type=Path, default=None, metavar="CHECKPOINT",
                       help="start a new run from these weights instead of random ones")  # fmt: skip
    train.add_argument("--samples-from", type=Path, default=None, metavar="NOTEBOOK",
                       help="draw a grid after each epoch with this notebook's DDIM sampler")  # fmt: skip
    train.add_argument("--force", action="store_true", help="start anew where --out already holds a run")
    train.set_defaults(command=_train)

    export = commands.add_parser(
        "export", help="store a trained checkpoint in half precision, and measure what it costs"
    )
    export.add_argument("checkpoint", type=Path)
    export.add_argument("--out", type=Path, required=True)
    export.set_defaults(command=_export)

    classifier = commands.add_parser("train-classifier", help="train the metric classifier and its statistics")
    classifier.add_argument("--out", type=Path, default=Path("data"))
    classifier.add_argument("--epochs", type=int, default=3)
    classifier.add_argument("--seed", type=int, default=0)
    classifier.set_defaults(command=_train_classifier)

    sample = commands.add_parser("sample", help="draw samples with the sampler of a notebook")
    sample.add_argument("--from", dest="notebook", type=Path, required=True, metavar="NOTEBOOK")
    sample.add_argument("--checkpoint", default="mnist-small", help="a .safetensors file or a name in data/")
    sample.add_argument("--method", choices=["ddpm", "ddim"], default="ddim")
    sample.add_argument("--num-steps", type=int, default=None, help="network calls of ddim (default 50)")
    sample.add_argument("--eta", type=float, default=0.0)
    sample.add_argument("--num-samples", type=int, default=64)
    sample.add_argument("--batch-size", type=int, default=250)
    sample.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of the network calls")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--device", default=_default_device())
    sample.add_argument("--out", type=Path, default=Path("samples.png"), help=".png for a grid, .npz for a data set")
    sample.add_argument("--force", action="store_true", help="overwrite --out")
    sample.set_defaults(command=_sample)

    evaluate = commands.add_parser("evaluate", help="measure the images of an .npz file, or 'mnist-test'")
    evaluate.add_argument("images", help="an .npz written by `difflab sample`, or mnist-test for the floor")
    evaluate.add_argument("--num", type=int, default=None, help="how many of them, drawn at random")
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.set_defaults(command=_evaluate)

    table = commands.add_parser("quality-table", help="measure every sampler of a notebook; run again to resume")
    table.add_argument("--from", dest="notebook", type=Path, required=True, metavar="NOTEBOOK")
    table.add_argument("--checkpoint", default="mnist-small", help="a .safetensors file or a name in data/")
    table.add_argument("--num", type=int, default=2048, help="digits for each sampler and seed")
    table.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of x_T, one column of figures each")
    table.add_argument("--batch-size", type=int, default=128)
    table.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of the network calls")
    table.add_argument("--device", default=_default_device())
    table.add_argument("--compile", action="store_true", help="draw with torch.compile: faster, needs a C++ compiler")
    table.add_argument("--work", type=Path, default=Path("runs/quality"), help="keeps finished batches")
    table.add_argument("--out", type=Path, default=Path("quality.json"))
    table.set_defaults(command=_quality_table)

    compression = commands.add_parser("compression-table", help="measure Lab 7's tables; run again to resume")
    compression.add_argument("--from", dest="notebook", type=Path, required=True, metavar="NOTEBOOK")
    compression.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS)
    )
    compression.add_argument("--checkpoint", default="mnist-small", help="a .safetensors file or a name in data/")
    compression.add_argument("--num", type=int, default=1024, help="digits for each row")
    compression.add_argument("--seed", type=int, default=0, help="of x_T")
    compression.add_argument("--batch-size", type=int, default=64)
    compression.add_argument("--finetune-steps", type=int, default=1000, help="of pruned and of 4-bit networks")
    compression.add_argument("--work", type=Path, default=Path("runs/compression"), help="keeps finished batches")
    compression.add_argument("--out", type=Path, default=Path("compression.json"), help="other parts in it are kept")
    compression.set_defaults(command=_compression_table, device="cpu")
    solvers = commands.add_parser(
        "solver-table", help="measure the solvers of a notebook of Lab 8; run again to resume"
    )
    solvers.add_argument("--from", dest="notebook", type=Path, required=True, metavar="NOTEBOOK")
    solvers.add_argument("--checkpoint", default="mnist-small", help="a .safetensors file or a name in data/")
    solvers.add_argument("--seeds", type=int, nargs="+", default=[0], help="of x_T, one column of figures each")
    solvers.add_argument("--batch-size", type=int, default=128)
    solvers.add_argument("--device", default=_default_device())
    solvers.add_argument("--work", type=Path, default=Path("runs/solvers"), help="keeps finished batches")
    solvers.add_argument("--out", type=Path, default=Path("solvers.json"))
    solvers.set_defaults(command=_solver_table)
    return parser


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _train(arguments: argparse.Namespace) -> None:
    from difflab.plots import save_image_grid
    from difflab.training import TrainingConfig, train

    kind = arguments.schedule or ("linear" if arguments.timesteps == 1000 else "scaled_linear")
    schedule = getattr(NoiseSchedule, kind)(arguments.timesteps)
    config = TrainingConfig(
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        ema_decay=arguments.ema_decay,
        min_snr_gamma=arguments.min_snr_gamma,
        precision=arguments.precision,
        seed=arguments.seed,
    )
    torch.manual_seed(arguments.seed)
    model = UNet(arguments.channels, arguments.time_dim)
    if arguments.init is not None:
        given, trained_on, _ = load_checkpoint(arguments.init)
        if (given.config, trained_on.config) != (model.config, schedule.config):
            raise ValueError(f"--init {arguments.init} holds another network or schedule than this run's")
        model.load_state_dict(given.state_dict())
    model.to(arguments.device)
    num_steps = min(50, arguments.timesteps)
    if arguments.samples_from is not None:  # one step now: an exercise not written yet must not cost an epoch
        draw = _sampler(arguments.samples_from, "ddim", model.eval(), schedule, 1)
        draw(torch.randn(1, 1, 28, 28, device=arguments.device))
    _claim_run(arguments.out, arguments.force)
    images, _ = datasets.load_mnist("train")
    test_images, _ = datasets.load_mnist("test")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {schedule}, {len(images):,} images, {arguments.device}", flush=True)

    bar: tqdm | None = None

    def on_batch(batch: int, batches: int, loss: float) -> None:
        nonlocal bar
        if bar is None or batch == 1:
            bar = tqdm(total=batches, unit="batch", mininterval=1.0, leave=False)
        bar.update()
        bar.set_postfix(loss=f"{loss:.4f}")
        if batch == batches:
            bar.close()

    start = time.perf_counter()
    for epoch in train(model, schedule, images, config, arguments.out, test_images[:2000], on_batch):
        minutes = (time.perf_counter() - start) / 60
        print(
            f"epoch {epoch.epoch}/{config.epochs}: training loss {epoch.train_loss:.5f}, "
            f"test loss {epoch.test_loss:.5f}, {minutes:.1f} min",
            flush=True,
        )
        if arguments.samples_from is not None:
            draw = _sampler(arguments.samples_from, "ddim", epoch.model, schedule, num_steps)
            samples = draw(torch.randn(64, 1, 28, 28, generator=torch.Generator().manual_seed(0)).to(arguments.device))
            save_image_grid(arguments.out / "samples" / f"epoch_{epoch.epoch:03d}.png", samples)
    print(f"finished; the model is {arguments.out / 'checkpoints' / 'model_latest.safetensors'}")


def _claim_run(out: Path, force: bool) -> None:
    """See that a run can be kept in `out`; one that is there is gone on with, or with `force` forgotten."""
    state, model = (out / "checkpoints" / f"{name}.safetensors" for name in ("training_state", "model_latest"))
    if force:
        state.unlink(missing_ok=True)
    elif model.exists() and not state.exists():
        raise ValueError(f"{model} is already there; add --force to overwrite it, or give another --out")
    ensure_writable(state.parent)


def _export(arguments: argparse.Namespace) -> None:
    from difflab.training import TrainingConfig, held_out_loss

    model, schedule, notes = load_checkpoint(arguments.checkpoint)
    save_checkpoint(arguments.out, model, schedule, dtype=torch.float16, **notes)
    images = datasets.load_mnist("test")[0][:2000]
    for label, path in (("float32", arguments.checkpoint), ("float16", arguments.out)):
        loss = held_out_loss(load_checkpoint(path)[0], schedule, images, TrainingConfig().seed)
        print(f"{label}: test loss {loss:.6f}, {path.stat().st_size / 1e6:.2f} MB ({path})")


def _train_classifier(arguments: argparse.Namespace) -> None:
    import numpy as np

    from difflab.training import train_classifier

    images, labels = datasets.load_mnist("train", fallback=False)
    test_images, test_labels = datasets.load_mnist("test", fallback=False)
    for epoch, loss, classifier in train_classifier(images, labels, arguments.epochs, seed=arguments.seed):
        with torch.no_grad():
            predicted = torch.cat([classifier(batch) for batch in test_images.split(500)]).argmax(-1)
        accuracy = (predicted == test_labels).float().mean().item()
        print(f"epoch {epoch}/{arguments.epochs}: loss {loss:.4f}, test accuracy {100 * accuracy:.2f} %", flush=True)
    metrics.save_classifier(
        arguments.out / "classifier.safetensors", classifier, epochs=arguments.epochs, test_accuracy=accuracy
    )
    with torch.no_grad():
        features = torch.cat([classifier.features(batch) for batch in images.split(500)])
    mean, cov = metrics.gaussian_statistics(features)
    np.savez(arguments.out / "mnist-features.npz", mean=mean.numpy(), cov=cov.numpy(), num_images=len(images))


def _sampler(
    notebook: Path, method: str, model: UNet, schedule: NoiseSchedule, num_steps: int = 50, eta: float = 0.0
) -> Callable[[Tensor], Tensor]:
    """What a notebook of Lab 4 or Lab 5 makes of x_T, by "ddpm" or "ddim"."""
    from difflab.notebook import load_notebook

    if method == "ddim" and num_steps > schedule.num_timesteps:
        raise ValueError(f"--num-steps {num_steps} is more than the {schedule.num_timesteps} timesteps there are")
    namespace = load_notebook(notebook)
    name = {"ddpm": "DDPMSampler", "ddim": "DDIMSampler"}[method]
    if name in namespace:
        sampler = namespace[name](model, schedule)
        keywords = {}
        if method == "ddim":
            keywords = {"timesteps": sampler.create_timestep_schedule(num_steps), "eta": eta}
        return lambda x_T: sampler.sample(tuple(x_T.shape), x_T=x_T, **keywords)
    if "Diffusion" not in namespace:
        raise ValueError(f"{notebook} defines neither {name} nor Diffusion; give a notebook in which one is written")
    if eta:
        raise ValueError(f"the class Diffusion in {notebook} knows no --eta; give a notebook of Lab 5")
    diffusion = namespace["Diffusion"](model, schedule)
    if method == "ddpm":
        return lambda x_T: diffusion.ddpm_sample(tuple(x_T.shape), x_T=x_T)
    return lambda x_T: diffusion.ddim_sample(tuple(x_T.shape), num_steps, x_T=x_T)


def _sample(arguments: argparse.Namespace) -> None:
    from difflab.plots import save_image_grid

    if arguments.out.suffix not in (".png", ".npz"):
        raise ValueError(f"--out must end in .png or .npz, got {arguments.out}")
    if arguments.out.exists() and not arguments.force:
        raise ValueError(f"{arguments.out} is already there; add --force to overwrite it, or give another --out")
    num_steps = 50 if arguments.num_steps is None else arguments.num_steps
    if min(arguments.num_samples, arguments.batch_size, num_steps) < 1:
        raise ValueError("--num-samples, --batch-size and --num-steps must be at least 1")
    if arguments.method == "ddpm" and (arguments.num_steps is not None or arguments.eta):
        raise ValueError("--num-steps and --eta belong to --method ddim; ddpm always takes every timestep")
    ensure_writable(arguments.out.parent)
    model, schedule = _checkpoint(arguments)
    draw = _sampler(arguments.notebook, arguments.method, model, schedule, num_steps, arguments.eta)

    torch.manual_seed(arguments.seed)
    rng = torch.Generator().manual_seed(arguments.seed)
    sizes = [arguments.batch_size] * (arguments.num_samples // arguments.batch_size)
    sizes += [arguments.num_samples % arguments.batch_size] * (arguments.num_samples % arguments.batch_size > 0)
    batches = []
    # The network alone runs in lower precision; the sampler's own arithmetic stays in float32.
    with count_calls(model) as counter, low_precision(model, arguments.precision, arguments.device):
        start = time.perf_counter()
        for size in tqdm(sizes, unit="batch", disable=len(sizes) == 1):
            x_T = torch.randn(size, 1, 28, 28, generator=rng).to(arguments.device)
            batches.append(draw(x_T).cpu())
        synchronize(arguments.device)
        seconds = time.perf_counter() - start
    samples = torch.cat(batches)
    print(
        f"{len(samples)} samples in {seconds:.1f} s on {arguments.device}: "
        f"{counter.calls // len(sizes)} network calls for each of {len(sizes)} batches"
    )
    if arguments.out.suffix == ".png":
        save_image_grid(arguments.out, samples)
    else:
        _save_digits(arguments.out, samples)
    print(f"written to {arguments.out}")


def _checkpoint(arguments: argparse.Namespace):
    name = str(arguments.checkpoint)
    path = Path(name) if name.endswith(".safetensors") else data_path(f"{name}.safetensors")
    model, schedule, _ = load_checkpoint(path, arguments.device)
    return model, schedule


def _save_digits(path: Path, samples: torch.Tensor) -> None:
    import numpy as np

    classifier = metrics.load_classifier()
    with torch.no_grad():
        labels = torch.cat([classifier(batch) for batch in samples.split(500)]).argmax(-1)
    images = ((samples.clamp(-1, 1) + 1) * 127.5).round().byte()[:, 0]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.stem + ".tmp.npz")
    np.savez_compressed(temporary, images=images.numpy(), labels=labels.byte().numpy())
    os.replace(temporary, path)


def _evaluate(arguments: argparse.Namespace) -> None:
    import numpy as np

    if arguments.images == "mnist-test":
        images, _ = datasets.load_mnist("test", fallback=False)
    else:
        with np.load(arguments.images) as file:
            images = torch.from_numpy(file["images"]).float().div(127.5).sub(1)[:, None]
    if arguments.num is not None:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(arguments.seed))
        images = images[order[: arguments.num]]
    print(metrics.quality(images))


def _quality_table(arguments: argparse.Namespace) -> None:
    from difflab.notebook import load_notebook
    from difflab.quality_table import draw_rows, to_markdown

    namespace = load_notebook(arguments.notebook)
    samplers = {method: namespace.get(f"{method.upper()}Sampler") for method in ("ddpm", "ddim")}
    if None in samplers.values():
        raise ValueError(f"{arguments.notebook} does not define both DDPMSampler and DDIMSampler; give one of Lab 5")
    model, schedule = _checkpoint(arguments)
    if schedule.num_timesteps != 1000:
        raise ValueError(f"the table is about networks with 1000 timesteps; this one has {schedule.num_timesteps}")
    test_images, _ = datasets.load_mnist("test", fallback=False)
    if arguments.compile:
        model = torch.compile(model, options={"freezing": True})
    table = draw_rows(
        samplers, model, schedule, test_images, arguments.work, arguments.num, tuple(arguments.seeds),
        arguments.batch_size, arguments.precision, arguments.device,
        report=lambda line: print(line, flush=True),
    )  # fmt: skip
    arguments.out.write_text(table.to_json() + "\n", encoding="utf-8")
    print(to_markdown(table))


def _compression_table(arguments: argparse.Namespace) -> None:
    from difflab.notebook import load_notebook

    namespace = load_notebook(arguments.notebook)
    needed = ("MomentumSampler", "noise_prediction_mse", "quantize_model", "prune_model")
    if missing := [name for name in needed if name not in namespace]:
        raise ValueError(f"{arguments.notebook} does not define {', '.join(missing)}; give a notebook of Lab 7")
    model, schedule = _checkpoint(arguments)
    test_images, _ = datasets.load_mnist("test", fallback=False)
    if not 2 <= arguments.num <= len(test_images):
        raise ValueError(f"--num must lie between 2 and {len(test_images):,}, got {arguments.num}")
    measurement = Measurement(
        namespace, model, schedule, datasets.load_mnist("train")[0], test_images, arguments.work, arguments.num,
        arguments.seed, arguments.batch_size, arguments.finetune_steps, lambda line: print(line, flush=True),
    )  # fmt: skip
    table = compression_table(arguments.out) if arguments.out.exists() else CompressionTable()
    for name in arguments.parts:
        table.parts[name] = measurement.measure(name)
        arguments.out.write_text(table.to_json() + "\n", encoding="utf-8")
        print(f"\n### {name}\n\n{table[name].markdown()}\n", flush=True)


def _solver_table(arguments: argparse.Namespace) -> None:
    from difflab.notebook import load_notebook
    from difflab.solver_table import NEEDED, draw_solver_rows, to_markdown

    namespace = load_notebook(arguments.notebook)
    if missing := [name for name in NEEDED if name not in namespace]:
        raise ValueError(f"{arguments.notebook} does not define {', '.join(missing)}; give a notebook of Lab 8")
    model, schedule = _checkpoint(arguments)
    table = draw_solver_rows(
        namespace, model, schedule, arguments.work, tuple(arguments.seeds), arguments.batch_size, arguments.device,
        report=lambda line: print(line, flush=True),
    )  # fmt: skip
    arguments.out.write_text(table.to_json() + "\n", encoding="utf-8")
    print(to_markdown(table))


if __name__ == "__main__":
    sys.exit(main())
