"""Are the schedule's numbers the papers' numbers, also at t = -1 and between the timesteps?"""

import math

import pytest
import torch

from difflab.schedule import NoiseSchedule

SCHEDULES = [NoiseSchedule.linear(), NoiseSchedule.scaled_linear(300), NoiseSchedule.cosine()]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.config["kind"])


# -- the usual schedules ----------------------------------------------------------------------------------------


def test_linear_betas_are_those_of_ddpm():
    schedule = NoiseSchedule.linear()
    product = 1.0
    for t in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
    assert schedule.num_timesteps == 1000
    assert schedule.betas[[0, 999]].tolist() == pytest.approx([1e-4, 0.02])
    assert schedule.alphas[999].item() == pytest.approx(0.98)
    assert schedule.alphas_cumprod[999].item() == pytest.approx(product, rel=1e-6)
    assert product == pytest.approx(4.04e-5, rel=1e-2)


def test_scaled_linear_ends_in_noise_where_linear_does_not():
    assert NoiseSchedule.linear(300).alphas_cumprod[-1].item() == pytest.approx(0.048, abs=5e-4)
    scaled = NoiseSchedule.scaled_linear(300)
    assert scaled.alphas_cumprod[-1].item() == pytest.approx(3.4e-5, abs=5e-7)
    assert scaled.betas[[0, -1]].tolist() == pytest.approx([1e-4 / 0.3, 0.02 / 0.3])
    assert torch.equal(NoiseSchedule.scaled_linear(1000).betas, NoiseSchedule.linear().betas)


@pytest.mark.parametrize("num_timesteps", [1, 19, 20])
def test_scaled_linear_refuses_so_few_timesteps_that_beta_reaches_one(num_timesteps):
    with pytest.raises(ValueError, match=f"more than 20 timesteps, got {num_timesteps}"):
        NoiseSchedule.scaled_linear(num_timesteps)
    assert NoiseSchedule.scaled_linear(21).betas.max() < 1


def test_cosine_follows_the_papers_formula():
    schedule = NoiseSchedule.cosine()

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 250, 499, 900):  # entry t holds the noise after t + 1 steps of the paper
        assert schedule.alphas_cumprod[t].item() == pytest.approx(f(t + 1) / f(0), rel=1e-5)
    assert schedule.betas.max().item() == pytest.approx(0.999)


@each_schedule
def test_products_are_taken_in_float64_and_stored_in_float32(schedule):
    product, table = 1.0, []
    for beta in schedule.betas64.tolist():
        product *= 1 - beta
        table.append(product)
    assert schedule.alphas_cumprod.dtype == schedule.betas.dtype == schedule.alphas.dtype == torch.float32
    torch.testing.assert_close(schedule.alphas_cumprod, torch.tensor(table), rtol=2e-7, atol=0)
    assert torch.equal(schedule.alphas, (1 - schedule.betas64).float())


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([0.1, 1.0], "strictly between 0 and 1, got 0.1 ... 1"),
        ([0.0, 0.1], "strictly between 0 and 1"),
        ([math.nan], "strictly between 0 and 1"),
        ([], "non-empty vector"),
        ([[0.1]], r"non-empty vector, got shape \[1, 1\]"),
    ],
)
def test_bad_betas_are_refused(betas, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(torch.tensor(betas))


@pytest.mark.parametrize("make", [NoiseSchedule.linear, NoiseSchedule.scaled_linear, NoiseSchedule.cosine])
def test_no_schedule_without_timesteps(make):
    with pytest.raises(ValueError, match="at least one timestep, got 0"):
        make(0)


# -- configuration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule",
    [*SCHEDULES, NoiseSchedule.linear(50, 1e-3, 0.1), NoiseSchedule(torch.tensor([0.1, 0.3, 0.2]))],
    ids=lambda s: f"{s.config['kind']}-{s.num_timesteps}",
)
def test_config_rebuilds_the_same_schedule(schedule):
    config = dict(schedule.config)
    again = NoiseSchedule.from_config(schedule.config)
    assert torch.equal(again.betas64, schedule.betas64)
    assert again.config == schedule.config == config, "from_config changed its argument"


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="unknown noise schedule 'sigmoid'; expected linear"):
        NoiseSchedule.from_config({"kind": "sigmoid"})


