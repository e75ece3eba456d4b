"""Training streams over plain numbers, whose batches are easily compared."""

import datasets
import torch

from rq_hf.data import TrainingStream


def numbers(count, num_shards=None):
    dataset = datasets.Dataset.from_dict({"number": list(range(count))})
    return dataset if num_shards is None else dataset.to_iterable_dataset(num_shards)


def batch_of(values):
    return {"values": values, "counts": {"images": len(values)}}


def collate_numbers(examples):
    return batch_of([example["number"] for example in examples])


def collate_random_numbers(examples):
    return batch_of(torch.rand(len(examples)).tolist())


def number_stream(dataset, collate=collate_numbers, batch_size=2, seed=0, shuffle_buffer_size=4, **kwargs):
    return TrainingStream(dataset, collate, batch_size, seed, shuffle_buffer_size=shuffle_buffer_size, **kwargs)


def epochs(count, *arguments, **kwargs):
    """The values of all batches of the first epochs."""
    stream = number_stream(*arguments, **kwargs)
    batches = [[] for _ in range(count)]
    for batch in stream:
        if stream.epoch == count:
            return batches
        batches[stream.epoch].append(batch["values"])
