"""Around Stable Diffusion: a tiny pipeline and a tiny CLIP that need no download, images in folders, COCO's layout.

Nothing here touches the network: weights come from a folder or from the Hugging Face cache of this machine, or they are
random. diffusers and transformers are imported when they are needed, and `require_acceleration` says how to get them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by huggingface_hub once, when it is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork

__all__ = [
    "SCHEDULE",
    "TINY_UNET",
    "Clip",
    "RandomFeatures",
    "image_batches",
    "inception_features",
    "latents_to_images",
    "require_acceleration",
    "save_coco",
    "save_images",
    "save_tiny_pipeline",
    "tiny_pipeline",
]

SCHEDULE = {  # Stable Diffusion's noise: the roots of beta rise evenly
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
}
TINY_UNET = {  # the kinds of blocks of Stable Diffusion 1.5, a thousandth of its size
    "sample_size": 12,
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
}
_TINY_VAE = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
}
_TINY_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "projection_dim": 16,
}
_TINY_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
    "projection_dim": 16,
}


def require_acceleration() -> None:
    """Make sure that diffusers, transformers and torchmetrics are installed, and keep them quiet.

    Raises:
        ModuleNotFoundError: with one line that says what is missing and how to get it.
    """
    missing = [name for name in ("diffusers", "transformers", "torchmetrics") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{', '.join(missing)} missing: this part of Lab 8 needs the extra `acceleration`; "
            "run  pip install -e '.[acceleration]'  in the course's folder and restart the kernel"
        )
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    # DPM-Solver without ++ is what the lab compares with; diffusers advises against it each time.
    warnings.filterwarnings("ignore", message=".*algorithm_type.*dpmsolver", category=FutureWarning)


def tiny_pipeline(seed: int = 0) -> Any:
    """A whole Stable Diffusion pipeline, some hundred thousand random weights, built without a download.

    Tokenizer, text encoder, U-Net, scheduler and decoder are of the same classes as in Stable Diffusion 1.5; its
    images, 24 pixels wide, are noise.

    Returns:
        A diffusers.StableDiffusionPipeline on the CPU, in float32.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = _tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionPipeline(
            vae=AutoencoderKL(**_TINY_VAE),
            text_encoder=CLIPTextModel(CLIPTextConfig(**_TINY_TEXT, **_token_ids(tokenizer))).eval(),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(**TINY_UNET).eval(),
            scheduler=DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_tiny_pipeline(seed: int = 0) -> str:
    """Save `tiny_pipeline(seed)` in a new folder as `StableDiffusionPipeline.from_pretrained` reads it; its path."""
    folder = tempfile.mkdtemp(prefix="tiny_stable_diffusion_")
    tiny_pipeline(seed).save_pretrained(folder)
    return folder


@torch.no_grad()
def latents_to_images(pipeline: Any, latents: Tensor) -> Tensor:
    """Images, uint8 [B, 3, H, W] on the CPU, that the pipeline's decoder makes of latents [B, 4, h, w]."""
    images = [pipeline.vae.decode(x[None] / pipeline.vae.config.scaling_factor).sample[0] for x in latents]
    return (127.5 * (torch.stack(images) + 1)).round().clamp(0, 255).to("cpu", torch.uint8)


class Clip(nn.Module):
    """CLIP (Radford et al. 2021) as torchmetrics wants it: `CLIPScore(lambda: (clip, clip.processor))`.

    transformers 5 wraps features in an object that torchmetrics cannot read; here they are plain tensors.

    Args:
        source: a folder with the weights, or a name in the local Hugging Face cache such as
            "openai/clip-vit-base-patch16"; None for a tiny CLIP of random weights, whose scores mean nothing.

    Raises:
        OSError: if there are no weights under that name on this machine.
    """

    def __init__(self, source: str | None = None):
        from transformers import CLIPConfig, CLIPModel, CLIPProcessor

        super().__init__()
        if source is not None:
            self.model = CLIPModel.from_pretrained(source, local_files_only=True)
            self.processor = CLIPProcessor.from_pretrained(source, local_files_only=True)
        else:
            tokenizer, side = _tokenizer(), _TINY_VISION["image_size"]
            text = _TINY_TEXT | _token_ids(tokenizer)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(3)
                self.model = CLIPModel(CLIPConfig(text_config=text, vision_config=_TINY_VISION, projection_dim=16))
            self.processor = CLIPProcessor(_image_processor(side), tokenizer)
        self.eval().requires_grad_(False)
        self.config = self.model.config

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Embeddings [B, D] of processed images [B, 3, H, W]."""
        return _plain(self.model.get_image_features(pixel_values=pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings [B, D] of tokens [B, L]."""
        return _plain(self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask))


def _plain(features: Any) -> Tensor:
    return features if isinstance(features, Tensor) else features.pooler_output


