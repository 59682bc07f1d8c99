"""Lab 8, part 4: solutions with one realistic mistake each, the checks each must lose, and what the hint must say."""

from __future__ import annotations

from tests.accuracy import Mutant

_LOOP = ("propagated_sampling", "batched_decoding", "same_as_pipeline")
_GUIDE = "return null + guidance_scale * (prompted - null)"
_PAINT = "return unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))"
_DECODE = "self.network.decode(h, skips, t.expand(rows), both)"
_TAKE = """unet, skips = self.unet, list(skips)
    emb = unet.time_embedding(unet.get_time_embed(sample=h, timestep=t))
    for block in unet.up_blocks:
        count = len(block.resnets)
        skips, taken = skips[:-count], tuple(skips[-count:])"""
_DPM = 'solver_order=2, final_sigmas_type="sigma_min"'


def _both(hint: str) -> dict[str, str]:
    """Wrong halves: their own check says why, the comparison with the pipeline sees it too."""
    return {"unet_halves": hint, "same_as_pipeline": "sample with"}


def _loop(hint: str, names: tuple[str, ...] = _LOOP[:2]) -> dict[str, str]:
    """A wrong loop, the comparison with the pipeline fails as well if `names` says so."""
    return {name: hint if name != "same_as_pipeline" else "sample with" for name in names}


