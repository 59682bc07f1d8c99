"""Part 3: the loss, the average of the weights, a step and an epoch of training (Ho et al. 2020, algorithm 1)."""

import torch

from autograder.checks import expect, graded
from autograder.checks.lab04 import test_forward_process as forward
from autograder.checks.oracles import Coefficients, GaussianOracle, images, random_schedule
from difflab.training import noise_prediction_loss
from difflab.unet import UNet

LEARNED = 0.4  # of the loss before, what may be left after 40 steps; the solution keeps 0.16 at most
TINY = {"channels": [8, 8], "time_dim": 8, "attention": False}


@graded(points=9, section="Training")
def test_noise_prediction_loss(submission, rng):
    """`noise_prediction_loss` shows the network x_t and t, once, and returns the mean squared error of its answer."""
    schedule = random_schedule(rng)
    c = Coefficients(schedule)
    network = GaussianOracle(schedule)
    x_0, noise = images(rng, 6, 1, 8, 8), images(rng, 6, 1, 8, 8)
    t = torch.randint(schedule.num_timesteps, (6,), generator=rng)
    loss = expect.tensor(submission.noise_prediction_loss(network, schedule, x_0, t, noise), "the loss", ())
    if len(network.calls) != 1:
        expect.fail(f"noise_prediction_loss should call the network once; it called it {len(network.calls)} times.")
    x_t, t_seen, eps = network.calls[0]
    own = _own_noising(submission, schedule, x_0, t, noise)
    if own is not None and expect.is_close(x_t, own[0].double(), 1e-5, 1e-5):
        noise = own[1]  # the points for a wrong add_noise are lost there
    else:
        expect.close(
            x_t, c.noised(x_0, noise, t), "the x_t shown to the network", forward.noising_mistakes(c, x_0, noise, t)
        )
    if not torch.equal(t_seen.double(), t.double()):
        expect.fail(f"the network should be asked about the timesteps t that were used, {t.tolist()}; "
                    f"it was asked about {[int(value) for value in t_seen]}.")  # fmt: skip
    error = eps.double() - noise.double()
    mistakes = {
        "the sum in place of the mean": error.square().sum(),
        "the sum over pixels, averaged over images,": error.square().sum() / 6,
        "the mean absolute error": error.abs().mean(),
        "the root of the mean squared error": error.square().mean().sqrt(),
        "the error against x_0 in place of the noise": (eps.double() - x_0.double()).square().mean(),
        "the error against x_t in place of the noise": (eps.double() - x_t.double()).square().mean(),
        "half the mean squared error": 0.5 * error.square().mean(),
        "a smooth L1 loss": torch.nn.functional.smooth_l1_loss(eps.double(), noise.double()),
    }
    expect.close(loss, error.square().mean(), "the loss", mistakes, 1e-4, 1e-7)
    _hold_draws(submission, rng)


def _own_noising(submission, schedule, x_0, t, noise):
    """(x_t, noise) as the student's add_noise gives them; None if it does not work."""
    try:
        pair = expect.tensors(submission.ForwardProcess(schedule).add_noise(x_0, t, noise), "", 2)
        return [expect.tensor(value, "", tuple(x_0.shape)) for value in pair]
    except expect.NOT_WORKING:
        return None


def passes(check, submission, rng) -> bool:
    """Does another check pass?"""
    try:
        check(submission, rng)
    except expect.NOT_WORKING:
        return False
    return True


