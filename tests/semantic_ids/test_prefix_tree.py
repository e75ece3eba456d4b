import numpy as np
import pytest

from rq_hf.semantic_ids.prefix_tree import PrefixTree

SIZES = (5, 3, 4)


@pytest.fixture(scope="module")
def codes():
    return np.random.default_rng(0).integers(0, SIZES, (40, 3))


@pytest.fixture(scope="module")
def tree(codes):
    return PrefixTree(codes, SIZES)


def every_prefix():
    return [index for length in range(4) for index in np.ndindex(*SIZES[:length])]


def test_next_codes_and_rows_are_those_of_a_search_through_all_rows(codes, tree):
    assert {len(tree.rows(prefix)) for prefix in every_prefix()} >= {0, 1, 2, 40}
    for prefix in every_prefix():
        rows = [row for row, code in enumerate(codes.tolist()) if code[: len(prefix)] == list(prefix)]
        rows = sorted(rows, key=lambda row: codes[row].tolist())
        assert tree.rows(prefix).tolist() == rows
        following = {codes[row, len(prefix)] for row in rows} if len(prefix) < 3 else ()
        assert tree.next_codes(prefix).tolist() == sorted(following)


def test_prefixes_are_counted_and_ranked(codes, tree):
    for length, level in enumerate(tree.levels, 1):
        prefixes = sorted({tuple(row) for row in codes[:, :length].tolist()})
        assert [tree.find(prefix) for prefix in prefixes] == list(range(len(prefixes)))
        assert level.counts.tolist() == [len(tree.rows(prefix)) for prefix in prefixes]
        alone = sum(len(tree.rows(prefix)) == 1 for prefix in prefixes)
        assert level.collision_rate == 1 - alone / 40
    assert tree.ranks().tolist() == [tree.find(row) for row in codes.tolist()]


def test_rows_of_an_id_are_numbered_in_their_order(codes, tree):
    rows = codes.tolist()
    assert tree.numbers().tolist() == [rows[:i].count(row) for i, row in enumerate(rows)]
    assert tree.numbers().max() > 0


@pytest.mark.parametrize("prefix", [(5,), (-1,), (0, 3), (0, -1), (0, 0, 0, 0)])
def test_impossible_codes_begin_no_id(tree, prefix):
    """Keys of neighbouring prefixes must not be mistaken for theirs."""
    assert tree.find(prefix) is None
    assert not len(tree.next_codes(prefix)) and not len(tree.rows(prefix))


def test_large_codes_do_not_overflow():
    codes = np.array([[2**31 - 2, 2**31 - 2], [2**31 - 2, 0], [7, 2**31 - 2]])
    tree = PrefixTree(codes, (2**31 - 1, 2**31 - 1))
    assert [tree.rows(row).tolist() for row in codes.tolist()] == [[0], [1], [2]]
    assert tree.next_codes((2**31 - 2,)).tolist() == [0, 2**31 - 2]
