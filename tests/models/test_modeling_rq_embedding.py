import pytest
import torch
from tiny import C, K, same_state, tiny_embedding, tiny_pixels, tiny_vae, tiny_vectors

from rq_hf import RQEmbeddingModel
from rq_hf.models.rq_embedding import modeling_rq_embedding

INPUT_DIM = 14


def k_means_model(**overrides):
    """Without an encoder, not fitted."""
    return RQEmbeddingModel(**{"input_dim": INPUT_DIM, "hidden_dims": (), "codebook_size": 8, "depth": 4} | overrides)


def errors_by_depth(model, vectors, codes):
    return [(model.decode(codes, depth=d) - vectors).square().mean().item() for d in range(1, codes.shape[1] + 1)]


def test_the_encoder_sees_standardised_vectors():
    vectors = 3 * tiny_vectors(500) - 7
    model = k_means_model().fit(vectors)
    latents = model(vectors).latents
    torch.testing.assert_close(model.mean, vectors.mean(dim=0))
    torch.testing.assert_close(latents.mean(dim=0), torch.zeros(INPUT_DIM), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.square().mean(), torch.tensor(1.0))


@pytest.mark.parametrize("hidden_dims", [(), (40, 30)])
@pytest.mark.parametrize("scale, shift", [(1e-3, 0.0), (1e4, -1e5)])
def test_codes_depend_on_neither_scale_nor_shift(hidden_dims, scale, shift):
    vectors = tiny_vectors(200).double()
    codes = []
    for given in (vectors, scale * vectors + shift):
        torch.manual_seed(0)
        codes.append(k_means_model(hidden_dims=hidden_dims).fit(given).encode(given))
    assert (codes[0] == codes[1]).float().mean() > 0.99  # k-means is in float32
    assert [len(column.unique()) for column in codes[0].T] == [8] * 4


def test_fitted_codebooks_reconstruct_ever_better():
    vectors = tiny_vectors(500)
    model = k_means_model(codebook_size=32).fit(vectors)
    errors = errors_by_depth(model, vectors, model.encode(vectors))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * vectors.var(dim=0).mean()
    searched = errors_by_depth(model, vectors, model.encode(vectors, beam_size=8))
    assert searched[-1] < 0.98 * errors[-1]


def test_codewords_that_are_the_vectors_reconstruct_them():
    vectors = tiny_vectors(5)
    model = tiny_embedding(hidden_dims=(), latent_dim=None, codebook_size=5, depth=1).fit(vectors)
    codes = model.encode(vectors)
    assert sorted(codes.flatten().tolist()) == list(range(5))
    torch.testing.assert_close(model.decode(codes), vectors)


def test_forward_encodes_and_decodes():
    model, vectors = tiny_embedding(), tiny_vectors(50)
    output = model(vectors)
    assert torch.equal(output.codes, model.encode(vectors))
    torch.testing.assert_close(output.sample, model.decode(output.codes))
    assert output.latents.shape == (50, C)


def test_gradients_reach_the_encoder():
    model, vectors = tiny_embedding().train(), tiny_vectors(50)
    model(vectors).sample.square().mean().backward()
    assert all(weight.grad.any() for weight in (*model.encoder.parameters(), *model.decoder.parameters()))


@pytest.mark.parametrize("settings", [{}, {"beam_size": 3}])
@pytest.mark.parametrize("hidden_dims", [(), (40, 30)])
def test_codes_are_those_of_each_vector_alone(monkeypatch, hidden_dims, settings):
    latent_dim = None if not hidden_dims else C
    model, vectors = tiny_embedding(hidden_dims=hidden_dims, latent_dim=latent_dim), tiny_vectors(300)
    codes = model.encode(vectors, **settings)
    assert torch.equal(torch.cat([model.encode(vector[None], **settings) for vector in vectors]), codes)
    assert torch.equal(model.encode(vectors.flip(0), **settings).flip(0), codes)
    torch.set_num_threads(2)
    assert torch.equal(model.encode(vectors, **settings), codes)
    torch.set_num_threads(1)
    monkeypatch.setattr(modeling_rq_embedding, "CHUNK", 7)
    assert torch.equal(model.encode(vectors, **settings), codes)


