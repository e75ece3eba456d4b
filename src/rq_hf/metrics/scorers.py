"""Scores for rejection sampling: `pipe(..., scorer=ClassifierScorer(model), num_candidates=20)` (section 4.2).

A scorer takes pictures `(B, 3, height, width)` in [0, 1] and the list of their prompts or labels, and returns `(B,)`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import CLIPModel, PreTrainedModel, PreTrainedTokenizerBase

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ClassifierScorer:
    """
    The log-probability that a classifier of pictures gives their labels.

    Args:
        model: from `AutoModelForImageClassification.from_pretrained`; its classes are those of the pipeline.
        image_size: side of the pictures that it takes; others are resized.
        mean, std: of its normalization, per channel.
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

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, labels: list[int]) -> torch.Tensor:
        logits = self.model(normalize(images.to(self.model.device), self.image_size, self.mean, self.std)).logits
        labels = torch.tensor(labels, device=logits.device)
        return logits.float().log_softmax(dim=-1).gather(-1, labels[:, None]).squeeze(-1)


class CLIPScorer:
    """
    The cosine similarity, by CLIP, of pictures and prompts.

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
        return F.cosine_similarity(output.image_embeds.float(), output.text_embeds.float())


def normalize(images: torch.Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Pictures `(B, 3, height, width)` in [0, 1] -> `(B, 3, size, size)` of zero mean and unit deviation."""
    images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (images.new_tensor(values)[:, None, None] for values in (mean, std))
    return (images - mean) / std
