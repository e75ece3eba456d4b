import pytest
import torch
from tiny import tiny_pipeline

from rq_hf.evaluation.retrieval import retrieval_ranks

PROMPTS = ["red apple", "fire engine", "red fire"]


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    return tiny_pipeline("text")


@pytest.fixture(scope="module")
def sampled(pipe):
    """What the pipeline samples for the prompts, two at a time."""
    generator = torch.Generator().manual_seed(5)
    return torch.cat([pipe(part, generator=generator, output_type="pt").images for part in (PROMPTS[:2], PROMPTS[2:])])


def ranks(pipe, images, candidates):
    return retrieval_ranks(pipe, PROMPTS, images, candidates, seed=5, batch_size=2).tolist()


def test_counts_the_candidates_that_are_closer(pipe, sampled):
    far = [sampled + shift for shift in (0.3, 0.1, 0.2)]
    candidates = torch.cat(far)
    same = [sampled[i : i + 1] + shift for i, shift in enumerate((0.3, 0.1, 0.2))]
    found = retrieval_ranks(pipe, PROMPTS, torch.cat(same), candidates, seed=5, batch_size=2)
    distances = [torch.linalg.vector_norm((sampled[i] - candidates).flatten(1), dim=1) for i in range(3)]
    own = [torch.linalg.vector_norm(sampled[i] - same[i][0]) for i in range(3)]
    assert found.tolist() == [1 + int((d < o * 0.999).sum()) for d, o in zip(distances, own)]
    assert found[1] == 1
    assert found[0] >= 3


def test_the_sampled_images_themselves_come_first(pipe, sampled):
    assert ranks(pipe, sampled, torch.cat([sampled + 0.5, sampled])) == [1, 1, 1]


def test_equal_candidates_share_a_rank(pipe, sampled):
    images = sampled + 0.1
    assert ranks(pipe, images, torch.cat([images, images])) == ranks(pipe, images, images)


@pytest.mark.parametrize(
    ("images", "candidates", "message"),
    [
        (torch.zeros(2, 3, 4, 6), torch.zeros(5, 3, 4, 6), r"images must have the shape \(3, 3, 4, 6\)"),
        (torch.zeros(3, 3, 4, 6), torch.zeros(5, 1, 4, 6), r"candidates must have the shape \(M, 3, height, width\)"),
    ],
    ids=["count", "channels"],
)
def test_refuses_other_images(pipe, images, candidates, message):
    with pytest.raises(ValueError, match=message):
        retrieval_ranks(pipe, PROMPTS, images, candidates)
