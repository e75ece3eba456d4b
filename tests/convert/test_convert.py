"""Checkpoints in the authors' layout, made up here, through the converter: what comes out is what went in.

`original_rqvae` and `original_rqtransformer` name our weights as the authors do, module by module, without the
converter's tables. That the authors' code computes the same with them is in `test_golden.py`.
"""

import functools
import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile

import diffusers
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from tiny import same_state
from tokenizers.implementations import CharBPETokenizer

from rq_hf import RQPipeline, RQTransformerConfig, RQTransformerModel, RQVAEModel, convert_original_checkpoint
from rq_hf.convert.__main__ import main

D, K, C, E, L = 3, 12, 6, 16, 5
NUM_CLASSES, NUM_TOKENS = 7, 90

RQVAE_CONFIG = """
dataset: {type: LSUN-church, transforms: {type: LSUN-church}}
arch:
  type: rq-vae
  code_hier: 1
  hparams:
    bottleneck_type: rq
    embed_dim: 6
    n_embed: 12
    latent_shape: [4, 4, 6]
    code_shape: [4, 4, 3]
    shared_codebook: true
    decay: 0.9
    restart_unused_codes: true
    loss_type: mse
    latent_loss_weight: 0.25
  ddconfig:
    double_z: false
    z_channels: 10
    resolution: 8
    in_channels: 3
    out_ch: 3
    ch: 32
    ch_mult: [1, 1]
    num_res_blocks: 1
    attn_resolutions: [4]
    dropout: 0.0
  checkpointing: true
optimizer: {type: adam, init_lr: 4.0e-05, betas: [0.5, 0.9]}
experiment: {batch_size: 32, epochs: 10, save_ckpt_freq: 5, test_freq: 1}
"""
RQVAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
    "block_out_channels": [32, 32],
    "layers_per_block": 1,
    "dropout": 0.0,
    "latent_channels": 10,
    "codebook_dim": C,
    "code_patch_size": [1, 1],
    "codebook_size": K,
    "depth": D,
    "shared_codebook": True,
    "ema_decay": 0.9,
    "restart_unused_codes": True,
    "sample_size": 8,
}
RQTRANSFORMER_CONFIG = """
dataset: {type: LSUN-church, vocab_size: 12, transforms: {type: LSUN-church}}
arch:
  type: rq-transformer
  block_size: [4, 4, 3]
  vocab_size_cond: 1
  block_size_cond: 1
  embed_dim: 16
  input_embed_dim: 6
  shared_tok_emb: true
  shared_cls_emb: true
  input_emb_vqvae: true
  head_emb_vqvae: true
  cumsum_depth_ctx: true
  body: {n_layer: 2, block: {n_head: 4}}
  head: {n_layer: 1, block: {n_head: 2}}
loss: {type: soft_target_cross_entropy, stochastic_codes: true, temp: 0.5}
optimizer: {type: adamW, init_lr: 0.0005, max_gn: 1.0}
experiment: {amp: true, batch_size: 32, sample: {top_k: 8, top_p: 0.9}}
"""
RQTRANSFORMER = {
    "code_shape": (4, 4, D),
    "codebook_size": K,
    "codebook_dim": C,
    "spatial_config": {"hidden_size": E, "num_hidden_layers": 2, "num_attention_heads": 4},
    "depth_config": {"hidden_size": E, "num_hidden_layers": 1, "num_attention_heads": 2},
}
# what makes a model conditional: theirs, ours
KINDS = {
    "none": ({}, {}),
    "class": ({"arch.vocab_size_cond": NUM_CLASSES}, {"cond_vocab_size": NUM_CLASSES}),
    "text": (
        {"arch.vocab_size_cond": NUM_TOKENS, "arch.block_size_cond": L, "dataset.txt_tok_name": "bpe16k_huggingface"},
        {"cond_vocab_size": NUM_TOKENS, "cond_length": L},
    ),
}
CALLS = {"none": {}, "class": {"class_labels": [0, 6]}, "text": {"prompt": ["red apple", "café"]}}
REMOVED = object()
GENERATOR = torch.Generator().manual_seed(0)  # not that of every test, so that no two models are the same

kinds = pytest.mark.parametrize("kind", KINDS)


def cases(**cases):
    """Decorator: the test runs for every case, a tuple of its arguments `theirs, ours`."""
    return pytest.mark.parametrize("theirs, ours", cases.values(), ids=cases)


# The authors' checkpoints, made up


def config_with(text, options):
    """The configuration `text` with other options, named by their path: `{"arch.hparams.decay": 0.8}`."""
    config = yaml.safe_load(text)
    for path, value in options.items():
        *sections, option = path.split(".")
        section = functools.reduce(lambda section, name: section.setdefault(name, {}), sections, config)
        section[option] = value
        if value is REMOVED:
            del section[option]
    return config


@torch.no_grad()
def randomized(model):
    for weight in model.state_dict().values():  # also norms and biases, which start as ones and zeros
        weight.normal_(std=0.3, generator=GENERATOR)
    return model.eval()


def random_rqvae(**changes):
    return randomized(RQVAEModel(**RQVAE | changes))


def random_rqtransformer(vae, **changes):
    transformer = randomized(RQTransformerModel(RQTransformerConfig(**RQTRANSFORMER | changes)))
    transformer.set_codebook(vae.quantizer.codebook)
    return transformer


# Models that all tests share and none changes


@functools.cache
def shared_rqvae():
    return random_rqvae()


@functools.cache
def shared_rqtransformer(kind, *, ema):
    return random_rqtransformer(shared_rqvae(), **KINDS[kind][1])


class Weights(dict):
    """A state dict under construction."""

    def add(self, name, module, trailing=()):
        for key, weight in module.named_parameters(recurse=False):
            self[f"{name}.{key}"] = weight.detach().reshape(*weight.shape, *(trailing if key == "weight" else ()))

    def add_resnet(self, name, block):
        for part in ("norm1", "conv1", "norm2", "conv2"):
            self.add(f"{name}.{part}", getattr(block, part))
        if block.conv_shortcut is not None:
            self.add(f"{name}.nin_shortcut", block.conv_shortcut)

    def add_attention(self, name, attention):
        self.add(f"{name}.norm", attention.group_norm)
        layers = {"q": attention.to_q, "k": attention.to_k, "v": attention.to_v, "proj_out": attention.to_out[0]}
        for part, layer in layers.items():
            self.add(f"{name}.{part}", layer, trailing=(1, 1))

    def add_level(self, name, block):
        for i, resnet in enumerate(block.resnets):
            self.add_resnet(f"{name}.block.{i}", resnet)
        for i, attention in enumerate(getattr(block, "attentions", ())):
            self.add_attention(f"{name}.attn.{i}", attention)

    def add_half(self, name, half):
        self.add(f"{name}.conv_in", half.conv_in)
        self.add_resnet(f"{name}.mid.block_1", half.mid_block.resnets[0])
        self.add_attention(f"{name}.mid.attn_1", half.mid_block.attentions[0])
        self.add_resnet(f"{name}.mid.block_2", half.mid_block.resnets[1])
        self.add(f"{name}.norm_out", half.conv_norm_out)
        self.add(f"{name}.conv_out", half.conv_out)


def original_rqvae(vae):
    """The state dict of an RQ-VAE as the authors' code would save it."""
    weights = Weights()
    weights.add_half("encoder", vae.encoder)
    for i, block in enumerate(vae.encoder.down_blocks):  # fine to coarse
        weights.add_level(f"encoder.down.{i}", block)
        if block.downsamplers:
            weights.add(f"encoder.down.{i}.downsample.conv", block.downsamplers[0].conv)
    weights.add_half("decoder", vae.decoder)
    for i, block in enumerate(reversed(vae.decoder.up_blocks)):
        weights.add_level(f"decoder.up.{i}", block)
        if block.upsamplers:
            weights.add(f"decoder.up.{i}.upsample.conv", block.upsamplers[0].conv)
    quantizer = vae.quantizer
    padding = torch.zeros(1, quantizer.codebook_dim)
    codebooks = [
        {
            "weight": torch.cat([quantizer.codebook[m], padding]),
            "cluster_size_ema": quantizer.cluster_size[m],
            "embed_ema": quantizer.cluster_sum[m],
        }
        for m in range(len(quantizer.codebook))
    ]
    for d in range(quantizer.depth):  # a shared codebook is there D times
        codebook = codebooks[0 if quantizer.shared_codebook else d]
        weights.update({f"quantizer.codebooks.{d}.{name}": weight for name, weight in codebook.items()})
    weights.add("quant_conv", vae.quant_conv)
    weights.add("post_quant_conv", vae.post_quant_conv)
    return dict(weights)


