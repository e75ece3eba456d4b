"""
Exports an RQPipeline as ONNX: the two steps of its sampling, and its decoder. `examples/browser` samples with them on
a web page; docs/browser.md has the loop in Python.

Shapes: `B` images (twice as many rows with guidance), `H W` code grid, `T = H·W` positions in raster order, `D`
quantization depth, `K` codebook size, `L` length of the condition, `V` its vocabulary, `E` hidden size.
"""

import importlib
import json
import logging
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from rq_hf_cli import MODEL_HELP, Parser, hide_loading, pipeline_class_of, place_of

from .argument_checks import check_choice, check_instance
from .files import atomic_folder, checksum
from .models import RQTransformerModel, RQVAEModel
from .models.codes import embed_codes
from .models.rq_transformer.generation_settings import GenerationSettings
from .pipelines import RQPipeline
from .pipelines.conditions import is_class_conditional, is_text_conditional
from .untrusted_files import one_line

LIBRARIES = ("onnx", "onnxscript", "onnxruntime")  # of the extra `onnx`
DTYPES = ("float32", "float16")
TOLERANCE = 1e-3  # of logits, and of pixels in [0, 1]
LARGEST_FILE = 2**31 - 2**20  # bytes: protobuf ends at 2 GiB, and a graph without its weights is below 1 MiB
EPILOG = """\
examples:
  python -m rq_hf.export_onnx --dtype float16 --output_dir examples/browser/model
  python -m rq_hf.export_onnx models/imagenet-480m --output_dir imagenet-onnx

files:
  spatial_step.onnx  codes of the last position, keys and values -> context of the next position
  depth_step.onnx    context and the codes so far -> logits of the next code
  decoder.onnx       codes -> pixels in [0, 1]
  onnx.json          sizes, sampling settings, and the bytes and SHA-256 of the other files
  tokenizer.json     of a text model

The folder appears only when onnxruntime has computed the same greedy codes and image as the pipeline.
"""


