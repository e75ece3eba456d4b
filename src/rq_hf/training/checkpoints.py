"""Checkpoints of a run, written completely or not at all, and the finished model."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from huggingface_hub import upload_folder

from ..files import atomic_folder, replace_folder
from ..model_cards import CARD_FILE, first_line, open_repository
from .checkpoint_files import (
    MANIFEST,
    UnreadableFile,
    check_contents,
    check_plain,
    plain_data_only,
    read_json,
    read_manifest,
    write_manifest,
)

logger = get_logger(__name__)

FORMAT = 2  # version 0.1 wrote no manifest


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

    def save(
        self, accelerator: Accelerator, step: int, position: dict[str, int], configuration: dict | None = None
    ) -> Path:
        """
        Writes `checkpoint-{step}` under another name and then renames it, so that a killed run never leaves a partial
        checkpoint; deletes the oldest ones.

        Args:
            position: of this rank in the data.
            configuration: of the run, see [`saved_configuration`].

        Returns the folder. Raises `OSError` on all ranks, and removes what was written, when one of them cannot write.
        """
        destination = self.folder / f"checkpoint-{step}"
        unfinished = self.folder / f"unfinished-checkpoint-{step}"
        if accelerator.is_main_process:
            for abandoned in self.folder.glob("unfinished-checkpoint-*"):
                shutil.rmtree(abandoned, ignore_errors=True)
        accelerator.wait_for_everyone()

        def describe(error: Exception) -> str:
            written = sum(path.stat().st_size for path in unfinished.rglob("*") if path.is_file())
            free = shutil.disk_usage(self.folder).free
            return (
                f"{destination} cannot be written ({first_line(error)}): {written / 1e6:.1f} MB were written and "
                f"{free / 1e6:.1f} MB are free there. What was written is removed; {self.describe_latest()}"
            )

        try:
            with failing_together(OSError, describe):
                accelerator.save_state(unfinished)
                position = {"format": FORMAT, "step": step, "num_processes": accelerator.num_processes, **position}
                (unfinished / f"position-{accelerator.process_index}.json").write_text(json.dumps(position))
            with failing_together(OSError, describe):
                if accelerator.is_main_process:
                    write_manifest(unfinished, configuration or {})
                    replace_folder(destination, unfinished)
        except OSError:
            if accelerator.is_main_process:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
        if accelerator.is_main_process:
            up_to_here = [path for path in self.list() if step_of(path) <= step]
            for old in up_to_here[: -self.limit]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()
        return destination

    def restore(self, accelerator: Accelerator, which: str | None) -> dict[str, int] | None:
        """
        Loads a checkpoint and returns this rank's position with its `step`; `None` for a new run. No file of it is
        executed, whatever it contains.

        Args:
            which: a checkpoint folder, `"latest"` for the newest one, if any, or `None` for a new run.

        Raises `ValueError` on all ranks for a checkpoint that does not exist or was written by another number of
        processes, and for one with a file that cannot be read; names the file and the checkpoint before.
        """
        checkpoint = self.find(which)
        if checkpoint is None:
            if which is not None:
                logger.info(f"no checkpoint in {self.folder} yet: a new run")
            return None
        with failing_together(ValueError, mention_checkpoint_before(checkpoint)):
            check_exists(checkpoint)
            if accelerator.is_main_process and (checkpoint / MANIFEST).exists():
                check_contents(checkpoint)
            position = read_position(checkpoint, accelerator)
            # accelerate ignores random states that it cannot read.
            check_plain(checkpoint / f"random_states_{accelerator.process_index}.pkl")
            if accelerator.is_main_process:
                with plain_data_only(accelerator):
                    for path in sorted(checkpoint.rglob("*")):
                        check_plain(path)
        with failing_together(ValueError, mention_checkpoint_before(checkpoint)), plain_data_only(accelerator):
            try:
                accelerator.load_state(checkpoint)
            except Exception as error:
                raise UnreadableFile(checkpoint, f"{type(error).__name__}: {first_line(error)}") from error
        return position

    def saved_configuration(self, which: str | None) -> dict | None:
        """The configuration of the run whose checkpoint [`restore`] would load; `None` for a new run and for
        checkpoints of version 0.1, which did not save it. Raises `ValueError` like [`restore`]."""
        checkpoint = self.find(which)
        if checkpoint is None:
            return None
        check_exists(checkpoint)
        if not (checkpoint / MANIFEST).exists():
            return None
        with failing_together(ValueError, mention_checkpoint_before(checkpoint)):
            return read_manifest(checkpoint)["configuration"]

    def find(self, which: str | None) -> Path | None:
        """The checkpoint that [`restore`] loads, which need not exist; `None` for a new run."""
        if which is None:
            return None
        return self.latest() if which == "latest" else Path(which)

    def latest(self) -> Path | None:
        return next(reversed(self.list()), None)

    def describe_latest(self) -> str:
        latest = self.latest()
        return "there is no checkpoint yet" if latest is None else f"the last checkpoint is {latest}"

    def list(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        found = [path for path in self.folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
        return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def check_exists(checkpoint: Path) -> None:
    if not any((checkpoint / name).exists() for name in (MANIFEST, "position-0.json")):
        raise ValueError(
            f"{checkpoint} is not a checkpoint of this script: it has neither {MANIFEST} nor position-0.json"
        )


def read_position(checkpoint: Path, accelerator: Accelerator) -> dict[str, int]:
    """What this rank wrote to `position-{rank}.json`."""
    position = read_json(checkpoint / f"position-{accelerator.process_index}.json", "step", "num_processes")
    if "format" in position:
        read_manifest(checkpoint)  # must not be missing
    if position["num_processes"] != accelerator.num_processes:
        raise ValueError(
            f"{checkpoint} was written by {position['num_processes']} processes, "
            f"this run has {accelerator.num_processes}"
        )
    return position


def mention_checkpoint_before(checkpoint: Path) -> Callable[[Exception], str]:
    """Error -> its message; for a file that cannot be read, with the checkpoint to resume from instead, if any."""

    def describe(error: Exception) -> str:
        if not isinstance(error, UnreadableFile):
            return str(error)
        others = Checkpoints(checkpoint.parent).list()
        before = others[: others.index(checkpoint)] if checkpoint in others else others
        return f"{error}; resume from {before[-1]}" if before else f"{error}; there is no checkpoint before it"

    return describe


@contextmanager
def failing_together(kind: type[Exception], describe: Callable[[Exception], str] = str) -> Iterator[None]:
    """An exception on one rank becomes one of this kind on all of them, with its description (a collective call)."""
    message, cause = None, None
    try:
        yield
    except Exception as error:
        message, cause = describe(error), error
    message = next((text for text in gather_object([message]) if text is not None), None)
    if message is not None:
        raise kind(message) from cause


def check_finite(step: int, checkpoints: Checkpoints, names: Sequence[str], values: Sequence[Sequence[float]]) -> None:
    """
    Raises `ValueError` for the first loss that is NaN or infinite, naming the step and the last checkpoint.

    Args:
        names: of the losses.
        values: of the losses on every rank; the same on all ranks, so that all of them stop.
    """
    for rank, losses in enumerate(values):
        for name, loss in zip(names, losses):
            if not math.isfinite(loss):
                where = f" on process {rank}" if len(values) > 1 else ""
                raise ValueError(
                    f"{name} is {loss}{where} at step {step}; {checkpoints.describe_latest()}. A lower "
                    "--learning_rate, a lower --max_grad_norm or --mixed_precision bf16 instead of fp16 may help"
                )


def create_repository(name: str) -> None:
    """
    Creates the repository `name` on the Hub, unless there is one, and makes sure that the token may write to it.

    Raises `ValueError` that says what to do otherwise.
    """
    try:
        open_repository(name)
    except ValueError as error:
        raise ValueError(
            f"--push_to_hub {error}. Or train without it, and upload the finished model by `hf upload {name} FOLDER`"
        ) from error


def save_finished(
    accelerator: Accelerator,
    model,
    destination: Path,
    card: str,
    upload_to: str | None = None,
    files: dict[str, Callable[[Path], object]] | None = None,
) -> None:
    """
    Saves a model or pipeline with its card, and says where; a folder that was there before stays as `previous-…`.

    Args:
        model: with `save_pretrained`; used on the main process only.
        upload_to: repository on the Hub, `user/name`, to upload it to as well; see [`create_repository`].
        files: what writes further files of the folder, by name.

    Raises `ConnectionError` when the upload fails; the model is saved then.
    """
    if accelerator.is_main_process:
        with atomic_folder(destination) as folder:
            model.save_pretrained(folder)
            for name, write in (files or {}).items():
                write(folder / name)
            (folder / CARD_FILE).write_text(card, encoding="utf-8")
        accelerator.print(f"saved {destination}")
        if upload_to is not None:
            try:
                upload_folder(repo_id=upload_to, folder_path=destination, commit_message="Upload trained model")
            except Exception as error:
                raise ConnectionError(
                    f"{destination} is saved, but not uploaded ({first_line(error)}): "
                    f"run `hf upload {upload_to} {destination}`"
                ) from error
    accelerator.wait_for_everyone()
