import json
import math
import re

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from tiny import tiny_embedding, tiny_vectors

from rq_hf import SemanticIds

CODES = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 2, 3], [4, 11, 6], [1, 0, 3], [1, 2, 3]])
NAMES = ["red", "green", "blue", "white", "black", "grey"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_embedding()


@pytest.fixture(scope="module")
def ids(model):
    return SemanticIds(model, NAMES, CODES)


def test_items_have_ids_and_ids_have_items(ids):
    assert len(ids) == 6 and ids.sizes == (5, 12, 7) and repr(ids) == "SemanticIds(6 items, codes of 5×12×7)"
    assert ids.codes_of("white") == (4, 11, 6)
    assert ids.items_of((1, 2, 3)) == ids.items_of(CODES[0]) == ["red", "blue", "grey"]
    assert ids.items_of([1, 2]) == ["red", "blue", "grey", "green"]
    assert sorted(ids.items_of([])) == sorted(NAMES)
    assert [ids.allowed_next(prefix) for prefix in ([], (1,), CODES[0, :2], [1, 2, 3])] == [[1, 4], [0, 2], [3, 4], []]


@pytest.mark.parametrize("ask", [SemanticIds.items_of, SemanticIds.allowed_next])
def test_codes_that_no_id_begins_with(ids, ask):
    for codes in ([0], [1, 11], [5], [-1], [1, 2, 3, 0], torch.tensor([4, 11, 5])):
        with pytest.raises(ValueError, match="no ID begins with the codes"):
            ask(ids, codes)
    for codes in ([1.0], ["1"], [True], 1, None):
        with pytest.raises(TypeError, match="codes must be"):
            ask(ids, codes)


@pytest.mark.parametrize("item", ["RED", 0, None, [0]])
def test_what_is_no_item(ids, item):
    with pytest.raises(ValueError, match="there is no item"):
        ids.codes_of(item)


@pytest.mark.parametrize(
    "items", [np.arange(6), torch.arange(6), tuple(range(6)), list(np.arange(6)), np.array(NAMES)]
)
def test_names_may_be_arrays(model, items):
    ids = SemanticIds(model, items, CODES)
    assert ids.items == [item.item() if hasattr(item, "item") else item for item in items]
    assert {type(item) for item in ids.items} <= {int, str}
    assert ids.codes_of(items[3]) == (4, 11, 6)


@pytest.mark.parametrize(
    "items, codes, error, message",
    [
        ("abcdef", CODES, TypeError, "items must be a list or tuple"),
        ([*NAMES[:5], 1], CODES, TypeError, "items must be all strings or all integers, got int and str"),
        ([True] * 6, CODES, TypeError, "items must be all strings or all integers, got bool"),
        ([0.5] * 6, CODES, TypeError, "items must be all strings or all integers, got float"),
        ([], CODES, TypeError, "items must be all strings or all integers, got none"),
        ([*NAMES[:5], "red"], CODES, ValueError, "items must differ, got 'red' 2 times"),
        ([*range(5), 2**63], CODES, ValueError, "items must lie in"),
        (NAMES[:5], CODES, ValueError, r"codes must have the shape \(5, L\), got \(6, 3\)"),
        (NAMES, CODES.int(), TypeError, "codes must be int64"),
        (NAMES, CODES[:, :2], ValueError, "codes must have 3 levels, or 4 with a suffix, got 2"),
        (NAMES, CODES + 3, ValueError, r"codes of level 1 must lie in \[0, 5\), got values from 4 to 7"),
        (NAMES, CODES - 1, ValueError, r"codes of level 2 must lie in \[0, 12\), got values from -1 to 10"),
        (NAMES, torch.cat([CODES, CODES[:, 2:] + 2], dim=1), ValueError, r"suffixes must lie in \[0, 6\)"),
    ],
)
def test_impossible_tables_are_refused(model, items, codes, error, message):
    with pytest.raises(error, match=message):
        SemanticIds(model, items, codes)


def test_the_model_is_one_of_embeddings():
    with pytest.raises(TypeError, match="model must be of type RQEmbeddingModel"):
        SemanticIds(torch.nn.Linear(1, 1), NAMES, CODES)


def test_the_table_does_not_change_with_the_tensor(model):
    codes = CODES.clone()
    ids = SemanticIds(model, NAMES, codes)
    codes[0] = 0
    assert ids.codes_of("red") == (1, 2, 3)


@pytest.mark.parametrize("settings", [{}, {"beam_size": 3}, {"balanced": True}])
def test_encoded_are_the_codes_of_the_model(model, settings):
    vectors = tiny_vectors(20)
    ids = SemanticIds.encode(model, list(range(20)), vectors, **settings)
    assert torch.equal(ids.codes, model.encode(vectors, **settings))


def test_vectors_and_names_must_match(model):
    with pytest.raises(ValueError, match=r"vectors must have the shape \(3, 14\), got \(2, 14\)"):
        SemanticIds.encode(model, [1, 2, 3], tiny_vectors(2))
    with pytest.raises(ValueError, match="items must differ, got 1 2 times"):
        SemanticIds.encode(model, [1, 1], tiny_vectors(2))


def test_the_report_counts(ids):
    report = ids.report()
    assert json.loads(json.dumps(report)) == report
    assert (report["items"], report["unique"], report["largest_group"], report["sizes"]) == (6, 4, 3, [5, 12, 7])
    assert report["distinct_prefixes"] == [2, 3, 4]
    assert report["collision_rate"] == [5 / 6, 4 / 6, 3 / 6]
    assert report["usage"] == [2 / 5, 3 / 12, 3 / 7]
    entropy = -sum(share * math.log(share) for share in (5 / 6, 1 / 6))
    assert report["perplexity"][0] == pytest.approx(math.exp(entropy))
    assert "relative_error" not in report and "duplicate_rate" not in report


def test_the_report_with_vectors(model):
    vectors = tiny_vectors(300)
    vectors[7] = vectors[40] = vectors[3]
    vectors[50, 0], vectors[51] = 0.0, vectors[50]
    vectors[51, 0] = -0.0
    ids = SemanticIds.encode(model, list(range(300)), vectors)
    report = ids.report(vectors)
    assert report["duplicate_rate"] == 5 / 300
    for depth, error in enumerate(report["relative_error"], 1):
        residual = vectors.double() - model.decode(ids.codes, depth=depth)
        deviation = vectors.double() - vectors.double().mean(dim=0)
        assert error == pytest.approx(float(residual.square().sum() / deviation.square().sum()))
    different = 0
    for row in range(300):
        others = (ids.codes == ids.codes[row]).all(dim=1)
        different += bool((vectors[others] != vectors[row]).any())
    assert report["collision_rate_of_different_vectors"] == different / 300 > 0


def test_collisions_of_equal_vectors_are_counted_apart(model):
    vectors = tiny_vectors(6)
    vectors[1] = vectors[5] = vectors[0].clone()
    codes = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 1], [0, 0, 2], [0, 0, 3]])
    report = SemanticIds(model, NAMES, codes).report(vectors)
    assert report["collision_rate"][-1] == 4 / 6 and report["duplicate_rate"] == 3 / 6
    assert report["collision_rate_of_different_vectors"] == 2 / 6


