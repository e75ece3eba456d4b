import itertools

import numpy as np

from rq_hf.semantic_ids.free_ids import FreeIds
from rq_hf.semantic_ids.prefix_tree import PrefixTree

SIZES = (3, 4, 5)


def make(codes):
    numbers = np.random.default_rng(0)
    codebooks = [numbers.normal(size=(size, 6)) / 2**d for d, size in enumerate(SIZES)]
    return FreeIds(PrefixTree(np.array(codes), SIZES), codebooks), codebooks, numbers.normal(size=6)


def distance(latent, codebooks, codes):
    return np.square(latent - sum(book[code] for book, code in zip(codebooks, codes))).sum()


def test_the_nearest_free_last_code_is_taken_and_then_the_next():
    free_ids, codebooks, latent = make([[1, 2, 3], [1, 2, 0], [0, 0, 1]])
    near_first = sorted([1, 2, 4], key=lambda code: distance(latent, codebooks, (1, 2, code)))
    for code in near_first:
        assert free_ids.take_nearest((1, 2, 3), latent) == (1, 2, code)


def test_other_codes_before_the_last_follow_when_no_last_code_is_free():
    free_ids, codebooks, latent = make([[1, 2, code] for code in range(5)])
    second = min([0, 1, 3], key=lambda code: distance(latent, codebooks, (1, code)))
    third = min(range(5), key=lambda code: distance(latent, codebooks, (1, second, code)))
    assert free_ids.take_nearest((1, 2, 3), latent) == (1, second, third)


def test_first_codes_are_kept_as_long_as_possible():
    free_ids, _, latent = make([[1, code, last] for code in range(4) for last in range(5) if (code, last) != (3, 3)])
    assert free_ids.take_nearest((1, 0, 0), latent) == (1, 3, 3)
    assert free_ids.take_nearest((1, 0, 0), latent)[0] != 1


def test_every_id_is_found_and_then_none():
    free_ids, _, latent = make([[0, 0, 0]])
    found = [free_ids.take_nearest((0, 0, 0), latent) for _ in range(3 * 4 * 5 - 1)]
    assert sorted(found) == sorted(itertools.product(*map(range, SIZES)))[1:]
    assert free_ids.take_nearest((0, 0, 0), latent) is None


def test_equally_near_codes_are_taken_in_their_order():
    codebooks = [np.zeros((2, 1)), np.zeros((3, 1))]
    free_ids = FreeIds(PrefixTree(np.array([[1, 1]]), (2, 3)), codebooks)
    found = [free_ids.take_nearest((1, 1), np.zeros(1)) for _ in range(5)]
    assert found == [(1, 0), (1, 2), (0, 0), (0, 1), (0, 2)]
