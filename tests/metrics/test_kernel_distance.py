import itertools
import math

import pytest
import torch

from rq_hf.metrics import cmmd, kernel_inception_distance, pairwise


def naive_discrepancy(x, y, kernel, is_unbiased):
    """The squared maximum mean discrepancy, pair by pair."""

    def mean(a, b, skip):
        pairs = [(i, j) for i, j in itertools.product(range(len(a)), range(len(b))) if not (skip and i == j)]
        return sum(kernel(a[i], b[j]) for i, j in pairs) / len(pairs)

    return mean(x, x, is_unbiased) + mean(y, y, is_unbiased) - 2 * mean(x, y, False)


def test_kid_of_whole_sets_is_the_unbiased_discrepancy():
    features, reference = torch.randn(2, 7, 3, dtype=torch.double) + torch.tensor([0, 1])[:, None, None]
    found = kernel_inception_distance(features, reference, subsets=2, subset_size=7)
    expected = naive_discrepancy(features, reference, lambda x, y: (x.dot(y).item() / 3 + 1) ** 3, is_unbiased=True)
    assert found["mean"] == pytest.approx(expected, rel=1e-9)
    assert found["std"] == pytest.approx(0, abs=1e-12)


def test_kid_of_one_distribution_is_0_on_average():
    features, reference = torch.randn(2, 400, 5)
    found = kernel_inception_distance(features, reference, subsets=50, subset_size=200)
    assert abs(found["mean"]) < 3 * found["std"]
    shifted = kernel_inception_distance(features, reference + 1, subsets=50, subset_size=200)
    assert shifted["mean"] > 5 * found["std"]


def test_kid_depends_on_the_generator_only():
    features, reference = torch.randn(2, 50, 3)
    one, same, other = (
        kernel_inception_distance(
            features, reference, subsets=5, subset_size=20, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (0, 0, 1)
    )
    assert one == same != other


def test_cmmd_is_the_biased_discrepancy_of_unit_vectors(monkeypatch):
    features, reference = torch.randn(9, 4), torch.randn(7, 4)
    units = [x.double() / x.double().norm(dim=1, keepdim=True) for x in (features, reference)]
    expected = 1000 * naive_discrepancy(
        *units, lambda x, y: math.exp(-(x - y).square().sum().item() / 200), is_unbiased=False
    )
    assert cmmd(features, reference) == pytest.approx(expected, rel=1e-9)
    assert cmmd(3 * features, reference) == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr("rq_hf.metrics.kernel_distance.ROWS", 2)
    monkeypatch.setattr("rq_hf.metrics.kernel_distance.COLUMNS", 3)
    assert cmmd(features, reference) == pytest.approx(expected, rel=1e-9)
    assert cmmd(features, features) == pytest.approx(0, abs=1e-9)


def test_distances_of_equal_features_are_0_and_others_exact():
    x = torch.randn(6, 2000) + 300
    distances = pairwise.squared_distances(x, torch.cat([x, x + 1e-3]))
    assert not distances[range(6), range(6)].any()
    expected = torch.cdist(x.double(), torch.cat([x, x + 1e-3]).double(), compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(distances, expected.square(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"subset_size": 21}, r"subset_size must lie in \[2, 20\], got 21"),
        ({"subset_size": 1}, r"subset_size must lie in \[2, 20\], got 1"),
        ({"subsets": 0}, "subsets must be at least 1, got 0"),
        ({"features": torch.randn(30, 4)}, "features and reference must have the same length F, got 4 and 3"),
        ({"reference": torch.full((30, 3), torch.nan)}, "reference must be finite"),
        ({"features": torch.randn(1, 3)}, "features must have at least 2 rows, got 1"),
    ],
)
def test_kid_refuses_by_name(changed, message):
    arguments = {"features": torch.randn(30, 3), "reference": torch.randn(20, 3), "subset_size": 10} | changed
    with pytest.raises(ValueError, match=message):
        kernel_inception_distance(**arguments)


def test_cmmd_refuses_embeddings_without_direction():
    with pytest.raises(ValueError, match="reference must not be 0, got 2 of 3 embeddings that are"):
        cmmd(torch.randn(4, 2), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]))