def test_equal_vectors_have_no_relative_error(model):
    vectors = torch.ones(4, 14)
    report = SemanticIds.encode(model, [1, 2, 3, 4], vectors).report(vectors)
    assert report["relative_error"] == [None] * 3 and report["collision_rate_of_different_vectors"] == 0
    assert report["duplicate_rate"] == 1
    assert json.loads(json.dumps(report)) == report and "–" in str(report)


def test_the_report_prints_as_a_table(ids):
    vectors = tiny_vectors(6)
    resolved, _ = ids.resolve("suffix")
    text = str(resolved.report(vectors))
    assert text.startswith(
        "6 items, 6 distinct IDs, 1 items in the largest group with one ID. 0.00% of the items have"
    )
    head, rule, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    assert [len(row) for row in (rule, *rows)] == [len(head)] * 5
    assert [rows[0][head.index(name)] for name in ("level", "codes", "usage")] == ["1", "5", "40.0%"]
    assert rows[2][head.index("collision rate")] == "50.00%" and rows[3][head.index("collision rate")] == "0.00%"
    assert rows[3][head.index("relative error")] == "–"
    assert len({len(line) for line in text.splitlines() if line.startswith("|")}) == 1


def test_a_suffix_numbers_the_items_of_each_id(ids):
    vectors = tiny_vectors(6)
    resolved, damage = ids.resolve("suffix", vectors)
    assert resolved.items == ids.items and torch.equal(resolved.codes[:, :3], ids.codes)
    assert resolved.codes[:, 3].tolist() == [0, 0, 1, 0, 0, 2] and resolved.sizes == (5, 12, 7, 3)
    assert (damage["items_changed"], damage["suffix_size"], damage["collision_rate"]) == (0, 3, [0.5, 0])
    assert damage["relative_error"][0] == damage["relative_error"][1] == ids.report(vectors)["relative_error"][-1]
    assert json.loads(json.dumps(damage)) == damage
    assert resolved.items_of((1, 2, 3, 1)) == ["blue"] and resolved.items_of((1, 2, 3)) == ["red", "blue", "grey"]
    assert resolved.text("grey") == "<a_1><b_2><c_3><d_2>" and len(resolved.tokens()) == 5 + 12 + 7 + 3
    for method in ("suffix", "next_nearest"):
        with pytest.raises(ValueError, match="these IDs have a suffix already"):
            resolved.resolve(method, vectors)
    assert resolved.resolve("keep")[0] is resolved


def test_keep_changes_nothing(ids):
    resolved, damage = ids.resolve("keep")
    assert resolved is ids
    assert damage == {"method": "keep", "collision_rate": [0.5, 0.5], "items_changed": 0, "suffix_size": 0}


