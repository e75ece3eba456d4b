"""Random checkpoints in the authors' layout, and how tests convert them.

`original_rqvae` and `original_rqtransformer` name our weights as the authors do, module by module, without the
converter's tables. `test_golden_models.py` compares converted models with the authors' code.
"""

import functools
import sys
import tarfile

import pytest
import torch
import yaml
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
# options of conditional models: theirs, ours
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
GENERATOR = torch.Generator().manual_seed(0)  # not the generator of each test, so that no two models are equal

kinds = pytest.mark.parametrize("kind", KINDS)


def cases(**cases):
    """Decorator: the test runs for every case, a tuple of its arguments `theirs, ours`."""
    return pytest.mark.parametrize("theirs, ours", cases.values(), ids=cases)


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
    for name, weight in model.state_dict().items():  # also norms and biases, which start as ones and zeros
        weight.normal_(std=0.3, generator=GENERATOR)
        if name == "quantizer.cluster_size":
            weight.abs_()
    return model.eval()


def random_rqvae(**changes):
    return randomized(RQVAEModel(**RQVAE | changes))


def random_rqtransformer(vae, **changes):
    transformer = randomized(RQTransformerModel(RQTransformerConfig(**RQTRANSFORMER | changes)))
    transformer.set_codebook(vae.quantizer.codebook)
    return transformer


# Models that all tests share. No test may change them.


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
    """Writes both stages and returns their models, without the moving average."""
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


def sample(pipe, kind):
    pipe.set_progress_bar_config(disable=True)
    return pipe(**CALLS[kind], generator=torch.Generator().manual_seed(0), output_type="pt")


def assert_same_pipeline(pipe, other, kind):
    assert type(pipe) is type(other) is RQPipeline
    assert same_state(pipe.vae, other.vae)
    assert same_state(pipe.transformer, other.transformer)
    assert pipe.transformer.generation_config.to_diff_dict() == other.transformer.generation_config.to_diff_dict()
    actual, expected = sample(pipe, kind), sample(other, kind)
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


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    main()
