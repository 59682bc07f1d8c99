"""Points follow through: what is built on an exercise is judged even where that exercise is still wrong."""

import torch

from autograder.checks import expect
from autograder.checks.oracles import ideal_timesteps


def ddim_sampler(submission, network, schedule):
    """The student's DDIMSampler; where its create_timestep_schedule is wrong, with a right uniform one in its place."""
    sampler = submission.DDIMSampler(network, schedule)
    total = schedule.num_timesteps

    def uniform(num_steps, *_):
        return ideal_timesteps(total, num_steps, power=1).round().long()

    try:
        for num_steps in (1, min(3, total), total // 2):
            timesteps = expect.tensor(sampler.create_timestep_schedule(num_steps), "", (num_steps,), torch.int64)
            if timesteps.max() >= total or (timesteps - uniform(num_steps)).abs().max() > 1:
                break
        else:
            return sampler
    except expect.NOT_WORKING as error:
        if getattr(error, "kind", "") == "NotImplementedError":
            raise  # not wrong, but still to be written
    submission.set(sampler, "create_timestep_schedule", uniform)
    return sampler