def test_codes_of_float32_vectors_are_those_of_float64():
    model, vectors = tiny_embedding(), tiny_vectors(100)
    assert torch.equal(model.encode(vectors.double()), model.encode(vectors))


@pytest.mark.parametrize("chunk", [7, 8192])
def test_balanced_codes_use_the_last_level_evenly(monkeypatch, chunk):
    monkeypatch.setattr(modeling_rq_embedding, "CHUNK", chunk)
    model, vectors = tiny_embedding(), torch.randn(7 * 20, INPUT_DIM) ** 3
    codes, balanced = model.encode(vectors), model.encode(vectors, balanced=True)
    assert torch.equal(balanced[:, :-1], codes[:, :-1])
    assert torch.bincount(balanced[:, -1]).tolist() == [20] * 7
    assert torch.bincount(codes[:, -1]).max() > 20


def test_every_level_has_its_codebook_size():
    model = tiny_embedding()
    assert model.codebook_sizes == (5, K, 7)
    assert (model.encode(tiny_vectors(100)) < torch.tensor(model.codebook_sizes)).all()
    with pytest.raises(ValueError, match=r"codes of depth 1 must lie in \[0, 5\)"):
        model.decode(torch.tensor([[5, 0, 0]]))


def test_default_latents():
    assert RQEmbeddingModel(20, (16,), codebook_size=4).config.latent_dim == 32
    assert RQEmbeddingModel(20, (), codebook_size=4).config.latent_dim == 20


@pytest.mark.parametrize(
    "options, message",
    [
        ({"input_dim": 0}, "input_dim must be at least 1, got 0"),
        ({"latent_dim": 13}, "without hidden_dims, latent_dim must be input_dim, got 13 and 14"),
        ({"hidden_dims": (8, 0)}, "hidden_dims must be at least 1, got 0"),
        ({"codebook_size": (8, 8)}, r"codebook_size must be a number or one per codebook \(4\)"),
        ({"activation": "gelu"}, r"activation must be one of \['relu', 'silu'\], got 'gelu'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        k_means_model(**options)


@pytest.mark.parametrize("method", ["fit", "encode", "forward"])
@pytest.mark.parametrize(
    "vectors, error, message",
    [
        (torch.randn(20, 13), ValueError, r"vectors must have the shape \(N, 14\), got \(20, 13\)"),
        (torch.randn(14), ValueError, r"vectors must have the shape \(N, 14\), got \(14,\)"),
        (torch.randn(0, 14), ValueError, r"not empty"),
        (torch.full((20, 14), torch.nan), ValueError, "vectors must be finite, .* in 20 of 20"),
        (torch.ones(20, 14, dtype=torch.int64), TypeError, "vectors must be floating point, got torch.int64"),
        ([[0.0] * 14], TypeError, "vectors must be a torch.Tensor"),
    ],
)
def test_bad_vectors(method, vectors, error, message):
    with pytest.raises(error, match=message):
        getattr(k_means_model(), method)(vectors)


def test_nothing_can_be_fitted_to():
    with pytest.raises(ValueError, match="all 20 vectors are equal"):
        k_means_model().fit(torch.ones(20, INPUT_DIM))
    with pytest.raises(ValueError, match=r"at least as many vectors as clusters \(8\), got 7"):
        k_means_model().fit(tiny_vectors(7))


def test_the_code_of_its_card_runs(tmp_path):
    model = tiny_embedding()
    model.save_pretrained(tmp_path)
    card = model.card(str(tmp_path))
    names = {}
    exec(card.split("```python\n")[1].split("```")[0], names)
    assert same_state(names["model"], model)
    assert names["codes"].shape == (2, 3) and names["vectors"].shape == (2, INPUT_DIM)


def test_images_may_be_encoded_with_a_beam():
    vae, pixels = tiny_vae(shared_codebook=False), tiny_pixels(8)
    vectors = vae.encode_to_vectors(pixels)
    errors = [
        (vae.quantizer.decode(vae.get_codes(pixels, beam_size=beam_size)) - vectors).square().mean()
        for beam_size in (1, 4)
    ]
    assert errors[1] < errors[0]