def original_rqtransformer(transformer):
    """The state dict of an RQ-Transformer as the authors' code would save it."""
    weights = Weights()
    weights["pos_emb_cond"] = transformer.cond_position_embedding.detach()[None]
    weights["pos_emb_hw"] = transformer.spatial_position_embedding.detach()[None]
    weights["pos_emb_d"] = transformer.depth_position_embedding.detach()[None]
    weights.add("cond_emb", transformer.cond_embedding)
    weights.add("input_mlp", transformer.code_projection)
    weights.add("head_mlp", getattr(transformer, "depth_projection", torch.nn.Linear(C, E)))  # at depth 1, too
    for stack, blocks in (("body", transformer.spatial_stack.layers), ("head", transformer.depth_stack.layers)):
        for i, block in enumerate(blocks):
            name = f"{stack}_transformer.blocks.{i}"
            weights.add(f"{name}.ln1", block.attention_norm)
            weights.add(f"{name}.ln2", block.mlp_norm)
            for key, weight in block.self_attn.qkv_proj.named_parameters():
                query, key_, value = weight.detach().chunk(3)
                weights[f"{name}.attn.key.{key}"] = key_
                weights[f"{name}.attn.query.{key}"] = query
                weights[f"{name}.attn.value.{key}"] = value
            weights.add(f"{name}.attn.proj", block.self_attn.o_proj)
            weights.add(f"{name}.mlp.0", block.mlp.up_proj)
            weights.add(f"{name}.mlp.2", block.mlp.down_proj)
    classifier = transformer.classifier
    weights.add("classifier.layer_norm", classifier.norm)
    if transformer.config.shared_classifier:
        weights["classifier.linear.weight"] = classifier.weight.detach()[0]  # (K, E)
        weights["classifier.linear.bias"] = classifier.bias.detach()[0]
    else:
        weights["classifier.linear.weight"] = classifier.weight.detach().transpose(1, 2)  # (D, E, K)
        weights["classifier.linear.bias"] = classifier.bias.detach()
    if transformer.config.cond_length > 1:
        weights.add("cond_classifier.layer_norm", transformer.cond_norm)
        weights.add("cond_classifier.linear", transformer.cond_classifier)
    return dict(weights)


def write(folder, config, state_dict, **contents):
    """Writes one stage and returns its `model.pt`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    torch.save({"epoch": 10, "state_dict": state_dict, "optimizer": {}} | contents, folder / "model.pt")
    return folder / "model.pt"


def write_rqvae(folder, vae=None, options=None, weights=None, **contents):
    """`weights` replace those of `vae`."""
    state_dict = original_rqvae(vae or shared_rqvae()) | (weights or {})
    return write(folder / "stage1", config_with(RQVAE_CONFIG, options or {}), state_dict, **contents)


def write_rqtransformer(folder, transformer=None, options=None, weights=None, **contents):
    state_dict = original_rqtransformer(transformer or shared_rqtransformer("none", ema=False)) | (weights or {})
    return write(folder / "stage2", config_with(RQTRANSFORMER_CONFIG, options or {}), state_dict, **contents)


def write_both(folder, kind="none"):
    """Writes both stages and returns the models that they are of."""
    transformer, average = (shared_rqtransformer(kind, ema=ema) for ema in (False, True))
    write_rqvae(folder)
    write_rqtransformer(folder, transformer, KINDS[kind][0], state_dict_ema=original_rqtransformer(average))
    return shared_rqvae(), transformer


def write_tokenizer(folder, name="bpe-16k", captions=("red apple", "fire engine", "café")):
    """The authors' tokenizer files, for the words of `captions`; returns the vocabulary."""
    folder.mkdir(exist_ok=True)
    tokenizer = CharBPETokenizer(unk_token="[UNK]", lowercase=True)
    special = ["[PAD]", "[UNK]"]
    tokenizer.train_from_iterator(list(captions) * 10, vocab_size=NUM_TOKENS, special_tokens=special)
    tokenizer.save_model(str(folder), name)
    return tokenizer.get_vocab()


def pack(folder, archive):
    """The archive `church/stage1/...`, as compressed as its name says."""
    compression = archive.suffix.removeprefix(".")
    with tarfile.open(archive, "w" if compression == "tar" else f"w:{compression}") as tar:
        tar.add(folder, "church")
    return archive


def draw(pipe, kind):
    pipe.set_progress_bar_config(disable=True)
    return pipe(**CALLS[kind], generator=torch.Generator().manual_seed(0), output_type="pt")


def assert_same_pipeline(pipe, other, kind):
    assert type(pipe) is type(other) is RQPipeline
    assert same_state(pipe.vae, other.vae)
    assert same_state(pipe.transformer, other.transformer)
    assert pipe.transformer.generation_config.to_diff_dict() == other.transformer.generation_config.to_diff_dict()
    actual, expected = draw(pipe, kind), draw(other, kind)
    assert torch.equal(actual.codes, expected.codes)
    assert torch.equal(actual.images, expected.images)


def listing(folder):
    return sorted([*folder.rglob("*"), *folder.parent.iterdir()])


def assert_refused(folder, match, error=ValueError, **arguments):
    """The conversion fails with one line, and leaves no trace in `folder` or beside it."""
    before = listing(folder)
    with pytest.raises(error, match=match) as caught:
        convert_original_checkpoint(destination=folder / "new" / "model", **arguments)
    assert "\n" not in str(caught.value)
    assert listing(folder) == before


# Sources


