import json
import re

import pytest
from original_checkpoints import (
    KINDS,
    REMOVED,
    RQTRANSFORMER,
    C,
    D,
    K,
    assert_refused,
    cases,
    random_rqtransformer,
    random_rqvae,
    randomized,
    sample,
    shared_rqvae,
    write_rqtransformer,
    write_rqvae,
)
from tiny import same_state

from rq_hf import RQPipeline, RQTransformerConfig, RQTransformerModel, convert_original_checkpoint


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
    assert sample(pipe, "none").codes.shape == (1, *code_shape)


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
        sample(pipe, "none")


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
    match = "stage1/model.pt and .*stage2/model.pt: vae and transformer must have the same"
    assert_refused(tmp_path, match, source=tmp_path)
