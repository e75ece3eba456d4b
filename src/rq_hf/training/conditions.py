"""What the training scripts condition on: captions with their tokenizer, or classes."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import caption_of, find_class_names
from ..files import atomic_folder
from ..pipelines import MARPipeline, RQPipeline
from ..text import encode_captions, load_tokenizer, train_tokenizer
from .arguments import RunArguments, check_numbers
from .checkpoints import Checkpoints


@dataclass
class TextArguments:
    """Options for captions and their tokenizer."""

    _argument_group_name = "text"

    text_column: str = field(default="text", metadata={"help": "Column with the captions."})
    text_length: int = field(default=32, metadata={"help": "Tokens of a caption, padded or truncated to this length."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer: a folder or a Hub id (default: train one on the captions)."}
    )
    tokenizer_vocab_size: int = field(default=8192, metadata={"help": "Vocabulary of a tokenizer trained here."})
    tokenizer_captions: int = field(default=1_000_000, metadata={"help": "Captions a tokenizer is trained on."})
    bpe_dropout: float = field(
        default=0.0,
        metadata={
            "help": "Share of the tokenizer's merges left out at random, so that words are seen in several spellings. "
            "Does not follow --seed: runs differ, and a resumed run differs from an uninterrupted one."
        },
    )
    validation_prompts: list[str] = field(
        default_factory=list, metadata={"help": "Prompts to generate images for, every --image_logging_steps steps."}
    )

    def __post_init__(self):
        # The model takes a condition of one id for a class.
        check_numbers(self, "be at least 2", "text_length")
        check_numbers(self, "be at least 1", "tokenizer_captions")
        check_numbers(self, "lie in [0, 1)", "bpe_dropout")
        if self.tokenizer_vocab_size < 257:
            raise ValueError(
                "--tokenizer_vocab_size must be at least 257, for the 256 bytes and [PAD], "
                f"got {self.tokenizer_vocab_size}"
            )


def prepare_tokenizer(
    accelerator: Accelerator, args: TextArguments, run: RunArguments, dataset
) -> PreTrainedTokenizerBase:
    """The tokenizer that was asked for or, without one, that of the checkpoint to resume from, or a new one trained on
    the captions."""
    own = Path(run.output_dir) / "tokenizer"
    is_resumed = Checkpoints(run.output_dir).find(run.resume_from_checkpoint) is not None and own.exists()
    if args.tokenizer is None and not is_resumed and accelerator.is_main_process:
        columns = dataset.select_columns([args.text_column, "example_index"])
        texts = (
            caption_of(example, args.text_column) for example in itertools.islice(columns, args.tokenizer_captions)
        )
        with atomic_folder(own) as folder:
            train_tokenizer(texts, args.tokenizer_vocab_size, args.text_length).save_pretrained(folder)
    accelerator.wait_for_everyone()
    return load_tokenizer(args.tokenizer or own, args.text_length)


def example_prompts(pipeline: RQPipeline | MARPipeline, dataset, text_column: str, count: int = 8) -> list[str]:
    """The first captions of a data set that are not too long for the pipeline, each once; none where all of the first
    hundred are."""
    columns = dataset.select_columns([text_column, "example_index"])
    captions = dict.fromkeys(caption_of(example, text_column) for example in itertools.islice(columns, 100))
    _, lengths = encode_captions(pipeline.tokenizer, list(captions), pipeline.transformer.config.cond_length)
    limit = pipeline.transformer.config.cond_length
    return [caption for caption, length in zip(captions, lengths) if 0 < length <= limit][:count]


@dataclass
class ClassArguments:
    """Options for classes; without a column of them, there is no condition."""

    _argument_group_name = "classes"

    label_column: str | None = field(
        default=None, metadata={"help": "Column with the classes, numbers or names (default: no condition)."}
    )
    num_classes: int | None = field(
        default=None, metadata={"help": "Number of classes (default: those that the data set declares or names)."}
    )
    num_samples: int = field(
        default=16, metadata={"help": "Number of images to generate, every --image_logging_steps steps."}
    )

    def __post_init__(self):
        check_numbers(self, "be at least 1", "num_classes", "num_samples")


def find_classes(args: ClassArguments, dataset) -> tuple[int, list[str] | None]:
    """Number of classes, 0 without labels, and their names, if they have names. Raises `ValueError` for labels whose
    classes are unknown."""
    if args.label_column is None:
        return 0, None
    names = find_class_names(dataset, args.label_column)
    if args.num_classes is not None:
        return args.num_classes, names
    if names is None:
        raise ValueError(f"the data set does not declare the classes of {args.label_column!r}: pass --num_classes")
    return len(names), names


def set_class_names(model: PreTrainedModel, num_classes: int, names: list[str] | None) -> None:
    """Keeps the names of the first classes in the model's configuration, if they have names."""
    if names is not None:
        model.config.id2label = dict(enumerate(names[:num_classes]))
        model.config.label2id = {name: label for label, name in model.config.id2label.items()}