MUTANTS = [
    # -- loading
    Mutant("names that can be no model's", "load_stable_diffusion", "except (OSError, ValueError):", "except OSError:",
           {"load_stable_diffusion": "raised ValueError"}),
    Mutant("no fallback", "load_stable_diffusion", "except (OSError, ValueError):", "except KeyError:",
           {"load_stable_diffusion": "raised"}),
    Mutant("the weights not taken", "load_stable_diffusion", "return pipeline, f", "return tiny_pipeline(), f",
           {"load_stable_diffusion": "as tiny_pipeline() does"}),
    Mutant("source not named", "load_stable_diffusion", "No weights of {source} on", "No weights on",
           {"load_stable_diffusion": "should hold the source"}),
    Mutant("random not said", "load_stable_diffusion", "a tiny pipeline with random weights", "a tiny pipeline",
           {"load_stable_diffusion": 'say that the weights are "random"'}),
    Mutant("two lines", "load_stable_diffusion", "on this machine: ", "on this machine:\\n",
           {"load_stable_diffusion": "one line of text"}),
    # -- schedulers
    Mutant("clipping", "make_scheduler", "clip_sample=False, ", "", {"make_scheduler": "clip_sample=True gives"}),
    Mutant("alpha set to one", "make_scheduler", ", set_alpha_to_one=False", "",
           {"make_scheduler": "set_alpha_to_one=True gives"}),
    Mutant("both defaults", "make_scheduler", ", clip_sample=False, set_alpha_to_one=False", "",
           {"make_scheduler": "the defaults"}),
    Mutant("no schedule for DDIM", "make_scheduler", "DDIMScheduler(**SCHEDULE, ", "DDIMScheduler(",
           {"make_scheduler": "steps_offset"}),
    Mutant("no schedule for DPM-Solver", "make_scheduler", '**SCHEDULE, algorithm_type="dpmsolver",',
           'algorithm_type="dpmsolver",', {"make_scheduler": "without those in SCHEDULE"}),
    Mutant("evenly spaced betas", "make_scheduler", '**SCHEDULE, algorithm_type="dpmsolver",',
           '**SCHEDULE | {"beta_schedule": "linear"}, algorithm_type="dpmsolver",',
           {"make_scheduler": "evenly spaced betas"}),
    Mutant("++ under the other name", "make_scheduler", 'algorithm_type="dpmsolver",', 'algorithm_type="dpmsolver++",',
           {"make_scheduler": "DPM-Solver++ with final_sigmas_type"}),
    Mutant("ends at sigma_min", "make_scheduler", 'final_sigmas_type="zero"', 'final_sigmas_type="sigma_min"',
           {"make_scheduler": '"sigma_min" gives'}),
    Mutant("first order", "make_scheduler", _DPM, _DPM.replace("2", "1"), {"make_scheduler": "solver_order=1"}),
    Mutant("leading timesteps", "make_scheduler", _DPM, _DPM + ', timestep_spacing="leading"',
           {"make_scheduler": "the timesteps of dpm-solver"}),
    Mutant("DDIM for any other name", "make_scheduler", "if name not in makers:",
           'name = name if name in makers else "ddim"\n    if False:', {"make_scheduler": "was accepted"}),
    # -- halves
    Mutant("time of the key step", "unet_halves", "h = unet.conv_in(x)",
           "h = unet.conv_in(x)\n    embed = type(unet).get_time_embed\n    unet.get_time_embed = "
           "lambda sample, timestep: embed(unet, sample, timestep if sample.shape == x.shape else t)",
           _both("time embedding of the key step")),
    Mutant("no middle block", "unet_halves", "return unet.mid_block(h, emb, encoder_hidden_states=text), skips",
           "return h, skips", _both("without its middle block")),
    Mutant("no norm and activation", "unet_halves", _PAINT, "return unet.conv_out(h)",
           _both("without conv_norm_out and conv_act")),
    Mutant("no activation", "unet_halves", _PAINT, "return unet.conv_out(unet.conv_norm_out(h))",
           _both("without conv_act")),
    Mutant("no upsample size", "unet_halves", "if skips:", "if False:", {"unet_halves": "see upsample_size"}),
    Mutant("skips used up", "unet_halves", _TAKE,
           _TAKE.replace("list(skips)", "skips").replace("skips, taken = skips[:-count], tuple(skips[-count:])",
                                                         "taken = tuple(skips.pop() for _ in range(count))[::-1]"),
           {"unet_halves": "work on a copy of the list", "same_as_pipeline": "raised"}),
    Mutant("skips of a block in reverse", "unet_halves", "tuple(skips[-count:])", "tuple(skips[:-count-1:-1])",
           {"unet_halves": "raised RuntimeError", "same_as_pipeline": "raised RuntimeError"}),
    Mutant("first skip left out", "unet_halves", "skips = [h]", "skips = []",
           {"unet_halves": "raised", "same_as_pipeline": "raised"}),
    Mutant("one timestep for the batch", "unet_halves", "get_time_embed(sample=x, timestep=t)",
           "get_time_embed(sample=x, timestep=t[0])", {"unet_halves": "for the whole batch in the encoder"}),
    # -- the loop
    Mutant("text and null exchanged", "propagated_sampling", "null, prompted = eps.chunk(2)",
           "prompted, null = eps.chunk(2)", _loop("text and null text exchanged", _LOOP)),
    Mutant("guidance from the prompt", "propagated_sampling", _GUIDE, _GUIDE.replace("return null", "return prompted"),
           _loop("guidance from the prompt", _LOOP)),
    Mutant("no guidance", "propagated_sampling", _GUIDE, "return prompted", _loop("no guidance", _LOOP)),
    Mutant("scaled prompt", "propagated_sampling", _GUIDE, "return guidance_scale * prompted",
           _loop("in place of guidance", _LOOP)),
    Mutant("noise injected early", "propagated_sampling", "if t < halfway:", "if t >= halfway:",
           _loop("noise injection at t ≥ T/2")),
    Mutant("noise injected always", "propagated_sampling", "if t < halfway:", "if True:",
           _loop("noise injection at every step")),
    Mutant("no noise injected", "propagated_sampling", "if t < halfway:", "if False:", _loop("no noise injection")),
    Mutant("fresh noise", "propagated_sampling", "injection * x_T", "injection * torch.randn_like(x_T)",
           _loop("is off by")),
    Mutant("encoder at every step", "propagated_sampling", "if i == 0:", "if True:",
           {**_loop("at every step"), "same_as_pipeline": "sample with"}),
    Mutant("decoder's time of the key step", "propagated_sampling", _DECODE, _DECODE.replace("t.ex", "run[0].ex"),
           {"propagated_sampling": "the time of the key step", "same_as_pipeline": "sample with"}),
    Mutant("features of step 0 throughout", "propagated_sampling", "if i == 0:", "if start + i == 0:",
           {"propagated_sampling": "should run the encoder", "batched_decoding": "IndexError",
            "same_as_pipeline": "sample with"}),
    Mutant("last step left out", "propagated_sampling", "[*key_steps[1:], num_steps]",
           "[*key_steps[1:], num_steps - 1]", _loop("decode", _LOOP)),
    Mutant("key schedule without step 0", "propagated_sampling", "key_steps[:1] != [0]", "not key_steps",
           {"propagated_sampling": "without step 0"}),
    Mutant("unsorted key schedule", "propagated_sampling",
           " or any(a >= b for a, b in zip(key_steps, key_steps[1:]))", "", {"propagated_sampling": "unsorted"}),
    Mutant("repeated key step", "propagated_sampling", "a >= b for", "a > b for",
           {"propagated_sampling": "with a step twice"}),
    Mutant("key step out of range", "propagated_sampling", "key_steps[-1] >= num_steps", "key_steps[-1] > num_steps",
           {"propagated_sampling": "not below num_steps"}),
    Mutant("solver remembers the last run", "propagated_sampling",
           "self.scheduler.set_timesteps(num_steps, device=x_T.device)",
           "if self.scheduler.num_inference_steps != num_steps:\n        self.scheduler.set_timesteps(num_steps)",
           {**_loop("set_timesteps at the start"), "same_as_pipeline": "sample"}),
    Mutant("batched in name only", "propagated_sampling", "decode_together(h, skips, run) if batched",
           "[self.network.decode(h, skips, s.expand(rows), both) for s in run] if batched",
           {"batched_decoding": "once for each key step"}),
    Mutant("texts in another order", "propagated_sampling", "torch.cat([both] * k)", "both.repeat_interleave(k, dim=0)",
           {"batched_decoding": "the h of one text and another text", "same_as_pipeline": "batched = True"}),
    Mutant("timesteps in another order", "propagated_sampling", "run.repeat_interleave(rows)", "run.repeat(rows)",
           {"batched_decoding": "all go in one order", "same_as_pipeline": "batched = True"}),
    # -- folders and scores
    Mutant("one caption", "read_coco", 'captions[image["id"]]) for', 'captions[image["id"]][:1]) for',
           {"read_coco": "all captions of an image"}),
    Mutant("images as they come", "read_coco", 'sorted(content["images"], key=lambda image: image["id"])',
           'content["images"]', {"read_coco": "order of their ids"}),
    Mutant("captions as they come", "read_coco", 'sorted(content["annotations"], key=lambda a: a["id"])',
           'content["annotations"]', {"read_coco": "order of the annotations' ids"}),
    Mutant("joined by position", "read_coco", 'captions[annotation["image_id"]].append',
           'list(captions.values())[annotation["id"] % len(captions)].append',
           {"read_coco": "whose id is its image_id"}),
    Mutant("folder left out", "read_coco", ' / "val2017" / ', " / ", {"read_coco": "FOLDER/val2017/NAME"}),
    Mutant("empty without captions", "read_coco", "if not file.is_file():", "if not file.is_file():\n        return []",
           {"read_coco": "FileNotFoundError; it did not"}),
    Mutant("first batch only", "folder_fid", "in image_batches(folder, size, batch_size):",
           "in [next(image_batches(folder, size, batch_size))]:", {"folder_fid": "only the first batch"}),
    Mutant("last batch dropped", "folder_fid", "            metric.update(images",
           "            if len(images) == batch_size: metric.update(images", {"folder_fid": "last, smaller batch"}),
    Mutant("one folder twice", "folder_fid", "(generated, False)", "(real, False)", {"folder_fid": "against itself"}),
    Mutant("all images real", "folder_fid", "real=is_real", "real=True", {"folder_fid": "raised RuntimeError"}),
    Mutant("a tensor", "folder_fid", "metric.compute().item()", "metric.compute()", {"folder_fid": "plain float"}),
    Mutant("cosine", "clip_score", "metric.compute().item()", "metric.compute().item() / 100",
           {"clip_score": "without the factor 100"}),
    Mutant("the scale of the definition", "clip_score", "metric.compute().item()", "metric.compute().item() / 40",
           {"clip_score": "2.5 · cos"}),
    Mutant("first prompt for all", "clip_score", "prompts[start : start + batch_size]",
           "prompts[:1] * len(images[start : start + batch_size])", {"clip_score": "the first prompt for every image"}),
    Mutant("images without a prompt left out", "clip_score", "if len(images) != len(prompts):",
           "images = images[: len(prompts)]\n    if False:", {"clip_score": "was accepted"}),
    Mutant("last batch forgotten", "clip_score", "range(0, len(images), batch_size)",
           "range(0, len(images) - batch_size + 1, batch_size)", {"clip_score": "last, smaller batch"}),
]  # fmt: skip