def _hold_draws(submission, rng):
    """What it draws itself: timesteps, uniform and one for each image, and noise."""
    schedule = random_schedule(rng, num_timesteps=60)
    c, network = Coefficients(schedule), GaussianOracle(schedule)
    x_0 = images(rng, 3000, 1, 3, 3)
    loss = expect.tensor(submission.noise_prediction_loss(network, schedule, x_0), "the loss", ())
    if len(network.calls) != 1:
        expect.fail(f"noise_prediction_loss should call the network once; it called it {len(network.calls)} times.")
    x_t, t, eps = network.calls[0]
    t = t.long()
    if bool((t == t[0]).all()):
        expect.fail("every image of the batch has the same timestep; draw one for each: torch.randint(T, (len(x_0),)).")
    # 50 of each are expected; 6 standard deviations and a margin for the skewed tail.
    counts = torch.bincount(t, minlength=60)
    missing = [name for name, index in (("0", 0), ("T − 1", 59)) if counts[index] == 0]
    if missing:
        expect.fail(f"timestep {' and '.join(missing)} is never drawn; t is uniform over 0, …, T − 1.")
    if counts.max() > 110 or counts.min() < 10:
        expect.fail("the timesteps are not drawn uniformly from 0, …, T − 1.")
    if not passes(forward.test_forward_jump, submission, rng):
        return
    a = c.alpha_bar(t)
    noise = (x_t.double() - a.sqrt() * x_0.double()) / (1 - a).sqrt()
    seen = t > 3  # where the noise can be told from rounding
    expect.noise(noise[seen], "the noise drawn when none is given")
    expect.close(loss, (eps.double() - noise).square()[:].mean(), "the loss with its own draws", None, 1e-2, 1e-3)


def _network(submission, rng):
    """(the same small network here, and in the submission's process)."""
    torch.manual_seed(int(torch.randint(2**31, (), generator=rng)))
    ours = UNet(**TINY)
    for parameter in ours.parameters():  # the last layer starts at zero, and lets no gradient through
        parameter.data += 0.02 * torch.randn_like(parameter)
    theirs = submission.UNet(TINY["channels"], TINY["time_dim"], 1, TINY["attention"])
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def _weights(holder) -> dict[str, torch.Tensor]:
    """What the `weights` of an EMA or a Trainer gives, of the network's names and shapes."""
    weights, wanted = holder.weights(), UNet(**TINY).state_dict()
    if not isinstance(weights, dict) or weights.keys() != wanted.keys():
        expect.fail("the averaged model should be a network like the one it averages (copy.deepcopy).")
    return {name: expect.tensor(value, name, tuple(wanted[name].shape)) for name, value in weights.items()}


@graded(points=7, section="Training")
def test_ema(submission, rng):
    """`EMA` starts from a copy of the weights and moves by (1 − decay) at every update; the model stays as it is."""
    ours, theirs = _network(submission, rng)
    decay = 0.7 + 0.25 * torch.rand((), generator=rng).item()
    ema = submission.EMA(theirs, decay)
    start = {name: value.clone() for name, value in ours.state_dict().items()}
    expect.same(_flat(_weights(ema)), _flat(start), "a new EMA's model should have the weights of the model.")
    history = []
    for _ in range(4):
        step = {name: value + images(rng, *value.shape) for name, value in start.items()}
        theirs.load_state_dict(step)
        ema.update(theirs)
        history.append(step)
        expect.same(_flat(theirs.state_dict()), _flat(step), "update should leave the model that is trained as it is.")
    got = _flat(_weights(ema))
    right, other = _flat(start).double(), _flat(start).double()
    for step in history:
        right = decay * right + (1 - decay) * _flat(step).double()
        other = (1 - decay) * other + decay * _flat(step).double()
    steps = torch.stack([_flat(step).double() for step in history])
    mistakes = {
        "an average that is the model itself, not a copy,": steps[-1],
        "decay and 1 − decay swapped": other,
        "an average that never moves": _flat(start),
        "a plain mean of all weights": torch.cat([_flat(start).double()[None], steps]).mean(0),
        "an update that starts from the first weights every time": decay * _flat(start).double()
        + (1 - decay) * steps[-1],
        "an average that starts at zero": right - decay ** len(history) * _flat(start).double(),
    }
    expect.close(got, right, f"the averaged weights after {len(history)} updates", mistakes, 1e-4, 1e-5)


def _flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weights[name].flatten().float() for name in sorted(weights)])


