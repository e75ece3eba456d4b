"""The one place that touches the tables of diffusers and transformers: their loaders find our classes by name."""

import importlib.abc
import importlib.util
import sys

import diffusers
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES
from transformers import AutoConfig, AutoModel

from .convert import single_file_config, single_file_weights
from .models import (
    MARHeadConfig,
    MARStackConfig,
    MARTransformerConfig,
    MARTransformerModel,
    RQEmbeddingModel,
    RQStackConfig,
    RQTransformerConfig,
    RQTransformerModel,
    RQVAEModel,
)
from .pipelines import MARPipeline, RQPipeline

AUTO_PIPELINES = "diffusers.pipelines.auto_pipeline"


class AutoPipelineFinder(importlib.abc.MetaPathFinder):
    """Registers with the auto pipelines once somebody imports its module, which imports all of diffusers."""

    def find_spec(self, name, path, target=None):
        if name != AUTO_PIPELINES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            register_auto_pipelines(module)

        spec.loader.exec_module = execute_and_register
        return spec


def register_auto_pipelines(module) -> None:
    module.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["rq"] = RQPipeline
    for mapping in (
        module.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
        module.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        module.AUTO_INPAINT_PIPELINES_MAPPING,
    ):
        mapping["mar"] = MARPipeline


def register() -> None:
    # `model_index.json` then names components by ["rq_hf", "RQVAEModel"], never by the file they live in.
    models = (RQVAEModel, RQEmbeddingModel, RQTransformerModel, MARTransformerModel)
    methods = {cls.__name__: ["save_pretrained", "from_pretrained"] for cls in models}
    LOADABLE_CLASSES["rq_hf"] = methods
    ALL_IMPORTABLE_CLASSES.update(methods)
    # Where `DiffusionPipeline.from_pretrained` and `diffusers.AutoModel` look classes up.
    diffusers.RQPipeline = RQPipeline
    diffusers.MARPipeline = MARPipeline
    diffusers.RQVAEModel = RQVAEModel
    diffusers.RQEmbeddingModel = RQEmbeddingModel
    SINGLE_FILE_LOADABLE_CLASSES["RQVAEModel"] = {
        "config_mapping_fn": single_file_config,
        "checkpoint_mapping_fn": single_file_weights,
    }
    for config in (RQStackConfig, RQTransformerConfig, MARStackConfig, MARHeadConfig, MARTransformerConfig):
        AutoConfig.register(config.model_type, config)
    AutoModel.register(RQTransformerConfig, RQTransformerModel)
    AutoModel.register(MARTransformerConfig, MARTransformerModel)
    if AUTO_PIPELINES in sys.modules:
        register_auto_pipelines(sys.modules[AUTO_PIPELINES])
    elif not any(isinstance(finder, AutoPipelineFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, AutoPipelineFinder())