SOURCES = {
    "folder": lambda folder: {"source": folder / "church"},
    "folder above": lambda folder: {"source": str(folder)},
    "tar.gz": lambda folder: {"source": pack(folder / "church", folder / "church.tar.gz")},
    "tar": lambda folder: {"source": pack(folder / "church", folder / "church.tar")},
    "tar.xz": lambda folder: {"source": pack(folder / "church", folder / "church.tar.xz")},
    "files": lambda folder: {
        "rqvae": folder / "church" / "stage1" / "model.pt",
        "rqtransformer": str(folder / "church" / "stage2" / "model.pt"),
    },
    "stage 2 and a file": lambda folder: {
        "source": folder / "church" / "stage2",
        "rqvae": folder / "church" / "stage1" / "model.pt",
    },
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_both_stages_make_a_pipeline(tmp_path, source):
    vae, transformer = write_both(tmp_path / "church")
    pipe = convert_original_checkpoint(**source(tmp_path))
    assert type(pipe) is RQPipeline
    assert same_state(pipe.vae, vae)
    assert same_state(pipe.transformer, transformer)
    assert not pipe.vae.training
    assert not pipe.transformer.training


@pytest.mark.parametrize("source", [SOURCES["folder"], SOURCES["tar.gz"]])
def test_first_stage_alone_makes_an_rqvae(tmp_path, source):
    rqvae = write_rqvae(tmp_path / "church")
    for arguments in (source(tmp_path), {"rqvae": rqvae}):
        vae = convert_original_checkpoint(**arguments)
        assert type(vae) is RQVAEModel
        assert not vae.training
        assert same_state(vae, shared_rqvae())


def test_pt_file_may_have_another_name(tmp_path):
    write_both(tmp_path)
    (tmp_path / "stage1" / "model.pt").rename(tmp_path / "stage1" / "epoch10_model.pt")
    shutil.copy(tmp_path / "stage2" / "model.pt", tmp_path / "stage2" / "last.pt")  # model.pt is taken
    assert same_state(convert_original_checkpoint(tmp_path).transformer, shared_rqtransformer("none", ema=False))


def test_other_configurations_and_files_do_not_matter(tmp_path):
    vae, _ = write_both(tmp_path)
    (tmp_path / "gan").mkdir()
    (tmp_path / "gan" / "config.yaml").write_text("arch: {type: patchgan}")
    (tmp_path / "notes.txt").write_text("hello")
    assert same_state(convert_original_checkpoint(tmp_path).vae, vae)


def test_half_precision_becomes_single(tmp_path):
    state_dict = original_rqvae(shared_rqvae())
    rqvae = write_rqvae(tmp_path, weights={name: weight.half() for name, weight in state_dict.items()})
    vae = convert_original_checkpoint(rqvae=rqvae)
    expected = {name: weight.half().float() for name, weight in shared_rqvae().state_dict().items()}
    assert all(torch.equal(weight, expected[name]) for name, weight in vae.state_dict().items())
    assert {weight.dtype for weight in vae.state_dict().values()} == {torch.float32}


# Destination


@kinds
def test_written_pipeline_is_the_returned_one_and_draws(tmp_path, kind):
    vae, transformer = write_both(tmp_path / "church", kind)
    tokenizer = None
    if kind == "text":
        tokenizer = tmp_path / "tokenizer"
        write_tokenizer(tokenizer)
    source = pack(tmp_path / "church", tmp_path / "church.tar.gz")
    destination = tmp_path / "models" / "church"
    returned = convert_original_checkpoint(source, destination, tokenizer=tokenizer)
    assert same_state(returned.vae, vae)
    assert same_state(returned.transformer, transformer)
    assert draw(returned, kind).images.isfinite().all()
    for other in (
        RQPipeline.from_pretrained(destination),
        DiffusionPipeline.from_pretrained(destination),
        convert_original_checkpoint(source, tokenizer=tokenizer),
    ):
        assert_same_pipeline(other, returned, kind)


def test_written_rqvae_is_the_returned_one(tmp_path):
    returned = convert_original_checkpoint(rqvae=write_rqvae(tmp_path), destination=tmp_path / "vae")
    loaded = RQVAEModel.from_pretrained(tmp_path / "vae")
    assert same_state(returned, shared_rqvae())
    assert same_state(loaded, shared_rqvae())
    pixels = torch.rand(1, 3, 8, 8)
    assert torch.equal(loaded.get_codes(pixels), shared_rqvae().get_codes(pixels))
    assert ModelCard.load(tmp_path / "vae" / "README.md").data.license == "cc-by-nc-sa-4.0"


@pytest.mark.parametrize("kind, task", [("class", "unconditional-image-generation"), ("text", "text-to-image")])
def test_folder_has_all_that_the_hub_wants(tmp_path, kind, task):
    write_both(tmp_path / "church", kind)
    folder = tmp_path / "model"
    convert_original_checkpoint(tmp_path / "church", folder)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "README.md",
        "model_index.json",
        "transformer/config.json",
        "transformer/generation_config.json",
        "transformer/model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "RQPipeline"
    assert index["vae"] == ["rq_hf", "RQVAEModel"]
    assert index["transformer"] == ["rq_hf", "RQTransformerModel"]
    card = ModelCard.load(folder / "README.md")
    card.data.to_dict()
    assert card.data.license == "cc-by-nc-sa-4.0"
    assert card.data.library_name == "rq_hf"
    assert card.data.pipeline_tag == task
    assert "no commercial use" in card.text


def test_destination_may_be_new_or_empty(tmp_path, monkeypatch):
    write_both(tmp_path / "church")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for destination in ("empty", "new/parents/model", tmp_path / "work" / "new" / "absolute"):
        convert_original_checkpoint(tmp_path / "church", destination)
        assert RQPipeline.from_pretrained(destination)
    assert {path.name for path in tmp_path.rglob("*") if path.is_dir()} == {
        *("church", "stage1", "stage2", "work", "empty", "new", "parents", "model", "absolute", "vae", "transformer")
    }


def test_destination_may_be_a_link_to_an_empty_folder(tmp_path):
    write_rqvae(tmp_path)
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "disk")
    convert_original_checkpoint(tmp_path / "stage1", tmp_path / "model")
    assert same_state(RQVAEModel.from_pretrained(tmp_path / "model"), shared_rqvae())


@pytest.mark.parametrize("content", ["a file", "a folder"])
def test_destination_with_content_is_left_alone(tmp_path, content):
    write_rqvae(tmp_path / "church")
    destination = tmp_path / "model"
    if content == "a folder":
        destination.mkdir()
    written = destination / "precious" if content == "a folder" else destination
    written.write_text("precious")
    with pytest.raises(FileExistsError, match="model is not empty"):
        convert_original_checkpoint(tmp_path / "church", destination)
    assert written.read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {"church", "model"}


def test_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    write_both(tmp_path / "church")
    monkeypatch.setattr("rq_hf.convert.conversion.save_file", full)  # of safetensors; the RQ-VAE is written by then
    assert_refused(tmp_path, "No space left", OSError, source=tmp_path / "church")


def test_unpacked_archive_is_removed_without_a_destination(tmp_path, monkeypatch):
    write_both(tmp_path / "church")
    source = pack(tmp_path / "church", tmp_path / "church.tar")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    pipe = convert_original_checkpoint(source)
    assert not list((tmp_path / "tmp").iterdir())
    assert same_state(pipe.transformer, shared_rqtransformer("none", ema=False))  # mapped from a file that is gone


def test_transformer_is_written_in_shards(tmp_path, monkeypatch):
    _, transformer = write_both(tmp_path / "church")
    monkeypatch.setattr("rq_hf.convert.conversion.MAX_SHARD_SIZE", "20KB")
    returned = convert_original_checkpoint(tmp_path / "church", tmp_path / "model")
    folder = tmp_path / "model" / "transformer"
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert all((folder / shard).stat().st_size < 25_000 for shard in shards)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["weight_map"].keys() == transformer.state_dict().keys()
    assert same_state(returned.transformer, transformer)
    assert same_state(RQTransformerModel.from_pretrained(folder), transformer)


def test_changing_the_model_does_not_change_the_checkpoint(tmp_path):
    write_both(tmp_path)
    files = sorted(tmp_path.rglob("*.pt"))
    before = [file.read_bytes() for file in files]
    pipe = convert_original_checkpoint(tmp_path)
    with torch.no_grad():
        for weight in (*pipe.vae.state_dict().values(), *pipe.transformer.state_dict().values()):
            weight.add_(1)
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize("written", [False, True])
def test_the_transformer_has_a_codebook_of_its_own(tmp_path, written):
    write_both(tmp_path / "church")
    pipe = convert_original_checkpoint(tmp_path / "church", tmp_path / "model" if written else None)
    pipe.vae.quantizer.codebook.data.zero_()  # as training the RQ-VAE would
    assert same_state(pipe.transformer, shared_rqtransformer("none", ema=False))


# Moving average


def test_moving_average_is_that_of_the_last_stage(tmp_path):
    other = random_rqvae()
    rqvae = write_rqvae(tmp_path / "a", state_dict_ema=original_rqvae(other))
    write_both(tmp_path / "b")
    rqtransformer = tmp_path / "b" / "stage2" / "model.pt"
    pipe = convert_original_checkpoint(rqvae=rqvae, rqtransformer=rqtransformer, ema=True)
    assert same_state(pipe.vae, shared_rqvae())
    assert same_state(pipe.transformer, shared_rqtransformer("none", ema=True))
    assert same_state(convert_original_checkpoint(rqvae=rqvae, ema=True), other)


def test_moving_average_that_is_not_there(tmp_path):
    rqvae = write_rqvae(tmp_path)
    rqtransformer = write_rqtransformer(tmp_path)
    has = "has no state_dict_ema; it has epoch, state_dict, optimizer"
    assert_refused(tmp_path, f"stage1/model.pt {has}", rqvae=rqvae, ema=True)
    assert_refused(tmp_path, f"stage2/model.pt {has}", rqvae=rqvae, rqtransformer=rqtransformer, ema=True)


# Options