def test_repr_names_kind_and_range():
    expected = "NoiseSchedule(scaled_linear, num_timesteps=300, alpha_bar 0.9997 ... 3.43e-05)"
    assert repr(NoiseSchedule.scaled_linear(300)) == expected


# -- alpha_bar --------------------------------------------------------------------------------------------------


@each_schedule
def test_alpha_bar_is_the_table_and_one_for_clean_data(schedule):
    t = torch.arange(-1, schedule.num_timesteps)
    for times in (t, t.double(), t.float()):
        value = schedule.alpha_bar(times)
        assert value.dtype == torch.float32
        assert value[0] == 1
        assert torch.equal(value[1:], schedule.alphas_cumprod)
    assert schedule.alpha_bar(-1).shape == ()
    assert schedule.alpha_bar(5).item() == schedule.alphas_cumprod[5].item()


@each_schedule
def test_alpha_bar_between_timesteps_is_the_geometric_mean(schedule):
    table = schedule.alphas_cumprod.double()
    assert schedule.alpha_bar(10.5).item() == pytest.approx((table[10] * table[11]).sqrt().item(), rel=1e-6)
    assert schedule.alpha_bar(-0.5).item() == pytest.approx(table[0].sqrt().item(), rel=1e-6)
    assert schedule.alpha_bar(7.25).item() == pytest.approx((table[7] ** 0.75 * table[8] ** 0.25).item(), rel=1e-6)


def test_alpha_bar_keeps_the_shape_of_t():
    schedule = NoiseSchedule.linear()
    t = torch.tensor([[-1, 0, 1], [997, 998, 999]])
    assert torch.equal(schedule.alpha_bar(t)[1], schedule.alphas_cumprod[997:])
    assert schedule.alpha_bar(t).shape == (2, 3)
    assert schedule.alpha_bar(torch.empty(0)).shape == (0,)


@pytest.mark.parametrize("method", ["alpha_bar", "log_snr"])
@pytest.mark.parametrize("t", [-2, -1.01, 1000, 999.5, math.nan, torch.tensor([0, 1000])])
def test_t_outside_the_schedule_is_refused(method, t):
    with pytest.raises(ValueError, match=r"between -1 \(clean data\) and 999"):
        getattr(NoiseSchedule.linear(), method)(t)


# -- lambda -----------------------------------------------------------------------------------------------------


@each_schedule
def test_log_snr_is_half_the_log_of_signal_over_noise(schedule):
    alpha_bar = schedule.alphas_cumprod.double()
    value = schedule.log_snr(torch.arange(schedule.num_timesteps))
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, 0.5 * torch.log(alpha_bar / (1 - alpha_bar)), rtol=1e-9, atol=1e-9)
    assert bool((value.diff() < 0).all()), "lambda must fall as noise grows"
    assert schedule.log_snr(-1).item() == math.inf


@each_schedule
def test_t_of_lambda_is_the_inverse_of_log_snr(schedule):
    t = torch.linspace(-0.99, schedule.num_timesteps - 1, 777, dtype=torch.float64)
    torch.testing.assert_close(schedule.t_of_lambda(schedule.log_snr(t)), t, rtol=0, atol=1e-6)
    lam = torch.linspace(schedule.log_snr(schedule.num_timesteps - 1).item(), 8.0, 50, dtype=torch.float64)
    torch.testing.assert_close(schedule.log_snr(schedule.t_of_lambda(lam)), lam, rtol=0, atol=1e-6)


def test_t_of_lambda_of_a_number_and_of_infinity():
    schedule = NoiseSchedule.linear()
    t = schedule.t_of_lambda(schedule.log_snr(500).item())
    assert t.shape == () and t.dtype == torch.float64
    assert t.item() == pytest.approx(500)
    assert schedule.t_of_lambda(math.inf).item() == -1


def test_lambda_noisier_than_the_schedule_is_refused():
    with pytest.raises(ValueError, match="lambda must be at least -5.059, got -6"):
        NoiseSchedule.linear().t_of_lambda(torch.tensor([0.0, -6.0]))
