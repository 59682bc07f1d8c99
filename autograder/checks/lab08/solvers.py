"""The solvers' formulas in float64, and a network in two halves whose every call is seen."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from autograder.checks.oracles import MAX_RECORDED, RecordingNetwork
from difflab.schedule import NoiseSchedule

__all__ = ["CALLS_A_STEP", "Formulas", "HalvedNetwork", "exact_flow"]

CALLS_A_STEP = {"dpm1": 1, "dpm2": 2, "dpm++2m": 1}  # network calls, for a step that does not lead to clean data


class Formulas:
    """DPM-Solver-1, -2 and ++ 2M (Lu et al. 2022a, 2022b), from the schedule's half log signal-to-noise ratio."""

    def __init__(self, schedule: NoiseSchedule):
        self.schedule = schedule

    def levels(self, t: float) -> tuple[float, float, float]:
        """(a, b, lambda) at t; (1, 0, inf) at -1."""
        if t == -1:
            return 1.0, 0.0, math.inf
        lam = float(self.schedule.log_snr(t))
        return (1 + math.exp(-2 * lam)) ** -0.5, (1 + math.exp(2 * lam)) ** -0.5, lam

    def middle(self, t: float, s: float) -> float:
        """The time in the middle of t and s in lambda."""
        return float(self.schedule.t_of_lambda((self.levels(t)[2] + self.levels(s)[2]) / 2))

    def first(self, x: Tensor, eps: Tensor, t: float, s: float) -> Tensor:
        """Order 1; the estimate of x_0 at s = -1."""
        (a_t, b_t, _), (a_s, b_s, _) = self.levels(t), self.levels(s)
        return a_s * (x.double() - b_t * eps.double()) / a_t + b_s * eps.double()

    def multistep_moments(self, x: Tensor, D: Tensor, t: float, s: float, eta: float = 0.0) -> tuple[Tensor, float]:
        """Mean and standard deviation of a ++ 2M step with the combined estimate D."""
        if s == -1:
            return D.double(), 0.0
        (_, b_t, now), (a_s, b_s, then) = self.levels(t), self.levels(s)
        h = then - now
        mean = b_s / b_t * math.exp(-eta * h) * x.double() - a_s * math.expm1(-(1 + eta) * h) * D.double()
        return mean, b_s * math.sqrt(-math.expm1(-2 * eta * h))

    def ratio(self, t: float, s: float, t_before: float) -> float:
        """r = (last step in lambda) / (this step in lambda)."""
        now = self.levels(t)[2]
        return (now - self.levels(t_before)[2]) / (self.levels(s)[2] - now)

    def combined(self, x_0: Tensor, t: float, s: float, before: Tensor | None, t_before: float | None) -> Tensor:
        """D of a ++ 2M step."""
        if before is None or s == -1:
            return x_0.double()
        weight = 1 / (2 * self.ratio(t, s, t_before))
        return (1 + weight) * x_0.double() - weight * before.double()


def exact_flow(schedule: NoiseSchedule, x: Tensor, t: float, s: float, mean: float, std: float) -> Tensor:
    """Where the probability-flow ODE takes x from t to s, for data N(mean, std^2 I)."""
    a_t, a_s = (torch.sigmoid(2 * schedule.log_snr(time)) for time in (t, s))
    v_t, v_s = (a * std**2 + 1 - a for a in (a_t, a_s))
    return a_s.sqrt() * mean + (v_s / v_t).sqrt() * (x.double() - a_t.sqrt() * mean)


class HalvedNetwork(RecordingNetwork):
    """A network with `encode` and `decode`, cheap and smooth, in which x enters through the encoder alone.

    `encoded` holds (x, t) of every run of the first half, `decoded` (h, skips, t) of every run of the second; `forward`
    is one of each.
    """

    methods = frozenset({"forward", "encode", "decode"})

    def __init__(self, schedule: NoiseSchedule, dtype: str = "float32"):
        super().__init__(schedule, dtype)
        self.encoded: list[tuple[Tensor, Tensor]] = []
        self.decoded: list[tuple[Tensor, list[Tensor], Tensor]] = []

    def clear(self) -> None:
        """Forget what was asked."""
        self.calls, self.encoded, self.decoded = [], [], []

    def encode(self, x: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(h, skips) with two skips of different sizes."""
        self._hold(x, t)
        self.encoded.append((x, t))
        return self._encode(x, t)

    def decode(self, h: Tensor, skips: list[Tensor], t: Tensor) -> Tensor:
        """The predicted noise, of the size of the first skip."""
        if not (isinstance(skips, list) and len(skips) == 2 and all(isinstance(s, Tensor) for s in skips)):
            raise ValueError("decode takes h, the list of skips that encode returned, and t")
        self._hold(skips[0], t)
        if h.shape[0] != len(t) or skips[1].shape[0] != len(t):
            raise ValueError(
                f"decode was given t for {len(t)} images, h for {h.shape[0]} and skips for "
                f"{skips[0].shape[0]} and {skips[1].shape[0]}; all must be repeated alike"
            )
        self.decoded.append((h, skips, t))
        return self._decode(h, skips, t)

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        """One half after the other."""
        self.encoded.append((x, t))
        h, skips = self._encode(x, t)
        self.decoded.append((h, skips, t))
        return self._decode(h, skips, t)

    def propagated(self, x: Tensor, t_key: float, t: float) -> Tensor:
        """What is decoded at t from the features of x at t_key."""
        key, now = (torch.full((len(x),), time, dtype=torch.float64) for time in (t_key, t))
        return self._decode(*self._encode(x, key), now)

    def _encode(self, x, t):
        level = self._level(t)
        h = torch.tanh(x.double().mean((2, 3), keepdim=True) + 2 * level)
        return h.to(x.dtype), [
            (x.double() * (1 - 0.3 * level)).to(x.dtype),
            (x.double()[:, :, ::2, ::2] + level).to(x.dtype),
        ]

    def _decode(self, h, skips, t):
        level = self._level(t)
        up = skips[1].double().repeat_interleave(2, 2).repeat_interleave(2, 3)
        eps = (0.9 - 0.4 * level) * skips[0].double() + 0.2 * level * up + 0.3 * h.double() * (1 + level)
        return eps.to(skips[0].dtype)

    def _level(self, t):
        return (t.double() / self.schedule.num_timesteps)[:, None, None, None]

    def _hold(self, x, t):
        if not isinstance(t, Tensor) or t.shape != (len(x),):
            got = list(t.shape) if isinstance(t, Tensor) else repr(t)[:40]
            raise ValueError(f"each half takes one time per image, t of shape [{len(x)}], got {got}")
        if not bool(((t >= 0) & (t <= self.schedule.num_timesteps - 1)).all()):
            raise ValueError(f"the network was asked about t = {t.min().item():g} … {t.max().item():g}")
        self.recorded += 4 * x.numel() + 256
        if self.recorded > MAX_RECORDED:
            raise ValueError("the network was called far more often, or with far larger batches, than any step needs")
