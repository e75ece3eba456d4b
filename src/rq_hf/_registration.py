"""The one place that touches the tables of diffusers and transformers: their loaders find our classes by name."""

import diffusers
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES
from transformers import AutoConfig, AutoModel

from .convert import single_file_config, single_file_weights
from .models import RQStackConfig, RQTransformerConfig, RQTransformerModel, RQVAEModel
from .pipelines import RQPipeline


def register() -> None:
    # `model_index.json` then names components by ["rq_hf", "RQVAEModel"], never by the file they live in.
    methods = {cls.__name__: ["save_pretrained", "from_pretrained"] for cls in (RQVAEModel, RQTransformerModel)}
    LOADABLE_CLASSES["rq_hf"] = methods
    ALL_IMPORTABLE_CLASSES.update(methods)
    # Where `DiffusionPipeline.from_pretrained` and `diffusers.AutoModel` look classes up.
    diffusers.RQPipeline = RQPipeline
    diffusers.RQVAEModel = RQVAEModel
    SINGLE_FILE_LOADABLE_CLASSES["RQVAEModel"] = {
        "config_mapping_fn": single_file_config,
        "checkpoint_mapping_fn": single_file_weights,
    }
    AutoConfig.register(RQStackConfig.model_type, RQStackConfig)
    AutoConfig.register(RQTransformerConfig.model_type, RQTransformerConfig)
    AutoModel.register(RQTransformerConfig, RQTransformerModel)
