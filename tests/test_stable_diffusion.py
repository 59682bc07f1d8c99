"""What Lab 8 takes from the kit for Stable Diffusion: does it work without a download, and say so when it cannot?"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from difflab import stable_diffusion as sd


@pytest.fixture(scope="module")
def pipeline():
    return sd.tiny_pipeline()


def test_tiny_pipeline_paints_from_a_prompt_and_is_the_same_each_time(pipeline):
    def paint(pipe, prompt):
        rng = torch.Generator().manual_seed(0)
        return torch.as_tensor(pipe(prompt, num_inference_steps=2, generator=rng, output_type="pt").images)

    image = paint(pipeline, "a cat")
    assert image.shape == (1, 3, 24, 24) and image.isfinite().all()
    assert torch.equal(image, paint(sd.tiny_pipeline(), "a cat"))
    assert not torch.equal(image, paint(pipeline, "a dog"))
    assert not torch.equal(image, paint(sd.tiny_pipeline(seed=1), "a cat"))


def test_tiny_pipeline_leaves_the_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    sd.tiny_pipeline()
    assert torch.rand(()) == expected


def test_saved_pipeline_is_read_back():
    from diffusers import StableDiffusionPipeline

    read = StableDiffusionPipeline.from_pretrained(sd.save_tiny_pipeline(5), local_files_only=True, safety_checker=None)
    ours = sd.tiny_pipeline(5).unet.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in read.unet.state_dict().items())


def test_latents_become_the_images_of_the_pipeline(pipeline):
    latents = torch.randn(2, 4, 12, 12)
    images = sd.latents_to_images(pipeline, latents)
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    expected = pipeline.image_processor.postprocess(decoded, output_type="pt")
    assert images.dtype == torch.uint8
    assert (images / 255 - expected).abs().max() < 0.51 / 255


def test_clip_is_read_from_a_folder_and_gives_plain_tensors(tmp_path):
    clip = sd.Clip()
    clip.model.save_pretrained(tmp_path)
    clip.processor.save_pretrained(tmp_path)
    read = sd.Clip(str(tmp_path))
    inputs = clip.processor(text=["a cat"], images=[torch.zeros(3, 30, 26, dtype=torch.uint8)], return_tensors="pt")
    for a, b in (
        (clip.get_image_features(inputs["pixel_values"]), read.get_image_features(inputs["pixel_values"])),
        (clip.get_text_features(inputs["input_ids"], inputs["attention_mask"]),
         read.get_text_features(inputs["input_ids"], inputs["attention_mask"])),
    ):  # fmt: skip
        assert a.shape == (1, 16) and torch.allclose(a, b, atol=1e-5)


def test_clip_without_weights_is_an_os_error():
    with pytest.raises(OSError):
        sd.Clip("nobody/no-such-clip")


def test_coco_layout_holds_what_was_written(tmp_path):
    images = torch.randint(256, (3, 3, 16, 20), dtype=torch.uint8)
    captions = [[f"caption {i} of image {n}" for i in range(5 + n)] for n in range(3)]
    folder = Path(sd.save_coco(images, captions, tmp_path / "coco"))
    content = json.loads((folder / "annotations/captions_val2017.json").read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    assert all((folder / "val2017" / name).is_file() for name in names.values())
    found = {i: [] for i in sorted(names)}
    for annotation in sorted(content["annotations"], key=lambda a: a["id"]):
        found[annotation["image_id"]].append(annotation["caption"])
    assert list(found.values()) == captions
    for key in ("images", "annotations"):
        ids = [entry["id"] for entry in content[key]]
        assert len(set(ids)) == len(ids) and ids != sorted(ids)  # as in COCO, order joins nothing


def test_images_come_back_from_a_folder_in_batches(tmp_path):
    images = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    folder = sd.save_images(images, tmp_path)
    batches = list(sd.image_batches(folder, size=8, batch_size=2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert torch.equal(torch.cat(batches), images)


def test_wide_images_are_cut_about_their_centre(tmp_path):
    wide = torch.zeros(1, 3, 8, 16, dtype=torch.uint8)
    wide[..., 4:12] = 200
    (batch,) = sd.image_batches(sd.save_images(wide, tmp_path), size=8)
    assert batch.shape == (1, 3, 8, 8) and (batch == 200).all()


def test_folder_without_images_is_named(tmp_path):
    with pytest.raises(ValueError, match=tmp_path.name):
        next(sd.image_batches(tmp_path))


def test_inception_is_taken_from_the_cache_or_not_at_all(tmp_path, monkeypatch):
    from torchvision.models import inception_v3

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert sd.inception_features() is None
    (tmp_path / "checkpoints").mkdir()
    network = inception_v3(weights=None, init_weights=False)
    torch.save(network.state_dict(), tmp_path / "checkpoints" / "inception_v3_google-0cc3c7bd.pth")
    features = sd.inception_features().train()  # torchmetrics may ask for training mode
    images = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8)
    both, first = features(images), features(images[:1])
    assert both.shape == (2, 2048) == (2, features.num_features)
    assert torch.allclose(both[:1], first, atol=1e-4)


def test_what_is_missing_is_said_in_one_line(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchmetrics" else find(name))
    with pytest.raises(ModuleNotFoundError, match=r"^torchmetrics missing: .*acceleration.*$") as caught:
        sd.require_acceleration()
    assert "\n" not in str(caught.value)
