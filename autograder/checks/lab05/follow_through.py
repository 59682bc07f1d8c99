"""Points follow through: what is built on an exercise is judged even where that exercise is still wrong."""

import torch

from autograder.checks import expect


def ddim_sampler(submission, network, schedule):
    """The student's DDIMSampler; where its create_timestep_schedule is wrong, with a right uniform one in its place."""
    sampler = submission.DDIMSampler(network, schedule)
    total = schedule.num_timesteps
    try:
        for num_steps in (1, min(3, total), total // 2):
            timesteps = expect.tensor(sampler.create_timestep_schedule(num_steps), "", (num_steps,), torch.int64)
            if timesteps.max() >= total or (timesteps - _uniform(total, num_steps)).abs().max() > 1:
                break
        else:
            return sampler
    except expect.NOT_WORKING as error:
        if getattr(error, "kind", "") == "NotImplementedError":
            raise  # not wrong, but still to be written
    submission.set(sampler, "create_timestep_schedule", lambda num_steps, *_: _uniform(total, num_steps))
    return sampler


def _uniform(total: int, num_steps: int) -> torch.Tensor:
    if num_steps == 1:
        return torch.tensor([total - 1])
    return torch.linspace(total - 1, 0, num_steps, dtype=torch.float64).round().long()
