import io
import itertools
import shutil

import datasets
import numpy as np
import pytest
import torch
from number_streams import collate_numbers, collate_random_numbers, epochs, number_stream, numbers
from PIL import Image
from shapes import CAPTIONS, create_shapes, draw_shape, write_parquet, write_shapes
from transformers import AutoTokenizer

from rq_hf.data import (
    Collator,
    DataArguments,
    TrainingStream,
    decode_image,
    load_images,
    next_readable,
)
from rq_hf.images import to_pixels
from rq_hf.text import train_tokenizer

streaming_or_not = pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streaming"])


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(CAPTIONS), vocab_size=300, max_length=8)


@pytest.fixture
def shape_files(tmp_path):
    return write_shapes(tmp_path / "shapes", count=10, num_shards=3)


def encoded(image, format="PNG", **kwargs):
    file = io.BytesIO()
    image.save(file, format, **kwargs)
    return {"bytes": file.getvalue(), "path": None}


def image_folder(folder, count=4):
    folder.mkdir()
    for number in range(count):
        draw_shape(number, 16).save(folder / f"{number}.png")
    lines = ["file_name,text", *(f"{number}.png,{CAPTIONS[number]}" for number in range(count))]
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


class TestLoadImages:
    @streaming_or_not
    def test_gives_the_examples_of_all_files_in_order_and_numbers_them(self, shape_files, streaming):
        dataset = load_images(DataArguments(data_files=shape_files, streaming=streaming), required_columns=("text",))
        assert isinstance(dataset, datasets.IterableDataset) == streaming
        examples = list(dataset)
        assert [example["example_index"] for example in examples] == list(range(10))
        assert [example["text"] for example in examples] == CAPTIONS[:10]
        assert [example["label"] for example in examples] == [number % 3 for number in range(10)]

    @streaming_or_not
    def test_leaves_images_undecoded(self, shape_files, streaming):
        example = next(iter(load_images(DataArguments(data_files=shape_files, streaming=streaming))))
        assert example["image"]["bytes"].startswith(b"\x89PNG")
        assert decode_image(example["image"]).tobytes() == draw_shape(0, 16).tobytes()

    @streaming_or_not
    @pytest.mark.parametrize("pack", [None, "zip"])
    def test_reads_a_folder_of_images(self, tmp_path, streaming, pack):
        folder = image_folder(tmp_path / "pictures")
        if pack:
            (tmp_path / "packed").mkdir()
            shutil.make_archive(tmp_path / "packed" / "pictures", pack, folder)
            folder = tmp_path / "packed"
        dataset = load_images(DataArguments(dataset_name=str(folder), streaming=streaming), required_columns=("text",))
        for number, example in enumerate(dataset):
            assert example["text"] == CAPTIONS[number]
            assert decode_image(example["image"]).tobytes() == draw_shape(number, 16).tobytes()
        assert number == 3

    @streaming_or_not
    def test_reads_a_folder_of_parquet_files(self, shape_files, tmp_path, streaming):
        dataset = load_images(DataArguments(dataset_name=str(tmp_path / "shapes"), streaming=streaming))
        assert [example["text"] for example in dataset] == CAPTIONS[:10]

    @streaming_or_not
    def test_reads_images_named_by_path(self, tmp_path, streaming):
        folder = image_folder(tmp_path / "pictures")
        paths = [str(folder / f"{number}.png") for number in range(4)]
        dataset = datasets.Dataset.from_dict({"picture": paths}).cast_column("picture", datasets.Image())
        dataset.to_parquet(tmp_path / "paths.parquet")
        arguments = DataArguments(
            data_files=str(tmp_path / "paths.parquet"), image_column="picture", streaming=streaming
        )
        pictures = [decode_image(example["picture"]).tobytes() for example in load_images(arguments)]
        assert pictures == [draw_shape(number, 16).tobytes() for number in range(4)]

    @streaming_or_not
    def test_reads_a_data_set_that_has_a_column_named_index(self, tmp_path, streaming):
        dataset = create_shapes(4).add_column("index", [7, 5, 3, 1])
        files = write_parquet(dataset, tmp_path / "indexed")
        assert len(list(load_images(DataArguments(data_files=files, streaming=streaming)))) == 4

    def test_numbers_prepared_examples_the_same_when_shuffled(self, shape_files):
        dataset = load_images(DataArguments(data_files=shape_files))
        numbers = {example["text"]: example["example_index"] for example in dataset.shuffle(seed=1)}
        assert numbers == {caption: number for number, caption in enumerate(CAPTIONS[:10])}

    def test_numbers_a_stream_in_the_order_of_reading(self, shape_files):
        dataset = load_images(DataArguments(data_files=shape_files, streaming=True))
        assert [example["example_index"] for example in dataset] == list(range(10))

    @streaming_or_not
    @pytest.mark.parametrize(("image_column", "required_columns"), [("photo", ()), ("image", ("text", "photo"))])
    def test_names_the_columns_there_are_when_one_is_missing(
        self, shape_files, streaming, image_column, required_columns
    ):
        arguments = DataArguments(data_files=shape_files, streaming=streaming, image_column=image_column)
        with pytest.raises(ValueError, match=r"no column 'photo'.*\['image', 'text', 'label'\]"):
            load_images(arguments, required_columns)

    @pytest.mark.parametrize("sources", [{}, {"dataset_name": "a/b", "data_files": "c.parquet"}])
    def test_wants_exactly_one_source(self, sources):
        with pytest.raises(ValueError, match="one of --dataset_name and --data_files"):
            load_images(DataArguments(**sources))

    @pytest.mark.parametrize("files", ["pictures.xyz", "pictures", "*"])
    def test_names_the_kinds_of_files_it_reads(self, files):
        with pytest.raises(ValueError, match=r"\.parquet, .*\.tar, .*got '" + files.replace("*", r"\*")):
            load_images(DataArguments(data_files=files))

    def test_says_when_a_pattern_matches_nothing(self, tmp_path):
        with pytest.raises(ValueError, match="nowhere.*matches no file"):
            load_images(DataArguments(data_files=str(tmp_path / "nowhere" / "*.parquet")))


