import pytest
import torch
from tiny import CONDITIONS, C, D, K, same_state, tiny_transformer, tiny_vae

from rq_hf.training.rq_transformer import TransformerArguments, create_transformer

SIZES = {"hidden_size": 16, "spatial_layers": 1, "depth_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def vae():
    return tiny_vae(sample_size=6)  # a grid of 3×3


def test_new_transformer_has_the_codes_and_the_codebook_of_the_vae(vae):
    model = create_transformer(vae, TransformerArguments(rqvae="vae", **SIZES))
    assert model.config.code_shape == (3, 3, D)
    assert (model.config.codebook_size, model.config.codebook_dim) == (K, C)
    assert torch.equal(model.codebook, vae.quantizer.codebook)
    assert model.config.spatial_config.hidden_size == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_goes_on_from_a_trained_one_in_single_precision(vae, tmp_path, dtype):
    vae.quantizer.codebook.data = vae.quantizer.codebook.data.half().float()
    trained = tiny_transformer("class", code_shape=(3, 3, D))
    trained.set_codebook(vae.quantizer.codebook)
    trained.to(dtype).save_pretrained(tmp_path)
    arguments = TransformerArguments(rqvae="vae", transformer=str(tmp_path))
    model = create_transformer(vae, arguments, **CONDITIONS["class"])
    assert same_state(model, trained.float())


@pytest.mark.parametrize(
    "kind, code_shape, message",
    [
        ("class", (3, 3, D), "another codebook than --rqvae vae"),
        ("text", (3, 3, D), r"\(\(3, 3, 4\), 5, 1, 4\), this data needs \(\(3, 3, 4\), 270, 5, 0\)"),
        ("class", (2, 3, D), r"\(\(2, 3, 4\), 5, 1, 4\), this data needs \(\(3, 3, 4\), 5, 1, 4\)"),
    ],
)
def test_trained_one_that_does_not_fit_is_an_error(vae, tmp_path, kind, code_shape, message):
    tiny_transformer("class", code_shape=code_shape).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        create_transformer(vae, TransformerArguments(rqvae="vae", transformer=str(tmp_path)), **CONDITIONS[kind])