def _tokenizer() -> Any:
    """CLIP's tokenizer with a vocabulary of single characters, so that no file is needed."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=77)


def _token_ids(tokenizer: Any) -> dict[str, int]:
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    return {"vocab_size": len(tokenizer), "bos_token_id": first, "eos_token_id": last, "pad_token_id": last}


def _image_processor(side: int) -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


# -- features for FID --------------------------------------------------------------------------------------------------


class RandomFeatures(nn.Module):
    """Features of a random convolution: they tell folders of images apart, but FIDs of them compare with nothing.

    Args:
        weights: [D, 3, k, k].
    """

    def __init__(self, weights: Tensor):
        super().__init__()
        self.register_buffer("weights", weights)
        self.num_features = len(weights)  # torchmetrics would otherwise find it out with a large image

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, D] of uint8 images [B, 3, H, W]: the mean over all places of relu(convolution)."""
        x = images.to(self.weights.dtype) / 127.5 - 1
        return F.conv2d(x, self.weights, stride=self.weights.shape[-1] // 2).relu().mean((2, 3))


def inception_features() -> nn.Module | None:
    """The 2048 features of torchvision's Inception v3, if its weights are in torch's cache on this machine.

    It is not the port of Inception that published FIDs rest on: values compare with each other, not with papers.

    Returns:
        A module from uint8 images [B, 3, H, W] to [B, 2048]; None if the weights are not there.
    """
    from torchvision.models import Inception_V3_Weights, inception_v3

    file = Path(torch.hub.get_dir(), "checkpoints", Path(Inception_V3_Weights.IMAGENET1K_V1.url).name)
    if not file.is_file():
        return None
    network = inception_v3(weights=None, init_weights=False)
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return _Inception(network)


class _Inception(nn.Module):
    num_features = 2048

    def __init__(self, network: nn.Module):
        super().__init__()
        network.fc, network.transform_input = nn.Identity(), False
        self.network = network.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> _Inception:
        return super().train(False)  # batch statistics would make features depend on their neighbours

    def forward(self, images: Tensor) -> Tensor:
        x = F.interpolate(images.float(), (299, 299), mode="bilinear", antialias=True) / 127.5 - 1
        return self.network(x)


# -- images in folders -------------------------------------------------------------------------------------------------


def save_images(images: Tensor, folder: str | Path | None = None) -> str:
    """Save uint8 images [N, 3, H, W] as 000000.png, 000001.png … in a folder, a temporary one when None; its path."""
    folder = Path(folder or tempfile.mkdtemp(prefix="images_"))
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        _picture(image).save(folder / f"{number:06}.png")
    return str(folder)


def image_batches(folder: str | Path, size: int = 64, batch_size: int = 32) -> Iterator[Tensor]:
    """The images (.jpg, .jpeg, .png) of a folder, in the order of their names, uint8 [≤ batch_size, 3, size, size].

    Each is scaled until its shorter side is `size`, and cut to a square about its centre.

    Raises:
        ValueError: if the folder holds no image.
    """
    from torchvision.transforms.v2.functional import center_crop, resize

    files = sorted(f for f in Path(folder).glob("*") if f.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        raise ValueError(f"there is no image (.jpg, .jpeg or .png) in {folder}")
    for start in range(0, len(files), batch_size):
        images = (_pixels(file) for file in files[start : start + batch_size])
        yield torch.stack([center_crop(resize(image, [size], antialias=True), [size, size]) for image in images])


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def _pixels(file: Path) -> Tensor:
    with Image.open(file) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def save_coco(images: Tensor, captions: Sequence[Sequence[str]], folder: str | Path | None = None) -> str:
    """Write images and captions in the layout of COCO 2017's validation set, in a temporary folder when None.

    As in COCO, the ids of images have gaps, and neither list of the file of captions is in the order of the other.

    Args:
        images: uint8 [N, 3, H, W].
        captions: N lists of captions; COCO has five, and for a few images six or seven.

    Returns:
        The folder, with val2017/000000000139.jpg … and annotations/captions_val2017.json in it.
    """
    folder = Path(folder or tempfile.mkdtemp(prefix="coco_"))
    (folder / "val2017").mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    ids = [139 + 146 * number for number in range(len(images))]
    listed = [
        {"id": i, "file_name": f"{i:012}.jpg", "height": x.shape[1], "width": x.shape[2]} for i, x in zip(ids, images)
    ]
    for entry, image in zip(listed, images):
        _picture(image).save(folder / "val2017" / entry["file_name"], quality=95)
    annotations = [
        {"id": 1000 * turn + number, "image_id": ids[number], "caption": texts[turn]}
        for turn in range(max(map(len, captions), default=0))
        for number, texts in enumerate(captions)
        if turn < len(texts)
    ]
    content = {"images": listed[::-1], "annotations": annotations[1::2] + annotations[::2]}
    (folder / "annotations" / "captions_val2017.json").write_text(json.dumps(content), encoding="utf-8")
    return str(folder)