class TestDecodeImage:
    def test_takes_pil_images_and_paths(self, tmp_path):
        image = draw_shape(0, 16)
        image.save(tmp_path / "shape.png")
        assert decode_image(image).tobytes() == image.tobytes()
        assert decode_image({"bytes": None, "path": str(tmp_path / "shape.png")}).tobytes() == image.tobytes()


class TestCollator:
    CORRUPT = {"bytes": b"\x89PNG no picture", "path": None}

    def examples(self, count=4):
        return [
            {
                "image": encoded(draw_shape(number, 16)),
                "text": CAPTIONS[number],
                "label": number % 3,
                "example_index": 100 + number,
            }
            for number in range(count)
        ]

    def test_stacks_pixels(self):
        batch = Collator("image", 16)(self.examples())
        assert torch.equal(batch["pixels"], torch.stack([to_pixels(draw_shape(n, 16), 16) for n in range(4)]))
        assert batch["skipped_images"] == 0
        assert "cond_ids" not in batch

    def test_gives_labels(self):
        batch = Collator("image", 16, label_column="label")(self.examples())
        assert batch["cond_ids"].tolist() == [[0], [1], [2], [0]]

    def test_pads_captions_on_the_right(self, tokenizer):
        batch = Collator("image", 16, text_column="text", tokenizer=tokenizer)(self.examples())
        ids = tokenizer(CAPTIONS[0])["input_ids"]
        assert batch["cond_ids"].shape == (4, 8)
        assert batch["cond_ids"][0].tolist() == ids + [0] * (8 - len(ids))
        assert batch["truncated_captions"] == 0

    def test_cuts_long_captions_and_counts_them(self, tokenizer):
        examples = self.examples(3)
        examples[1]["text"] = "a red circle " * 10
        batch = Collator("image", 16, text_column="text", tokenizer=tokenizer)(examples)
        assert batch["cond_ids"][1].tolist() == tokenizer(examples[1]["text"])["input_ids"][:8]
        assert batch["truncated_captions"] == 1

    def test_mirrors_about_half_of_the_images(self):
        image = Image.new("RGB", (2, 2), "black")
        image.paste("white", (0, 0, 1, 2))
        torch.manual_seed(0)
        pixels = Collator("image", 2, random_flip=True)([{"image": image, "example_index": 0}] * 200)["pixels"]
        plain = to_pixels(image, 2)
        mirrored = [torch.equal(p, plain.flip(-1)) for p in pixels]
        assert all(flipped or torch.equal(p, plain) for flipped, p in zip(mirrored, pixels))
        assert 70 < sum(mirrored) < 130

    def test_stops_at_a_corrupt_image_and_names_it(self):
        examples = self.examples()
        examples[2]["image"] = self.CORRUPT
        with pytest.raises(ValueError, match="example 102 cannot be decoded.*--skip_corrupt_images"):
            Collator("image", 16)(examples)

    def test_stops_at_a_truncated_image(self):
        examples = self.examples()
        examples[1]["image"]["bytes"] = examples[1]["image"]["bytes"][:-40]
        with pytest.raises(ValueError, match="example 101 cannot be decoded"):
            Collator("image", 16)(examples)

    def test_leaves_out_corrupt_images_with_their_captions_and_counts_them(self, tokenizer):
        examples = self.examples()
        examples[0]["image"] = examples[2]["image"] = self.CORRUPT
        batch = Collator("image", 16, skip_corrupt_images=True, text_column="text", tokenizer=tokenizer)(examples)
        assert batch["skipped_images"] == 2
        assert torch.equal(batch["pixels"], torch.stack([to_pixels(draw_shape(n, 16), 16) for n in (1, 3)]))
        assert [tokenizer.decode(row, skip_special_tokens=True).strip() for row in batch["cond_ids"]] == [
            CAPTIONS[1],
            CAPTIONS[3],
        ]

    def test_stops_at_a_caption_that_is_no_string(self, tokenizer):
        examples = self.examples()
        examples[3]["text"] = None
        with pytest.raises(ValueError, match="caption of example 103 must be a string, got None"):
            Collator("image", 16, text_column="text", tokenizer=tokenizer)(examples)

    def test_passes_over_batches_without_a_readable_image(self):
        collate = Collator("image", 16, skip_corrupt_images=True)
        corrupt = [{"image": self.CORRUPT, "example_index": 0}] * 2
        good = [{"image": draw_shape(0, 16), "example_index": 1}]
        batches = iter([collate(corrupt), collate(corrupt[:1]), collate(good + corrupt), collate(good)])
        first, second = next_readable(batches), next_readable(batches)
        assert (len(first["pixels"]), first["skipped_images"]) == (1, 5)
        assert (len(second["pixels"]), second["skipped_images"]) == (1, 0)

    def test_stops_when_no_image_of_many_can_be_decoded(self):
        collate = Collator("image", 16, skip_corrupt_images=True)
        batches = (collate([{"image": self.CORRUPT, "example_index": 0}] * 2) for _ in range(100))
        with pytest.raises(ValueError, match="none of 6 images in a row can be decoded"):
            next_readable(batches, patience=5)