class SpatialStep(nn.Module):
    """The spatial stack from one position to the next."""

    def __init__(self, transformer: RQTransformerModel):
        super().__init__()
        self.transformer = transformer

    def forward(
        self, cond_ids: torch.Tensor, codes: torch.Tensor, past: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            cond_ids: the condition `(B, L)` in the first call, `(B, 0)` in all others.
            codes: `(B, t, D)` of positions that are not in `past`: one in every call but the first, where any number
                may be given.
            past: keys and values `(layers, 2, B, heads, p, dim)`, in the first call p = 0.

        Returns:
            context `(B, E)` of the next position, and keys and values for the next call.
        """
        transformer, cond_length = self.transformer, cond_ids.shape[1]
        first = past.shape[4] + cond_length - transformer.config.cond_length  # raster index
        condition = transformer.cond_embedding(cond_ids)
        condition = condition + transformer.cond_position_embedding[torch.arange(cond_length)]
        # With one position more, which is dropped again: onnxruntime cannot sum over a tensor that is empty.
        codes = F.pad(codes, (0, 0, 0, 1))
        indices = first + torch.arange(codes.shape[1])
        positions = transformer.embed_positions(embed_codes(codes, transformer.codebook), indices)
        inputs = torch.cat([condition, positions[:, :-1]], dim=1)
        cache = GrowingCache(past, inputs.shape[1])
        context = transformer.spatial_stack(inputs, cache)[:, -1]
        return context, torch.stack(cache.layers)


class GrowingCache:
    """Past keys and values `(layers, 2, B, heads, p, dim)`, to which each layer appends those of t new inputs."""

    def __init__(self, past: torch.Tensor, num_new: int):
        self.past = past
        self.layers = []
        start, end = past.shape[4], past.shape[4] + num_new
        self.mask = torch.arange(end) <= torch.arange(start, end)[:, None]  # (t, p + t)

    def update(self, keys_values: torch.Tensor, layer_idx: int) -> torch.Tensor:
        self.layers.append(torch.cat([self.past[layer_idx], keys_values], dim=3))
        return self.layers[-1]


class DepthStep(nn.Module):
    """The depth stack and the classifier. The few codes of a position are computed again in every step."""

    def __init__(self, transformer: RQTransformerModel):
        super().__init__()
        self.transformer = transformer

    def forward(self, context: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Context `(B, E)` of a position and its first codes `(B, d)`, d < D -> logits `(B, K)` of the next code."""
        transformer = self.transformer
        inputs = transformer.embed_depths(context, embed_codes(codes, transformer.codebook))
        hidden_states = transformer.depth_stack(inputs)[:, -1]
        classifier = transformer.classifier
        m = 0 if transformer.config.shared_classifier else codes.shape[1]
        return classifier.logits(classifier.norm(hidden_states), m)


class Decoder(nn.Module):
    """The decoder of the RQ-VAE."""

    def __init__(self, vae: RQVAEModel):
        super().__init__()
        self.vae = vae

    def forward(self, codes: torch.Tensor, num_positions: torch.Tensor) -> torch.Tensor:
        """Codes `(B, H, W, D)`, of which the first `num_positions` `()` in raster order are known -> pixels
        `(B, 3, height, width)` in [0, 1]."""
        height, width = codes.shape[1:3]
        is_known = torch.arange(height * width).view(height, width, 1) < num_positions
        vectors = embed_codes(codes, self.vae.quantizer.codebook).sum(dim=-2) * is_known
        sample = self.vae.decode(self.vae.unpatchify(vectors)).sample
        return (sample / 2 + 0.5).clamp(0, 1)


def export_onnx(model: str | os.PathLike, output_dir: str | os.PathLike, dtype: str = "float32") -> dict:
    """
    Writes a saved [`RQPipeline`] as ONNX, and returns what `onnx.json` says.

    Args:
        model: its folder, or its name on the Hub.
        output_dir: new folder, which appears only when onnxruntime has computed the same greedy codes, and an image
            that differs by at most 10⁻³.
        dtype: `"float32"`, or `"float16"` for weights that are rounded to half precision, in files of half the size.
            Arithmetic is in float32 in both cases.

    Raises:
        `ImportError` without the extra `onnx`; `FileExistsError` for an `output_dir` that exists; `FileNotFoundError`
        for a folder without a pipeline; `TypeError` for a pipeline of another class; `ValueError` for a pipeline that
        lacks a component, another dtype, or weights of more than 2 GiB in one file; `RuntimeError` if onnxruntime
        computes something else.
    """
    check_choice("dtype", dtype, DTYPES)
    check_libraries()
    output_dir = Path(output_dir)
    if output_dir.exists():
        raise FileExistsError(f"{output_dir} exists, and nothing is overwritten: name another folder or remove it")
    pipe = load(os.fspath(model))
    if dtype == "float16":
        round_to_half(pipe.transformer, pipe.vae)
    check_file_sizes(pipe.transformer, dtype)
    with atomic_folder(output_dir) as folder:
        for name, (module, inputs, dynamic_shapes, outputs) in graphs(pipe).items():
            write_graph(module, inputs, dynamic_shapes, outputs, dtype, folder / f"{name}.onnx")
        if pipe.is_text_conditional:
            pipe.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        check_outputs(pipe, folder)
        description = describe(pipe, dtype, folder)
        text = json.dumps(description, indent=2, ensure_ascii=False)
        (folder / "onnx.json").write_text(text + "\n", encoding="utf-8")
    return description


def check_libraries() -> None:
    """Raises `ImportError` unless the extra `onnx` is installed."""
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"the export needs {name}: pip install 'rq_hf[onnx]'") from error


def load(model: str) -> RQPipeline:
    """The pipeline on the CPU and in float32, with all components that its images need."""
    pipeline_class = pipeline_class_of(model)
    if pipeline_class is not RQPipeline:
        raise TypeError(f"only an RQPipeline can be exported, got {model} of class {pipeline_class.__name__}")
    pipe = RQPipeline.from_pretrained(model, dtype=torch.float32)
    for name in ("vae", "transformer", *(["tokenizer"] if pipe.is_text_conditional else [])):
        if getattr(pipe, name) is None:
            raise ValueError(f"{model} has no {name}, which the export needs")
    if pipe.is_text_conditional:
        check_instance("the tokenizer", pipe.tokenizer, transformers.PreTrainedTokenizerFast)
    pipe.transformer.set_attn_implementation("eager")
    return pipe


def round_to_half(*models: nn.Module) -> None:
    """Rounds all weights to float16, and keeps them in float32."""
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.half().float()


