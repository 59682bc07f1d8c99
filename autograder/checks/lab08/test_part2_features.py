"""Part 2: how features change along a path, their principal components, and what reusing them costs."""

import torch

from autograder.checks import expect, graded
from autograder.checks.lab08.solvers import HalvedNetwork
from autograder.checks.oracles import images, random_schedule


@graded(points=5, section="Feature analysis")
def test_adjacent_changes(submission, rng):
    """`adjacent_changes` gives the relative change and the cosine of neighbouring steps, image by image, then the mean."""
    scales = torch.tensor([0.2, 1.0, 6.0])[:, None, None, None]  # images of very different size: order of means matters
    features = [scales * (images(rng, 3, 4, 6, 6) + 1)]
    for _ in range(4):
        features.append(features[-1] + 0.4 * scales.flip(0) * images(rng, 3, 4, 6, 6))
    changes = submission.adjacent_changes(features)
    if not isinstance(changes, dict) or not {"relative", "cosine"} <= changes.keys():
        expect.fail(f'adjacent_changes should return a dict with "relative" and "cosine"; got {changes!r:.80}')
    pairs = [(a.double().flatten(1), b.double().flatten(1)) for a, b in zip(features, features[1:])]

    def over(function):
        return torch.tensor([float(function(a, b)) for a, b in pairs], dtype=torch.float64)

    values = {}
    for key in ("relative", "cosine"):
        got = changes[key].tolist() if isinstance(changes[key], torch.Tensor) else changes[key]
        if not isinstance(got, list) or len(got) != len(pairs):
            size = len(got) if isinstance(got, list) else "no list"
            expect.fail(
                f'"{key}" should hold {len(pairs)} numbers for {len(features)} steps, one a pair; it holds {size}.'
            )
        values[key] = torch.stack([expect.tensor(v, f'an entry of "{key}"', ()).double() for v in got])
    mistakes = {
        "all images taken as one long vector": over(lambda a, b: (b - a).norm() / a.norm()),
        "the norm of the later step in the denominator": over(lambda a, b: ((b - a).norm(dim=1) / b.norm(dim=1)).mean()),
        "the change, not divided by the norm,": over(lambda a, b: (b - a).norm(dim=1).mean()),
        "squared norms": over(lambda a, b: ((b - a).norm(dim=1) / a.norm(dim=1)).square().mean()),
        "the difference of the norms": over(lambda a, b: ((b.norm(dim=1) - a.norm(dim=1)).abs() / a.norm(dim=1)).mean()),
        "the change since the first step": torch.stack(
            [((f.flatten(1) - features[0].flatten(1)).norm(dim=1) / features[0].flatten(1).norm(dim=1)).mean()
             for f in features[1:]]
        ),
    }  # fmt: skip
    truth = over(lambda a, b: ((b - a).norm(dim=1) / a.norm(dim=1)).mean())
    expect.close(values["relative"], truth, '"relative"', mistakes, 1e-4, 1e-6)
    cosine = torch.nn.functional.cosine_similarity
    mistakes = {
        "all images taken as one long vector": over(lambda a, b: cosine(a.flatten(), b.flatten(), dim=0)),
        "Pearson's correlation: nothing is centred here,": over(
            lambda a, b: cosine(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1).mean()
        ),
        "the product, not divided by the norms,": over(lambda a, b: (a * b).sum(1).mean()),
        "one minus the cosine": over(lambda a, b: 1 - cosine(a, b, dim=1).mean()),
    }
    expect.close(values["cosine"], over(lambda a, b: cosine(a, b, dim=1).mean()), '"cosine"', mistakes, 1e-4, 1e-6)


