import itertools
import multiprocessing
import os

import datasets
import numpy as np
import pytest
import torch
from number_streams import collate_numbers, collate_random_numbers, epochs, number_stream, numbers
from processes import run
from shapes import draw_shape, write_shapes

from rq_hf.data import ImageCollator, TrainingStream, load_image_dataset
from rq_hf.data.stream import STOP_SIGNALS
from rq_hf.images import to_pixels

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

    @pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streaming"])
    def test_gives_batches_of_a_loaded_data_set(self, streaming, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 seconds after every stream
        files = write_shapes(tmp_path / "shapes", count=10, num_shards=3)
        dataset = load_image_dataset(data_files=files, streaming=streaming)
        stream = TrainingStream(dataset, ImageCollator("image", 16), batch_size=10, seed=0)
        pixels = next(iter(stream))["pixels"]
        expected = {to_pixels(draw_shape(n, 16), 16).numpy().tobytes() for n in range(10)}
        assert {p.numpy().tobytes() for p in pixels} == expected


def read_while_workers_are_signalled(count):
    """Prints the values of `count` batches. After the first, all workers get the signals that would stop a run."""
    batches = iter(number_stream(numbers(40), num_workers=2))
    for position, batch in enumerate(itertools.islice(batches, count)):
        for worker in multiprocessing.active_children() if position == 0 else ():
            for number in STOP_SIGNALS:
                os.kill(worker.pid, number)
        print(*batch["values"])
    raise SystemExit(3)  # while the stream is in use


@pytest.mark.parametrize("count", [5, 20], ids=["part", "epoch"])
def test_workers_outlive_signals_to_their_group_but_not_the_process(count):
    outcome = run(read_while_workers_are_signalled, count)
    assert outcome.code == 3, outcome.output
    values = list(map(int, outcome.output.split()))
    assert len(set(values)) == len(values) == 2 * count


def collate_small_numbers(examples):
    """Numbers from 4 on count as images that cannot be decoded."""
    values = [example["number"] for example in examples if example["number"] < 4]
    return {"values": values, "counts": {"images": len(values), "skipped_images": len(examples) - len(values)}}


class TestSkippedImages:
    def test_batches_without_images_are_passed_over_and_counted_with_the_next(self):
        expected, skipped = [], 0
        for values in sum(epochs(4, numbers(13)), []):
            kept = [value for value in values if value < 4]
            skipped += len(values) - len(kept)
            if kept:
                expected.append((kept, {"images": len(kept), "skipped_images": skipped}))
                skipped = 0
        stream = number_stream(numbers(13), collate_small_numbers)
        batches = [(batch["values"], batch["counts"]) for batch in itertools.islice(stream, len(expected))]
        assert batches == expected
        assert max(counts["skipped_images"] for _, counts in batches) > 2  # images of a batch

    def test_resumes_after_every_batch(self):
        stream = number_stream(numbers(13), collate_small_numbers)
        states, batches = zip(*((stream.state_dict(), batch) for batch in itertools.islice(stream, 10)))
        for state, batch in zip(states[:-1], batches[1:]):
            resumed = number_stream(numbers(13), collate_small_numbers)
            resumed.load_state_dict(state)
            assert next(iter(resumed)) == batch

    @pytest.mark.parametrize("count", [2, 100])
    def test_too_many_in_a_row_are_an_error(self, count):
        dataset = datasets.Dataset.from_dict({"number": [9] * count})
        with pytest.raises(ValueError, match="none of 6 images in a row can be decoded"):
            next(iter(number_stream(dataset, collate_small_numbers, max_skipped=5)))