def check_file_sizes(transformer: RQTransformerModel, dtype: str) -> None:
    """Raises `ValueError` if the weights of a step do not fit into one file."""
    weight_size = 2 if dtype == "float16" else 4
    elsewhere = sum(weight.numel() for weight in transformer.depth_stack.parameters())
    size = weight_size * (sum(weight.numel() for weight in transformer.parameters()) - elsewhere)
    if size > LARGEST_FILE:
        hint = "; try float16" if dtype == "float32" and size // 2 <= LARGEST_FILE else ""
        raise ValueError(f"a file can hold 2.1 GB, but the spatial step has {size / 1e9:.1f} GB in {dtype}{hint}")


def graphs(pipe: RQPipeline) -> dict[str, tuple[nn.Module, dict, dict, list[str]]]:
    """Of every graph by the name of its file: module, example inputs, dynamic axes of these, and names of outputs."""
    config = pipe.transformer.config
    height, width, depth = config.code_shape
    rows, cond_length, num_new, past_length, num_codes = 2, 3, 5, 7, min(2, depth - 1)
    layers, heads, dim = cache_shape(config)
    examples = {
        "cond_ids": torch.zeros(rows, cond_length, dtype=torch.long),
        "codes": torch.zeros(rows, num_new, depth, dtype=torch.long),
        "past": torch.zeros(layers, 2, rows, heads, past_length, dim),
    }
    spatial_axes = {"cond_ids": axes(0, 1), "codes": axes(0, 1), "past": axes(2, 4)}
    context = torch.zeros(rows, config.spatial_config.hidden_size)
    codes_so_far = torch.zeros(rows, num_codes, dtype=torch.long)
    depth_axes = {"context": axes(0), "codes": axes(0, 1) if depth > 1 else axes(0)}
    code_map = torch.zeros(rows, height, width, depth, dtype=torch.long)
    decoder_inputs = {"codes": code_map, "num_positions": torch.tensor(height * width)}
    return {
        "spatial_step": (SpatialStep(pipe.transformer), examples, spatial_axes, ["context", "present"]),
        "depth_step": (
            DepthStep(pipe.transformer),
            {"context": context, "codes": codes_so_far},
            depth_axes,
            ["logits"],
        ),
        "decoder": (Decoder(pipe.vae), decoder_inputs, {"codes": axes(0), "num_positions": {}}, ["pixels"]),
    }


def axes(*dynamic: int) -> dict:
    """These axes of an input may have any size."""
    return {axis: torch.export.Dim.DYNAMIC for axis in dynamic}


def cache_shape(config) -> tuple[int, int, int]:
    """Layers, heads and size of a head of the spatial stack."""
    stack = config.spatial_config
    return stack.num_hidden_layers, stack.num_attention_heads, stack.hidden_size // stack.num_attention_heads


def write_graph(
    module: nn.Module, inputs: dict, dynamic_shapes: dict, outputs: list[str], dtype: str, file: Path
) -> None:
    import onnx

    program = torch.onnx.export(
        module.eval(),
        kwargs=inputs,
        dynamic_shapes=dynamic_shapes,
        input_names=list(inputs),
        output_names=outputs,
        verbose=False,
    )
    graph = program.model_proto
    if dtype == "float16":
        store_in_half(graph.graph)
    onnx.save(graph, file)