@cases(
    levels=(
        {"arch.ddconfig.ch_mult": [1, 2, 1], "arch.ddconfig.resolution": 16, "arch.ddconfig.attn_resolutions": [8]},
        {
            "block_out_channels": [32, 64, 32],
            "sample_size": 16,
            "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"],
            "up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        },
    ),
    attention_everywhere=(
        {"arch.ddconfig.attn_resolutions": [8, 4], "arch.ddconfig.num_res_blocks": 2},
        {
            "down_block_types": ["AttnDownEncoderBlock2D"] * 2,
            "up_block_types": ["AttnUpDecoderBlock2D"] * 2,
            "layers_per_block": 2,
        },
    ),
    no_attention=(
        {"arch.ddconfig.attn_resolutions": []},
        {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2},
    ),
    depth_1=({"arch.hparams.code_shape": [4, 4, 1]}, {"depth": 1}),
    codebook_per_depth=(
        {
            "arch.hparams.shared_codebook": False,
            "arch.hparams.n_embed": [K, K, K],
            "arch.hparams.decay": [0.9, 0.8, 0.7],
        },
        {"shared_codebook": False, "ema_decay": [0.9, 0.8, 0.7]},
    ),
    square_patches=({"arch.hparams.code_shape": [2, 2, 3]}, {"code_patch_size": [2, 2], "codebook_dim": 4 * C}),
    flat_patches=({"arch.hparams.code_shape": [2, 4, 3]}, {"code_patch_size": [2, 1], "codebook_dim": 2 * C}),
    grey=({"arch.ddconfig.in_channels": 1, "arch.ddconfig.out_ch": 1}, {"in_channels": 1, "out_channels": 1}),
    dropout=({"arch.ddconfig.dropout": 0.25}, {"dropout": 0.25}),
    no_restarts=({"arch.hparams.restart_unused_codes": False}, {"restart_unused_codes": False}),
    defaults=(
        {
            "arch.hparams.decay": REMOVED,
            "arch.hparams.bottleneck_type": REMOVED,
            "arch.ddconfig.dropout": REMOVED,
            "arch.type": "RQ-VAE",
        },
        {"ema_decay": 0.99},
    ),
)
def test_options_of_the_rqvae(tmp_path, theirs, ours):
    expected = random_rqvae(**ours)
    vae = convert_original_checkpoint(rqvae=write_rqvae(tmp_path, expected, theirs))
    assert same_state(vae, expected)
    configs = [json.loads(model.to_json_string()) for model in (vae, expected)]
    actual, expected = ({name: config[name] for name in config if not name.startswith("_")} for config in configs)
    assert actual == expected


@cases(
    differing_stacks=(
        {"arch.body": {"n_layer": 1, "block": {"n_head": 1}}, "arch.head": {"n_layer": 3, "block": {"n_head": 8}}},
        {
            "spatial_config": {"num_hidden_layers": 1, "num_attention_heads": 1},
            "depth_config": {"num_hidden_layers": 3, "num_attention_heads": 8},
        },
    ),
    quick_gelu=(
        {"arch.body.block.gelu": "v2", "arch.head.block.gelu": "v1"},
        {"spatial_config": {"hidden_act": "quick_gelu"}},
    ),
    no_attention_bias=({"arch.body.block.attn_bias": False}, {"spatial_config": {"attention_bias": False}}),
    no_mlp_bias=({"arch.head.block.mlp_bias": False}, {"depth_config": {"mlp_bias": False}}),
    last_codeword_only=({"arch.cumsum_depth_ctx": False}, {"cumulative_depth_inputs": False}),
    classifier_per_depth=({"arch.shared_cls_emb": False}, {"shared_classifier": False}),
    no_head=({"arch.head.n_layer": 0}, {"depth_config": {"num_hidden_layers": 0}}),
    no_condition=({"arch.vocab_size_cond": 0, "arch.block_size_cond": 0}, {}),
    classes=KINDS["class"],
    text=(
        KINDS["text"][0] | {"loss.txt_weight": 1, "loss.img_weight": 3},
        KINDS["text"][1] | {"text_loss_weight": 0.25},
    ),
    vocabulary_in_arch=({"arch.vocab_size": [K, K, K], "dataset": None}, {}),
    dropouts=(
        {"arch.embd_pdrop": 0.2, "arch.body.block.attn_pdrop": 0.3, "arch.head.block.resid_pdrop": 0.4},
        {
            "embedding_dropout": 0.2,
            "spatial_config": {"attention_dropout": 0.3},
            "depth_config": {"hidden_dropout": 0.4},
        },
    ),
    defaults=(
        {
            "arch.cumsum_depth_ctx": REMOVED,
            "arch.shared_cls_emb": REMOVED,
            "arch.vocab_size_cond": REMOVED,
            "arch.block_size_cond": REMOVED,
            "loss": REMOVED,
        },
        {"cumulative_depth_inputs": False, "shared_classifier": False},
    ),
)
def test_options_of_the_rqtransformer(tmp_path, theirs, ours):
    stacks = {name: RQTRANSFORMER[name] | ours.get(name, {}) for name in ("spatial_config", "depth_config")}
    expected = random_rqtransformer(shared_rqvae(), **ours | stacks)
    rqtransformer = write_rqtransformer(tmp_path, expected, theirs)
    transformer = convert_original_checkpoint(rqvae=write_rqvae(tmp_path), rqtransformer=rqtransformer).transformer
    assert same_state(transformer, expected)
    assert transformer.config.to_dict() == expected.config.to_dict()


@cases(
    depth_1=({"arch.hparams.code_shape": [4, 4, 1]}, {"depth": 1}),
    codebook_per_depth=({"arch.hparams.shared_codebook": False}, {"shared_codebook": False}),
    flat_patches=({"arch.hparams.code_shape": [2, 4, 3]}, {"code_patch_size": [2, 1], "codebook_dim": 2 * C}),
)
def test_options_of_the_rqvae_that_the_rqtransformer_shares(tmp_path, theirs, ours):
    vae = random_rqvae(**ours)
    code_shape = theirs.get("arch.hparams.code_shape", [4, 4, D])
    transformer = random_rqtransformer(
        vae, code_shape=code_shape, codebook_dim=vae.config.codebook_dim, shared_codebook=vae.config.shared_codebook
    )
    write_rqvae(tmp_path / "church", vae, theirs)
    options = {"arch.block_size": code_shape, "arch.input_embed_dim": vae.config.codebook_dim}
    write_rqtransformer(tmp_path / "church", transformer, options)
    pipe = convert_original_checkpoint(tmp_path / "church", tmp_path / "model")
    assert same_state(pipe.vae, vae)
    assert same_state(pipe.transformer, transformer)
    assert draw(pipe, "none").codes.shape == (1, *code_shape)


SAMPLE, SAMPLING = "experiment.sample", "sampling"


@cases(
    repository=({SAMPLE: {"top_k": 8, "top_p": 0.9}}, {"top_k": 8, "top_p": 0.9}),
    checkpoint=(
        {SAMPLE: REMOVED, SAMPLING: {"temp": 0.7, "top_k": 9, "top_p": 0.8}},
        {"temperature": 0.7, "top_k": 9, "top_p": 0.8},
    ),
    both=({SAMPLE: {"top_k": 8, "top_p": 0.9}, SAMPLING: {"temp": 0.7, "top_k": 9}}, {"temperature": 0.7, "top_k": 9}),
    per_depth=(
        {SAMPLING: {"temp": 1.0, "top_k": [9, 5, 2], "top_p": [0.9, 0.8, 0.7]}},
        {"temperature": 1.0, "top_k": [9, 5, 2], "top_p": [0.9, 0.8, 0.7]},
    ),
    lists_of_one=({SAMPLING: {"top_k": [9], "top_p": [0.9]}}, {"top_k": 9, "top_p": 0.9}),
    nulls=({SAMPLING: {"temp": 1.0, "top_k": None, "top_p": None}}, {"temperature": 1.0}),
    empty=({SAMPLING: None, SAMPLE: {"top_k": 8}}, {"top_k": 8}),
    nothing=({SAMPLE: None}, {}),
)
def test_sampling_settings_arrive(tmp_path, theirs, ours):
    write_rqvae(tmp_path / "church")
    write_rqtransformer(tmp_path / "church", options=theirs)
    returned = convert_original_checkpoint(tmp_path / "church", tmp_path / "model")
    written = json.loads((tmp_path / "model" / "transformer" / "generation_config.json").read_text())
    names = ("temperature", "top_k", "top_p")
    assert {name: written[name] for name in names if name in written} == ours
    for pipe in (returned, RQPipeline.from_pretrained(tmp_path / "model")):
        config = pipe.transformer.generation_config
        assert config.do_sample
        assert {name: getattr(config, name) for name in names if getattr(config, name) is not None} == ours
        draw(pipe, "none")


