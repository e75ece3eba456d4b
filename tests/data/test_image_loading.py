import glob
import shutil
from pathlib import Path

import datasets
import pytest
from shapes import CAPTIONS, create_shapes, draw_shape, write_parquet, write_shapes

from rq_hf.data import decode_image, load_image_dataset

streaming_or_not = pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streaming"])


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def shape_files(tmp_path):
    return write_shapes(tmp_path / "shapes", count=10, num_shards=3)


def image_folder(folder, count=4):
    folder.mkdir()
    for number in range(count):
        draw_shape(number, 16).save(folder / f"{number}.png")
    lines = ["file_name,text", *(f"{number}.png,{CAPTIONS[number]}" for number in range(count))]
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


class TestLoadImageDataset:
    @streaming_or_not
    def test_gives_the_examples_of_all_files_in_order_and_numbers_them(self, shape_files, streaming):
        dataset = load_image_dataset(data_files=shape_files, streaming=streaming, required_columns=("text",))
        assert isinstance(dataset, datasets.IterableDataset) == streaming
        examples = list(dataset)
        assert [example["example_index"] for example in examples] == list(range(10))
        assert [example["text"] for example in examples] == CAPTIONS[:10]
        assert [example["label"] for example in examples] == [number % 3 for number in range(10)]

    @streaming_or_not
    def test_leaves_images_undecoded(self, shape_files, streaming):
        example = next(iter(load_image_dataset(data_files=shape_files, streaming=streaming)))
        assert example["image"]["bytes"].startswith(b"\x89PNG")
        assert decode_image(example["image"]).tobytes() == draw_shape(0, 16).tobytes()

    @streaming_or_not
    @pytest.mark.parametrize("pack", [None, "zip"])
    def test_reads_a_folder_of_images(self, tmp_path, streaming, pack):
        folder = image_folder(tmp_path / "images")
        if pack:
            (tmp_path / "packed").mkdir()
            shutil.make_archive(tmp_path / "packed" / "images", pack, folder)
            folder = tmp_path / "packed"
        dataset = load_image_dataset(dataset_name=str(folder), streaming=streaming, required_columns=("text",))
        for number, example in enumerate(dataset):
            assert example["text"] == CAPTIONS[number]
            assert decode_image(example["image"]).tobytes() == draw_shape(number, 16).tobytes()
        assert number == 3

    @streaming_or_not
    def test_reads_a_folder_of_parquet_files(self, shape_files, tmp_path, streaming):
        dataset = load_image_dataset(dataset_name=str(tmp_path / "shapes"), streaming=streaming)
        assert [example["text"] for example in dataset] == CAPTIONS[:10]

    @streaming_or_not
    def test_reads_images_named_by_path(self, tmp_path, streaming):
        folder = image_folder(tmp_path / "images")
        paths = [str(folder / f"{number}.png") for number in range(4)]
        dataset = datasets.Dataset.from_dict({"photo": paths}).cast_column("photo", datasets.Image())
        dataset.to_parquet(tmp_path / "paths.parquet")
        files = str(tmp_path / "paths.parquet")
        images = load_image_dataset(data_files=files, image_column="photo", streaming=streaming)
        assert [decode_image(example["photo"]).tobytes() for example in images] == [
            draw_shape(number, 16).tobytes() for number in range(4)
        ]

    @streaming_or_not
    def test_reads_a_data_set_that_has_a_column_named_index(self, tmp_path, streaming):
        dataset = create_shapes(4).add_column("index", [7, 5, 3, 1])
        files = write_parquet(dataset, tmp_path / "indexed")
        assert len(list(load_image_dataset(data_files=files, streaming=streaming))) == 4

    def test_numbers_prepared_examples_the_same_when_shuffled(self, shape_files):
        dataset = load_image_dataset(data_files=shape_files)
        numbers = {example["text"]: example["example_index"] for example in dataset.shuffle(seed=1)}
        assert numbers == {caption: number for number, caption in enumerate(CAPTIONS[:10])}

    def test_numbers_a_stream_in_the_order_of_reading(self, shape_files):
        dataset = load_image_dataset(data_files=shape_files, streaming=True)
        assert [example["example_index"] for example in dataset] == list(range(10))

    @streaming_or_not
    @pytest.mark.parametrize(("image_column", "required_columns"), [("photo", ()), ("image", ("text", "photo"))])
    def test_names_the_columns_there_are_when_one_is_missing(
        self, shape_files, streaming, image_column, required_columns
    ):
        arguments = {"image_column": image_column, "required_columns": required_columns}
        with pytest.raises(ValueError, match=r"no column 'photo'.*\['image', 'text', 'label'\]"):
            load_image_dataset(data_files=shape_files, streaming=streaming, **arguments)

    @streaming_or_not
    def test_takes_the_names_of_found_files_as_they_are(self, tmp_path, streaming):
        folder = tmp_path / "x[1]"
        folder.mkdir()
        create_shapes(2).to_parquet(folder / "a[1].parquet")
        create_shapes(5).to_parquet(folder / "a1.parquet")
        for pattern, expected in [("*", CAPTIONS[:5] + CAPTIONS[:2]), ("a[[]1]", CAPTIONS[:2])]:
            files = str(Path(glob.escape(str(folder)), f"{pattern}.parquet"))
            dataset = load_image_dataset(data_files=files, streaming=streaming)
            assert [example["text"] for example in dataset] == expected

    @pytest.mark.parametrize("sources", [{}, {"dataset_name": "a/b", "data_files": "c.parquet"}])
    def test_wants_exactly_one_source(self, sources):
        with pytest.raises(ValueError, match="either dataset_name or data_files"):
            load_image_dataset(**sources)

    @pytest.mark.parametrize("files", ["images.xyz", "images", "*"])
    def test_names_the_kinds_of_files_it_reads(self, files):
        with pytest.raises(ValueError, match=r"\.parquet, .*\.tar, .*got '" + files.replace("*", r"\*")):
            load_image_dataset(data_files=files)

    def test_says_when_a_pattern_matches_nothing(self, tmp_path):
        with pytest.raises(ValueError, match="nowhere.*matches no file"):
            load_image_dataset(data_files=str(tmp_path / "nowhere" / "*.parquet"))