def store_in_half(graph) -> None:
    """Stores as float16 the weights that it represents exactly. onnxruntime casts them back once, when it loads the
    graph."""
    import onnx

    casts = []
    for weight in graph.initializer:
        values = torch.from_numpy(onnx.numpy_helper.to_array(weight).copy())
        halves = values.half()
        if values.dtype != torch.float32 or not values.ndim or not torch.equal(halves.float(), values):
            continue
        name = weight.name
        weight.CopyFrom(onnx.numpy_helper.from_array(halves.numpy(), f"{name}.half"))
        casts.append(onnx.helper.make_node("Cast", [weight.name], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def check_outputs(pipe: RQPipeline, folder: Path) -> None:
    """Raises `RuntimeError` unless onnxruntime computes the greedy codes of the pipeline, and their image."""
    import onnxruntime

    def run(name, **inputs):
        inputs = {key: np.asarray(value) for key, value in inputs.items()}
        return sessions[name].run(None, inputs)

    sessions = {
        name: onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for name in ("spatial_step", "depth_step", "decoder")
    }
    config = pipe.transformer.config
    rows, depth = 2, config.code_shape[-1]
    layers, heads, dim = cache_shape(config)
    generator = torch.Generator().manual_seed(0)
    cond_ids = torch.randint(config.cond_vocab_size, (rows, config.cond_length), generator=generator)
    code_map = pipe.transformer.generate(cond_ids, do_sample=False, guidance_scale=1.0)
    codes = code_map.flatten(1, 2)
    past = np.zeros((layers, 2, rows, heads, 0, dim), np.float32)
    inputs = {"cond_ids": cond_ids, "codes": codes[:, :0], "past": past}
    for position in range(codes.shape[1]):
        context, past = run("spatial_step", **inputs)
        for d in range(depth):
            (logits,) = run("depth_step", context=context, codes=codes[:, position, :d])
            chosen = np.take_along_axis(logits, codes[:, position, d : d + 1].numpy(), axis=1)
            if not (logits <= chosen + TOLERANCE).all():  # also where one is NaN
                raise RuntimeError(f"onnxruntime would choose another code at position {position}, depth {d}")
        inputs = {"cond_ids": cond_ids[:, :0], "codes": codes[:, position : position + 1], "past": past}
    (pixels,) = run("decoder", codes=code_map, num_positions=codes.shape[1])
    difference = np.abs(pixels - pipe.decode_codes(code_map, output_type="pt").numpy()).max()
    if not difference <= TOLERANCE:
        raise RuntimeError(f"onnxruntime decodes another image: pixels in [0, 1] differ by up to {difference:.1e}")


def describe(pipe: RQPipeline, dtype: str, folder: Path) -> dict:
    """What a program must know that samples with the files in `folder`."""
    config = pipe.transformer.config
    depth = config.code_shape[-1]
    given = dict.fromkeys(("do_sample", "temperature", "top_k", "top_p", "guidance_scale"))
    settings = GenerationSettings.resolve(pipe.transformer.generation_config, depth, config.codebook_size, **given)
    condition = {"kind": "none", "length": config.cond_length, "vocabulary": config.cond_vocab_size}
    if is_text_conditional(config):
        condition |= {"kind": "text", "padding": pipe.tokenizer.pad_token_id}
    elif is_class_conditional(config):
        condition |= {"kind": "class"}
    condition["null"] = config.null_cond_id
    layers, heads, dim = cache_shape(config)
    rows, columns = pipe.vae.pixels_per_code
    height, width, _ = config.code_shape
    return {
        "code_shape": config.code_shape,
        "codebook_size": config.codebook_size,
        "condition": condition,
        "cache": {"layers": layers, "heads": heads, "dim": dim},
        "image": {"height": height * rows, "width": width * columns, "channels": pipe.vae.config.out_channels},
        "generation": {
            "temperature": settings.temperature,
            "top_k": settings.top_k if settings.do_sample else [1] * depth,
            "top_p": settings.top_p,
            "guidance_scale": settings.guidance_scale,
        },
        "dtype": dtype,
        "files": {
            file.name: {"bytes": file.stat().st_size, "sha256": checksum(file)} for file in sorted(folder.iterdir())
        },
    }


def main(arguments: list[str] | None = None) -> None:
    prog = "python -m rq_hf.export_onnx"
    parser = Parser(prog, "[MODEL] [options]", "Exports an RQPipeline as ONNX, checked with onnxruntime.", EPILOG)
    parser.add_argument("model", nargs="?", default="rq", metavar="MODEL", help=f"{MODEL_HELP}; but no MAR model")
    parser.add_argument("--output_dir", type=Path, default=Path("onnx"), metavar="FOLDER", help="new (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="in which weights are stored (%(default)s)")
    args = parser.parse_args(arguments)
    parser.check_model(args.model)
    hide_loading()
    warnings.simplefilter("ignore")  # the exporter warns of itself
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # and of torchvision, which it does without
    try:
        description = export_onnx(place_of(args.model), args.output_dir, args.dtype)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        sys.exit(f"{prog}: error: {one_line(error)}")
    for name, file in description["files"].items():
        print(f"{args.output_dir / name}: {file['bytes'] / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
