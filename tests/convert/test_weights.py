import math
import re
import zipfile

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

from rq_hf import RQVAEModel, convert_original_checkpoint


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


NAME = "quant_conv.bias"  # of C numbers
ONES = torch.ones(C)
FLAWS = {
    "complex": (NAME, ONES * 1j, "must be a dense tensor of float16, bfloat16, float32, float64, got complex64"),
    "bool": (NAME, ONES.bool(), "must be a dense tensor .* got bool"),
    "int8": (NAME, ONES.to(torch.int8), "must be a dense tensor .* got int8"),
    "quantized": (NAME, torch.quantize_per_tensor(ONES, 0.1, 0, torch.quint8), "must be a dense tensor .* got quint8"),
    "meta": (NAME, ONES.to("meta"), "must be a dense tensor .* got float32 without values"),
    "sparse": (NAME, ONES.to_sparse(), "must be a dense tensor"),
    "None": (NAME, None, "must be a tensor, got NoneType"),
    "number": (NAME, 3, "must be a tensor, got int"),
    "list": (NAME, [ONES], "must be a tensor, got list"),
    "NaN": (NAME, ONES / 0 * 0, "has values that are NaN or infinite"),
    "infinite": (NAME, -ONES / 0, "has values that are NaN or infinite"),
    "infinite in half precision": (NAME, ONES.half() / 0, "has values that are NaN or infinite"),
    "too large for float32": (NAME, ONES.double() * 1e300, "has values that are NaN or infinite in float32"),
    "not used": ("quantizer.codebooks.1.weight", torch.zeros(K + 1, C, dtype=torch.int8), "must be a dense tensor"),
}


def convert_file(rqvae):
    return convert_original_checkpoint(rqvae=rqvae)


def load_single_file(rqvae):
    return RQVAEModel.from_single_file(rqvae, original_config=rqvae.with_name("config.yaml"))


loaders = pytest.mark.parametrize("load", [convert_file, load_single_file])


@loaders
@pytest.mark.parametrize("name, weight, match", FLAWS.values(), ids=FLAWS)
@pytest.mark.filterwarnings("ignore:torch.quantize")
def test_weight_that_cannot_be_converted(tmp_path, load, name, weight, match):
    rqvae = write_rqvae(tmp_path, weights={name: weight})
    with pytest.raises(ValueError, match=f"{re.escape(name)} {match}"):
        load(rqvae)


@loaders
def test_negative_cluster_sizes(tmp_path, load):
    sizes = original_rqvae(shared_rqvae())["quantizer.codebooks.0.cluster_size_ema"].clone()
    sizes[3] = -0.1
    rqvae = write_rqvae(tmp_path, weights={f"quantizer.codebooks.{d}.cluster_size_ema": sizes for d in range(3)})
    with pytest.raises(ValueError, match="cluster_size_ema must not be negative"):
        load(rqvae)


@loaders
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions(tmp_path, load, dtype):
    weights = {name: weight.to(dtype) for name, weight in original_rqvae(shared_rqvae()).items()}
    actual = load(write_rqvae(tmp_path, weights=weights)).state_dict()
    assert all(torch.equal(actual[name], w.to(dtype).float()) for name, w in shared_rqvae().state_dict().items())


@loaders
def test_few_bytes_for_many_weights(tmp_path, load):
    zero = torch.zeros(1)
    weights = {name: zero.expand(weight.shape) for name, weight in original_rqvae(shared_rqvae()).items()}
    zero[0] = math.nan  # looking at all values of an absurd size would take too long
    with pytest.raises(ValueError, match="weights share memory: they would need .* bytes and have 4"):
        load(write_rqvae(tmp_path, weights=weights))


@loaders
def test_compressed_checkpoint(tmp_path, load):
    rqvae = write_rqvae(tmp_path)
    with zipfile.ZipFile(rqvae) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(rqvae, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match="model.pt is a truncated or invalid PyTorch checkpoint: .*compressed"):
        load(rqvae)


@loaders
def test_aliases_in_the_configuration(tmp_path, load):
    rqvae = write_rqvae(tmp_path)
    config = yaml.safe_load(RQVAE_CONFIG)
    config["arch"]["ddconfig"]["ch_mult"] = config["arch"]["ddconfig"]["attn_resolutions"] = [1, 1]
    config["dataset"] = config["arch"]
    rqvae.with_name("config.yaml").write_text(yaml.safe_dump(config))
    assert "*id001" in rqvae.with_name("config.yaml").read_text()
    with pytest.raises(ValueError, match="encoder.down.1.attn.0"):
        load(rqvae)
    rqvae.with_name("config.yaml").write_text("arch: &arch {type: rq-vae, hparams: *arch}")
    with pytest.raises(ValueError, match="config.yaml lacks arch.hparams.latent_shape"):
        load(rqvae)
