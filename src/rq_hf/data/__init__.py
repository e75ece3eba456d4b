from .collators import ImageCollator, LatentCollator, caption_of, decode_image, first_batches, label_of
from .latents import (
    bytes_to_latents,
    describe_latents,
    latents_to_bytes,
    load_latents,
    stored_dtype,
    stored_shape,
    write_description,
    write_latents,
)
from .loading import find_class_names, find_features, load_image_dataset, prepare_images
from .stream import TrainingStream
from .vectors import VectorCollator, load_vector_dataset, read_items, read_vectors

__all__ = [
    "ImageCollator",
    "LatentCollator",
    "TrainingStream",
    "VectorCollator",
    "bytes_to_latents",
    "caption_of",
    "decode_image",
    "describe_latents",
    "find_class_names",
    "find_features",
    "first_batches",
    "label_of",
    "latents_to_bytes",
    "load_image_dataset",
    "load_latents",
    "load_vector_dataset",
    "prepare_images",
    "read_items",
    "read_vectors",
    "stored_dtype",
    "stored_shape",
    "write_description",
    "write_latents",
]
