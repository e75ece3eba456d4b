import json

import pytest
import torch
from tiny import tiny_pipeline, tiny_tokenizer
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTForImageClassification

from rq_hf.metrics import clip_score
from rq_hf.metrics.scorers import IMAGENET_MEAN, IMAGENET_STD, ClassifierScorer, CLIPScorer

TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_classifier():
    model = ViTForImageClassification(ViTConfig(**TINY, image_size=8, patch_size=4, num_labels=5))
    images, labels = torch.rand(3, 3, 8, 8), [4, 0, 2]
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    expected = model.eval()((images - mean) / std).logits.log_softmax(dim=-1)[range(3), labels]
    torch.testing.assert_close(ClassifierScorer(model, image_size=8)(images, labels), expected)
    pipe = tiny_pipeline("class")
    out = pipe(class_labels=[0, 3], num_candidates=3, scorer=ClassifierScorer(model, image_size=8))
    assert len(out.images) == 2


@pytest.mark.parametrize(
    "preprocessor",
    [
        {"image_processor_type": "ViTImageProcessor", "size": 8},
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 8}},
        {"image_processor_type": "DeiTImageProcessor", "size": 12, "crop_size": 8, "do_center_crop": True},
    ],
    ids=["size", "shortest edge", "crop"],
)
def test_classifier_with_the_settings_of_its_checkpoint(tmp_path, preprocessor):
    model = ViTForImageClassification(ViTConfig(**TINY, image_size=8, patch_size=4, num_labels=5))
    model.save_pretrained(tmp_path)
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor | statistics))
    expected = ClassifierScorer(model, 8, *statistics.values())
    images, labels = torch.rand(2, 3, 16, 12), [4, 0]
    assert torch.equal(ClassifierScorer.from_pretrained(str(tmp_path))(images, labels), expected(images, labels))


def test_clip():
    tokenizer = tiny_tokenizer()
    text = {**TINY, "vocab_size": len(tokenizer), "max_position_embeddings": 8, "pad_token_id": 0}
    config = CLIPConfig(text_config=text, vision_config={**TINY, "image_size": 8, "patch_size": 4})
    scorer = CLIPScorer(CLIPModel(config), tokenizer)
    images, prompts = torch.rand(3, 3, 20, 12), ["red", "red apple", "fire engine"]
    scores = scorer(images, prompts)
    assert scores.shape == (3,)
    assert (scores.abs() <= 1).all()
    alone = torch.cat([scorer(images[i : i + 1], prompts[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(scores, alone)
    assert not torch.allclose(scores, scorer(images, prompts[::-1]))
    assert len(tiny_pipeline("text")("red apple", num_candidates=3, scorer=scorer).images) == 1


def test_clip_score_is_the_cosine():
    images, texts = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([[2.0, 2.0], [0.0, -1.0]])
    torch.testing.assert_close(clip_score(images, texts), torch.tensor([0.5**0.5, -1.0]))
    with pytest.raises(ValueError, match=r"text_embeds must have the shape \(2, 2\), got \(1, 2\)"):
        clip_score(images, texts[:1])
    with pytest.raises(ValueError, match="image_embeds must be finite"):
        clip_score(images * torch.nan, texts)
