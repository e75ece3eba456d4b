import pytest
import torch

from rq_hf.metrics import frechet_distance


def test_frechet_distance_of_shifted_and_scaled_gaussians():
    features = torch.randn(2000, 3, dtype=torch.double)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features, features + 2) == pytest.approx(12)
    scaled = frechet_distance(features, 3 * features)
    mean, covariance = features.mean(dim=0), features.T.cov()
    assert scaled == pytest.approx(4 * (mean.square().sum() + covariance.trace()).item())
