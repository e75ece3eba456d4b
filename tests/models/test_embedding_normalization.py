"""`normalize_latents` and `normalize_output` of the model of embeddings."""

import pytest
import torch

from rq_hf import RQEmbeddingModel


@pytest.mark.parametrize("hidden_dims", [(), (64,)])
@pytest.mark.parametrize("latents", [False, True])
@pytest.mark.parametrize("output", [False, True])
def test_unit_length_of_latents_and_output(hidden_dims, latents, output):
    torch.manual_seed(0)
    model = RQEmbeddingModel(
        6, hidden_dims, 6, codebook_size=8, depth=2, normalize_latents=latents, normalize_output=output
    )
    vectors = torch.randn(100, 6) + 1
    found = model.fit(vectors).eval()(vectors)
    for tensor, normalized in ((found.latents, latents), (found.sample, output)):
        assert torch.allclose(tensor.norm(dim=1), torch.ones(100), atol=1e-6) == normalized
    assert torch.equal(model.encode(vectors), found.codes)
    torch.testing.assert_close(model.decode(found.codes), found.sample)


def test_normalization_makes_the_length_of_a_vector_irrelevant_to_its_codes():
    model = RQEmbeddingModel(6, (), codebook_size=8, normalize_latents=True)
    vectors = torch.randn(100, 6)
    assert torch.equal(model.encode(vectors), model.encode(3 * vectors))


@pytest.mark.parametrize("name", ["normalize_latents", "normalize_output"])
def test_normalization_is_on_or_off(name):
    with pytest.raises(TypeError, match=f"{name} must be True or False, got 1"):
        RQEmbeddingModel(6, (), **{name: 1})
