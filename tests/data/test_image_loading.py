import glob
import json
import shutil
from pathlib import Path

import datasets
import pytest
from shapes import CAPTIONS, SHAPES, create_shapes, draw_shape, write_parquet, write_shapes

from rq_hf.data import ImageCollator, decode_image, find_class_names, load_image_dataset, prepare_images

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


def write_table(file, rows):
    """A table of the kind that the file's name ends in."""
    if file.suffix == ".csv":
        lines = [list(rows[0]), *(row.values() for row in rows)]
        file.write_text("\n".join(",".join("" if value is None else value for value in line) for line in lines))
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


@streaming_or_not
class TestTableOfPaths:
    @pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
    @pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
    def test_gives_the_images(self, tmp_path, streaming, suffix, absolute):
        folder = image_folder(tmp_path / "images")
        paths = [str(folder / f"{n}.png") if absolute else f"images/{n}.png" for n in range(4)]
        rows = [{"photo": path, "text": CAPTIONS[n]} for n, path in enumerate(paths)]
        files = write_table(tmp_path / f"photos.{suffix}", rows)
        dataset = load_image_dataset(data_files=files, image_column="photo", streaming=streaming)
        examples = list(dataset)
        assert [decode_image(example["photo"]).tobytes() for example in examples] == [
            draw_shape(n, 16).tobytes() for n in range(4)
        ]
        assert [(example["example_index"], example["text"]) for example in examples] == list(enumerate(CAPTIONS[:4]))

    def test_may_be_the_metadata_of_a_folder_of_images(self, tmp_path, streaming):
        files = str(image_folder(tmp_path / "images") / "metadata.csv")
        dataset = load_image_dataset(data_files=files, image_column="file_name", streaming=streaming)
        assert [decode_image(example["file_name"]).size for example in dataset] == [(16, 16)] * 4

    def test_names_the_file_that_an_example_lacks(self, tmp_path, streaming):
        image_folder(tmp_path / "images")
        rows = [{"image": "images/0.png"}, {"image": "0.png"}, {"image": None}]
        dataset = load_image_dataset(data_files=write_table(tmp_path / "a.jsonl", rows), streaming=streaming)
        _, absent, none = dataset
        with pytest.raises(ValueError, match=f"example 1 cannot be decoded .*No such file.*{tmp_path / '0.png'}"):
            ImageCollator("image", 8)([absent])
        with pytest.raises(ValueError, match="example 2 cannot be decoded"):
            ImageCollator("image", 8)([none])

    @pytest.mark.parametrize("position", [0, 1])
    def test_refuses_urls(self, tmp_path, streaming, position):
        rows = [{"image": "0.png"}, {"image": "1.png"}]
        rows[position]["image"] = "https://example.org/cat.png"
        files = write_table(tmp_path / "a.csv", rows)
        with pytest.raises(ValueError, match="'image' must hold images or paths .*got the URL 'https://.*download"):
            list(load_image_dataset(data_files=files, streaming=streaming))

    def test_refuses_paths_that_begin_nowhere(self, tmp_path, streaming):
        message = "the column 'image' holds paths; .* only in data_files that are all in one folder"
        for name in ("a", "b"):
            image_folder(tmp_path / name)
            write_table(tmp_path / name / "table.csv", [{"image": "0.png"}])
        with pytest.raises(ValueError, match=message):
            load_image_dataset(data_files=str(tmp_path / "*" / "table.csv"), streaming=streaming)
        dataset = datasets.Dataset.from_dict({"image": ["a/0.png"]})
        with pytest.raises(ValueError, match=message):
            prepare_images(dataset.to_iterable_dataset() if streaming else dataset, "image")

    @pytest.mark.parametrize("value", ["5", "[1, 2]"])
    def test_refuses_what_is_no_image(self, tmp_path, streaming, value):
        (tmp_path / "a.jsonl").write_text(f'{{"image": {value}}}')
        with pytest.raises(ValueError, match="the column 'image' must hold images or paths of images, got .*int64"):
            load_image_dataset(data_files=str(tmp_path / "a.jsonl"), streaming=streaming)


@streaming_or_not
class TestOwnDataset:
    def test_may_hold_encoded_images(self, tmp_path, streaming):
        image_folder(tmp_path / "images")
        encoded = [(tmp_path / "images" / f"{n}.png").read_bytes() for n in range(2)]
        dataset = datasets.Dataset.from_dict({"image": encoded})
        examples = prepare_images(dataset.to_iterable_dataset() if streaming else dataset, "image")
        assert [decode_image(example["image"]).tobytes() for example in examples] == [
            draw_shape(n, 16).tobytes() for n in range(2)
        ]

    def test_may_come_from_a_generator(self, tmp_path, streaming):
        if streaming:
            dataset = datasets.IterableDataset.from_generator(drawn_shapes)
        else:
            dataset = datasets.Dataset.from_generator(drawn_shapes, cache_dir=tmp_path)
        examples = list(prepare_images(dataset, "image"))
        assert [example["example_index"] for example in examples] == [0, 1]
        assert decode_image(examples[1]["image"]).tobytes() == draw_shape(1, 16).tobytes()


def drawn_shapes():
    for number in range(2):
        yield {"image": draw_shape(number, 16), "label": number}


class TestFindClassNames:
    @streaming_or_not
    def test_are_the_sorted_strings_of_the_column(self, tmp_path, streaming):
        rows = [{"image": "0.png", "kind": kind} for kind in ("dog", "cat", "dog", "ant")]
        dataset = load_image_dataset(data_files=write_table(tmp_path / "a.csv", rows), streaming=streaming)
        assert find_class_names(dataset, "kind") == ["ant", "cat", "dog"]

    @streaming_or_not
    def test_are_those_that_the_data_set_declares(self, shape_files, streaming):
        dataset = load_image_dataset(data_files=shape_files, streaming=streaming)
        assert find_class_names(dataset, "label") == list(SHAPES)

    @streaming_or_not
    def test_numbers_have_none(self, tmp_path, streaming):
        (tmp_path / "a.csv").write_text("image,kind\n0.png,3\n1.png,1")
        dataset = load_image_dataset(data_files=str(tmp_path / "a.csv"), streaming=streaming)
        assert find_class_names(dataset, "kind") is None

    @streaming_or_not
    def test_stop_at_a_label_that_is_missing(self, tmp_path, streaming):
        rows = [{"image": "0.png", "kind": "cat"}, {"image": "1.png", "kind": None}]
        dataset = load_image_dataset(data_files=write_table(tmp_path / "a.jsonl", rows), streaming=streaming)
        with pytest.raises(ValueError, match="the label of example 1 must be a string, got None"):
            find_class_names(dataset, "kind")


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
