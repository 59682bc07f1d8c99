"""Part 3: key steps, the network that encodes at key steps only, noise injection, and solvers on it."""

import torch

from autograder.checks import expect, graded
from autograder.checks.lab08.solvers import Formulas, HalvedNetwork
from autograder.checks.oracles import images, random_schedule

PAPER = (0, 1, 2, 3, 5, 10, 15, 25, 35)  # Li et al. 2023, for 50 steps


def _keys(value, call):
    value = value.tolist() if isinstance(value, torch.Tensor) else value
    if not isinstance(value, list) or not all(isinstance(k, int) and not isinstance(k, bool) for k in value):
        expect.fail(
            f"{call} should be a list of ints{': is a `return` missing?' if value is None else f'; got {value!r:.60}'}"
        )
    return value


@graded(points=3, section="Propagation")
def test_key_schedule(submission, rng):
    """`key_schedule` gives the uniform and the paper's key steps for any number of calls, and refuses what cannot be."""
    for num_calls, num_keys in (
        (50, 10),
        (20, 7),
        (21, 4),
        (9, 9),
        (50, 1),
        (int(torch.randint(30, 90, (), generator=rng)), 11),
    ):
        call = f'key_schedule({num_calls}, "uniform", {num_keys})'
        keys = _keys(submission.key_schedule(num_calls, "uniform", num_keys), call)
        if keys[:1] != [0]:
            expect.fail(f"{call} should start with 0, got {keys}: call 0 has no earlier features to reuse.")
        if len(keys) != num_keys:
            expect.fail(f"{call} should hold {num_keys} key steps, got {len(keys)}: {keys}.")
        expected = [k * num_calls // num_keys for k in range(num_keys)]
        if keys != expected:
            both_ends = [round(k * (num_calls - 1) / max(num_keys - 1, 1)) for k in range(num_keys)]
            cause = (
                ": linspace from 0 to N − 1 spends a key step on the last call, where hardly anything is left to reuse"
                if keys == both_ends
                else ": the step is cut to a whole number first, so that the keys stop early"
                if keys == [k * (num_calls // num_keys) for k in range(num_keys)]
                else ""
            )
            expect.fail(f"{call} should be {expected}, got {keys}{cause}.")
    for num_calls in (50, 20, 21, 100, 5, 1):
        call = f'key_schedule({num_calls}, "paper")'
        keys = _keys(submission.key_schedule(num_calls, "paper"), call)
        expected = sorted({i * num_calls // 50 for i in PAPER})
        if keys != expected:
            cause = (
                ": repeats must be removed" if sorted(set(keys)) == expected
                else ": the list is for 50 calls; scale it to N" if keys == list(PAPER) else ""
            )  # fmt: skip
            expect.fail(f"{call} should be {expected}, got {keys}{cause}.")
    for arguments, what in (
        ((10, "uniform", 0), "num_keys = 0"),
        ((10, "uniform", 11), "num_keys > N"),
        ((10, "random", 3), "an unknown kind"),
    ):
        with expect.raises_value_error(f"key_schedule with {what}"):
            submission.key_schedule(*arguments)


@graded(points=3, section="Propagation")
def test_hold_key_steps(submission, rng):
    """`hold_key_steps` lets good key steps through, and says in a ValueError what is wrong with others."""
    total = int(torch.randint(12, 60, (), generator=rng))
    for keys in ([0], [0, 1, 2], list(range(total)), [0, 3, total - 1]):
        if _keys(submission.hold_key_steps(keys, total), f"hold_key_steps({keys}, {total})") != keys:
            expect.fail(f"hold_key_steps({keys}, {total}) should return the key steps as they are.")
    for keys, what, word in (
        ([], "no key steps", ""), ([1, 2, 5], "key steps without call 0", "0"), ([0, 5, 3], "key steps out of order", ""),
        ([0, 4, 4, 7], "a key step twice", ""), ([0, 3, total], "a key step equal to num_calls", str(total)),
        ([0, total + 7], "a key step beyond the end", str(total)), ([-1, 0, 4], "a negative key step", ""),
    ):  # fmt: skip
        what = f"hold_key_steps with {what} ({keys} of {total} calls)"
        with expect.raises_value_error(what):
            try:
                submission.hold_key_steps(keys, total)
            except expect.StudentError as error:
                if error.kind == "ValueError" and word not in error.message:
                    expect.fail(f'{what}: the message should hold "{word}"; it is "{error.message:.100}".')
                raise


@graded(points=2, section="Propagation")
def test_network_times(submission, rng):
    """`network_times` lists the time of every network call, with "dpm2" the middles in λ as well."""
    schedule = random_schedule(rng)
    f = Formulas(schedule)
    last = float(schedule.num_timesteps - 1)
    inner = sorted((0.1 + 0.8 * float(u)) * last for u in torch.rand(4, generator=rng))[::-1]
    for times in ([last, *inner, -1.0], [last, *inner]):
        for method in ("dpm1", "dpm++2m", "dpm2"):
            what = f'network_times with "{method}"' + ("" if times[-1] == -1 else ", times not ending at −1")
            got = submission.network_times(schedule, times, method)
            got = got.tolist() if isinstance(got, torch.Tensor) else got
            if not isinstance(got, list):
                expect.fail(f"{what} should be a list of floats; got {got!r:.60}")
            got = expect.tensor(
                torch.stack([expect.tensor(t, "a time", ()).double() for t in got] or [torch.tensor(0.0)]), what
            )
            expected = []
            for t, s in zip(times, times[1:]):
                expected += [t, f.middle(t, s)] if method == "dpm2" and s != -1 else [t]
            if len(got) != len(expected):
                expect.fail(
                    f"{what} should hold {len(expected)} times, one for each network call; it holds {len(got)}."
                )
            in_t = []
            for t, s in zip(times, times[1:]):
                in_t += [t, (t + s) / 2] if method == "dpm2" and s != -1 else [t]
            mistakes = {"the middle in t in place of λ": torch.tensor(in_t)} if method == "dpm2" else {}
            expect.close(got, torch.tensor(expected, dtype=torch.float64), what, mistakes, 2e-4, 0.02)


class _Run:
    """A run of EncoderPropagation over 9 calls, driven from here."""

    def __init__(self, submission, rng, batched, batch=3):
        self.schedule = random_schedule(rng)
        self.network = HalvedNetwork(self.schedule)
        last = self.schedule.num_timesteps - 1
        self.times = sorted((float(u) * last for u in torch.rand(9, generator=rng, dtype=torch.float64)), reverse=True)
        self.keys = [0, 1, 4, 7]
        self.batched = batched
        self.propagation = submission.EncoderPropagation(self.network, self.times, self.keys, batched)
        self.fill(rng, batch)

    def fill(self, rng, batch):
        """Other states."""
        self.states = [images(rng, batch, 1, 8, 8) for _ in self.times]

    def key_of(self, call):
        """The last key step at or before a call."""
        return max(k for k in self.keys if k <= call)

    def expected(self, call, now=None):
        """The noise at a call."""
        key = self.key_of(call)
        return self.network.propagated(self.states[key], self.times[key], self.times[call] if now is None else now)

    def predict(self, call):
        """What the student's object answers at a call."""
        x = self.states[call]
        t = torch.full((len(x),), self.times[call], dtype=torch.float64)
        return expect.tensor(self.propagation.predict(x, t), f"predict at call {call}", tuple(x.shape))

    def hold(self, call, result, hint=""):
        """The answer is the one that propagation gives."""
        x, key = self.states[call], self.key_of(call)
        t = self.times[call]
        before = max((k for k in self.keys if k < key), default=0)
        mistakes = {
            "the time of the key step in place of the time of this call": self.expected(call, self.times[key]),
            "a whole network call: nothing is reused": self.network.propagated(x, t, t),
            "the features of an earlier key step (they were not replaced at the last one)": self.network.propagated(
                self.states[before], self.times[before], t
            ),
            "the features of the very first call": self.network.propagated(self.states[0], self.times[0], t),
            "the time of another call of the run": self.expected(call, self.times[min(call + 1, len(self.times) - 1)]),
        }
        expect.close(
            result, self.expected(call), f"{hint}predict at call {call} (key steps {self.keys})", mistakes, 1e-4, 1e-4
        )


@graded(points=6, section="Propagation")
def test_propagation_serial(submission, rng):
    """Serial: the encoder runs at key steps only, the decoder at every call, with the time of that call."""
    run = _Run(submission, rng, batched=False)
    for call in range(len(run.times)):
        encoded, decoded = len(run.network.encoded), len(run.network.decoded)
        result = run.predict(call)
        encoded, decoded = len(run.network.encoded) - encoded, len(run.network.decoded) - decoded
        if encoded != (call in run.keys):
            which = (
                "a key step: the encoder should run once"
                if call in run.keys
                else "no key step: the encoder should not run"
            )
            expect.fail(f"call {call} is {which}; it ran {encoded} times (key steps {run.keys}).")
        if decoded != 1:
            expect.fail(f"at call {call} the decoder should run once; it ran {decoded} times.")
        run.hold(call, result)
    run = _Run(submission, rng, batched=False)
    run.propagation = submission.EncoderPropagation(run.network, run.times, list(range(9)))
    run.keys = list(range(9))
    for call in range(9):
        if not expect.is_close(run.predict(call), run.expected(call).double(), 1e-5, 1e-5):
            expect.fail(f"with every call a key step, predict at call {call} should be the plain network.")


@graded(points=4, section="Propagation")
def test_propagation_batched(submission, rng):
    """Batched: one decoder call for each key step, for all calls up to the next, with the same noise as serial."""
    for _ in range(2):
        run = _Run(submission, rng, batched=True, batch=int(torch.randint(2, 5, (), generator=rng)))
        results = []
        for call in range(len(run.times)):
            try:
                results.append(run.predict(call))
            except expect.StudentError as error:
                if error.kind not in ("KeyError", "IndexError"):
                    raise
                expect.fail(
                    f"batched: predict at call {call} found nothing that was decoded ahead ({error.kind}); the last key step "
                    f"before it is {run.key_of(call)} of {run.keys}, and the encoder ran {len(run.network.encoded)} times."
                )
        if len(run.network.encoded) != len(run.keys):
            expect.fail(f"batched: {len(run.keys)} key steps, but the encoder ran {len(run.network.encoded)} times.")
        if len(run.network.decoded) != len(run.keys):
            expect.fail(
                f"batched: the decoder should run once for each of the {len(run.keys)} key steps, for all calls up to the "
                f"next; it ran {len(run.network.decoded)} times."
            )
        ends = [*run.keys[1:], len(run.times)]
        for key, end, (h, _, t) in zip(run.keys, ends, run.network.decoded):
            size = (end - key) * len(run.states[0])
            if len(h) != size:
                expect.fail(
                    f"batched: at key step {key} the decoder should get {end - key} calls × {len(run.states[0])} images = "
                    f"{size} at once; it got {len(h)}."
                )
            expected = torch.tensor(run.times[key:end], dtype=torch.float64).repeat_interleave(len(run.states[0]))
            if not expect.is_close(t, expected, 1e-4, 1e-2) and expect.is_close(
                t.sort()[0], expected.sort()[0], 1e-4, 1e-2
            ):
                own = h.double().flatten(1)
                if not expect.is_close(own, own[: len(run.states[0])].repeat(end - key, 1), 1e-5, 1e-6):
                    continue  # another order of the batch, h repeated to match
                expect.fail(
                    f"batched: at key step {key} h is repeated image by image, all images for each call in turn, but the times "
                    "are not: use repeat_interleave for the times."
                )
        for call, result in enumerate(results):
            run.hold(call, result, "batched: ")


@graded(points=2, section="Propagation")
def test_propagation_fresh(submission, rng):
    """After `start()` nothing of the last run is left: not its features, not its noise, not its place."""
    for batched in (False, True):
        run = _Run(submission, rng, batched)
        for stop in (len(run.times), 6, len(run.times)):  # a run to its end, one broken off in the middle, and another
            run.propagation.start()
            run.fill(rng, int(torch.randint(2, 6, (), generator=rng)))
            first = run.states
            run.network.clear()
            for call in range(stop):
                x = run.states[call]
                t = torch.full((len(x),), run.times[call], dtype=torch.float64)
                try:
                    result = run.propagation.predict(x, t)
                except expect.StudentError as error:
                    if error.kind == "NotImplementedError":
                        raise
                    expect.fail(
                        f"a run after start(), with another batch size, raised {error.kind}: {error.message:.120}"
                    )
                result = expect.tensor(result, f"predict at call {call}")
                fresh = submission.EncoderPropagation(run.network, run.times, run.keys, batched)
                if tuple(result.shape) != tuple(x.shape):
                    expect.fail(
                        f"a run with {len(x)} images, after one with another number, gave noise of shape {list(result.shape)} at "
                        f"call {call}: features of the last run are still there."
                    )
                if call == 0:
                    again = expect.tensor(fresh.predict(x, t), "predict")
                    expect.same(
                        result, again, "the first call after start() differs from that of a new object: a stale cache."
                    )
                    encoded = len(run.network.encoded)
                    if encoded != 2:
                        expect.fail(
                            "the first call after start() should run the encoder: call 0 is a key step of every run."
                        )
            if stop == len(run.times):
                own = submission.EncoderPropagation(run.network, run.times, run.keys, batched)
                for call in range(stop):
                    x = first[call]
                    again = own.predict(x, torch.full((len(x),), run.times[call], dtype=torch.float64))
                expect.same(
                    result, expect.tensor(again, "predict"), "a run after start() differs from one of a new object."
                )


@graded(points=2, section="Propagation")
def test_inject_noise(submission, rng):
    """`inject_noise` adds strength · x_T in the second half of the way, t < T/2, and nothing before."""
    total = 2 * int(torch.randint(100, 500, (), generator=rng))
    x, x_T = images(rng, 3, 1, 8, 8), images(rng, 3, 1, 8, 8)
    X, N = x.double(), x_T.double()
    for t, strength in (
        (0.2 * total, 0.3),
        (0.5 * total - 0.5, 0.3),
        (0.0, 0.05),
        (0.5 * total, 0.3),
        (total - 1.0, 0.3),
    ):
        result = expect.tensor(submission.inject_noise(x, t, x_T, total, strength), "inject_noise", x.shape)
        half = t < total / 2
        mistakes = {
            "noise at t = T/2, too," if t == total / 2 else "noise where t > T/2": X + strength * N,
            "no noise: it belongs where t < T/2, the second half of the way, and": X,
            "x shrunk as well: (1 − γ) x + γ x_T": (1 - strength) * X + strength * N,
            "the root of the strength": X + strength**0.5 * N,
            "x_T alone": strength * N,
        }
        expect.close(result, X + strength * N * half, f"inject_noise at t = {t:g} of T = {total}", mistakes, 1e-5, 1e-6)
    default = expect.tensor(submission.inject_noise(x, 1.0, x_T, total), "inject_noise", x.shape)
    expect.close(default, X + 0.003 * N, "inject_noise with its default strength", {}, 1e-5, 1e-6)


@graded(points=4, section="Propagation")
def test_faster_sample(submission, rng):
    """`faster_sample` is the plain solver when all calls are key, encodes at key steps only, injects, refuses bad input."""
    schedule = random_schedule(rng)
    network = HalvedNetwork(schedule)
    last = float(schedule.num_timesteps - 1)
    x_T = images(rng, 3, 1, 8, 8)
    times = [last, *sorted(((0.1 + 0.8 * float(u)) * last for u in torch.rand(4, generator=rng)), reverse=True), -1.0]
    solver = submission.DPMSolver(network, schedule)
    for method, total in (("dpm1", 5), ("dpm2", 9), ("dpm++2m", 5)):
        what = f'faster_sample with "{method}"'
        network.clear()
        plain = expect.tensor(solver.sample(x_T, times, method), "sample", tuple(x_T.shape))
        asked = [t[0].item() for _, t in network.encoded]
        network.clear()
        all_key = submission.faster_sample(network, schedule, x_T, times, method, list(range(total)))
        all_key = expect.tensor(all_key, what, tuple(x_T.shape), x_T.dtype)
        if len(network.encoded) != total or len(network.decoded) != total:
            expect.fail(
                f"{what}, all {total} calls key: encoder and decoder should run {total} times each; they ran "
                f"{len(network.encoded)} and {len(network.decoded)} times."
            )
        expect.same(all_key, plain, f"{what}, all calls key, should give exactly what DPMSolver.sample gives.")
        keys = [0, 2, 3]
        outcomes = []
        for batched in (False, True):
            network.clear()
            result = submission.faster_sample(network, schedule, x_T, times, method, keys, batched)
            outcomes.append(expect.tensor(result, what, tuple(x_T.shape)))
            decoders = len(keys) if batched else total
            if len(network.encoded) != len(keys) or len(network.decoded) != decoders:
                expect.fail(
                    f"{what}, key steps {keys}, batched={batched}: {len(keys)} encoder and {decoders} decoder calls are needed; "
                    f"there were {len(network.encoded)} and {len(network.decoded)}."
                )
            seen = [t[0].item() for _, t in network.encoded]
            if any(abs(a - asked[k]) > 0.02 + 2e-4 * last for a, k in zip(seen, keys)):
                expect.fail(f"{what}: the encoder should run at network calls {keys}, it ran at other times.")
        # A solver that asks at other times than it should has lost its points in Part 1.
        right = _asked_as_it_should(schedule, times, method, asked)
        if right and not expect.is_close(
            outcomes[1], outcomes[0].double(), 1e-4, 1e-4 * float(outcomes[0].abs().max())
        ):
            expect.fail(
                f"{what}: batched and serial decoding should agree; are the times of network_times those of the run?"
            )
        if expect.is_close(outcomes[0], plain.double(), 1e-4, 1e-4):
            expect.fail(f"{what}, key steps {keys}, gives what the plain solver gives: nothing was reused.")
        _hold_injection(submission, solver, network, schedule, x_T, times, method, total, what)
    for method, keys, about in (
        ("heun", [0], "an unknown method"), ("dpm1", [1, 2], "key steps without 0"), ("dpm1", [0, 5], "a key step beyond the end"),
        ("dpm2", [0, 3, 2], "key steps out of order"),
    ):  # fmt: skip
        network.clear()
        with expect.raises_value_error(f"faster_sample with {about}"):
            submission.faster_sample(network, schedule, x_T, times, method, keys)
        if network.encoded:
            expect.fail(f"faster_sample with {about} should refuse before the network is asked anything.")


def _asked_as_it_should(schedule, times, method, asked) -> bool:
    f, expected = Formulas(schedule), []
    for t, s in zip(times, times[1:]):
        expected += [t, f.middle(t, s)] if method == "dpm2" and s != -1 else [t]
    return len(asked) == len(expected) and all(abs(a - b) < 0.02 + 2e-4 * b for a, b in zip(asked, expected))


def _hold_injection(submission, solver, network, schedule, x_T, times, method, total, what):
    """With noise: the plain solver with the formula, or with the student's own inject_noise, before each step."""
    strength, half = 0.2, schedule.num_timesteps / 2
    result = submission.faster_sample(network, schedule, x_T, times, method, list(range(total)), False, strength)
    result = expect.tensor(result, what, tuple(x_T.shape))

    def own(x, t):
        return submission.inject_noise(x, float(t), x_T, schedule.num_timesteps, strength)

    if _close_to(result, solver.sample(x_T, times, method, on_state=lambda x, t: x + strength * x_T * (t < half))):
        return
    if _close_to(result, _sample_or_none(solver, x_T, times, method, own)):
        return
    if _close_to(result, solver.sample(x_T, times, method)):
        expect.fail(f"{what}: strength is ignored; pass inject_noise as on_state.")
    expect.fail(
        f"{what} and strength {strength}: not what the solver gives with x + {strength}·x_T before each step at t < T/2."
    )


def _sample_or_none(solver, x_T, times, method, on_state):
    try:
        return solver.sample(x_T, times, method, on_state=on_state)
    except expect.NOT_WORKING:
        return None


def _close_to(a, b) -> bool:
    return (
        isinstance(b, torch.Tensor)
        and a.shape == b.shape
        and expect.is_close(a, b.double(), 1e-4, 1e-4 * float(b.abs().max()))
    )


@graded(points=2, section="Propagation")
def test_theoretical_saving(submission, rng):
    """`theoretical_saving` is (1 − K/N) f, and refuses impossible arguments."""
    for _ in range(3):
        total = int(torch.randint(10, 60, (), generator=rng))
        keys, share = int(torch.randint(1, total, (), generator=rng)), 0.2 + 0.6 * float(torch.rand((), generator=rng))
        got = expect.tensor(submission.theoretical_saving(total, keys, share), "theoretical_saving", ()).double()
        skipped = 1 - keys / total
        mistakes = {
            "K/N in place of 1 − K/N": keys / total * share,
            "what is left, not what is saved,": 1 - skipped * share,
            "the speed-up": 1 / (1 - skipped * share),
            "the skipped fraction without f": skipped,
            "the decoder's share in place of the encoder's": skipped * (1 - share),
            "a percentage": 100 * skipped * share,
        }
        mistakes = {name: torch.tensor(value) for name, value in mistakes.items()}
        expect.close(got, torch.tensor(skipped * share), "theoretical_saving", mistakes, 1e-6, 1e-9)
    if abs(float(expect.tensor(submission.theoretical_saving(7, 7, 0.4), "theoretical_saving", ()))) > 1e-12:
        expect.fail("theoretical_saving with K = N should be 0.")
    for arguments, what in (
        ((10, 0, 0.4), "K = 0"),
        ((10, 11, 0.4), "K > N"),
        ((10, 5, 1.4), "a share above 1"),
        ((10, 5, -0.1), "a negative share"),
    ):
        with expect.raises_value_error(f"theoretical_saving with {what}"):
            submission.theoretical_saving(*arguments)
