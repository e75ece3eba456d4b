import re

import pytest
import torch
import yaml
from original_checkpoints import (
    RQVAE_CONFIG,
    C,
    E,
    K,
    assert_refused,
    original_rqvae,
    random_rqvae,
    shared_rqtransformer,
    shared_rqvae,
    write,
    write_both,
    write_rqtransformer,
    write_rqvae,
)
from tiny import same_state

from rq_hf import convert_original_checkpoint


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