@graded(points=7, section="Training")
def test_train_step(submission, rng):
    """`train_step` learns: loss, gradients of this batch alone, a step of the optimizer, an update of the average."""
    schedule = random_schedule(rng, num_timesteps=60)
    ours, theirs = _network(submission, rng)
    x_0 = _easy_images(rng)
    start = {name: value.clone() for name, value in ours.state_dict().items()}

    draws = torch.tensor([_true_loss(ours, schedule, x_0, 1) for _ in range(24)])
    own = _own_losses(submission, theirs, schedule, x_0, 24)
    trainer = submission.Trainer(theirs, schedule, 1e-3, _working_ema(submission, theirs))
    loss = float(expect.tensor(trainer.train_step(x_0), "train_step's loss", ()))
    if not any(abs(loss - d.mean()) < 8 * d.std() + 1e-6 for d in (draws, own)):
        expect.fail(f"train_step should return the loss of the batch, here about {draws.mean():.2f}; got {loss:.4g}.")
    after = theirs.state_dict()
    moved = {name: after[name].double() - start[name].double() for name in start}
    still = [name for name, change in moved.items() if change.abs().max() == 0]
    if len(still) == len(moved):
        expect.fail("train_step leaves the weights as they are: is optimizer.step() missing, or zero_grad() between "
                    "backward() and step()?")  # fmt: skip
    reached = _reached(ours, schedule, x_0)
    missed = [name for name in still if name in reached]
    if missed:
        expect.fail(f"train_step does not change {missed[0]}: no gradient reaches it.")
    if passes(test_ema, submission, rng):
        _hold_average(submission, trainer, start, after)

    _, theirs = _network(submission, rng)
    idle = submission.Trainer(theirs, schedule, 1e-12, None)
    norms = []
    for _ in range(8):
        idle.train_step(x_0)
        norms.append(float(expect.tensor(idle.gradient_norm(), "gradient_norm", ())))
    if norms[-1] > 4 * max(norms[0], 1e-12):
        expect.fail("the gradients of earlier batches are still there: clear them with optimizer.zero_grad().")
    _hold_learning(submission, schedule, x_0, rng)


def _easy_images(rng) -> torch.Tensor:
    """48 images of one kind: quick to learn."""
    return 0.9 * torch.sign(images(rng, 1, 1, 8, 8)).expand(48, -1, -1, -1).contiguous()


def _reached(network, schedule, x_0) -> set[str]:
    """Parameters that the loss depends on. (What GroupNorm takes out again has no gradient but rounding errors.)"""
    t = torch.randint(schedule.num_timesteps, (len(x_0),))
    loss = noise_prediction_loss(network, schedule, x_0, t, torch.randn(x_0.shape)).mean()
    names, parameters = zip(*network.named_parameters())
    largest = [gradient.abs().max().item() for gradient in torch.autograd.grad(loss, parameters)]
    return {name for name, size in zip(names, largest) if size > 1e-6 * max(largest)}


@torch.no_grad()
def _true_loss(network, schedule, x_0, repeats: int) -> float:
    total = 0.0
    for _ in range(repeats):
        t = torch.randint(schedule.num_timesteps, (len(x_0),))
        total += noise_prediction_loss(network, schedule, x_0, t, torch.randn(x_0.shape)).mean().item()
    return total / repeats


def _own_losses(submission, theirs, schedule, x_0, count: int) -> torch.Tensor:
    """What the student's own loss says, drawn several times; NaN if it does not work."""
    try:
        values = [submission.noise_prediction_loss(theirs, schedule, x_0) for _ in range(count)]
        return torch.tensor([expect.tensor(value, "the loss", ()).item() for value in values])
    except expect.NOT_WORKING as error:
        if getattr(error, "kind", "") == "NotImplementedError":
            raise
        return torch.full((count,), float("nan"))


def _working_ema(submission, theirs):
    """An EMA of the student's, or none if theirs does not work: its points are lost elsewhere."""
    try:
        return submission.EMA(theirs, 0.9)
    except expect.NOT_WORKING as error:
        if getattr(error, "kind", "") == "NotImplementedError":
            raise
        return None


