"""Trainings on twenty numbers, in processes of their own."""

import itertools
import json
import os

import datasets
import torch
from processes import die_while_saving, run
from torch import nn

from rq_hf.data import TrainingStream
from rq_hf.images import image_grid
from rq_hf.training import Checkpoints, LossOutput, RunArguments, flat_configuration, log_images, train

STEPS = 6


class Noisy(nn.Module):
    """A regression with all kinds of state: parameters, a running mean, a counter, and random numbers."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))

    def forward(self, numbers):
        return self.network(torch.stack([numbers, numbers.square()], dim=-1)).squeeze(-1)


def collate(examples):
    numbers = torch.tensor([example["number"] for example in examples])
    return {"numbers": numbers, "counts": {"images": len(numbers), "small_numbers": int((numbers < 1).sum())}}


def compute_loss(model, batch):
    loss = (model(batch["numbers"]) - batch["numbers"].sin()).square().mean()
    return LossOutput(loss, {"twice_the_loss": 2 * loss})


def run_training(output_dir, arguments, model=Noisy, die_at=None, before=None):
    """Trains on 20 numbers, after calling `before`; the weights go to `weights.pt`, also those of the other ranks."""
    if before:
        before()
    defaults = {"max_train_steps": STEPS, "train_batch_size": 4, "learning_rate": 0.05, "lr_warmup_steps": 2}
    defaults |= {"logging_steps": 1, "image_logging_steps": 0, "checkpointing_steps": 2, "report_to": "none"}
    run = RunArguments(str(output_dir), cpu=True, **defaults | arguments)
    configuration = flat_configuration(run)
    accelerator = run.create_accelerator(configuration)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    dataset = datasets.Dataset.from_dict({"number": [n / 10 for n in range(20)]})
    stream = TrainingStream(dataset, collate, run.train_batch_size, run.seed, rank, world_size)
    model = model()
    optimizer = run.create_optimizer(model)
    if die_at:
        die_while_saving(die_at)
    train(
        accelerator,
        model,
        optimizer,
        run.create_scheduler(optimizer),
        stream,
        compute_loss,
        evaluate=lambda step: log_images(accelerator, {"noise": image_grid(torch.rand(2, 3, 4, 4))}, step),
        units_per_image={"digits": 3},
        configuration=configuration,
        **run.training_options(),
    )
    torch.save(model.state_dict(), output_dir / f"weights-{rank}.pt")


def train_here(output_dir, die_at=None, model=Noisy, before=None, **arguments):
    return run(run_training, output_dir, arguments, model, die_at, before)


def finished_training(output_dir, **kwargs):
    outcome = train_here(output_dir, **kwargs)
    assert outcome.code == 0, outcome.output
    return output_dir


def weights(output_dir, rank=0):
    return torch.load(output_dir / f"weights-{rank}.pt")


def logged(output_dir):
    lines = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "step" in line}


def checkpoint_names(output_dir):
    return [path.name for path in Checkpoints(output_dir).list()]


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]


def signalled(model, number, times=1, rank=0):
    """A model whose third forward pass on one rank sends a signal to its process."""
    model, calls = model(), itertools.count(1)

    def send(*arguments):
        if next(calls) == 3 and int(os.environ.get("RANK", 0)) == rank:
            for _ in range(times):
                os.kill(os.getpid(), number)

    model.register_forward_pre_hook(send)
    return model


class Smooth(Noisy):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
