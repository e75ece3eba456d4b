"""Checkpoints of a run, written completely or not at all, and the finished model."""

import json
import re
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from huggingface_hub import create_repo, upload_folder

from ..files import atomic_folder, replace_folder

logger = get_logger(__name__)


class Checkpoints:
    """
    The folders `checkpoint-{step}` of a run.

    Args:
        folder: the run's output folder.
        limit (`int`): number of newest checkpoints to keep.
    """

    def __init__(self, folder: str | Path, limit: int = 2):
        self.folder = Path(folder)
        self.limit = limit

    def save(self, accelerator: Accelerator, step: int, position: dict[str, int]) -> None:
        """
        Writes `checkpoint-{step}` under another name and then renames it, so that a killed run never leaves a partial
        checkpoint; deletes the oldest ones.

        Args:
            position: of this rank in the data.
        """
        destination = self.folder / f"checkpoint-{step}"
        unfinished = self.folder / f"unfinished-checkpoint-{step}"
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(unfinished)
        position = {"step": step, "num_processes": accelerator.num_processes, **position}
        (unfinished / f"position-{accelerator.process_index}.json").write_text(json.dumps(position))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            replace_folder(destination, unfinished)
            up_to_here = [path for path in self.list() if step_of(path) <= step]
            for old in up_to_here[: -self.limit]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()

    def restore(self, accelerator: Accelerator, which: str | None) -> dict[str, int] | None:
        """
        Loads a checkpoint and returns this rank's position with its `step`; `None` for a new run.

        Args:
            which: a checkpoint folder, `"latest"` for the newest one, if any, or `None` for a new run.

        Raises `ValueError` for a checkpoint that does not exist or was written by another number of processes.
        """
        checkpoint = self.find(which)
        if checkpoint is None:
            if which is not None:
                logger.info(f"no checkpoint in {self.folder} yet: a new run")
            return None
        num_processes = accelerator.num_processes
        position_file = checkpoint / f"position-{accelerator.process_index}.json"
        if not position_file.exists():
            raise ValueError(f"{checkpoint} is not a checkpoint of this script with {num_processes} processes")
        position = json.loads(position_file.read_text())
        if position["num_processes"] != num_processes:
            raise ValueError(
                f"{checkpoint} was written by {position['num_processes']} processes, this run has {num_processes}"
            )
        accelerator.load_state(checkpoint)
        return position

    def find(self, which: str | None) -> Path | None:
        """The checkpoint that [`restore`] loads, which need not exist; `None` for a new run."""
        if which is None:
            return None
        return self.latest() if which == "latest" else Path(which)

    def latest(self) -> Path | None:
        return next(reversed(self.list()), None)

    def list(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        found = [path for path in self.folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
        return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def check_finite(step: int, checkpoints: Checkpoints, **losses: torch.Tensor) -> None:
    """Raises `ValueError` for the first loss that is NaN or infinite, naming the step and the last checkpoint."""
    for name, loss in losses.items():
        if not loss.isfinite().all():
            latest = checkpoints.latest()
            last = "there is no checkpoint yet" if latest is None else f"the last checkpoint is {latest}"
            raise ValueError(
                f"{name} is {loss.tolist()} at step {step}; {last}. A lower --learning_rate, a lower --max_grad_norm "
                "or --mixed_precision bf16 instead of fp16 may help"
            )


def save_finished(accelerator: Accelerator, model, destination: Path, card: str, upload_to: str | None = None) -> None:
    """
    Saves a model or pipeline with its card; a folder that was there before stays as `previous-…`.

    Args:
        model: with `save_pretrained`; used on the main process only.
        upload_to: repository on the Hub, `user/name`, to upload it to as well.
    """
    if accelerator.is_main_process:
        with atomic_folder(destination) as folder:
            model.save_pretrained(folder)
            (folder / "README.md").write_text(card)
        if upload_to is not None:
            create_repo(upload_to, exist_ok=True)
            upload_folder(repo_id=upload_to, folder_path=destination, commit_message="Upload trained model")
    accelerator.wait_for_everyone()