class TestTrainTokenizer:
    @pytest.mark.parametrize(
        "text", [*CAPTIONS[:2], "façade ’ 中文 😀 ﬁ", "tab\tand\nline", "a , b . c n't", "two  spaces"]
    )
    def test_writes_any_text(self, tokenizer, text):
        assert tokenizer.decode(tokenizer(text)["input_ids"]).strip() == text

    def test_lower_cases(self, tokenizer):
        assert tokenizer("A RED Çircle")["input_ids"] == tokenizer("a red çircle")["input_ids"]

    def test_composes_characters(self, tokenizer):
        assert tokenizer("c\u0327")["input_ids"] == tokenizer("\u00e7")["input_ids"]

    def test_pads_with_id_0_on_the_right(self, tokenizer):
        ids = tokenizer("red", padding="max_length", max_length=4)["input_ids"]
        assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("[PAD]", 0)
        assert ids[0] != 0
        assert ids[1:] == [0, 0, 0]

    def test_learns_frequent_words(self, tokenizer):
        assert len(tokenizer) <= 300
        assert len(tokenizer("a large blue triangle")["input_ids"]) == 4

    def test_adds_nothing_to_a_text(self, tokenizer):
        assert tokenizer("")["input_ids"] == []

    def test_survives_saving(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        text = "A Red circle ’ç中"
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert (loaded.pad_token_id, loaded.model_max_length, loaded.padding_side) == (0, 8, "right")


any_dataset = pytest.mark.parametrize(
    "num_shards", [None, 1, 3, 4], ids=["prepared", "one shard", "three shards", "four shards"]
)


class TestTrainingStream:
    @any_dataset
    @pytest.mark.parametrize("world_size", [1, 2, 3])
    @pytest.mark.parametrize("count", [12, 13])
    def test_each_epoch_has_every_example_once_over_all_ranks(self, num_shards, world_size, count):
        ranks = [epochs(2, numbers(count, num_shards), rank=r, world_size=world_size) for r in range(world_size)]
        for epoch in range(2):
            seen = [number for rank in ranks for batch in rank[epoch] for number in batch]
            assert sorted(seen) == list(range(count))

    @pytest.mark.slow
    @pytest.mark.parametrize("num_shards", [None, 3, 4])
    @pytest.mark.parametrize("world_size", [1, 2])
    def test_workers_share_out_every_example_once(self, num_shards, world_size):
        dataset = numbers(13, num_shards)
        ranks = [epochs(1, dataset, rank=r, world_size=world_size, num_workers=2) for r in range(world_size)]
        assert sorted(number for rank in ranks for batch in rank[0] for number in batch) == list(range(13))

    @any_dataset
    def test_epochs_differ(self, num_shards):
        first, second, third = epochs(3, numbers(12, num_shards))
        assert first != second != third != first

    @any_dataset
    def test_order_is_shuffled_and_follows_from_the_seed(self, num_shards):
        dataset = numbers(12, num_shards)
        shuffled = epochs(2, dataset, seed=1)
        assert sum(shuffled[0], []) != list(range(12))
        assert epochs(2, dataset, seed=1) == shuffled
        assert epochs(2, dataset, seed=2) != shuffled

    @any_dataset
    def test_last_batch_of_an_epoch_is_smaller(self, num_shards):
        assert [len(batch) for batch in epochs(2, numbers(10, num_shards), batch_size=4)[1]] == [4, 4, 2]

    @any_dataset
    @pytest.mark.parametrize("world_size", [1, 2])
    def test_resumes_anywhere_where_it_stood(self, num_shards, world_size):
        for rank in range(world_size):
            arguments = {"dataset": numbers(13, num_shards), "rank": rank, "world_size": world_size}
            self.check_resume(range(len(sum(epochs(2, **arguments), []))), **arguments)

    @pytest.mark.slow
    @pytest.mark.parametrize("collate", [collate_numbers, collate_random_numbers], ids=["examples", "random numbers"])
    @pytest.mark.parametrize("num_shards", [None, 4], ids=["prepared", "four shards"])
    def test_resumes_with_workers(self, num_shards, collate):
        self.check_resume([1, 6, 7, 9], dataset=numbers(13, num_shards), collate=collate, num_workers=2)

    def check_resume(self, positions, **arguments):
        unbroken = number_stream(**arguments)
        batches, states = [], [unbroken.state_dict()]
        for batch in itertools.islice(unbroken, max(positions) + 4):
            batches.append(batch)
            states.append(unbroken.state_dict())
        for position in positions:
            resumed = number_stream(**arguments)
            resumed.load_state_dict(states[position])
            remaining = list(itertools.islice(resumed, len(batches) - position))
            assert remaining == batches[position:], f"resumed after {position} batches"
            assert resumed.state_dict() == states[-1]

    @pytest.mark.parametrize("num_shards", [None, 1], ids=["prepared", "one shard"])
    def test_says_when_a_rank_gets_nothing(self, num_shards):
        stream = number_stream(numbers(1, num_shards), rank=1, world_size=2)
        with pytest.raises(ValueError, match="no examples for rank 1 of 2"):
            next(iter(stream))

    @any_dataset
    def test_leaves_the_global_random_state_alone(self, num_shards):
        torch.manual_seed(0)
        np.random.seed(0)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist()
        epochs(2, numbers(5, num_shards))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.random.get_state()[1].tolist() == before[1]

    @streaming_or_not
    def test_gives_batches_of_a_loaded_data_set(self, shape_files, streaming):
        dataset = load_images(DataArguments(data_files=shape_files, streaming=streaming))
        stream = TrainingStream(dataset, Collator("image", 16), batch_size=10, seed=0)
        pixels = next(iter(stream))["pixels"]
        expected = {to_pixels(draw_shape(n, 16), 16).numpy().tobytes() for n in range(10)}
        assert {p.numpy().tobytes() for p in pixels} == expected
