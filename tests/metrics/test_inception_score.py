import re

import pytest
import torch
from golden import FOLDER, require
from safetensors.torch import load_file

from rq_hf.metrics import inception_score


@require("metrics/io.safetensors")
def test_equals_the_recorded_scores():
    recorded = load_file(FOLDER / "metrics" / "io.safetensors")
    logits = recorded["in/is/probs"].log()
    numbers = [int(found[1]) for name in recorded if (found := re.fullmatch(r"out/is/splits(\d+)/mean", name))]
    assert numbers
    for splits in numbers:
        found = inception_score(logits, splits=splits, deviation="sample")
        for name, value in found.items():
            expected = recorded[f"out/is/splits{splits}/{name}"].item()
            assert value == pytest.approx(expected, rel=1e-6, nan_ok=splits == 1)


def test_of_certain_and_varied_classes_is_their_number():
    certain = torch.eye(4).repeat(5, 1)
    assert inception_score(certain.log(), splits=1)["mean"] == pytest.approx(4)
    assert inception_score(torch.zeros(20, 4), splits=5) == {"mean": pytest.approx(1), "std": pytest.approx(0)}


def test_parts_in_order_and_shuffled():
    """The first part has one class, the second has two."""
    logits = torch.eye(3)[torch.tensor([0, 0, 0, 0, 1, 2, 1, 2])].log()
    assert inception_score(logits, splits=2) == {"mean": pytest.approx(1.5), "std": pytest.approx(0.5)}
    sample = inception_score(logits, splits=2, deviation="sample")
    assert sample["std"] == pytest.approx(0.5 * 2**0.5)

    logits = torch.randn(40, 3)
    one, same, other = (
        inception_score(logits, splits=2, shuffle=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert one == same != other


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"splits": 9}, r"splits must lie in \[1, 8\], got 9"),
        ({"deviation": "unbiased"}, r"deviation must be one of \['population', 'sample'\], got 'unbiased'"),
        ({"logits": torch.full((8, 3), -torch.inf)}, "logits must be finite, got NaN or infinite values in 8 of 8"),
        ({"logits": torch.randn(8, 3) * torch.nan}, "logits must be finite, got NaN or infinite values in 8 of 8"),
        ({"logits": torch.randn(1, 3)}, "logits must have at least 2 rows, got 1"),
    ],
)
def test_refuses_by_name(changed, message):
    with pytest.raises(ValueError, match=message):
        inception_score(**{"logits": torch.randn(8, 3), "splits": 2} | changed)
