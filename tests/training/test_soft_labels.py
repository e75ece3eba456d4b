import pytest
import torch
from tiny import C, D, K

from rq_hf import ResidualQuantizer
from rq_hf.training import choose_soft_label_temperature, effective_codewords
from rq_hf.training.soft_labels import describe_soft_labels


@pytest.fixture(params=[True, False], ids=["shared", "per-depth"])
def quantizer(request):
    torch.manual_seed(0)
    return ResidualQuantizer(K, C, D, shared_codebook=request.param).eval()


@pytest.fixture
def vectors():
    return torch.randn(10, 3, 4, C, generator=torch.Generator().manual_seed(0))


def test_effective_codewords_are_those_of_the_entropy_of_the_soft_codes(quantizer, vectors):
    targets, _ = quantizer.get_soft_codes(vectors, temperature=0.7)
    entropy = torch.distributions.Categorical(targets).entropy().mean(dim=(0, 1, 2))
    actual = effective_codewords(quantizer, quantizer.encode(vectors).residuals, 0.7)
    torch.testing.assert_close(actual, entropy.exp())


@pytest.mark.parametrize("temperature, expected", [(1e-6, 1), (1e9, K)])
def test_effective_codewords_go_from_hard_to_uniform_labels(quantizer, vectors, temperature, expected):
    actual = effective_codewords(quantizer, quantizer.encode(vectors).residuals, temperature)
    torch.testing.assert_close(actual, torch.full((D,), float(expected)))


@pytest.mark.parametrize("target", [1.2, 3.0])
def test_chosen_temperature_meets_the_target(quantizer, vectors, target):
    temperature = choose_soft_label_temperature(quantizer, vectors, target)
    effective = effective_codewords(quantizer, quantizer.encode(vectors).residuals, temperature)
    assert effective.log().mean().exp().item() == pytest.approx(target, rel=0.05)


def test_chosen_temperature_has_the_unit_of_squared_distance(quantizer, vectors):
    temperature = choose_soft_label_temperature(quantizer, vectors)
    quantizer.codebook.data *= 10
    assert choose_soft_label_temperature(quantizer, 10 * vectors) == pytest.approx(100 * temperature, rel=0.02)


def test_chosen_temperature_is_that_of_evenly_spaced_vectors_of_a_large_set(quantizer, vectors):
    expected = choose_soft_label_temperature(quantizer, vectors)
    repeated = vectors.reshape(-1, 1, C).expand(-1, 50, -1)
    assert choose_soft_label_temperature(quantizer, repeated) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("target", [1.0, K, float("nan")])
def test_refuses_a_target_that_no_temperature_reaches(quantizer, vectors, target):
    with pytest.raises(ValueError, match=rf"target must lie in \(1, {K}\)"):
        choose_soft_label_temperature(quantizer, vectors, target)


@pytest.mark.parametrize(
    "temperature, warning", [(1e6, "nearly uniform and teach noise"), (1e-6, "are hard"), (None, None)]
)
def test_description_warns_of_labels_that_are_uniform_or_hard(quantizer, vectors, temperature, warning):
    temperature = temperature or choose_soft_label_temperature(quantizer, vectors)
    text = describe_soft_labels(quantizer, vectors, temperature)
    assert f"soft labels of temperature {temperature} have" in text
    assert ("WARNING" in text) == (warning is not None)
    assert warning is None or warning in text
