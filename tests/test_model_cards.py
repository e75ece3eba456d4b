"""The cards of the published checkpoints: what the Hub reads of them, and the figures that they quote."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from rq_hf import PRESETS, MARTransformerConfig, MARTransformerModel, RQTransformerConfig, RQTransformerModel
from rq_hf.convert import mar_card

FOLDER = Path(__file__).parents[1] / "model_cards"
FID, REJECTION = "FID", "FID, 5 % rejection sampling"
PUBLISHED = {  # card: preset and figures
    "ffhq-355m": ("ffhq-355m", {FID: 10.38}),
    "lsun-church-370m": ("lsun-church-370m", {FID: 7.45}),
    "lsun-cat-612m": ("lsun-cat-612m", {FID: 8.64}),
    "lsun-bedroom-612m": ("lsun-bedroom-612m", {FID: 3.04}),
    "imagenet-480m": ("imagenet-480m", {FID: 15.72}),
    "imagenet-821m": ("imagenet-821m", {FID: 13.11}),
    "imagenet-1.4b": ("imagenet-1.4b", {FID: 11.56, REJECTION: 4.45}),
    "imagenet-1.4b-rqvae-50-epochs": ("imagenet-1.4b", {FID: 8.71, REJECTION: 3.89}),
    "imagenet-3.8b": ("imagenet-3.8b", {FID: 7.55, REJECTION: 3.80}),
    "cc3m-654m": ("cc3m-654m", {FID: 12.33}),
    "cc3m-cc12m-yfcc-3.9b": ("cc3m-cc12m-yfcc-3.9b", {FID: 16.9}),
}


def test_every_checkpoint_has_a_card():
    own = {"emoji", "emoji-mar", "cifar10-classifier"}
    assert {path.stem for path in FOLDER.glob("*.md")} == {*PUBLISHED, *mar_card.PUBLISHED, *own}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_metadata_is_what_the_hub_needs(name):
    data = ModelCard.load(FOLDER / f"{name}.md").data
    text = name.startswith("cc3m")
    assert (data.license, data.license_name, data.library_name) == ("other", "cc-by-nc-sa-4.0", "rq_hf")
    assert data.license_link == "https://creativecommons.org/licenses/by-nc-sa/4.0/"
    assert data.pipeline_tag == ("text-to-image" if text else "unconditional-image-generation")
    assert data.datasets
    fids = {result.metric_name: result.metric_value for result in data.eval_results if result.metric_type == "fid"}
    assert fids == PUBLISHED[name][1]
    assert {result.source_url for result in data.eval_results} == {"https://github.com/kakaobrain/rq-vae-transformer"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_text_agrees_with_the_metadata_and_the_preset(name):
    card = ModelCard.load(FOLDER / f"{name}.md")
    preset, _ = PUBLISHED[name]
    assert preset in PRESETS and f"`{preset}`" in card.text
    with torch.device("meta"):
        transformer = RQTransformerModel(RQTransformerConfig.from_preset(preset))
    assert f"{transformer.num_parameters():,} parameters" in card.text
    table = card.text.partition("## Figures")[2]
    assert all(f"{result.metric_value:.4g}" in table for result in card.data.eval_results)
    assert "the authors', as published" in table
    assert "**no commercial use**" in card.text
    assert ("**inferred**" in card.text) == (name == "cc3m-cc12m-yfcc-3.9b")
    assert f"models/{name}" in card.text and "python -m rq_hf.convert" in card.text


@pytest.mark.parametrize("name", mar_card.PUBLISHED)
def test_cards_of_mar(name):
    card = ModelCard.load(FOLDER / f"{name}.md")
    title, fid, inception_score, guidance_scale = mar_card.PUBLISHED[name]
    assert (card.data.license, card.data.license_name, card.data.library_name) == ("other", "mit", "rq_hf")
    assert card.data.license_link == "https://github.com/LTH14/mar/blob/main/LICENSE"
    results = {result.metric_type: result for result in card.data.eval_results}
    assert {kind: result.metric_value for kind, result in results.items()} == {
        "fid": fid,
        "inception_score": inception_score,
    }
    assert {result.source_url for result in results.values()} == {"https://github.com/LTH14/mar"}
    with torch.device("meta"):
        transformer = MARTransformerModel(MARTransformerConfig.from_preset(name))
    assert f"{transformer.num_parameters():,} parameters" in card.text and f"`{name}`" in card.text
    table = card.text.partition("## Figures")[2]
    assert all(str(number) in table for number in (fid, inception_score, guidance_scale))
    assert "the authors', as published" in table and "say nothing else about them" in table
    assert card.text.lstrip().startswith(f"# {title}") and f"models/{name}" in card.text
