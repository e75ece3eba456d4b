"""Scores for rejection sampling: `pipe(..., scorer=ClassifierScorer(model), num_candidates=20)` (section 4.2).

A scorer takes images `(B, 3, height, width)` in [0, 1] and the list of their prompts or labels, and returns `(B,)`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForImageClassification,
    CLIPModel,
    ImageProcessingMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..argument_checks import check_finite, check_floating, check_values

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ClassifierScorer:
    """
    The log-probability of each label under an image classifier.

    Images are resized to a square without cropping, so that images that are not square are distorted.

    Args:
        model: from `AutoModelForImageClassification.from_pretrained`, with the classes of the pipeline.
        image_size: height and width of its inputs, in pixels.
        mean, std: normalization of its inputs, per channel.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        image_size: int = 224,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):
        self.model = model.eval()
        self.image_size = image_size
        self.mean = mean
        self.std = std

    @classmethod
    def from_pretrained(cls, checkpoint: str, **kwargs) -> "ClassifierScorer":
        """
        Args:
            checkpoint: folder or Hub id of a classifier. `image_size`, `mean` and `std` are those of its
                `preprocessor_config.json`.
            kwargs: for `AutoModelForImageClassification.from_pretrained`.
        """
        size, mean, std = image_settings(checkpoint)
        model = AutoModelForImageClassification.from_pretrained(checkpoint, **kwargs)
        return cls(model, size, mean, std)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, labels: list[int]) -> torch.Tensor:
        logits = self.model(normalize(images.to(self.model.device), self.image_size, self.mean, self.std)).logits
        labels = torch.tensor(labels, device=logits.device)
        return logits.float().log_softmax(dim=-1).gather(-1, labels[:, None]).squeeze(-1)


class CLIPScorer:
    """
    The cosine similarity of images and prompts according to CLIP.

    Images are resized to the square input of the model without cropping, and normalized as by OpenAI's models.

    Args:
        model: from `CLIPModel.from_pretrained`.
        tokenizer: from the same folder.
    """

    def __init__(self, model: CLIPModel, tokenizer: PreTrainedTokenizerBase):
        self.model = model.eval()
        self.tokenizer = tokenizer

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        device = self.model.device
        pixels = normalize(images.to(device), self.model.config.vision_config.image_size, CLIP_MEAN, CLIP_STD)
        text = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(device)
        output = self.model(text["input_ids"], pixels.to(self.model.dtype), text["attention_mask"])
        return clip_score(output.image_embeds, output.text_embeds)


def clip_score(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """
    The cosine similarity of every image and its prompt, `(B,)` in [-1, 1], from CLIP embeddings `(B, F)` of both.

    Some authors scale it (Hessel et al. 2021 by 2.5, others by 100) and replace negative values by 0; this does not.
    Raises `TypeError`/`ValueError` for other shapes, and NaN.
    """
    check_floating("image_embeds", image_embeds, "B", "F")
    check_floating("text_embeds", text_embeds, *image_embeds.shape)
    for name, embeds in (("image_embeds", image_embeds), ("text_embeds", text_embeds)):
        check_values(name, embeds)
        check_finite(name, embeds)
    return F.cosine_similarity(image_embeds.float(), text_embeds.float())


def image_settings(checkpoint: str) -> tuple[int, list[float], list[float]]:
    """Size, mean and deviation of a model's inputs, from the `preprocessor_config.json` of its folder or Hub id."""
    # Not AutoImageProcessor, which older releases of transformers leave to torchvision.
    settings, _ = ImageProcessingMixin.get_image_processor_dict(checkpoint)
    size = settings["crop_size"] if settings.get("do_center_crop") else settings["size"]
    size = size if isinstance(size, int) else size.get("height") or size["shortest_edge"]
    return size, settings["image_mean"], settings["image_std"]


def normalize(images: torch.Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Images `(B, 3, height, width)` in [0, 1] -> `(B, 3, size, size)` with zero mean and unit deviation."""
    images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (images.new_tensor(values)[:, None, None] for values in (mean, std))
    return (images - mean) / std
