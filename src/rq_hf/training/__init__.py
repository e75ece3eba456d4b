from .adversarial import DiscriminatorTrainer, PatchDiscriminator
from .arguments import (
    AutoencoderArguments,
    DatasetArguments,
    LatentsArguments,
    LossArguments,
    RunArguments,
    TrainingDataArguments,
    TransformerArguments,
    ValidationArguments,
    check_numbers,
    flat_configuration,
    parse_arguments,
)
from .autoencoder_kl import (
    AutoencoderKLForTraining,
    AutoencoderKLLoss,
    autoencoder_kl_grid,
    evaluate_autoencoder_kl,
    set_scaling_factor,
)
from .cards import save_autoencoder, training_sections
from .checkpoints import Checkpoints, save_finished
from .conditions import (
    ClassArguments,
    TextArguments,
    example_prompts,
    find_classes,
    prepare_tokenizer,
    set_class_names,
)
from .ema import EMA
from .launch import check_launch
from .loop import LossOutput, TrainingHook, create_accelerator, create_optimizer, create_scheduler, train
from .mar import MARLoss, create_mar_transformer, load_mar_transformer
from .pipelines import save_pipeline, train_pipeline
from .reconstruction import check_unsharded, first_pixels
from .rq_embedding import RQEmbeddingLoss, evaluate_semantic_ids, initialize_embedding_model
from .rq_transformer import RQTransformerLoss, create_transformer, load_transformer
from .rq_vae import RQVAELoss, evaluate_reconstructions, initialize_codebook, reconstruction_grid
from .soft_labels import choose_soft_label_temperature, effective_codewords
from .trackers import JSONLinesTracker, log_images

__all__ = [
    "load_mar_transformer",
    "create_mar_transformer",
    "MARLoss",
    "set_class_names",
    "prepare_tokenizer",
    "example_prompts",
    "find_classes",
    "TextArguments",
    "ClassArguments",
    "LatentsArguments",
    "AutoencoderArguments",
    "AutoencoderKLForTraining",
    "AutoencoderKLLoss",
    "Checkpoints",
    "DatasetArguments",
    "DiscriminatorTrainer",
    "EMA",
    "JSONLinesTracker",
    "LossArguments",
    "LossOutput",
    "PatchDiscriminator",
    "RQEmbeddingLoss",
    "RQTransformerLoss",
    "RQVAELoss",
    "RunArguments",
    "TrainingDataArguments",
    "TrainingHook",
    "TransformerArguments",
    "ValidationArguments",
    "autoencoder_kl_grid",
    "check_launch",
    "check_numbers",
    "check_unsharded",
    "choose_soft_label_temperature",
    "create_accelerator",
    "create_optimizer",
    "create_scheduler",
    "create_transformer",
    "effective_codewords",
    "evaluate_autoencoder_kl",
    "evaluate_reconstructions",
    "evaluate_semantic_ids",
    "first_pixels",
    "flat_configuration",
    "initialize_codebook",
    "initialize_embedding_model",
    "load_transformer",
    "log_images",
    "parse_arguments",
    "reconstruction_grid",
    "save_autoencoder",
    "save_finished",
    "save_pipeline",
    "set_scaling_factor",
    "train",
    "train_pipeline",
    "training_sections",
]