@graded(points=4, section="Feature analysis")
def test_principal_components(submission, rng):
    """`principal_components` gives coordinates along the directions of largest variance, and their share of it."""
    spread = torch.tensor([5.0, 2.0, 1.0, 0.5, 0.2])
    directions = torch.linalg.qr(images(rng, 24, 5, dtype=torch.float64))[0].T
    rows = (images(rng, 9, 5) * spread).double() @ directions + 8 * images(rng, 24, dtype=torch.float64)
    features = rows.view(9, 2, 3, 4).float()
    X = features.double().flatten(1)
    centred = X - X.mean(0)
    for num in (2, 3):
        result = expect.tensors(submission.principal_components(features, num), "principal_components", 2)
        U, S, Vt = torch.linalg.svd(centred, full_matrices=False)
        coordinates = expect.tensor(result[0], "the coordinates", (9, num)).double()
        explained = expect.tensor(result[1], "the fractions of variance", (num,)).double()
        truth = S[:num].square() / S.square().sum()
        raw = torch.linalg.svdvals(X)
        mistakes = {
            "rows that are not centred": raw[:num].square() / raw.square().sum(),
            "singular values without the square": S[:num] / S.sum(),
            "the sum over the kept directions only": S[:num].square() / S[:num].square().sum(),
            "the variances, not divided by their sum,": S[:num].square() / 8,
        }
        expect.close(explained, truth, "the fractions of variance", mistakes, 1e-3, 1e-5)
        alternatives = {
            "U without S": U[:, :num],
            "rows that are not centred": X @ Vt[:num].T,
            "the directions in rising order": (U * S).flip(1)[:, :num],
        }
        expected = _signed((U * S)[:, :num], coordinates)
        expect.close(
            coordinates, expected, "the coordinates",
            {name: _signed(values, coordinates) for name, values in alternatives.items()}, 1e-3, 1e-3,
        )  # fmt: skip


def _signed(values, like):
    """Each column with the sign that brings it nearer to the column of `like`."""
    sign = (values * like).sum(0).sign()
    return values * torch.where(sign == 0, torch.ones_like(sign), sign)


@graded(points=3, section="Feature analysis")
def test_reuse_error(submission, rng):
    """`reuse_error` decodes the first state's features at every time, and compares with the whole network there."""
    schedule = random_schedule(rng)
    network = HalvedNetwork(schedule)
    last = schedule.num_timesteps - 1
    sizes = torch.tensor([0.3, 1.0, 4.0])[:, None, None, None]
    states = [sizes * images(rng, 3, 1, 8, 8)]
    for _ in range(3):
        states.append(0.9 * states[-1] + 0.3 * sizes.flip(0) * images(rng, 3, 1, 8, 8))
    times = sorted((float(t) * last for t in torch.rand(4, generator=rng)), reverse=True)
    got = submission.reuse_error(network, states, times)
    got = got.tolist() if isinstance(got, torch.Tensor) else got
    if not isinstance(got, list) or len(got) != 4:
        expect.fail(f"reuse_error should return 4 numbers for 4 states; got {got!r:.80}")
    got = torch.stack([expect.tensor(v, "an entry of reuse_error", ()).double() for v in got])
    eps = [network.propagated(x, t, t).double().flatten(1) for x, t in zip(states, times)]
    reused = [network.propagated(states[0], times[0], t).double().flatten(1) for t in times]
    stale = [network.propagated(states[0], times[0], times[0]).double().flatten(1) for _ in times]

    def errors(a, b=None, against=None):
        against = against or eps
        return torch.stack([((r - e).norm(dim=1) / w.norm(dim=1)).mean() for r, e, w in zip(a, b or eps, against)])

    mistakes = {
        "features decoded at the time they were encoded at, in place of t_k,": errors(stale),
        "the norm of the reused prediction in the denominator": errors(reused, eps, reused),
        "all images taken as one long vector": torch.stack([(r - e).norm() / e.norm() for r, e in zip(reused, eps)]),
        "the error, not divided by the norm,": torch.stack([(r - e).norm(dim=1).mean() for r, e in zip(reused, eps)]),
        "features of the step before, in place of the first,": torch.stack(
            [((network.propagated(states[max(k - 1, 0)], times[max(k - 1, 0)], times[k]).double().flatten(1) - eps[k])
              .norm(dim=1) / eps[k].norm(dim=1)).mean() for k in range(4)]
        ),
        "each state encoded afresh (nothing is reused)": torch.zeros(4),
    }  # fmt: skip
    expect.close(got, errors(reused), "reuse_error", mistakes, 1e-3, 1e-5)
