import pytest
import torch

from rq_hf.metrics import FeatureMoments


@pytest.fixture
def features():
    return torch.randn(10_000, 5, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 6) + 100


def equal(a, b):
    found, expected = a.tensors(), b.tensors()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_batches_have_the_moments_of_the_whole(features):
    moments = FeatureMoments(5)
    for batch in features.split([1, 2, 997, 9000]):
        moments.update(batch)
    assert moments.count == 10_000
    torch.testing.assert_close(moments.mean, features.double().mean(dim=0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.covariance, features.double().T.cov(), rtol=1e-10, atol=1e-10)


def test_merging_in_order_has_the_bits_of_updating_in_order(features):
    one, merged = FeatureMoments(5), FeatureMoments(5)
    for shard in features.split(4500):
        one.update(shard)
        merged.merge(FeatureMoments.of(shard))
    assert equal(one, merged)
    assert equal(FeatureMoments.from_moments(**merged.tensors() | {"count": merged.count}), merged)


def test_one_feature_has_a_mean_and_no_spread(features):
    moments = FeatureMoments.of(features[:1])
    assert torch.equal(moments.mean, features[0].double()) and not moments.covariance.any()


def test_moments_of_unknown_count_are_not_updated(features):
    moments = FeatureMoments.from_moments(None, torch.zeros(5), torch.eye(5))
    assert moments.tensors().keys() == {"mean", "covariance"}
    with pytest.raises(ValueError, match="whose count is None cannot be updated"):
        moments.update(features)
    with pytest.raises(ValueError, match="whose count is None cannot be updated"):
        FeatureMoments.of(features).merge(moments)


@pytest.mark.parametrize(
    "count, mean, covariance, message",
    [
        (1, torch.zeros(2), torch.eye(2), r"count must lie in \[2,"),
        (None, torch.zeros(2), torch.eye(3), r"covariance must have the shape \(2, 2\), got \(3, 3\)"),
        (None, torch.zeros(2), torch.tensor([[1.0, 0.5], [0.4, 1.0]]), "covariance must be symmetric, got a diff"),
        (None, torch.full((2,), torch.nan), torch.eye(2), "mean must be finite"),
    ],
)
def test_refuses_what_are_no_moments(count, mean, covariance, message):
    with pytest.raises(ValueError, match=message):
        FeatureMoments.from_moments(count, mean, covariance)


def test_refuses_other_features(features):
    moments = FeatureMoments.of(features)
    with pytest.raises(ValueError, match="the same length F, got 5 and 4"):
        moments.update(features[:, :4])
    with pytest.raises(ValueError, match="features must be finite, got NaN or infinite values in 1 of 1"):
        moments.update(torch.full((1, 5), torch.nan))
    with pytest.raises(TypeError, match="features must be floating point, got torch.uint8"):
        moments.update(features.byte())
    assert moments.count == 10_000