# Refused, by name


def named(option, value):
    return re.escape(f"{option}: {str(value).lower()} is not supported")


@pytest.mark.parametrize(
    "option, value",
    [
        ("arch.hparams.n_embed", [K, K, 8]),
        ("arch.hparams.bottleneck_type", "vq"),
        ("arch.hparams.code_shape", [3, 4, 3]),
        ("arch.hparams.embed_dim", 7),
        ("arch.ddconfig.ch_mult", [2, 2]),
        ("arch.ddconfig.double_z", True),
        ("arch.ddconfig.resamp_with_conv", False),
        ("arch.ddconfig.give_pre_end", True),
    ],
)
def test_unsupported_rqvae(tmp_path, option, value):
    rqvae = write_rqvae(tmp_path, options={option: value})
    assert_refused(tmp_path, f"stage1/model.pt: {named(option, value)}", rqvae=rqvae)


@pytest.mark.parametrize(
    "option, value",
    [
        ("arch.input_emb_vqvae", False),
        ("arch.input_emb_vqvae", REMOVED),
        ("arch.head_emb_vqvae", False),
        ("dataset.vocab_size", [K, K, 8]),
        ("arch.vocab_size", [K, K, 8]),
        ("arch.body.block.gelu", "v3"),
        ("arch.head.block.embed_dim", 8),
    ],
)
def test_unsupported_rqtransformer(tmp_path, option, value):
    rqtransformer = write_rqtransformer(tmp_path, options={option: value})
    match = f"stage2/model.pt: {named(option, False if value is REMOVED else value)}"
    assert_refused(tmp_path, match, rqvae=write_rqvae(tmp_path), rqtransformer=rqtransformer)


@cases(
    codebook_size=({"dataset.vocab_size": 8}, {"codebook_size": 8}),
    depth=({"arch.block_size": [4, 4, 2]}, {"code_shape": (4, 4, 2)}),
    codebook_dim=({"arch.input_embed_dim": 5}, {"codebook_dim": 5}),
)
def test_stages_that_do_not_fit_each_other(tmp_path, theirs, ours):
    write_rqvae(tmp_path)
    transformer = randomized(RQTransformerModel(RQTransformerConfig(**RQTRANSFORMER | ours)))
    write_rqtransformer(tmp_path, transformer, theirs)
    match = "stage1/model.pt and .*stage2/model.pt: vae and transformer must agree"
    assert_refused(tmp_path, match, source=tmp_path)


# Weights that do not fit


@pytest.mark.parametrize(
    "name, shape",
    [
        ("post_quant_conv.weight", (10, 7, 1, 1)),
        ("encoder.down.1.attn.0.q.weight", (32, 31, 1, 1)),
        ("pos_emb_hw", (1, 9, E)),
        ("classifier.linear.weight", (K + 1, E)),
        ("body_transformer.blocks.1.attn.query.weight", (E - 1, E)),
        ("body_transformer.blocks.1.attn.key.weight", (E - 1, E)),
        ("body_transformer.blocks.1.attn.key.weight", (E, E - 1)),
        ("discriminator.weight", (3,)),  # left over
        ("tok_emb.weight", (K, E)),
    ],
)
def test_weight_of_another_shape_or_left_over(tmp_path, name, shape):
    in_rqvae = name in original_rqvae(shared_rqvae()) or name == "discriminator.weight"
    weights = {name: torch.zeros(shape)}
    write_rqvae(tmp_path, weights=weights if in_rqvae else {})
    write_rqtransformer(tmp_path, weights={} if in_rqvae else weights)
    match = rf"stage{1 if in_rqvae else 2}/model.pt: the weights do not fit.* 1 .*\({re.escape(name)}"
    assert_refused(tmp_path, match, source=tmp_path)


@pytest.mark.parametrize("name", ["decoder.up.0.block.1.conv2.bias", "quantizer.codebooks.0.embed_ema"])
def test_missing_weight_of_the_rqvae(tmp_path, name):
    state_dict = original_rqvae(shared_rqvae())
    del state_dict[name]
    rqvae = write(tmp_path, yaml.safe_load(RQVAE_CONFIG), state_dict)
    assert_refused(tmp_path, rf"model.pt: the weights do not fit .*: 1 missing \({re.escape(name)}\)$", rqvae=rqvae)


def test_missing_weights_of_the_rqtransformer(tmp_path):
    rqtransformer = write_rqtransformer(tmp_path, options={"arch.body.n_layer": 3})
    match = r"stage2/model.pt: .*16 missing \(body_transformer.blocks.2.\S+, \S+, \S+, …\)$"
    assert_refused(tmp_path, match, rqvae=write_rqvae(tmp_path), rqtransformer=rqtransformer)


@pytest.mark.parametrize("name", ["weight", "cluster_size_ema", "embed_ema"])
def test_copies_of_a_shared_codebook_that_differ(tmp_path, name):
    name = f"quantizer.codebooks.2.{name}"
    rqvae = write_rqvae(tmp_path, weights={name: original_rqvae(shared_rqvae())[name] + 1})
    assert_refused(tmp_path, f"stage1/model.pt: {re.escape(name)} differs", rqvae=rqvae)


@pytest.mark.parametrize("shape", [(K, C), (K + 1, C - 1)])
def test_codebook_of_another_shape(tmp_path, shape):
    name = "quantizer.codebooks.1.weight"
    options = {"arch.hparams.shared_codebook": False}
    rqvae = write_rqvae(tmp_path, random_rqvae(shared_codebook=False), options, {name: torch.zeros(shape)})
    assert_refused(tmp_path, re.escape(name), rqvae=rqvae)


def test_one_classifier_where_one_per_depth_is_announced(tmp_path):
    write_rqvae(tmp_path)
    write_rqtransformer(tmp_path, options={"arch.shared_cls_emb": False})
    assert_refused(tmp_path, "classifier.linear.weight", source=tmp_path)


def test_shapes_that_fit_only_together(tmp_path):
    name = "body_transformer.blocks.1.attn"
    weights = {f"{name}.query.weight": torch.zeros(E + 1, E), f"{name}.key.weight": torch.zeros(E - 1, E)}
    write_rqvae(tmp_path)
    write_rqtransformer(tmp_path, weights=weights)
    assert_refused(tmp_path, f"{name}.query.weight", source=tmp_path)


# Broken files


class Executes:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def saved(contents, **options):
    buffer = io.BytesIO()
    torch.save(contents, buffer, **options)
    return buffer.getvalue()


