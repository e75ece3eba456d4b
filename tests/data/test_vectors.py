import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rq_hf.data import TrainingStream, VectorCollator, load_vector_dataset, read_items, read_vectors
from rq_hf.data.vectors import CHUNK


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def load(tmp_path):
    """Columns -> the data set of a file with them."""

    def write_and_load(item_column=None, **columns):
        pq.write_table(pa.table(columns), tmp_path / "table.parquet")
        return load_vector_dataset(data_files=str(tmp_path / "table.parquet"), item_column=item_column)

    return write_and_load


NUMBERS = np.random.default_rng(0).normal(size=(7, 3))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("fixed", [False, True], ids=["lists", "lists of fixed size"])
def test_vectors_are_read_as_they_are_stored(load, dtype, fixed):
    kind = pa.list_(pa.from_numpy_dtype(dtype), *([3] if fixed else []))
    vectors = read_vectors(load(vector=pa.array(list(NUMBERS.astype(dtype)), kind)), "vector")
    assert torch.equal(vectors, torch.from_numpy(NUMBERS.astype(dtype)))


def test_many_vectors_and_a_selection_are_in_their_order(load):
    numbers = np.arange(3 * (CHUNK + 5), dtype=np.float32).reshape(-1, 3)
    dataset = load(vector=list(numbers))
    assert torch.equal(read_vectors(dataset, "vector"), torch.from_numpy(numbers))
    rows = [CHUNK, 0, CHUNK + 4]
    assert torch.equal(read_vectors(dataset.select(rows), "vector"), torch.from_numpy(numbers[rows]))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_batches_are_float32(load, dtype):
    dataset = load(vector=list(NUMBERS.astype(dtype)))
    stream = TrainingStream(dataset.with_format("numpy"), VectorCollator("vector"), batch_size=4, seed=0)
    batches = iter(stream)
    first, second = next(batches), next(batches)
    assert (first["counts"], second["counts"]) == ({"images": 4}, {"images": 3})
    epoch = torch.cat([first["vectors"], second["vectors"]])
    assert epoch.dtype == torch.float32
    expected = torch.from_numpy(NUMBERS.astype(dtype)).float()
    assert sorted(epoch.tolist()) == sorted(expected.tolist())


@pytest.mark.parametrize("items", [["b", "a", "c"], [5, -1, 3]])
def test_items_are_strings_or_integers(load, items):
    assert read_items(load(item_column="id", vector=list(NUMBERS[:3]), id=items), "id") == items


@pytest.mark.parametrize(
    "vectors, message",
    [
        ([[1.0, 2.0], [3.0]], "row 1 has 1 numbers in the column 'vector': it needs a vector, as the first row has 2"),
        ([[1.0, 2.0], None], "row 1 has nothing in the column 'vector'"),
        ([[1.0, 2.0], []], "row 1 has an empty list"),
        ([None, [1.0, 2.0]], "row 0 has nothing in the column 'vector': it needs a vector"),
        (pa.array([[], []], pa.list_(pa.float32())), "row 0 has an empty list"),
        ([[1.0, 2.0], [3.0, float("nan")]], "row 1 has NaN or infinite numbers in the column 'vector'"),
        ([[1.0, 2.0], [3.0, None]], "row 1 has NaN or infinite numbers"),
        ([[float("-inf"), 2.0]], "row 0 has NaN or infinite numbers"),
        ([[1, 2], [3, 4]], r"'vector' must hold lists of floating-point numbers, got list<\w+: int64>"),
        ([1.0, 2.0], "'vector' must hold lists of floating-point numbers, got double"),
        (["1 2"], "'vector' must hold lists of floating-point numbers, got string"),
    ],
)
def test_what_is_no_vector_is_refused_with_its_row(load, vectors, message):
    with pytest.raises(ValueError, match=message):
        load(vector=vectors)


def test_the_row_is_that_of_the_whole_table(load):
    numbers = np.zeros((CHUNK + 5, 3), dtype=np.float32)
    numbers[CHUNK + 2, 1] = np.inf
    with pytest.raises(ValueError, match=f"row {CHUNK + 2} has NaN or infinite numbers"):
        load(vector=list(numbers))
    with pytest.raises(ValueError, match=f"row {CHUNK} has 2 numbers .* as the first row has 3"):
        load(vector=[*numbers[:CHUNK], numbers[0, :2]])


@pytest.mark.parametrize(
    "items, message",
    [
        (["a", "b", "a"], "'id' must name every row differently, got 'a' 2 times"),
        ([7, 7, 7], "'id' must name every row differently, got 7 3 times"),
        (["a", None, "c"], "row 1 has nothing in the column 'id'"),
        ([0.5, 1.5, 2.5], "'id' must hold strings or integers, got double"),
        ([True, False, None], "'id' must hold strings or integers, got bool"),
    ],
)
def test_what_names_no_item_is_refused(load, items, message):
    with pytest.raises(ValueError, match=message):
        load(item_column="id", vector=list(NUMBERS[:3]), id=items)


def test_missing_columns_and_sources_are_refused(load, tmp_path):
    with pytest.raises(ValueError, match="no column 'vector'; its columns are .'embedding'."):
        load(embedding=list(NUMBERS))
    with pytest.raises(ValueError, match="no column 'id'"):
        load(item_column="id", vector=list(NUMBERS))
    with pytest.raises(ValueError, match="got a data set without rows"):
        read_vectors(load(vector=list(NUMBERS)).select([]), "vector")
    with pytest.raises(ValueError, match="expected either dataset_name or data_files, got None and None"):
        load_vector_dataset()
    with pytest.raises(ValueError, match="matches no file"):
        load_vector_dataset(data_files=str(tmp_path / "none.parquet"))