@pytest.mark.parametrize("hidden_dims", [(), (10,)])
def test_next_nearest_gives_every_item_an_id_of_its_own(hidden_dims):
    vectors = tiny_vectors(300)
    vectors[9] = vectors[4]
    model = tiny_embedding(hidden_dims=hidden_dims, latent_dim=6 if hidden_dims else None).fit(vectors)
    ids = SemanticIds.encode(model, list(range(300)), vectors)
    resolved, damage = ids.resolve("next_nearest", vectors)
    assert len({tuple(row) for row in resolved.codes.tolist()}) == 300
    changed = (resolved.codes != ids.codes).any(dim=1)
    seen = set()
    for row, code in enumerate(map(tuple, ids.codes.tolist())):
        assert changed[row] == (code in seen)  # the first of each ID keeps it
        seen.add(code)
    assert damage["items_changed"] == int(changed.sum()) and damage["suffix_size"] == 0
    before, after = (SemanticIds.report(table, vectors) for table in (ids, resolved))
    assert damage["collision_rate"] == [before["collision_rate"][-1], 0]
    assert damage["relative_error"] == [before["relative_error"][-1], after["relative_error"][-1]]
    residuals = [(vectors[changed] - model.decode(table.codes[changed])).square().sum() for table in (ids, resolved)]
    deviations = (vectors - vectors.mean(dim=0))[changed].square().sum()
    expected = [float(residual / deviations) for residual in residuals]
    assert damage["relative_error_of_changed"] == pytest.approx(expected, rel=1e-5)
    assert torch.equal(ids.resolve("next_nearest", vectors)[0].codes, resolved.codes)


def test_next_nearest_takes_the_nearest_free_last_code(model):
    vectors = tiny_vectors(8).repeat_interleave(3, dim=0)
    ids = SemanticIds.encode(model, list(range(24)), vectors)
    resolved, _ = ids.resolve("next_nearest", vectors)
    taken = {tuple(row) for row in ids.codes.tolist()}
    latents = model.encoder((vectors.double() - model.mean) / model.scale).detach()
    moved = (resolved.codes != ids.codes).any(dim=1).nonzero()[:, 0].tolist()
    assert len(moved) >= 16
    for row in moved:
        prefix = ids.codes[row, :2].tolist()
        free = [code for code in range(7) if (*prefix, code) not in taken]
        assert free and resolved.codes[row, :2].tolist() == prefix
        sums = model.quantizer.decode(torch.tensor([[*prefix, code] for code in free])).double()
        nearest = free[int((sums - latents[row]).square().sum(dim=1).argmin())]
        assert resolved.codes[row, 2] == nearest
        taken.add((*prefix, nearest))


def test_many_items_of_one_vector_find_ids(model):
    vectors = tiny_vectors(1).expand(5 * 12 * 7, 14)
    ids = SemanticIds.encode(model, list(range(420)), vectors)
    assert ids.report()["unique"] == 1
    resolved, _ = ids.resolve("next_nearest", vectors)
    assert resolved.report()["unique"] == 420


def test_what_resolve_refuses(model, ids):
    with pytest.raises(ValueError, match="method must be one of .'suffix', 'next_nearest', 'keep'., got 'nearest'"):
        ids.resolve("nearest")
    with pytest.raises(ValueError, match="next_nearest needs the vectors of the items"):
        ids.resolve("next_nearest")
    with pytest.raises(ValueError, match=r"vectors must have the shape \(6, 14\), got \(5, 14\)"):
        ids.resolve("next_nearest", tiny_vectors(5))
    with pytest.raises(ValueError, match="vectors must be finite, got NaN or infinite values in 6 of 6"):
        ids.report(tiny_vectors(6) / 0)
    many = SemanticIds(model, list(range(421)), torch.zeros(421, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="421 items need more than 420 IDs: resolve by a suffix"):
        many.resolve("next_nearest", tiny_vectors(421))


def test_the_card_has_the_report_and_code_that_runs(ids, tmp_path):
    resolved, _ = ids.resolve("suffix")
    resolved.save_pretrained(tmp_path)
    text = resolved.card(str(tmp_path), details="## More")
    card = ModelCard(text)
    assert card.data.library_name == "rq_hf" and "semantic-ids" in card.data.tags
    assert str(resolved.report()) in text and "## More" in text and "@inproceedings{rajput2023" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    found = {}
    exec(code, found)
    assert found["items"] == ["red"] and found["text"] == "<a_1><b_2><c_3><d_0>" and found["second_codes"] == [0, 2]
    assert found["vectors"].shape == (6, 14)


def test_codes_of_half_precision_vectors_have_a_report(model):
    vectors = tiny_vectors(9).bfloat16()
    ids = SemanticIds.encode(model, list(range(9)), vectors)
    resolved, damage = ids.resolve("next_nearest", vectors)
    assert resolved.report(vectors)["relative_error"][-1] == damage["relative_error"][1]
