"""Pushed to a Hub and loaded again, by the real client.

A client reads the address of its Hub at import. So the one test here starts a Hub, and a second pytest which talks to
that Hub and collects the `check_*` functions of this file instead.
"""

import os
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from fake_hub import FakeHub
from huggingface_hub import ModelCard, create_repo, hf_hub_download, list_repo_files, upload_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, PreTrainedTokenizerFast

from rq_hf import RQPipeline, RQTransformerConfig, RQTransformerModel, RQVAEModel

VOCABULARY = {"[PAD]": 0, "red": 1, "apple": 2}


def test_hub(tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_TOKEN": "hf_fake", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
    env |= {"NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-o", "python_functions=check_*"]
    with FakeHub() as hub:
        child = subprocess.run(
            [sys.executable, "-m", "pytest", *options, __file__],
            env=env | {"HF_ENDPOINT": hub.endpoint},
            capture_output=True,
            text=True,
        )
    if child.returncode:
        pytest.fail(child.stdout + child.stderr, pytrace=False)


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    codebook = {"codebook_size": 16, "codebook_dim": 8}
    vae = RQVAEModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=8,
        depth=3,
        sample_size=8,
        **codebook,
    )
    stack = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = RQTransformerConfig(
        code_shape=(4, 4, 3),
        cond_vocab_size=len(VOCABULARY),
        cond_length=3,
        null_cond_id=0,
        spatial_config=stack,
        depth_config=stack,
        **codebook,
    )
    transformer = RQTransformerModel(config)
    transformer.set_codebook(vae.quantizer.codebook)
    words = Tokenizer(models.WordLevel(VOCABULARY))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
    return RQPipeline(vae.eval(), transformer.eval(), tokenizer)


def assert_same_weights(model, loaded):
    assert type(loaded) is type(model)
    expected, actual = model.state_dict(), loaded.state_dict()
    assert actual.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]


def assert_same_pipeline(pipe, loaded):
    assert type(loaded) is RQPipeline
    assert_same_weights(pipe.vae, loaded.vae)
    assert_same_weights(pipe.transformer, loaded.transformer)
    expected, actual = (
        p("red apple", guidance_scale=2.0, generator=torch.Generator().manual_seed(0), output_type="pt")
        for p in (pipe, loaded)
    )
    assert torch.equal(actual.codes, expected.codes)
    assert torch.equal(actual.images, expected.images)


@pytest.mark.parametrize("loader", [RQPipeline, DiffusionPipeline])
def check_pipeline(pipe, loader):
    pipe.push_to_hub("tester/pipeline")
    assert_same_pipeline(pipe, loader.from_pretrained("tester/pipeline"))


@pytest.mark.parametrize("loader", [RQPipeline, DiffusionPipeline])
def check_shards_and_variant(pipe, loader, tmp_path):
    repo = "tester/sharded"
    pipe.save_pretrained(str(tmp_path), push_to_hub=True, repo_id=repo, max_shard_size="10KB", variant="small")
    files = list_repo_files(repo)
    assert {"transformer/model.safetensors.index.small.json", "model_index.json"} <= set(files)
    assert sum("small-0000" in file for file in files) >= 4
    assert_same_pipeline(pipe, loader.from_pretrained(repo, variant="small"))


def check_vae(pipe):
    pipe.vae.push_to_hub("tester/vae")
    assert_same_weights(pipe.vae, RQVAEModel.from_pretrained("tester/vae"))


@pytest.mark.parametrize("loader", [RQTransformerModel, AutoModel])
def check_transformer(pipe, loader):
    pipe.transformer.push_to_hub("tester/transformer")
    assert_same_weights(pipe.transformer, loader.from_pretrained("tester/transformer"))


@pytest.mark.parametrize("part", ["pipeline", "vae", "transformer"])
def check_card_survives(pipe, part):
    repo = create_repo(f"tester/{part}-with-card").repo_id
    card = b"---\nlicense: apache-2.0\n---\nDraws fire engines.\n"
    upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=repo)
    model = pipe if part == "pipeline" else getattr(pipe, part)
    model.push_to_hub(repo)
    card = ModelCard.load(hf_hub_download(repo, "README.md"))
    assert card.data.license == "apache-2.0"
    assert card.text.strip() == "Draws fire engines."


def card_of(repo):
    return ModelCard.load(hf_hub_download(repo, "README.md"))


def check_pipeline_gets_a_card(pipe, tmp_path):
    pipe.push_to_hub("tester/pushed")
    pipe.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="tester/saved")
    for repo in ("tester/pushed", "tester/saved"):
        card = card_of(repo)
        assert (card.data.library_name, card.data.pipeline_tag) == ("rq_hf", "text-to-image")
        assert f'rq_hf.RQPipeline.from_pretrained("{repo}")' in card.text
        assert "pipeline.py" in list_repo_files(repo)


def check_card_of_a_folder(pipe, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: apache-2.0\n---\nMine.\n")
    pipe.save_pretrained(tmp_path, push_to_hub=True, repo_id="tester/with-folder")
    assert card_of("tester/with-folder").text.strip() == "Mine."
    path.write_text("Another.\n")
    pipe.save_pretrained(tmp_path, push_to_hub=True, repo_id="tester/with-folder")
    assert card_of("tester/with-folder").text.strip() == "Mine."
    assert path.read_text() == "Another.\n"


def check_publishing_needs_a_token(pipe, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="cannot write to tester/no-token .there is no token: run `hf auth login`"):
        pipe.push_to_hub("tester/no-token")