def _hold_average(submission, trainer, start, after):
    """The average must be what one update of the student's own EMA makes of it."""
    other = submission.UNet(TINY["channels"], TINY["time_dim"], 1, TINY["attention"])
    other.load_state_dict(start)
    ema = submission.EMA(other, 0.9)
    other.load_state_dict(after)
    ema.update(other)
    right, got = _flat(_weights(ema)), _flat(_weights(trainer))
    if not expect.is_close(got, right.double(), 1e-5, 1e-6):
        before = expect.is_close(got, _flat(start).double(), 1e-5, 1e-7)
        expect.fail("after train_step the average has not moved: call self.ema.update(self.model)." if before else
                    "after train_step the average is not what one update with the new weights gives: is it updated "
                    "before the step, or twice?")  # fmt: skip


def _hold_learning(submission, schedule, x_0, rng):
    """40 steps must bring the loss down, by the grader's own measure, or by the student's if that is another."""
    ours, theirs = _network(submission, rng)
    before = _true_loss(ours, schedule, x_0, 12)
    own = _own_losses(submission, theirs, schedule, x_0, 8)
    trainer = submission.Trainer(theirs, schedule, 4e-3, None)
    for _ in range(40):
        trainer.train_step(x_0)
    ours.load_state_dict(theirs.state_dict())
    after = _true_loss(ours, schedule, x_0, 12)
    if after < LEARNED * before:
        return
    own_after = _own_losses(submission, theirs, schedule, x_0, 8)
    if not own_after.mean() < LEARNED * own.mean() or passes(test_noise_prediction_loss, submission, rng):
        expect.fail(f"40 calls of train_step on one batch should bring its loss from {before:.2f} below "
                    f"{LEARNED * before:.2f}; it is {after:.2f}.")  # fmt: skip


@graded(points=5, section="Training")
def test_train_epoch(submission, rng):
    """`train_epoch` trains on every image once, in a new random order, and averages the loss over images."""
    schedule = random_schedule(rng, num_timesteps=60)
    theirs = submission.UNet(TINY["channels"], TINY["time_dim"], 1, TINY["attention"])
    trainer = submission.Trainer(theirs, schedule, 1e-3, None)
    batches: list[torch.Tensor] = []
    losses: list[float] = []

    def train_step(x_0):
        batches.append(expect.tensor(x_0, "what train_epoch passes to train_step"))
        losses.append(1.0 + len(losses) ** 2)
        return losses[-1]

    submission.set(trainer, "train_step", train_step)
    count, size = 23, 5
    numbered = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    orders = []
    for _ in range(3):
        batches.clear()
        losses.clear()
        mean = expect.tensor(trainer.train_epoch(numbered, size), "train_epoch", ())
        sizes = [len(batch) for batch in batches]
        if not batches:
            expect.fail("train_epoch never called self.train_step.")
        seen = torch.cat([batch[:, 0, 0, 0] for batch in batches]).long().tolist()
        if any(batch.shape[1:] != (1, 2, 2) for batch in batches):
            expect.fail(f"train_step should be given images [B, C, H, W]; got shape {list(batches[0].shape)}.")
        if sorted(seen) != list(range(count)):
            lost = sorted(set(range(count)) - set(seen))
            why = (
                "the last, smaller batch is missing" if sizes == [size] * (count // size)
                else f"{len(lost)} are never seen, and some twice: shuffle without replacement (torch.randperm)" if lost
                else "some are seen more than once"
            )  # fmt: skip
            expect.fail(f"an epoch shows every image once; here {why}.")
        if sizes != [size] * (count // size) + [count % size]:
            expect.fail(f"with {count} images and batch_size {size} the batches should be {size}, …, {size}, "
                        f"{count % size}; they are {sizes}.")  # fmt: skip
        weighted = sum(n * loss for n, loss in zip(sizes, losses)) / count
        mistakes = {
            "the mean over batches (the smaller last one counts for less)": torch.tensor(losses).mean(),
            "the sum over batches": torch.tensor(losses).sum(),
            "the last batch's loss": losses[-1],
            "the first batch's loss": losses[0],
        }
        expect.close(mean, torch.tensor(weighted), "the mean loss", mistakes, 1e-4, 1e-5)
        orders.append(seen)
    if orders[0] == sorted(orders[0]):
        expect.fail("the images are taken in the order they come in; shuffle them anew for every epoch.")
    if orders[0] == orders[1] == orders[2]:
        expect.fail("every epoch has the same order; is a seed set inside?")
