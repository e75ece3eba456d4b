from importlib import import_module

import pytest
import torch

from rq_hf.metrics import precision_recall


def naive_share(features, reference, k):
    """Kynkäänniemi et al. 2019, eqs. 1 and 2."""

    def is_near(x):
        for ball in reference:
            radius = (reference - ball).norm(dim=1).sort().values[k]  # the first is the ball's own distance
            if (x - ball).norm() <= radius:
                return True
        return False

    return sum(is_near(x) for x in features) / len(features)


@pytest.mark.parametrize("neighbours", [1, 3])
def test_equals_the_definition_in_blocks_of_any_size(monkeypatch, neighbours):
    features, reference = torch.randn(23, 4, dtype=torch.double), 3 * torch.randn(31, 4, dtype=torch.double)
    expected = {
        "precision": naive_share(features, reference, neighbours),
        "recall": naive_share(reference, features, neighbours),
    }
    assert 0 < expected["recall"] < expected["precision"]
    assert precision_recall(features, reference, neighbours=neighbours) == expected
    module = import_module("rq_hf.metrics.precision_recall")  # hidden by the function of its name
    monkeypatch.setattr(module, "ROWS", 5)
    monkeypatch.setattr(module, "COLUMNS", 2)
    assert precision_recall(features, reference, neighbours=neighbours) == expected


def test_of_equal_far_and_collapsed_sets():
    features = torch.randn(20, 8)
    assert precision_recall(features, features) == {"precision": 1, "recall": 1}
    assert precision_recall(features, features + 100) == {"precision": 0, "recall": 0}
    assert precision_recall(features[:1].repeat(20, 1), features) == {"precision": 1, "recall": 1 / 20}


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"neighbours": 8}, r"neighbours must lie in \[1, 7\], got 8"),
        ({"neighbours": 0}, r"neighbours must lie in \[1, 7\], got 0"),
        ({"reference": torch.randn(9, 4)}, "features and reference must have the same length F, got 3 and 4"),
        ({"features": torch.randn(1, 3)}, "features must have at least 2 rows, got 1"),
    ],
)
def test_refuses_by_name(changed, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(**{"features": torch.randn(8, 3), "reference": torch.randn(9, 3)} | changed)
