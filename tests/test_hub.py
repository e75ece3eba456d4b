"""Pushed to a Hub and loaded again, by the real client.

A client reads the address of its Hub at import. So the one test here starts a Hub, and a second pytest which talks to
that Hub and collects the `check_*` functions of this file instead.
"""

import hashlib
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from alone import run_alone
from diffusers import DiffusionPipeline
from fake_hub import BROKEN, FakeHub
from huggingface_hub import (
    ModelCard,
    create_repo,
    hf_hub_download,
    list_repo_files,
    model_info,
    upload_file,
    upload_folder,
)
from huggingface_hub.errors import RepositoryNotFoundError
from PIL import Image
from tiny import MAR_CALL, tiny_embedding, tiny_mar_pipeline, tiny_vectors
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

import rq_hf_cli
from rq_hf import RQPipeline, RQTransformerConfig, RQTransformerModel, RQVAEModel, SemanticIds

VOCABULARY = {"[PAD]": 0, "red": 1, "apple": 2}
LORA = Path(__file__).parents[1] / "examples" / "train_lora.py"


def test_hub(tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_TOKEN": "hf_fake", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
    env |= {"NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    options = [
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-o",
        "python_functions=check_*",
        "-o",
        "python_classes=Check*",
    ]
    with FakeHub() as hub:
        hub.commit("somebody/model", {})
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


def check_command_line(pipe, tmp_path, capsys):
    pipe.push_to_hub("tester/commanded")
    rq_hf_cli.main(["info", "tester/commanded"])
    assert "codes        4×4×3 of 16" in capsys.readouterr().out
    rq_hf_cli.main(["generate", "tester/commanded", "red apple", "--seed", "1", "-o", str(tmp_path)])
    with Image.open(tmp_path / "red-apple-1.png") as image:
        assert image.tobytes() == pipe("red apple", generator=[1]).images[0].tobytes()
    with pytest.raises(SystemExit, match="there is no folder 'tester/none', nor a pipeline of this name from the Hub"):
        rq_hf_cli.main(["generate", "tester/none", "red apple"])


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


MODELS = ["vae", "transformer"]


@pytest.mark.parametrize("part", MODELS)
@pytest.mark.parametrize("method", ["push_to_hub", "save_pretrained"])
def check_models_get_a_card(pipe, part, method, tmp_path):
    model, repo = getattr(pipe, part), f"tester/{part}-{method.replace('_', '-')}"
    if method == "push_to_hub":
        model.push_to_hub(repo)
    else:
        model.save_pretrained(tmp_path, push_to_hub=True, repo_id=repo)
    card = card_of(repo)
    assert card.data.library_name == "rq_hf" and f'from_pretrained("{repo}")' in card.text
    assert "@inproceedings{lee2022" in card.text and "More Information Needed" not in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    exec(code, {})


@pytest.fixture(scope="module")
def ids():
    ids = SemanticIds.encode(tiny_embedding(), [f"item {i}" for i in range(50)], tiny_vectors(50))
    return ids.resolve("suffix")[0]


def assert_same_ids(ids, loaded):
    assert loaded.items == ids.items and torch.equal(loaded.codes, ids.codes)
    assert_same_weights(ids.model, loaded.model)


def check_semantic_ids(ids, tmp_path):
    address = ids.push_to_hub("tester/ids")
    assert str(address).endswith(model_info("tester/ids").sha)
    assert_same_ids(ids, SemanticIds.from_pretrained("tester/ids"))
    ids.save_pretrained(tmp_path, push_to_hub=True, repo_id="tester/saved-ids")
    assert_same_ids(ids, SemanticIds.from_pretrained("tester/saved-ids"))
    assert_same_ids(ids, SemanticIds.from_pretrained("tester/saved-ids", local_files_only=True))
    for repo in ("tester/ids", "tester/saved-ids"):
        card = card_of(repo)
        assert card.data.library_name == "rq_hf" and "semantic-ids" in card.data.tags
        assert str(ids.report()) in card.text
        (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
        exec(code, {})


def check_places_of_semantic_ids(ids, tmp_path):
    ids.push_to_hub("tester/places", subfolder="deep/er", private=True)
    ids.resolve("keep")[0].push_to_hub("tester/places", revision="other")
    assert {path.rpartition("/")[0] for path in list_repo_files("tester/places")} == {"deep/er"}
    assert_same_ids(ids, SemanticIds.from_pretrained("tester/places", subfolder="deep/er"))
    assert_same_ids(ids, SemanticIds.from_pretrained("tester/places", revision="other"))
    with pytest.raises(FileNotFoundError, match="holds no semantic IDs: it has no semantic_ids.json"):
        SemanticIds.from_pretrained("tester/places")
    with pytest.raises(RepositoryNotFoundError):
        SemanticIds.from_pretrained("tester/places", revision="other", token=False, cache_dir=tmp_path)


def check_semantic_ids_without_the_package(ids, tmp_path):
    ids.push_to_hub("tester/ids-with-code", with_code=True)
    usage, unpack = re.findall(r"```python\n(.*?)```", card_of("tester/ids-with-code").text, re.DOTALL)
    assert run_alone(tmp_path, unpack + usage + "print(text)") == [ids.text(ids.items[0])]


def check_interrupted_upload_of_semantic_ids_changes_nothing(ids, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client tries again, later and later
    ids.push_to_hub("tester/ids-break")
    before = model_info("tester/ids-break").sha
    other = SemanticIds(tiny_embedding(), [1], torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ConnectionError, match="the upload failed"):
        other.push_to_hub("tester/ids-break", commit_message=BROKEN)
    assert model_info("tester/ids-break").sha == before
    assert_same_ids(ids, SemanticIds.from_pretrained("tester/ids-break"))


def check_in_a_fresh_process(pipe):
    """Both pipelines and every part of them, by the names of their repositories."""
    mar = tiny_mar_pipeline("text")
    mar.push_to_hub("tester/mar")
    pipe.push_to_hub("tester/rq")
    pipe.vae.push_to_hub("tester/rq-vae")
    pipe.transformer.push_to_hub("tester/rq-transformer")
    pipe.tokenizer.push_to_hub("tester/rq-tokenizer")
    mar.transformer.push_to_hub("tester/mar-transformer")
    child = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    images = [
        p("red apple", guidance_scale=2.0, generator=torch.Generator().manual_seed(0), **settings).images[0]
        for p, settings in ((pipe, {}), (mar, MAR_CALL))
    ]
    assert child.stdout.split() == [digest(image) for image in (images[0], images[0], images[1], images[1])]


def digest(image):
    return hashlib.sha256(image.tobytes()).hexdigest()


FRESH = """
import hashlib
import torch
import rq_hf
from transformers import AutoTokenizer

rq = rq_hf.RQPipeline.from_pretrained("tester/rq")
mar = rq_hf.MARPipeline.from_pretrained("tester/mar")
parts = rq_hf.RQPipeline(
    rq_hf.RQVAEModel.from_pretrained("tester/rq-vae"),
    rq_hf.RQTransformerModel.from_pretrained("tester/rq-transformer"),
    AutoTokenizer.from_pretrained("tester/rq-tokenizer"),
)
mar_parts = rq_hf.MARPipeline.from_pretrained(
    "tester/mar", transformer=rq_hf.MARTransformerModel.from_pretrained("tester/mar-transformer")
)
for pipe in (rq, parts, mar, mar_parts):
    settings = {} if isinstance(pipe, rq_hf.RQPipeline) else {"num_iterations": 3, "num_inference_steps": 2}
    (image,) = pipe("red apple", guidance_scale=2.0, generator=torch.Generator().manual_seed(0), **settings).images
    print(hashlib.sha256(image.tobytes()).hexdigest())
"""


def check_without_the_package(pipe, tmp_path):
    pipe.push_to_hub("tester/with-code", with_code=True)
    pipe.transformer.push_to_hub("tester/transformer-with-code", with_code=True)
    usage, unpack = re.findall(r"```python\n(.*?)```", card_of("tester/with-code").text, re.DOTALL)
    lines = [*run_alone(tmp_path, unpack + usage + SAMPLED), *run_alone(tmp_path, ALONE + SAMPLED)]
    (image,) = pipe("red apple", guidance_scale=2.0, generator=torch.Generator().manual_seed(0)).images
    assert lines == [digest(image), "RQTransformerModel", digest(image)]


ALONE = """
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from transformers import AutoModel

print(type(AutoModel.from_pretrained("tester/transformer-with-code", trust_remote_code=True)).__name__)
folder = snapshot_download("tester/with-code")
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
"""
SAMPLED = """
import hashlib
import torch

(image,) = pipe("red apple", guidance_scale=2.0, generator=torch.Generator().manual_seed(0)).images
print(hashlib.sha256(image.tobytes()).hexdigest())
"""


def check_adapter(pipe, tmp_path, monkeypatch):
    pipe.push_to_hub("tester/base")
    (tmp_path / "images").mkdir()
    Image.effect_noise((8, 8), 100).save(tmp_path / "images" / "apple.png")
    command = [LORA, tmp_path / "images", "--keep", "red apple", "--model", "tester/base", "--steps", 2]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--output_dir", str(tmp_path / "out")])
    runpy.run_path(str(LORA), run_name="__main__")
    for name, relation in (("adapter", "adapter"), ("pipeline", "finetune")):
        repo = create_repo(f"tester/lora-{name}").repo_id
        upload_folder(repo_id=repo, folder_path=tmp_path / "out" / name)
        data = card_of(repo).data
        assert (data.base_model, data.base_model_relation) == ("tester/base", relation)
    taught = RQPipeline.from_pretrained("tester/base")
    taught.load_lora_weights("tester/lora-adapter")
    merged = RQPipeline.from_pretrained("tester/lora-pipeline")
    assert torch.equal(*(p("apple", do_sample=False, output_type="latent").codes for p in (taught, merged)))


def check_tokenizer(pipe):
    pipe.push_to_hub("tester/with-tokenizer")
    tokenizer = AutoTokenizer.from_pretrained("tester/with-tokenizer", subfolder="tokenizer")
    assert tokenizer.get_vocab() == VOCABULARY
    create_repo("tester/tokenizer")
    ModelCard("Two words.").push_to_hub("tester/tokenizer")
    tokenizer.push_to_hub("tester/tokenizer")
    assert AutoTokenizer.from_pretrained("tester/tokenizer").get_vocab() == VOCABULARY
    assert card_of("tester/tokenizer").text.strip() == "Two words."


def check_private(pipe):
    pipe.push_to_hub("tester/private", private=True)
    pipe.vae.push_to_hub("tester/public")
    assert model_info("tester/private").private and not model_info("tester/public").private
    assert_same_pipeline(pipe, RQPipeline.from_pretrained("tester/private"))
    with pytest.raises(RepositoryNotFoundError):
        model_info("tester/private", token=False)


def check_revision(pipe):
    pipe.push_to_hub("tester/revisions", revision="first")
    assert list_repo_files("tester/revisions") == []
    pipe.push_to_hub("tester/revisions", revision="first")
    assert_same_pipeline(pipe, RQPipeline.from_pretrained("tester/revisions", revision="first"))


@pytest.mark.parametrize("part", ["pipeline", "transformer"])
def check_interrupted_upload_changes_nothing(pipe, part, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client tries again, later and later
    model, repo = pipe if part == "pipeline" else getattr(pipe, part), f"tester/{part}-breaks"
    with pytest.raises(ConnectionError, match=f"the upload failed .*{repo} is as it was before; try again"):
        model.push_to_hub(repo, commit_message=BROKEN)
    assert list_repo_files(repo) == []
    model.push_to_hub(repo)
    before = model_info(repo).sha
    with pytest.raises(ConnectionError, match="the upload failed"):
        model.push_to_hub(repo, commit_message=BROKEN)
    assert model_info(repo).sha == before
    loaded = type(model).from_pretrained(repo)
    assert_same_pipeline(pipe, loaded) if part == "pipeline" else assert_same_weights(model, loaded)


def check_one_commit_for_an_upload(pipe):
    address = pipe.push_to_hub("tester/once")
    assert str(address).endswith(model_info("tester/once").sha)
    files = list_repo_files("tester/once")
    assert {"README.md", "model_index.json", "vae/config.json", "transformer/model.safetensors"} <= set(files)


class CheckMessages:
    @pytest.fixture
    def push(self, pipe):
        return pipe.vae.push_to_hub

    def check_no_token(self, push, monkeypatch):
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(
            ValueError, match="cannot write to tester/no-token .there is no token: run `hf auth login`"
        ):
            push("tester/no-token")

    def check_refused_token(self, push):
        with pytest.raises(
            ValueError, match=r"cannot write to tester/x \(.*403.*: run `hf auth login`, or set HF_TOKEN"
        ):
            push("tester/x", token="hf_other")

    def check_name_of_somebody_else(self, push):
        with pytest.raises(ValueError, match=r"cannot write to somebody/model \(.*403.*or take a name of your own"):
            push("somebody/model")

    def check_impossible_name(self, push):
        with pytest.raises(ValueError, match="cannot write to no/such/name .*: take a name such as user/model"):
            push("no/such/name")

    def check_offline(self, push, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match="cannot write to tester/x .HF_HUB_OFFLINE is set: unset it"):
            push("tester/x")

    def check_unreachable(self, push, monkeypatch):
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")
        with pytest.raises(ValueError, match="cannot write to tester/x .the Hub cannot be reached"):
            push("tester/x")
