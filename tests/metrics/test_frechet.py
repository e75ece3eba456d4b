import logging

import pytest
import torch
from golden import FOLDER, require
from safetensors.torch import load_file

from rq_hf.metrics import FeatureMoments, frechet_distance, frechet_distance_infinity


@pytest.fixture(scope="module")
def recorded():
    return load_file(FOLDER / "metrics" / "io.safetensors")


def test_of_shifted_and_scaled_gaussians():
    features = torch.randn(2000, 3, dtype=torch.double)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features, features + 2) == pytest.approx(12)
    scaled = frechet_distance(features, 3 * features)
    mean, covariance = features.mean(dim=0), features.T.cov()
    assert scaled == pytest.approx(4 * (mean.square().sum() + covariance.trace()).item())


@require("metrics/io.safetensors")
def test_equals_the_recorded_distances_of_features(recorded):
    sets = {name.removeprefix("in/fid/features_"): x for name, x in recorded.items() if "features_" in name}
    pairs = [(a, b) for a in sets for b in sets if f"out/fid/{a}_{b}" in recorded]
    assert pairs
    for a, b in pairs:
        expected = pytest.approx(recorded[f"out/fid/{a}_{b}"].item(), rel=1e-6, abs=1e-9)
        assert frechet_distance(sets[a], sets[b]) == expected
        assert frechet_distance(FeatureMoments.of(sets[a]), sets[b]) == expected
    for name, features in sets.items():
        moments = FeatureMoments.of(features)
        torch.testing.assert_close(moments.mean.float(), recorded[f"out/fid/mu_{name}"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(moments.covariance, recorded[f"out/fid/sigma_{name}"], rtol=1e-6, atol=1e-6)


@require("metrics/io.safetensors")
def test_equals_the_recorded_distances_of_moments(recorded):
    means = [recorded[f"in/fid/given_mu{i}"] for i in (1, 2)]
    sigmas = [recorded[f"in/fid/given_sigma{i}"] for i in (1, 2)]
    identity = torch.eye(len(means[0]))
    for name, covariances in (("given", sigmas), ("given_identity", (identity, 4 * identity))):
        moments = [FeatureMoments.from_moments(None, *given) for given in zip(means, covariances)]
        assert frechet_distance(*moments) == pytest.approx(recorded[f"out/fid/{name}"].item(), rel=1e-6)


def test_of_covariances_without_full_rank_is_exact_and_warns_with_the_numbers(caplog):
    """In orthogonal planes, the root is 0; along one line, Σ Σ' is a number."""
    x = torch.randn(50, 2, dtype=torch.double)
    in_plane, in_other_plane = torch.zeros(2, 50, 5, dtype=torch.double)
    in_plane[:, :2], in_other_plane[:, 2:4] = x, 3 * x
    mean, trace = x.mean(dim=0), x.T.cov().trace()
    with caplog.at_level(logging.WARNING, "rq_hf.metrics.frechet"):
        distance = frechet_distance(in_plane, in_other_plane)
    assert distance == pytest.approx((10 * mean.square().sum() + 10 * trace).item(), rel=1e-9)
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "features: the covariance of 5 features has rank 2 (number of samples: 50)",
        "other_features: the covariance of 5 features has rank 2 (number of samples: 50)",
    ]
    few = torch.randn(3, 40)
    assert frechet_distance(few, few + 1) == pytest.approx(40, rel=1e-6)
    constant = torch.ones(4, 2)
    assert frechet_distance(constant, 3 * constant) == pytest.approx(8)


def test_enough_samples_are_no_warning(caplog):
    with caplog.at_level(logging.WARNING, "rq_hf.metrics.frechet"):
        frechet_distance(torch.randn(20, 3), torch.randn(9, 3))
    assert not caplog.records


def test_infinity_is_the_intercept_of_the_line_in_1_over_n():
    features, reference = torch.randn(2, 3000, 4, dtype=torch.double)
    reference = FeatureMoments.of(reference)
    found = frechet_distance_infinity(
        features, reference, sizes=4, smallest=30, generator=torch.Generator().manual_seed(0)
    )
    assert found["sizes"] == [30, 1020, 2010, 3000]
    assert found["distances"][-1] == pytest.approx(frechet_distance(features, reference), rel=1e-9)
    lines = torch.tensor([[1, 1 / size] for size in found["sizes"]], dtype=torch.double)
    line = torch.linalg.lstsq(lines, torch.tensor(found["distances"], dtype=torch.double)).solution.tolist()
    assert [found["fd_infinity"], found["slope"]] == pytest.approx(line, rel=1e-6)
    assert found["fd_infinity"] < found["distances"][-1] < found["distances"][0]


def test_infinity_depends_on_the_generator_only():
    features, reference = torch.randn(2, 60, 3)
    found = [
        frechet_distance_infinity(features, reference, smallest=5, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    "features, other, message",
    [
        (torch.randn(5, 3), torch.randn(5, 4), "features and other_features must have the same length F, got 3 and 4"),
        (torch.randn(5, 3), torch.randn(1, 3), "other_features must have at least 2 rows, got 1"),
        (FeatureMoments.of(torch.randn(1, 3)), torch.randn(5, 3), "features must have a count of at least 2, got 1"),
        (torch.randn(5, 3) * torch.nan, torch.randn(5, 3), "features must be finite, got NaN or .* in 5 of 5"),
        (
            torch.randn(5, 2),
            FeatureMoments.from_moments(9, torch.zeros(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]])),
            "other_features must have a covariance without negative eigenvalues, got one of -1",
        ),
    ],
)
def test_refuses_by_name(features, other, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(features, other)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"smallest": 60}, r"smallest must lie in \[2, 59\], got 60"),
        ({"sizes": 1}, r"sizes must lie in \[2, 60\], got 1"),
        ({"reference": torch.randn(9, 2)}, "features and reference must have the same length F, got 3 and 2"),
    ],
)
def test_infinity_refuses_by_name(changed, message):
    arguments = {"features": torch.randn(60, 3), "reference": torch.randn(9, 3), "smallest": 5} | changed
    with pytest.raises(ValueError, match=message):
        frechet_distance_infinity(**arguments)
