"""The noise schedule: every number the samplers need, and nothing that samples."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["NoiseSchedule"]


class NoiseSchedule:
    """Variance schedule of the forward process (Ho et al. 2020, equations 2 and 4).

    Timesteps run from 0 (almost clean) to num_timesteps - 1 (almost pure noise). The products are taken in float64
    and stored in float32, as every common library does.

    Args:
        betas: noise added at each timestep, shape [T], each strictly between 0 and 1.

    Attributes:
        betas: float32 [T], beta_t (`betas64` holds them as given, in float64).
        alphas: float32 [T], alpha_t = 1 - beta_t.
        alphas_cumprod: float32 [T], the product of alpha_0 ... alpha_t, written with a bar over alpha in the papers.
        num_timesteps: T.
        config: arguments that `from_config` needs to build the same schedule again.

    Raises:
        ValueError: if `betas` is not one-dimensional, is empty, or leaves (0, 1).
    """

    def __init__(self, betas: Tensor):
        betas = torch.as_tensor(betas, dtype=torch.float64).detach().cpu()
        if betas.ndim != 1 or len(betas) == 0:
            raise ValueError(f"betas must be a non-empty vector, got shape {list(betas.shape)}")
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(
                f"every beta must lie strictly between 0 and 1, got {betas.min():.4g} ... {betas.max():.4g}"
            )
        self.betas64 = betas
        self.num_timesteps = len(betas)
        self.betas = betas.float()
        self.alphas = (1 - betas).float()
        self.alphas_cumprod = (1 - betas).cumprod(0).float()
        self.config: dict[str, Any] = {"kind": "betas", "betas": betas.tolist()}
        # log alpha_bar at -1, 0, ..., T-1, for timesteps between the integers; from the stored float32 values, so
        # that a fractional t that happens to be whole gives what the table gives.
        self._log_alpha_bar = torch.cat([torch.zeros(1, dtype=torch.float64), self.alphas_cumprod.double().log()])

    # -- the usual schedules ------------------------------------------------------------------------------------

    @classmethod
    def linear(cls, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """Evenly spaced betas (Ho et al. 2020, section 4)."""
        cls._check_length(num_timesteps)
        schedule = cls(torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64))
        schedule.config = {
            "kind": "linear",
            "num_timesteps": num_timesteps,
            "beta_start": beta_start,
            "beta_end": beta_end,
        }
        return schedule

    @classmethod
    def scaled_linear(cls, num_timesteps: int) -> NoiseSchedule:
        """Linear betas multiplied by 1000 / T, so that x_T is nearly pure noise for a T other than 1000.

        (Dhariwal & Nichol 2021 train this way. diffusers uses the same name for betas linear in their square roots.)

        Raises:
            ValueError: if T <= 20, where the largest beta would reach 1.
        """
        cls._check_length(num_timesteps)
        scale = 1000 / num_timesteps
        if 0.02 * scale >= 1:
            raise ValueError(
                f"scaled_linear needs more than 20 timesteps, got {num_timesteps}: "
                f"the last beta would be {0.02 * scale:.3g}, and a beta must stay below 1"
            )
        schedule = cls.linear(num_timesteps, 1e-4 * scale, 0.02 * scale)
        schedule.config = {"kind": "scaled_linear", "num_timesteps": num_timesteps}
        return schedule

    @classmethod
    def cosine(cls, num_timesteps: int = 1000, offset: float = 0.008) -> NoiseSchedule:
        """Cosine schedule (Nichol & Dhariwal 2021, equation 17), betas capped at 0.999."""
        cls._check_length(num_timesteps)
        grid = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        alpha_bar = torch.cos((grid + offset) / (1 + offset) * math.pi / 2) ** 2
        schedule = cls((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999))
        schedule.config = {"kind": "cosine", "num_timesteps": num_timesteps, "offset": offset}
        return schedule

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NoiseSchedule:
        """Build the schedule that `schedule.config` describes (checkpoints store it).

        Raises:
            ValueError: for an unknown kind.
        """
        arguments = dict(config)
        kind = arguments.pop("kind", None)
        if kind == "betas":
            return cls(torch.tensor(arguments["betas"], dtype=torch.float64))
        if kind not in ("linear", "scaled_linear", "cosine"):
            raise ValueError(f"unknown noise schedule {kind!r}; expected linear, scaled_linear, cosine or betas")
        return getattr(cls, kind)(**arguments)

    @staticmethod
    def _check_length(num_timesteps: int) -> None:
        if num_timesteps < 1:
            raise ValueError(f"a schedule needs at least one timestep, got {num_timesteps}")

    # -- values at a timestep -----------------------------------------------------------------------------------

    def alpha_bar(self, t: int | float | Tensor) -> Tensor:
        """The cumulative product at timestep t, with alpha_bar(-1) = 1: index -1 names clean data.

        Indexing `alphas_cumprod[t - 1]` at t = 0 silently wraps to the noisiest entry; this method does not.

        Args:
            t: an int, a float, or a tensor of either, from -1 to T - 1. Between the integers, log alpha_bar is
                interpolated linearly (as DPM-Solver does for discrete-time models, Lu et al. 2022, appendix D.4).

        Returns:
            float32 tensor of the shape of t (0-dimensional for a number), on t's device.

        Raises:
            ValueError: if any t lies outside [-1, T - 1].
        """
        t = self._check_timestep(t)
        position = t.detach().cpu().double() + 1
        low = position.floor().long().clamp(0, self.num_timesteps - 1)
        fraction = position - low
        log_value = torch.lerp(self._log_alpha_bar[low], self._log_alpha_bar[low + 1], fraction)
        # exp(log(x)) may differ from x in the last bit: whole timesteps are read from the table.
        whole = position == position.round()
        table = torch.cat([torch.ones(1), self.alphas_cumprod])
        value = torch.where(whole, table[position.round().long()], log_value.exp().float())
        return value.to(t.device)

    def log_snr(self, t: int | float | Tensor) -> Tensor:
        """Half the log signal-to-noise ratio, lambda_t = log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)), float64.

        The time variable of DPM-Solver (Lu et al. 2022, section 3.1). Infinite at t = -1.

        Raises:
            ValueError: if any t lies outside [-1, T - 1].
        """
        alpha_bar = self._alpha_bar64(self._check_timestep(t))
        return 0.5 * (alpha_bar.log() - torch.log1p(-alpha_bar))

    def t_of_lambda(self, lam: float | Tensor) -> Tensor:
        """The continuous timestep at which `log_snr` equals lam; its inverse.

        Args:
            lam: a number or tensor, from log_snr(T - 1) up; values above log_snr(0) fall between -1 and 0.

        Returns:
            float64 tensor of the same shape.

        Raises:
            ValueError: if lam is below log_snr(T - 1), noisier than the schedule reaches.
        """
        lam = torch.as_tensor(lam, dtype=torch.float64)
        lowest = self.log_snr(self.num_timesteps - 1)
        if bool((lam < lowest - 1e-9).any()):
            raise ValueError(f"lambda must be at least {lowest.item():.4g}, got {lam.min().item():.4g}")
        target = -torch.nn.functional.softplus(-2 * lam)  # log alpha_bar = log sigmoid(2 lambda)
        log_table = self._log_alpha_bar.flip(0)  # ascending, for searchsorted
        high = torch.searchsorted(log_table, target.contiguous()).clamp(1, self.num_timesteps)
        below, above = log_table[high - 1], log_table[high]
        position = (high - 1) + (target - below) / (above - below)
        return (self.num_timesteps - position - 1).clamp(-1, self.num_timesteps - 1)

    def _check_timestep(self, t: int | float | Tensor) -> Tensor:
        t = torch.as_tensor(t)
        if t.numel() and not bool(((t >= -1) & (t <= self.num_timesteps - 1)).all()):
            raise ValueError(
                f"t must lie between -1 (clean data) and {self.num_timesteps - 1}, "
                f"got {t.min().item():g} ... {t.max().item():g}"
            )
        return t

    def _alpha_bar64(self, t: Tensor) -> Tensor:
        position = t.detach().cpu().double() + 1
        low = position.floor().long().clamp(0, self.num_timesteps - 1)
        return torch.lerp(self._log_alpha_bar[low], self._log_alpha_bar[low + 1], position - low).exp()

    def __repr__(self) -> str:
        kind = self.config["kind"]
        return (
            f"NoiseSchedule({kind}, num_timesteps={self.num_timesteps}, "
            f"alpha_bar {self.alphas_cumprod[0]:.4f} ... {self.alphas_cumprod[-1]:.2e})"
        )