def pickled(code):
    """A file like those of `torch.save`, with another pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", code)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def good():
    return saved({"state_dict": original_rqvae(shared_rqvae())})


BROKEN_CHECKPOINTS = {
    "empty": (lambda: b"", "no whole PyTorch checkpoint"),
    "random": (lambda: torch.randint(256, (5000,), dtype=torch.uint8).numpy().tobytes(), "no whole PyTorch"),
    "web page": (lambda: b"<!DOCTYPE html><html></html>", "no whole PyTorch checkpoint"),
    "first bytes": (lambda: good()[:100], "no whole PyTorch checkpoint"),
    "first half": (lambda: good()[: len(good()) // 2], "no whole PyTorch checkpoint"),
    "last bytes missing": (lambda: good()[:-10], "no whole PyTorch checkpoint"),
    "legacy format": (
        lambda: saved({"state_dict": {}}, _use_new_zipfile_serialization=False),
        "no whole PyTorch checkpoint",
    ),
    "whole model": (lambda: saved({"state_dict": torch.nn.Linear(2, 2)}), r"holds Python objects \(torch.nn"),
    "tensor": (lambda: saved(torch.zeros(3)), "has no state_dict; it has Tensor"),
    "list": (lambda: saved([1, 2]), "has no state_dict; it has list"),
    "bare state dict": (lambda: saved({"conv.weight": torch.zeros(3)}), "has no state_dict; it has conv.weight"),
    "numbers": (lambda: saved({"state_dict": {"conv.weight": 3}}), "has no state_dict; it has state_dict"),
    "no weights": (lambda: saved({"state_dict": {}}), "missing"),
    "broken pickle": (lambda: pickled(b"garbage"), "not a PyTorch checkpoint"),
}
BROKEN_PICKLES = {"no object": b"\x80\x02.", "no memory": b"\x80\x02h\x05.", "no storage": b"\x80\x02K\x01Q."}


def refuse_checkpoint(folder, content, match):
    (folder / "config.yaml").write_text(RQVAE_CONFIG)
    (folder / "model.pt").write_bytes(content)
    assert_refused(folder, f"model.pt.*({match})", rqvae=folder / "model.pt")


@pytest.mark.parametrize("content, match", BROKEN_CHECKPOINTS.values(), ids=BROKEN_CHECKPOINTS)
def test_broken_checkpoint(tmp_path, content, match):
    refuse_checkpoint(tmp_path, content(), match)


@pytest.mark.parametrize("code", BROKEN_PICKLES.values(), ids=BROKEN_PICKLES)
def test_malformed_pickle(tmp_path, code):
    refuse_checkpoint(tmp_path, pickled(code), "not a PyTorch checkpoint|no whole PyTorch checkpoint")


def test_checkpoint_executes_nothing(tmp_path):
    mark = tmp_path / "executed"
    content = saved({"state_dict": original_rqvae(shared_rqvae()), "hook": Executes(mark)})
    refuse_checkpoint(tmp_path, content, r"holds Python objects \(posix.system\)")
    assert not mark.exists()


def test_contents_without_a_proper_name_do_not_matter(tmp_path):
    rqvae = write(tmp_path / "stage1", yaml.safe_load(RQVAE_CONFIG), original_rqvae(shared_rqvae()))
    torch.save(torch.load(rqvae) | {10: "epoch"}, rqvae)
    assert same_state(convert_original_checkpoint(rqvae=rqvae), shared_rqvae())


BROKEN_CONFIGS = {
    "not YAML": ("arch: [", "config.yaml is not YAML"),
    "binary": ("\x00\x01", "config.yaml is not YAML"),
    "impossible": ("date: 2022-99-99", "config.yaml is not YAML"),
    "code": ("arch: !!python/object/apply:os.getcwd []", "config.yaml is not YAML"),
    "empty": ("", "config.yaml must hold named options, got NoneType"),
    "list": ("- arch", "config.yaml must hold named options, got list"),
    "something else": ("arch: {type: vq-gan}", "config.yaml"),
    "no arch": ("dataset: {type: imagenet}", "config.yaml"),
    "nothing in arch": ("arch: {type: rq-vae}", "config.yaml lacks arch.hparams"),
}


@pytest.mark.parametrize("text, match", BROKEN_CONFIGS.values(), ids=BROKEN_CONFIGS)
def test_broken_configuration(tmp_path, text, match):
    rqvae = write_rqvae(tmp_path)
    rqvae.with_name("config.yaml").write_text(text)
    assert_refused(tmp_path, match, rqvae=rqvae)
    assert_refused(tmp_path, match, source=tmp_path)


def test_endless_configuration(tmp_path):
    rqvae = write_rqvae(tmp_path)
    rqvae.with_name("config.yaml").write_text("arch: &arch {type: rq-vae, hparams: *arch}")
    assert_refused(tmp_path, "config.yaml", rqvae=rqvae)


@pytest.mark.parametrize(
    "option, value",
    [
        ("arch.hparams", None),
        ("arch.hparams.n_embed", "many"),
        ("arch.hparams.code_shape", 8),
        ("arch.hparams.code_shape", [4, 4]),
        ("arch.hparams.decay", "slow"),
        ("arch.ddconfig", [1, 2]),
        ("arch.ddconfig.ch_mult", 2),
        ("arch.ddconfig.attn_resolutions", None),
        ("arch.ddconfig.resolution", "256x256"),
        ("arch.ddconfig.ch_mult", []),
        ("arch.hparams.n_embed", []),
        ("arch.hparams.code_shape", [0, 4, 3]),
        ("arch.ddconfig.z_channels", -1),
    ],
)
def test_option_of_the_rqvae_of_the_wrong_kind(tmp_path, option, value):
    rqvae = write_rqvae(tmp_path, options={option: value})
    assert_refused(tmp_path, "stage1/model.pt: ", rqvae=rqvae)


@pytest.mark.parametrize(
    "option, value",
    [
        ("arch.body", None),
        ("arch.head", REMOVED),
        ("arch.block_size", 8),
        ("arch.block_size", ["a", "b", "c"]),
        ("arch.embed_dim", "wide"),
        ("arch.embed_dim", 18),  # not divisible by the heads
        ("arch.body.n_layer", "deep"),
        ("arch.body.block.n_head", [4]),
        ("arch.vocab_size_cond", "classes"),
        ("dataset.vocab_size", REMOVED),
        ("dataset", "imagenet"),
        ("sampling", "greedy"),
        ("arch.head.block.n_head", 0),
        ("dataset.vocab_size", -1),
        ("sampling", {"top_k": "many"}),
    ],
)
def test_option_of_the_rqtransformer_of_the_wrong_kind(tmp_path, option, value):
    rqvae, rqtransformer = write_rqvae(tmp_path), write_rqtransformer(tmp_path, options={option: value})
    assert_refused(tmp_path, "stage2/model.pt: ", rqvae=rqvae, rqtransformer=rqtransformer)


# Broken archives


@pytest.mark.parametrize("length", [0, 1, 100, 5000, 0.5, 0.9, 0.99])
def test_truncated_archive(tmp_path, length):
    write_both(tmp_path / "church")
    archive = pack(tmp_path / "church", tmp_path / "church.tar.gz")
    content = archive.read_bytes()
    archive.write_bytes(content[: int(length * len(content)) if isinstance(length, float) else length])
    assert_refused(tmp_path, "church.tar.gz is no whole tar archive", source=archive)


@pytest.mark.parametrize("offset", [0, 100])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_archive_truncated_between_the_stages(tmp_path, compress, offset):
    write_both(tmp_path / "church")
    archive = pack(tmp_path / "church", tmp_path / "church.tar")
    with tarfile.open(archive) as tar:
        stage2 = tar.getmember("church/stage2").offset
    archive.write_bytes(compress(archive.read_bytes()[: stage2 + offset]))
    assert_refused(tmp_path, "church.tar is no whole tar archive", source=archive)


def test_damaged_archive(tmp_path):
    write_both(tmp_path / "church")
    archive = pack(tmp_path / "church", tmp_path / "church.tar.gz")
    content = bytearray(archive.read_bytes())
    content[-8] ^= 1  # of the checksum, as if it were the contents
    archive.write_bytes(content)
    assert_refused(tmp_path, "church.tar.gz is no whole tar archive", source=archive)


@pytest.mark.parametrize("content", [b"hello" * 1000, b"PK\x03\x04" + bytes(5000), bytes(range(256)) * 20])
def test_something_else_than_an_archive(tmp_path, content):
    (tmp_path / "church.tar.gz").write_bytes(content)
    assert_refused(tmp_path, "church.tar.gz is no whole tar archive", source=tmp_path / "church.tar.gz")


def test_archive_without_checkpoints(tmp_path):
    (tmp_path / "church").mkdir()
    archive = pack(tmp_path / "church", tmp_path / "church.tar.gz")
    assert_refused(tmp_path, "church.tar.gz has no config.yaml of an RQ-VAE", source=archive)


def member(name, kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "evil",
    [
        member("../evil.txt"),
        member("../../evil.pt"),
        member("../../../evil.pt"),
        member("church/../../../evil/config.yaml"),
        member("church/stage2", tarfile.SYMTYPE, "/etc"),
        member("church/stage2/model.pt", tarfile.SYMTYPE, "../../../../evil.pt"),
        member("church/stage2/model.pt", tarfile.LNKTYPE, "/etc/passwd"),
        member("church/stage2/model.pt", tarfile.FIFOTYPE),
    ],
    ids=lambda evil: f"{evil.name} {evil.linkname}",
)
def test_archive_that_reaches_outside(tmp_path, evil):
    work = tmp_path / "a" / "b"
    write_rqvae(work / "church")
    archive = pack(work / "church", work / "church.tar")
    with tarfile.open(archive, "a") as tar:
        tar.addfile(evil, io.BytesIO())
    assert_refused(work, "church.tar is refused", source=archive)
    assert not list(tmp_path.rglob("evil*"))


def test_archive_with_absolute_names_stays_inside(tmp_path):
    write_rqvae(tmp_path / "church")
    outside = tmp_path / "outside"
    with tarfile.open(tmp_path / "church.tar", "w") as tar:
        for path in sorted((tmp_path / "church" / "stage1").iterdir()):
            info = tar.gettarinfo(path)
            info.name = str(outside / path.name)
            tar.addfile(info, path.open("rb"))
    assert same_state(convert_original_checkpoint(tmp_path / "church.tar"), shared_rqvae())
    assert not outside.exists()


# Wrong arguments


def test_paths_that_are_not_there(tmp_path):
    rqvae = write_rqvae(tmp_path / "church")
    for arguments in (
        {"source": tmp_path / "no"},
        {"source": tmp_path / "no.tar.gz"},
        {"rqvae": tmp_path / "no.pt"},
        {"rqvae": rqvae, "rqtransformer": tmp_path / "no.pt"},
    ):
        assert_refused(tmp_path, r"^no file .*/no(\.pt|\.tar\.gz)?$", FileNotFoundError, **arguments)
    (rqvae.parent / "config.yaml").unlink()
    assert_refused(tmp_path, "no file .*stage1/config.yaml", FileNotFoundError, rqvae=rqvae)
    assert_refused(tmp_path, "church has no config.yaml", source=tmp_path / "church")


def test_stages_that_are_missing_doubled_or_swapped(tmp_path):
    write_both(tmp_path / "church")
    rqvae, rqtransformer = (tmp_path / "church" / stage / "model.pt" for stage in ("stage1", "stage2"))
    assert_refused(tmp_path, "nothing to convert")
    assert_refused(tmp_path, "stage2/model.pt needs its RQ-VAE", rqtransformer=rqtransformer)
    assert_refused(tmp_path, "stage2/model.pt needs its RQ-VAE", source=rqtransformer.parent)
    assert_refused(tmp_path, "stage2/model.pt must be an rq-vae", rqvae=rqtransformer, rqtransformer=rqvae)
    assert_refused(tmp_path, "stage1/model.pt must be an rq-transformer", rqvae=rqvae, rqtransformer=rqvae)
    assert_refused(tmp_path, "has an rq-vae already", source=tmp_path / "church", rqvae=rqvae)
    assert_refused(tmp_path, "model.pt is a single stage; name it by rqvae", source=rqvae)
    write_rqvae(tmp_path / "church" / "older")
    assert_refused(tmp_path, "two checkpoints of an rq-vae", source=tmp_path / "church")


@pytest.mark.parametrize("names", [[], ["a.pt", "b.pt"]])
def test_folder_without_one_checkpoint(tmp_path, names):
    rqvae = write_rqvae(tmp_path)
    for name in names:
        shutil.copy(rqvae, rqvae.with_name(name))
    rqvae.unlink()
    assert_refused(
        tmp_path, re.escape(f"stage1 must hold one .pt file, or one called model.pt; got {names}"), source=tmp_path
    )


# Tokenizer


@pytest.fixture
def text_model(tmp_path):
    """Arguments of the converter for a text model, and the vocabulary of its tokenizer."""
    write_both(tmp_path / "cc3m", "text")
    vocabulary = write_tokenizer(tmp_path / "tokenizer")
    return {"source": tmp_path / "cc3m", "tokenizer": tmp_path / "tokenizer"}, vocabulary


def ids(pipe, text):
    return pipe.tokenizer(text, padding="max_length", truncation=True)["input_ids"]


def test_tokenizer_gives_the_ids_of_the_authors(tmp_path, text_model):
    arguments, vocabulary = text_model
    red, apple, cafe = (vocabulary[f"{word}</w>"] for word in ("red", "apple", "café"))
    unknown = vocabulary["[UNK]"]
    returned = convert_original_checkpoint(**arguments, destination=tmp_path / "model")
    returned.save_pretrained(tmp_path / "again")
    for pipe in (
        convert_original_checkpoint(**arguments),
        returned,
        RQPipeline.from_pretrained(tmp_path / "model"),
        DiffusionPipeline.from_pretrained(tmp_path / "again"),
    ):
        assert pipe.tokenizer.model_max_length == L
        assert ids(pipe, "red apple") == [red, apple, 0, 0, 0]  # [PAD] is 0
        assert ids(pipe, "  RED\nApple ") == [red, apple, 0, 0, 0]
        assert ids(pipe, "Café CAFÉ") == [cafe, cafe, 0, 0, 0]
        assert ids(pipe, "cafe") != ids(pipe, "café")
        assert ids(pipe, "red 猫") == [red, unknown, 0, 0, 0]
        assert ids(pipe, "") == [0] * L
        assert ids(pipe, "red " * 4 + "apple red") == [red] * 4 + [apple]
        assert pipe.encode_prompt(["red apple"]).tolist() == [[red, apple, 0, 0, 0]]


def test_config_tells_which_tokenizer(tmp_path, text_model):
    arguments, vocabulary = text_model
    write_tokenizer(tmp_path / "tokenizer", "bpe-30k", captions=["blue house", "green tree"])
    (tmp_path / "tokenizer" / "notes.txt").write_text("bpe-16k is that of cc3m")
    pipe = convert_original_checkpoint(**arguments)
    assert pipe.tokenizer.get_vocab() == vocabulary
    config = arguments["source"] / "stage2" / "config.yaml"
    config.write_text(config.read_text().replace("bpe16k_huggingface", "bpe30k_huggingface"))
    assert "house</w>" in convert_original_checkpoint(**arguments).tokenizer.get_vocab()
    config.write_text(config.read_text().replace("bpe30k_huggingface", "simple"))
    assert_refused(tmp_path, "tokenizer must hold one vocab.json and one merges.txt, got .*bpe-30k", **arguments)


@pytest.mark.parametrize("name", ["bpe-16k-vocab.json", "bpe-16k-merges.txt"])
def test_tokenizer_with_a_missing_file(tmp_path, text_model, name):
    (tmp_path / "tokenizer" / name).unlink()
    assert_refused(tmp_path, "tokenizer must hold one vocab.json and one merges.txt", **text_model[0])


def test_tokenizer_folder_that_is_not_there(tmp_path, text_model):
    shutil.rmtree(tmp_path / "tokenizer")
    assert_refused(tmp_path, "tokenizer", (ValueError, FileNotFoundError), **text_model[0])


@pytest.mark.parametrize("name, text", [("vocab.json", "{"), ("vocab.json", "[]"), ("merges.txt", "a\n")])
def test_broken_tokenizer_files(tmp_path, text_model, name, text):
    (tmp_path / "tokenizer" / f"bpe-16k-{name}").write_text(text)
    assert_refused(tmp_path, "tokenizer", **text_model[0])


def write_dataset_section(folder, dataset):
    options = KINDS["text"][0] | {"arch.vocab_size": K, "dataset": dataset}
    del options["dataset.txt_tok_name"]
    (folder / "stage2" / "config.yaml").write_text(yaml.safe_dump(config_with(RQTRANSFORMER_CONFIG, options)))


@pytest.mark.parametrize("dataset", [None, {"vocab_size": K}])
def test_one_tokenizer_needs_no_name(text_model, dataset):
    arguments, vocabulary = text_model
    write_dataset_section(arguments["source"], dataset)
    assert convert_original_checkpoint(**arguments).tokenizer.get_vocab() == vocabulary


@pytest.mark.parametrize("dataset", ["cc3m", {"txt_tok_name": ["bpe16k_huggingface"]}])
def test_name_of_the_tokenizer_of_the_wrong_kind(tmp_path, text_model, dataset):
    write_dataset_section(text_model[0]["source"], dataset)
    assert_refused(tmp_path, "stage2/model.pt: ", **text_model[0])


@pytest.mark.parametrize("kind, match", [("class", "stage2/model.pt is no text model"), (None, "RQ-VAE alone")])
def test_tokenizer_for_another_model(tmp_path, kind, match):
    write_both(tmp_path / "church", kind) if kind else write_rqvae(tmp_path / "church")
    write_tokenizer(tmp_path / "tokenizer")
    assert_refused(tmp_path, match, source=tmp_path / "church", tokenizer=tmp_path / "tokenizer")


def test_text_model_without_tokenizer_takes_condition_ids(tmp_path, text_model):
    pipe = convert_original_checkpoint(text_model[0]["source"])
    assert pipe.tokenizer is None
    assert pipe.transformer.generate(torch.zeros(1, L, dtype=torch.long)).shape == (1, 4, 4, D)


# Summary


def test_summary(tmp_path, capsys, text_model):
    vae, transformer = shared_rqvae(), shared_rqtransformer("text", ema=False)
    convert_original_checkpoint(**text_model[0], destination=tmp_path / "model")
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    size = sum(weight.numel() for name, weight in vae.named_parameters() if name != "quantizer.codebook")
    assert f"RQ-VAE: {size:,} parameters" in text
    assert f"RQ-Transformer: {transformer.num_parameters():,} parameters" in text
    for expected in (f"4×4×{D}", f"depth {D}", f"{K} × {C}", f"{L} tokens of {NUM_TOKENS}", "top_k 8, top_p 0.9"):
        assert expected in text
    assert f"tokenizer: {len(text_model[1])} tokens" in text
    for stage in ("stage1", "stage2"):
        checkpoint, config = (str(tmp_path / "cc3m" / stage / name) for name in ("model.pt", "config.yaml"))
        assert any(line.startswith("read") and line.endswith(checkpoint) for line in lines)
        ignored = [line for line in lines if line.startswith("ignored")]
        contents = next(line for line in ignored if checkpoint in line)
        assert "epoch, optimizer" in contents
        assert ("state_dict_ema" in contents) == (stage == "stage2")
        options = next(line for line in ignored if config in line)
        assert "optimizer" in options
        assert ("arch.checkpointing" in options) == (stage == "stage1")
        assert "block_size" not in options
    assert lines[-1].startswith("written") and lines[-1].endswith(str(tmp_path / "model"))


def test_summary_warns_of_tokens_that_the_model_does_not_know(tmp_path, capsys, text_model):
    transformer = random_rqtransformer(shared_rqvae(), cond_vocab_size=20, cond_length=L)
    options = KINDS["text"][0] | {"arch.vocab_size_cond": 20}
    write_rqtransformer(tmp_path / "cc3m", transformer, options)
    convert_original_checkpoint(**text_model[0])
    assert "ONLY TAKES THE FIRST 20" in capsys.readouterr().out


# Command line


def run_convert(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "rq_hf.convert", *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_command_line(tmp_path):
    vae, _ = write_both(tmp_path / "church")
    pack(tmp_path / "church", tmp_path / "church.tar.gz")
    result = run_convert(tmp_path, "church.tar.gz", "--ema", "models/church")
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    assert result.stdout.splitlines()[-1].endswith("models/church")
    pipe = RQPipeline.from_pretrained(tmp_path / "models" / "church")
    assert same_state(pipe.vae, vae)
    assert same_state(pipe.transformer, shared_rqtransformer("none", ema=True))


def test_command_line_says_in_one_line_what_is_wrong(tmp_path):
    (tmp_path / "church.tar.gz").write_bytes(b"hello" * 1000)
    result = run_convert(tmp_path, "church.tar.gz", "model")
    assert result.returncode == 1
    assert result.stdout == ""
    assert re.fullmatch(r"error: church.tar.gz is no whole tar archive: .*\n", result.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["church.tar.gz"]


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    main()


def test_command_line_help(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit:
        run_main(monkeypatch, "--help")
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for name in ("SOURCE", "DESTINATION", "--rqvae", "--rqtransformer", "--ema", "--tokenizer", "no commercial use"):
        assert name in text
    assert "usage: python -m rq_hf.convert [SOURCE] DESTINATION" in text


def test_command_line_with_files(tmp_path, monkeypatch, text_model):
    vae, transformer = shared_rqvae(), shared_rqtransformer("text", ema=False)
    stages = ("--rqvae", tmp_path / "cc3m/stage1/model.pt", "--rqtransformer", tmp_path / "cc3m/stage2/model.pt")
    run_main(monkeypatch, *stages, tmp_path / "model", "--tokenizer", tmp_path / "tokenizer")
    pipe = RQPipeline.from_pretrained(tmp_path / "model")
    assert same_state(pipe.vae, vae)
    assert same_state(pipe.transformer, transformer)
    assert pipe.tokenizer.get_vocab() == text_model[1]


@pytest.mark.parametrize(
    "arguments, code",
    [
        (["model"], "error: nothing to convert: give source or rqvae"),
        (["--ema", "church", "model"], "error: church/stage1/model.pt has no state_dict_ema; it has .*"),
        (["church", "church"], "error: .*/church is not empty; name a new folder"),
        (["no", "model"], "error: no file or folder no"),
        (["--rqvae", "no.pt", "model"], "error: no file no.pt"),
    ],
)
def test_command_line_errors(tmp_path, monkeypatch, arguments, code):
    write_rqvae(tmp_path / "church")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        run_main(monkeypatch, *arguments)
    assert re.fullmatch(code, exit.value.code)
    assert [path.name for path in tmp_path.iterdir()] == ["church"]


@pytest.mark.parametrize("arguments", [[], ["--tokenizer", "folder"], ["a", "b", "c"], ["a", "b", "--depth", "4"]])
def test_command_line_usage(monkeypatch, capsys, arguments):
    with pytest.raises(SystemExit) as exit:
        run_main(monkeypatch, *arguments)
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m rq_hf.convert [SOURCE] DESTINATION")


# from_single_file


def test_single_file_is_the_converted_rqvae(tmp_path):
    expected = random_rqvae(depth=2, shared_codebook=False)
    options = {"arch.hparams.shared_codebook": False, "arch.hparams.code_shape": [4, 4, 2]}
    rqvae = write_rqvae(tmp_path, expected, options)
    config = str(rqvae.with_name("config.yaml"))
    converted = convert_original_checkpoint(rqvae=rqvae, destination=tmp_path / "vae")
    for vae in (
        RQVAEModel.from_single_file(str(rqvae), original_config=config),
        RQVAEModel.from_single_file(original_rqvae(expected), original_config=config),
        RQVAEModel.from_single_file(original_rqvae(expected), original_config=config_with(RQVAE_CONFIG, options)),
        RQVAEModel.from_single_file(str(rqvae), config=str(tmp_path / "vae")),
    ):
        assert type(vae) is RQVAEModel
        assert not vae.training
        assert same_state(vae, expected)
        assert vae.config.block_out_channels == converted.config.block_out_channels
        pixels = torch.rand(1, 3, 8, 8)
        assert torch.equal(vae.get_codes(pixels), converted.get_codes(pixels))


@pytest.mark.parametrize(
    "weights, options, match",
    [
        ({"extra": torch.zeros(3)}, {}, r"1 left over \(extra\)"),
        ({"quant_conv.bias": torch.zeros(3)}, {}, r"1 of another shape \(quant_conv.bias"),
        ({}, {"arch.ddconfig.num_res_blocks": 2}, "missing"),
        ({}, {"arch.ddconfig.ch_mult": [2, 2]}, "arch.ddconfig.ch_mult"),
    ],
)
def test_single_file_that_does_not_fit(tmp_path, weights, options, match):
    rqvae = write_rqvae(tmp_path, options=options, weights=weights)
    with pytest.raises(ValueError, match=match):
        RQVAEModel.from_single_file(str(rqvae), original_config=str(rqvae.with_name("config.yaml")))


def test_single_file_without_configuration(tmp_path):
    with pytest.raises(ValueError, match="original_config"):
        RQVAEModel.from_single_file(str(write_rqvae(tmp_path)))


def test_single_files_of_diffusers_still_load(tmp_path):
    assert diffusers.RQVAEModel is RQVAEModel  # diffusers looks all names of its table up
    expected = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).eval()
    expected.save_pretrained(tmp_path)
    vae = diffusers.AutoencoderKL.from_single_file(expected.state_dict(), config=str(tmp_path))
    assert type(vae) is diffusers.AutoencoderKL
    assert same_state(vae, expected)
