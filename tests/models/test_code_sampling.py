import math

import pytest
import torch
from generation import chi_square

from rq_hf.models.rq_transformer.code_sampling import filter_logits, num_proposals, preceding_mass, sample_codes


def brute_force_filter(logits, top_k, top_p):
    ranked = sorted(range(len(logits)), key=lambda k: -logits[k])
    kept = [k for k in ranked if logits[k] >= logits[ranked[top_k - 1]]]
    mass = [math.exp(logits[k]) for k in kept]
    return {k for i, k in enumerate(kept) if sum(mass[:i]) / sum(mass) < top_p}


@pytest.mark.parametrize("top_k", [1, 3, 7, 20])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_filter_keeps_the_nucleus_of_the_most_likely_codes(top_k, top_p):
    logits = 2 * torch.randn(30, 20)
    filtered = filter_logits(logits, top_k, top_p)
    for row, original in zip(filtered, logits):
        kept = row > -math.inf
        assert set(kept.nonzero().flatten().tolist()) == brute_force_filter(original.tolist(), top_k, top_p)
        assert torch.equal(row[kept], original[kept])


@pytest.mark.parametrize(
    "top_k, top_p, kept",
    [
        (1, 1.0, [3]),
        (2, 1.0, [0, 1, 3]),
        (3, 1.0, [0, 1, 3]),
        (4, 1.0, [0, 1, 3, 4]),
        (5, 0.399, [3]),
        (5, 0.601, [0, 1, 3]),
        (4, 0.81, [0, 1, 3]),
        (4, 0.85, [0, 1, 3, 4]),
    ],
)
def test_filter_by_hand(top_k, top_p, kept):
    logits = torch.tensor([[0.2, 0.2, 0.05, 0.4, 0.15]]).log()
    kept_here = (filter_logits(logits, top_k, top_p) > -math.inf)[0].nonzero().flatten().tolist()
    assert kept_here == kept


def draw(logits, top_k, top_p, generator):
    shape = (len(logits), num_proposals(top_p))
    return sample_codes(logits, top_k, top_p, torch.rand(shape, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("top_k", [3, 5, 12])
@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.6, 0.9, 1.0])
def test_drawn_codes_have_the_frequencies_of_the_filtered_probabilities(generator, top_k, top_p):
    logits = torch.randn(12).sort().values[torch.randperm(12)]
    probabilities = filter_logits(logits[None], top_k, top_p)[0].softmax(dim=-1)
    counts = torch.bincount(draw(logits.expand(50_000, 12), top_k, top_p, generator), minlength=12)
    assert torch.equal(counts > 0, probabilities > 0)
    assert chi_square(counts, probabilities) < 40  # at most 11 degrees of freedom


@pytest.mark.parametrize("top_p", [0.45, 0.7, 0.92])
def test_the_nucleus_of_a_large_codebook_is_exact(generator, top_p):
    logits = (3 * torch.randn(5, 4096)).round(decimals=1)  # with ties
    kept = filter_logits(logits, 2048, top_p) > -math.inf
    rows = torch.arange(5).repeat(4000)
    codes = draw(logits[rows], 2048, top_p, generator)
    assert kept[rows, codes].all()
    probabilities = filter_logits(logits, 2048, 1.0).softmax(dim=-1)
    for code in range(0, 4096, 7):
        inside = preceding_mass(probabilities, torch.full((5,), code)) < top_p
        assert torch.equal(inside & (probabilities[:, code] > 0), kept[:, code])


@pytest.mark.parametrize("uniform, code", [(0.0, 1), (0.2, 1), (0.3, 3), (1 - 2**-53, 3)])
def test_codes_without_mass_are_never_drawn(uniform, code):
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]])
    assert sample_codes(logits, 5, 1.0, torch.tensor([[uniform]], dtype=torch.float64)).item() == code
