"""The calls to try: the public API on tiny models."""

import functools
from collections.abc import Sequence

import diffusers
import numpy as np
import PIL.Image
import tiny
import torch
from fuzzing import (
    NAMES,
    Invalid,
    Kind,
    Target,
    anything,
    expressions,
    fits,
    flag,
    floats,
    index_like,
    integer,
    integers,
    leaves,
    listed,
    number,
    one_of,
    one_or_several,
    optional,
    restricted,
    several,
    tensor,
)
from tiny import HEIGHT, NUM_CLASSES, WIDTH, C, D, E, F, H, K, L, T, W
from transformers import GenerationConfig

import rq_hf
from rq_hf import data, images, metrics, text, training
from rq_hf.evaluation import Report, captions, generation
from rq_hf.evaluation.reconstruction import ReconstructionMeter
from rq_hf.models import continuous_latents
from rq_hf.models.mar_transformer.denoising import default_scheduler

VOCABULARY = tiny.CONDITIONS["text"]["cond_vocab_size"]
LATENT_CHANNELS = 10


@functools.cache
def shared(make, *arguments):
    """One for all cases, for calls that do not change it; to make it changes no random state."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(*arguments)


def pil(mode="RGB", size=(WIDTH, HEIGHT)):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels).convert(mode)


def bytes_of_images():
    return torch.arange(72, dtype=torch.uint8).view(2, 3, 4, 3)


def flat_network():
    return metrics.FeatureNetwork.from_module(torch.nn.Flatten(), "own", 4, [0.5] * 3, [0.5] * 3)


def reconstruction_meter():
    return ReconstructionMeter(tiny.tiny_vae())


def figure(metric, value, n, std):
    """A new report's only figure."""
    report = Report(
        model="model",
        weights={"model.safetensors": "a" * 64},
        dataset="shapes",
        split="train",
        transform="none",
        uint8_rule="round",
        sampler={},
        seeds=[],
    )
    report.add(metric, value, n, std=std)
    return report.figures[0]


def statistics(dataset, count, network_sha256, uint8_rule):
    identity = {"network": "tiny", "protocol": "8×8", "network_sha256": network_sha256}
    provenance = {"dataset": dataset, "split": "train", "transform": "none", "count": count, "uint8_rule": uint8_rule}
    moments = metrics.FeatureMoments.of(torch.arange(12.0).view(6, 2))
    return metrics.FeatureStatistics(moments, provenance | identity)


@functools.cache
def shapes():
    """A data set of four images, with captions and labels."""
    import datasets

    columns = {"image": [pil()] * 4, "text": tiny.CAPTIONS[:4], "label": [0, 1, 2, 0]}
    return data.prepare_images(datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()), "image")


def examples(**changes):
    return [dict(example) | changes for example in shapes()]


def semantic_ids():
    """Of two items with one ID."""
    return rq_hf.SemanticIds(shared(tiny.tiny_embedding), ["a", "b"], torch.zeros(2, 3, dtype=torch.long))


def generation_config(**settings):
    return GenerationConfig(**settings)


NAMES |= vars(tiny) | {
    "rq_hf": rq_hf,
    "data": data,
    "images": images,
    "metrics": metrics,
    "text": text,
    "training": training,
    "pil": pil,
    "shapes": shapes,
    "examples": examples,
    "GenerationConfig": generation_config,
    "vae": lambda: shared(tiny.tiny_vae),
    "embedding": lambda: shared(tiny.tiny_embedding),
    "semantic_ids": semantic_ids,
    "kl": lambda: shared(tiny.tiny_kl),
    "continuous_latents": continuous_latents,
    "transformer": lambda kind: shared(tiny.tiny_transformer, kind),
    "pipe": lambda kind: shared(tiny.tiny_pipeline, kind),
    "mar": lambda kind: shared(tiny.tiny_mar, kind),
    "mar_pipe": lambda kind: shared(tiny.tiny_mar_pipeline, kind),
    "diffusers": diffusers,
    "default_scheduler": default_scheduler,
    "tokenizer": lambda: shared(tiny.tiny_tokenizer),
    "lpips": lambda: shared(metrics.LPIPS),
    "network": lambda: shared(flat_network),
    "bytes_of_images": lambda: bytes_of_images(),
    "classifier": lambda: shared(metrics.SmallClassifier),
    "meter": lambda: shared(reconstruction_meter),
    "captions": captions,
    "figure": figure,
    "generation": generation,
    "statistics": statistics,
    "seeded": lambda seed=0: torch.Generator().manual_seed(seed),
    "mean": lambda images, conditions: images.mean(dim=(1, 2, 3)),
}

positive = number(lambda x: 0 < x < float("inf"), "0.5; np.float32(0.5); torch.tensor(0.5); 1; Fraction(1, 2)")
finite = number(lambda x: abs(x) < float("inf"), "1; 2.5; -1.5; np.float64(1.5); torch.tensor(2.5)")
at_least_0 = number(lambda x: 0 <= x < float("inf"))
share = number(lambda x: 0 <= x < 1)
closed_share = number(lambda x: 0 <= x <= 1)
per_depth = "[0.5] * 4; np.full(4, 0.5); torch.full((4,), 0.5); (1, 0.5, 0.25, 1); [0.5] * 5; np.full((2, 2), 0.5)"
pixels = floats(None, 3, None, None)
unit_images = tensor(lambda x: x.ndim == 4 and x.numel() > 0 and bool(((x >= 0) & (x <= 1)).all()))
vectors = floats(None, None, None, C)
latents = floats(None, C, None, None)
even_pixels = tensor(
    lambda x: x.ndim == 4 and x.shape[1] == 3 and x.numel() > 0 and x.shape[2] % F == x.shape[3] % F == 0
)
any_vectors = tensor(lambda x: x.ndim > 0 and x.shape[-1] == C and x.numel() > 0 and bool(x.isfinite().all()))
any_codes = tensor(
    lambda x: x.ndim > 0 and 0 < x.shape[-1] <= D and x.numel() > 0 and 0 <= x.min() <= x.max() < K, True
)
codes = integers(None, None, None, D, below=K)
codes_of_two = integers(2, H, W, D, below=K)
generator = anything(
    "None; seeded(); seeded(1); [seeded(), seeded()]; 3; [1, 2]; np.int64(1)",
    lambda value: value is None or isinstance(value, torch.Generator),
)


def _generators(count):
    def plain(value):
        if value is None or isinstance(value, torch.Generator):
            return value
        items = listed(value) if not isinstance(value, np.ndarray | torch.Tensor | range) else None
        if items is None or len(items) != count or (count > 1 and items[0] is items[1]):
            raise Invalid
        if not all(isinstance(g, torch.Generator) or integer(-(2**63), 2**64 - 1).plain(g) is not None for g in items):
            raise Invalid
        return [g if isinstance(g, torch.Generator) else int(g) for g in items]

    return Kind(
        plain,
        expressions(
            "[seeded(), seeded()]; [1, 2]; (1, 2); [1, seeded()]; [seeded()] * 2; [True, False]; [-1, 2]; seeded();"
            "[1.0, 2.0]; [np.int64(1), 2]; [2**70, 1]; [1, 2, 3]; [None, None]; [torch.tensor(1), 2]; 1; 'abc'"
        ),
    )


def is_codes(result):
    (result,) = leaves(result)
    return result.dtype == torch.long and 0 <= int(result.min()) <= int(result.max()) < K


sampling = {
    "do_sample": optional(flag),
    "temperature": optional(one_or_several(positive, D, per_depth)),
    "top_k": optional(one_or_several(optional(Kind(index_like, expressions("2; 5; 12; 13; 2.0; np.int64(3)"))), D)),
    "top_p": optional(one_or_several(number(lambda p: 0 < p <= 1), D, per_depth)),
    "guidance_scale": optional(one_or_several(finite, D, per_depth)),
    "guidance_schedule": one_of("constant", "linear", "cosine"),
}
callbacks = (
    "lambda *a: None; lambda *a: True; lambda *a: torch.zeros(2); lambda *a: {}; lambda *a: {'x': 1}; lambda *a: 3"
)


def _callback_plain(name, value):
    """One that changes nothing is like none."""
    if value is None:
        return None
    try:
        found = value(None, 0, 0, {name: None})
    except Exception:
        raise Invalid from None
    if found is None or found == {} or (isinstance(found, dict) and list(found) == [name]):
        return None
    raise Invalid


def _position_callback_plain(value):
    if value is None:
        return None
    marker = torch.zeros(1)
    try:
        found = value(0, marker)
    except Exception:
        raise Invalid from None
    if found is None or found is marker:
        return None
    raise Invalid


on_position = Kind(
    _position_callback_plain,
    expressions(
        "lambda p, c: None; lambda p, c: c; lambda p, c: True; lambda p, c: {'codes': c}; lambda p, c: c.float();"
        "lambda p, c: c[:1]; lambda p, c: c + 100; lambda p, c: c.flatten(1); lambda p, c: 'abc'; 3"
    ),
)


def step_end(name):
    return Kind(
        functools.partial(_callback_plain, name),
        expressions(
            callbacks + "; lambda *a: a[-1]; lambda *a: {'codes': 3}; lambda *a: {'codes': torch.zeros(1)};"
            "lambda *a: {'codes': None}; lambda *a: {'latents': 3}; lambda *a: {'latents': torch.zeros(1)};"
            "lambda *a: {'latents': None}; lambda *a: []; lambda *a: 'abc'; 'abc'"
        ),
    )


def step_end_inputs(name):
    return anything(
        "['codes']; ('codes',); []; ['latents']; ('latents',); 'codes'; [1]", lambda v: v in ([name], (name,), [], ())
    )


def decays(count=1):
    return one_or_several(share, count, "[0.5]; (0.5,); [0.5, 0.5]; np.array([0.5]); np.array([0.5, 0.9]); 0.0; 1.0")


QUANTIZER = [
    Target(
        "rq_hf.ResidualQuantizer",
        {"codebook_size": "12", "codebook_dim": "6", "depth": "4"},
        {
            "codebook_size": one_or_several(
                integer(1, is_bounded=False), 1, "(12,); [12]; (12, 12); [0]; np.array([12])"
            ),
            "codebook_dim": integer(1),
            "depth": integer(1),
            "shared_codebook": flag,
            "codebook_update": one_of("ema", "gradient"),
            "ema_decay": decays(),
            "restart_unused_codes": flag,
            "quantizer_dropout": closed_share,
            "epsilon": positive,
        },
        probe=lambda quantizer: quantizer(torch.randn(5, quantizer.codebook_dim)),
    ),
    Target("tiny_vae().quantizer", {"z": "torch.randn(2, 3, 6)"}, {"z": any_vectors}, {"z": "vectors"}),
    Target("tiny_vae().quantizer.train()", {"z": "torch.randn(2, 3, 6)"}, {"z": any_vectors}, {"z": "vectors"}),
    Target(
        "vae().quantizer.encode",
        {"z": "torch.randn(2, 3, 6)"},
        {"z": any_vectors, "temperature": optional(positive), "generator": generator},
        {"z": "vectors"},
    ),
    Target(
        "vae().quantizer.encode",
        {"z": "torch.randn(2, 3, 6)"},
        {"z": any_vectors, "beam_size": integer(1)},
        {"z": "vectors"},
    ),
    Target(
        "vae().quantizer.balanced_codes",
        {"residuals": "torch.randn(5, 6)"},
        {"residuals": any_vectors},
        {"residuals": "vectors"},
    ),
    Target(
        "vae().quantizer.get_soft_codes",
        {"z": "torch.randn(2, 3, 6)"},
        {"z": any_vectors, "temperature": positive, "stochastic": flag, "generator": generator},
        {"z": "vectors"},
    ),
    Target("vae().quantizer.embed", {"codes": "tiny_codes()"}, {"codes": any_codes}),
    Target("vae().quantizer.decode", {"codes": "tiny_codes()"}, {"codes": any_codes}),
    Target(
        "tiny_vae().quantizer.initialize",
        {"vectors": "torch.randn(20, 6)", "iterations": "2"},
        {
            "vectors": tensor(
                lambda x: x.ndim > 0 and x.shape[-1] == C and x.numel() >= K * C and bool(x.isfinite().all())
            ),
            "iterations": integer(0),
        },
    ),
]


embedding_vectors = tensor(lambda x: x.ndim == 2 and x.shape[1] == 14 and len(x) > 0 and bool(x.isfinite().all()))
embedding_codes = tensor(
    lambda x: (
        x.ndim == 2
        and len(x) > 0
        and 0 < x.shape[1] <= 3
        and bool(((x >= 0) & (x < torch.tensor([5, K, 7])[: x.shape[1]])).all())
    ),
    True,
)
prefix = anything(
    "[]; [0]; (0, 0); [7]; [0, 0, 0]; [0] * 4; torch.tensor([0]); [0.0]; 0; '0'",
    lambda value: isinstance(value, Sequence | np.ndarray | torch.Tensor) and [*value] in ([], [0], [0, 0], [0, 0, 0]),
)
templates = anything(
    "'<a_{}>'; 'x'; ['<{}>', '[{}]', '({})']; ['{}'] * 3; ['{}']; '{}'; 'aa{}'; 3; []",
    lambda value: value in ("<a_{}>", ["<{}>", "[{}]", "({})"]),
)

EMBEDDING = [
    Target(
        "rq_hf.RQEmbeddingModel",
        {"input_dim": "14", "hidden_dims": "(8,)", "codebook_size": "5"},
        {
            "input_dim": integer(1),
            "hidden_dims": several(integer(1), values="(8,); [8, 4]; (0,); 8; (8.0,); ('8',); np.array([8])"),
            "latent_dim": optional(integer(1)),
            "codebook_size": one_or_several(integer(1), 3, "(4, 5, 6); [4, 4]; np.array([4, 5, 6]); (4, 0, 4)"),
            "depth": integer(1),
            "activation": one_of("relu", "silu"),
            "ema_decay": one_or_several(share, 3, "[0.5] * 3; [0.5] * 2; 1.0"),
            "restart_unused_codes": flag,
            "normalize_latents": flag,
            "normalize_output": flag,
        },
        probe=lambda model: model(torch.randn(4, model.config.input_dim), return_dict=False),
    ),
    Target(
        "tiny_embedding().fit",
        {"vectors": "tiny_vectors(20)", "iterations": "2"},
        {"vectors": restricted(embedding_vectors, lambda x: len(x) >= K), "iterations": integer(0)},
        probe=lambda model: model.codebook_sizes,
    ),
    Target(
        "embedding().encode",
        {"vectors": "tiny_vectors(20)"},
        {"vectors": embedding_vectors, "beam_size": integer(1), "balanced": flag},
    ),
    Target(
        "embedding()",
        {"vectors": "tiny_vectors(20)"},
        {"vectors": embedding_vectors},
        probe=lambda output: output.codes,
    ),
    Target(
        "embedding().decode",
        {"codes": "torch.zeros(2, 3, dtype=torch.long)", "depth": "None"},
        {"codes": embedding_codes, "depth": optional(integer(1, 3))},
    ),
    Target("semantic_ids().allowed_next", {"prefix": "[]"}, {"prefix": prefix}, {"prefix": "codes"}),
    Target(
        "semantic_ids().resolve",
        {"method": "'next_nearest'", "vectors": "torch.ones(2, 14)"},
        {
            "method": one_of("suffix", "next_nearest", "keep"),
            "vectors": restricted(embedding_vectors, lambda x: len(x) == 2),
        },
        probe=lambda resolved: resolved[0].codes,
    ),
    Target(
        "semantic_ids().tokens",
        {},
        {"template": templates},
    ),
]


def _forward(vae):
    if max(vae.config.in_channels, vae.config.codebook_size, *vae.config.block_out_channels) > 1000:
        return vae.config
    rows, columns = vae.pixels_per_code
    return vae(tiny.tiny_pixels(2, rows * 2, columns * 2, vae.config.in_channels))


blocks = "('{a}DownEncoderBlock2D',) * 2; ['DownEncoderBlock2D'] * 2; 'DownEncoderBlock2D'; ('Nope',) * 2; (1, 2);"
down_blocks = several(one_of("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), 2, blocks.format(a="Attn"))
up_blocks = several(
    one_of("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
    2,
    blocks.format(a="Attn").replace("DownEncoder", "UpDecoder") + "('DownEncoderBlock2D',) * 2",
)


width = restricted(integer(1, 1000), lambda n: n % 4 == 0)

VAE = [
    Target(
        "tiny_vae",
        {},
        {
            "in_channels": integer(1),
            "out_channels": integer(1),
            "down_block_types": down_blocks,
            "up_block_types": up_blocks,
            "block_out_channels": several(
                width,
                2,
                "(8, 8); [4, 8]; (8, 0); (8, -8); (8, 7); (8,); 8; (8.0, 8); ('8', 8);"
                "np.array([8, 16]); torch.tensor([8, 16]); (True, 8); (8, 8, 8); (None, 8)",
            ),
            "layers_per_block": integer(1),
            "mid_block_add_attention": flag,
            "norm_num_groups": restricted(integer(1, 8), lambda n: n in (1, 2, 4, 8)),
            "dropout": share,
            "latent_channels": integer(1),
            "codebook_dim": integer(1),
            "code_patch_size": several(
                integer(1, 6),
                2,
                "(1, 1); [2, 1]; (1, 3); (2, 3); (1, 0); (-1, 1);"
                "(1.0, 1); (1, 1, 1); (1,); '11'; np.array([1, 2]); (4, 1); (True, 1); 1; ('1', '1')",
            ),
            "codebook_size": integer(1),
            "depth": integer(1),
            "shared_codebook": flag,
            "codebook_update": one_of("ema", "gradient"),
            "ema_decay": decays(),
            "restart_unused_codes": flag,
            "quantizer_dropout": closed_share,
            "sample_size": integer(1, is_bounded=False),
        },
        probe=_forward,
    ),
    *(
        Target(f"vae(){method}", {"pixels": "tiny_pixels()"}, {"pixels": even_pixels, **more}, {"pixels": "vectors"})
        for method, more in {
            "": {},
            ".encode": {},
            ".get_codes": {},
            ".get_soft_codes": {"temperature": positive, "stochastic": flag, "generator": generator},
        }.items()
    ),
    Target(
        "vae().quantize",
        {"latents": "torch.randn(2, 6, 2, 3)"},
        {"latents": latents},
        {"latents": "vectors"},
    ),
    Target("vae().decode", {"quantized": "torch.randn(2, 6, 2, 3)"}, {"quantized": latents}),
    Target(
        "vae().patchify",
        {"latents": "torch.randn(2, 6, 2, 3)"},
        {"latents": floats(None, C, None, None, finite=False)},
    ),
    Target("vae().unpatchify", {"vectors": "torch.randn(2, 2, 3, 6)"}, {"vectors": vectors}),
    Target("vae().embed_codes", {"codes": "tiny_codes()"}, {"codes": codes}),
    Target(
        "vae().decode_codes",
        {"codes": "tiny_codes()"},
        {
            "codes": codes,
            "depth": optional(integer(1, D)),
            "num_positions": optional(integer(0, T)),
        },
    ),
    Target("rq_hf.RQVAEModel.from_preset", {}, {"name": anything("'church'; 'nope'; 3")}, {"name": "preset"}),
]


def _generates(config):
    if max(*config.code_shape, config.codebook_size, config.codebook_dim, config.cond_vocab_size) > 1000:
        return config.to_dict()
    stacks = (config.spatial_config, config.depth_config)
    if max(s.hidden_size + s.num_hidden_layers + s.intermediate_size for s in stacks) > 3000:
        return config.to_dict()
    model = rq_hf.RQTransformerModel(config).eval()
    cond_ids = None
    if config.cond_vocab_size > 1:
        cond_ids = torch.zeros(2, config.cond_length, dtype=torch.long)
    found = model.generate(cond_ids, num_images=2)
    return found, model(found, cond_ids, labels=found).loss, config.to_dict()


def stack(**changes):
    return tiny.STACK | {"num_hidden_layers": 1} | changes


NAMES["stack"] = stack
NAMES["stack_in_model"] = lambda **changes: tiny.tiny_config(
    spatial_config=stack(**changes), depth_config=stack(**changes)
)
divisor_of_E = restricted(integer(1, E), lambda n: E % n == 0)
boundless = functools.partial(integer, is_bounded=False)
CONFIGS = [
    Target(
        "stack_in_model",
        {},
        {
            "hidden_size": restricted(boundless(2), lambda n: n % 2 == 0),
            "num_hidden_layers": boundless(1),
            "num_attention_heads": divisor_of_E,
            "intermediate_size": optional(boundless(1)),
            "hidden_act": one_of("gelu", "relu", "silu", "quick_gelu"),
            "attention_bias": flag,
            "mlp_bias": flag,
            "attention_dropout": share,
            "hidden_dropout": share,
            "layer_norm_eps": positive,
            "initializer_range": at_least_0,
        },
        probe=_generates,
    ),
    Target(
        "tiny_config",
        {},
        {
            "code_shape": several(
                integer(1),
                3,
                "(2, 3, 4); [2, 3, 4]; (2, 3, 1); (0, 3, 4); (2, 3); (2, 3, 4.0); (2, 3, '4'); '234';"
                "np.array([2, 3, 4]); (-1, 3, 4); (2, 3, True); (2, 3, 4, 5); (2, 3, None); 24",
            ),
            "codebook_size": boundless(1),
            "codebook_dim": boundless(1),
            "shared_codebook": flag,
            "cond_vocab_size": boundless(1),
            "cond_length": boundless(1),
            "null_cond_id": optional(integer(0, 0)),
            "spatial_config": anything(
                "stack(); stack(hidden_size=8); 3; 'abc'; rq_hf.RQTransformerConfig();"
                "rq_hf.RQStackConfig(**stack()); [1]; stack(num_hidden_layers=0)",
                lambda v: isinstance(v, rq_hf.RQStackConfig) or v in (None, stack()),
            ),
            "depth_config": anything(
                "stack(); stack(hidden_size=8); 3; 'abc'; rq_hf.RQStackConfig(**stack()); stack(num_hidden_layers=0)",
                lambda v: isinstance(v, rq_hf.RQStackConfig) or v in (None, stack(), stack(num_hidden_layers=0)),
            ),
            "cumulative_depth_inputs": flag,
            "shared_classifier": flag,
            "embedding_dropout": share,
            "text_loss_weight": closed_share,
            "initializer_range": at_least_0,
        },
        probe=_generates,
    ),
    Target("rq_hf.RQTransformerConfig.from_preset", {}, {"name": anything("'church'; 'nope'; 3")}, {"name": "preset"}),
    Target(
        "rq_hf.RQTransformerModel",
        {"config": "tiny_config()"},
        {"config": anything("3; {}; 'abc'; rq_hf.RQStackConfig()")},
    ),
]

class_ids = tensor(
    lambda x: (x.ndim == 1 or x.ndim == 2 and x.shape[1] == 1) and len(x) == 2 and 0 <= x.min() <= x.max() < 5,
    is_integer=True,
)
text_ids = integers(2, L, below=VOCABULARY)
prefix = {"prefix_codes": "tiny_codes()", "start": "2"}
TARGET_TEMPERATURE = "target_temperature"  # the name of the argument of `forward`
TRANSFORMER = [
    Target(
        "transformer('class')",
        {"codes": "tiny_codes()", "cond_ids": "tiny_condition('class')"},
        {
            "codes": codes_of_two,
            "cond_ids": class_ids,
            "labels": optional(codes_of_two),
            "return_logits": flag,
        },
        {"codes": "cond_ids"},
    ),
    Target(
        "transformer('text')",
        {"codes": "tiny_codes()", "cond_ids": "tiny_condition('text')", "labels": "tiny_codes()"},
        {"codes": codes_of_two, "cond_ids": text_ids, "labels": optional(codes_of_two)},
        {"codes": "cond_ids"},
    ),
    Target(
        "transformer('none')",
        {"codes": "tiny_codes()", "residuals": "torch.randn(2, 2, 3, 4, 6)"},
        {
            "codes": codes_of_two,
            "residuals": optional(floats(2, H, W, D, C, finite=False)),
            TARGET_TEMPERATURE: positive,
        },
        {"codes": "residuals"},
        is_right=lambda result: True,
    ),
    Target(
        "transformer('text').generate",
        {"cond_ids": "tiny_condition('text')"},
        {
            "cond_ids": text_ids,
            "num_images": optional(integer(2, 2)),
            "generation_config": anything(
                "None; GenerationConfig(); {}; {'temperature': 2}; 'abc'; GenerationConfig(temperature=nan);"
                "GenerationConfig(do_sample='no')",
                lambda v: (
                    v is None
                    or isinstance(v, GenerationConfig)
                    and v.to_diff_dict().keys() <= {"transformers_version"}
                ),
            ),
            "generator": _generators(2),
            "on_position": on_position,
            **sampling,
        },
        {"generation_config": "temperature|do_sample"},
        is_right=is_codes,
    ),
    Target(
        "transformer('class').generate",
        {"cond_ids": "torch.tensor([0, 3])", "guidance_scale": "2.0"},
        {"cond_ids": class_ids, "negative_cond_ids": optional(class_ids), **sampling},
        is_right=is_codes,
    ),
    Target(
        "transformer('none').generate",
        prefix | {"num_images": "2"},
        {
            "prefix_codes": codes_of_two,
            "start": integer(1, T),
            "keep_depth": integer(0, D - 1),
            "num_images": optional(integer(2, 2)),
            "generator": _generators(2),
        },
        is_right=is_codes,
    ),
    Target(
        "transformer('none').generate",
        {"do_sample": "True"},
        {"num_images": optional(integer(1)), **sampling},
        is_right=is_codes,
    ),
    Target("tiny_transformer().set_codebook", {"codebook": "torch.randn(1, 12, 6)"}, {"codebook": floats(1, K, C)}),
]


def _labels(value):
    value = scalar_list(value)
    if not all(0 <= v < NUM_CLASSES for v in value):
        raise Invalid
    return value


def scalar_list(value):
    try:
        return [integer(0).plain(value)]
    except Invalid:
        return several(integer(0)).plain(value)


def _prompts(value):
    if isinstance(value, str):
        value = [value]
    value = listed(value)
    if not value or not all(isinstance(v, str) for v in value) or any(len(v) > 30 for v in value):
        raise Invalid
    return value


def _pixels(value):
    """Images in every accepted form -> (B, 3, height, width) in [0, 1]."""
    if isinstance(value, PIL.Image.Image | np.ndarray | torch.Tensor):
        value = [value]
    if not isinstance(value, list | tuple) or not value:
        raise Invalid
    found = []
    for image in value:
        if isinstance(image, PIL.Image.Image):
            found.append(torch.from_numpy(np.asarray(images.to_rgb(image))).permute(2, 0, 1)[None] / 255)
        elif isinstance(image, np.ndarray) and image.dtype.kind == "f" and image.ndim in (3, 4):
            found.append(torch.from_numpy(image).float().reshape(-1, *image.shape[-3:]).permute(0, 3, 1, 2))
        elif (
            isinstance(image, torch.Tensor)
            and not image.is_meta
            and image.is_floating_point()
            and image.ndim in (3, 4)
        ):
            found.append(image.detach().to_dense().float().reshape(-1, *image.shape[-3:]))
        else:
            raise Invalid
    if len({image.shape[1:] for image in found}) > 1 or len({type(image) for image in value}) > 1:
        raise Invalid
    found = torch.cat(found)
    if found.shape[1] != 3 or not found.numel() or found.shape[2] % F or found.shape[3] % F:
        raise Invalid
    if not 0 <= found.min() <= found.max() <= 1:
        raise Invalid
    return found


class_labels = Kind(
    _labels,
    expressions(
        "0; 3; 4; -1; [0, 3]; [0, 5]; (0, 2); np.int64(1); np.array([0, 1]); np.array([[0, 1]]);"
        "torch.tensor([0, 1]); [np.int64(0), torch.tensor(1)]; [0, True]; [0.0]; 1.0; '1'; range(2); {0, 1}; [[0]]"
    ),
)
prompts = Kind(
    _prompts,
    expressions(
        "'red'; ['red', 'green apple']; ('red', 'green'); ['red', 3]; ['red', None]; b'red'; ''; [''];"
        "[['red']]; np.array(['red']); 'red ' * 50; ['red', 'a ' * 50]; {'red'}; {'red': 1}"
    ),
)
several_prompts = restricted(prompts, lambda texts: len(texts) in (1, 2))._replace(
    plain=lambda v: (
        v if isinstance(v, str) and len(v) < 30 else restricted(prompts, lambda texts: len(texts) == 2).plain(v)
    )
)
image = Kind(
    _pixels,
    expressions(
        "pil(); [pil(), pil()]; (pil(), pil()); pil('L'); pil('RGBA'); pil('P'); pil('1'); pil(size=(5, 4));"
        "[pil(), pil(size=(4, 4))]; 'cat.png'; ['cat.png']; [pil(), np.zeros((4, 6, 3), 'float32')]; "
        "np.random.rand(2, 4, 6, 3);"
        "np.random.rand(4, 6, 3); [np.random.rand(4, 6, 3)] * 2; np.asarray(pil()); "
        "np.asarray(pil()).astype('float32');"
        "[torch.rand(3, 4, 6)] * 2; torch.rand(3, 4, 6); torch.rand(4, 6, 3); np.random.rand(3, 4, 6); "
        "np.zeros((4, 6));"
        "torch.rand(2, 3, 4, 7); [torch.rand(1, 3, 4, 6), torch.rand(3, 4, 6)]; pil(size=(0, 0)) if 0 else None"
    ),
    is_tensor=True,
)
MAX_BATCH = "max_batch_size"  # the name of the pipeline's argument
output_type = one_of("pil", "np", "pt", "latent")
image_type = one_of("pil", "np", "pt")
common = {
    "num_images_per_prompt": integer(1),
    **sampling,
    MAX_BATCH: optional(integer(1, is_bounded=False)),
    "output_type": output_type,
    "callback_on_step_end": step_end("codes"),
    "callback_on_step_end_tensor_inputs": step_end_inputs("codes"),
    "scorer": anything("mean; len; 3; lambda i, c: torch.zeros(1); lambda i, c: None", lambda v: v is None),
    "num_candidates": integer(1, 1),
    "start": integer(0, 0),
    "keep_depth": integer(0, 0),
}
labels_call = {"class_labels": "[0, 3]"}
scored = {**labels_call, "scorer": "mean", "num_candidates": "3"}
fast = {"output_type": "'pt'"}
PIPELINE = [
    Target(
        "pipe('class')",
        labels_call | fast,
        {
            "class_labels": class_labels,
            "prompt": anything("'red'", lambda v: v is None),
            "generator": _generators(2),
            **common,
        },
        probe=lambda out: out,
    ),
    Target(
        "pipe('text')",
        {"prompt": "['red', 'green']", **fast},
        {
            "prompt": prompts,
            "negative_prompt": anything("'red'; ['red', 'a']", lambda v: v is None),
            "class_labels": anything("1; [1]", lambda v: v is None),
            "generator": _generators(2),
            **common,
        },
    ),
    Target(
        "pipe('text')",
        {"prompt": "['red', 'green']", "guidance_scale": "2.0", **fast},
        {
            "negative_prompt": optional(several_prompts),
            "guidance_scale": sampling["guidance_scale"],
            "guidance_schedule": sampling["guidance_schedule"],
        },
    ),
    Target(
        "pipe('none')",
        fast,
        {
            "class_labels": anything("1", lambda v: v is None),
            "prompt": anything("'red'", lambda v: v is None),
            "generator": _generators(1),
            **common,
        },
    ),
    Target(
        "pipe('none')",
        {"num_images_per_prompt": "2", **prefix, **fast},
        {
            "prefix_codes": codes_of_two,
            "start": integer(1, T),
            "keep_depth": integer(0, D - 1),
            "generator": _generators(2),
            MAX_BATCH: optional(integer(1)),
        },
    ),
    Target(
        "pipe('class')",
        scored | fast,
        {
            "num_candidates": integer(2),
            "num_images_per_prompt": integer(1),
            MAX_BATCH: optional(integer(1)),
            "scorer": anything(
                "mean; len; 3; 'abc'; lambda i, c: i; lambda i, c: torch.zeros(6) * nan; lambda i, c: [0.0] * 6;"
                "lambda i, c: torch.zeros(6, dtype=torch.complex64); lambda i, c: torch.zeros(6, dtype=torch.bool)",
                lambda v: v is NAMES["mean"],
            ),
        },
    ),
    Target("pipe('text').encode_prompt", {"prompt": "'red'"}, {"prompt": prompts}),
    Target(
        "pipe('class').encode_image",
        {"image": "torch.rand(2, 3, 4, 6)"},
        {"image": image},
        {"image": "images"},
        is_right=is_codes,
    ),
    Target(
        "pipe('class').reconstruct",
        {"image": "torch.rand(2, 3, 4, 6)", **fast},
        {"image": image, "depth": optional(integer(1, D)), "output_type": image_type},
        {"image": "images"},
    ),
    Target(
        "pipe('class').decode_codes",
        {"codes": "tiny_codes()", **fast},
        {
            "codes": codes,
            "depth": optional(integer(1, D)),
            "num_positions": optional(integer(0, T)),
            "output_type": image_type,
        },
    ),
    Target(
        "rq_hf.RQPipeline",
        {"vae": "vae()", "transformer": "None"},
        {
            "vae": anything(
                "vae(); None; transformer('none'); vae().config; 'vae'",
                lambda v: v is None or isinstance(v, rq_hf.RQVAEModel),
            ),
            "transformer": anything("transformer('none'); vae(); 'abc'; None", lambda v: v is None),
        },
        probe=lambda pipe: sorted(pipe.components),
    ),
    Target(
        "rq_hf.RQPipeline",
        {"vae": "None", "transformer": "transformer('text')"},
        {
            "tokenizer": anything(
                "tokenizer(); None; 'abc'; vae(); 3", lambda v: v is None or hasattr(v, "pad_token_id")
            )
        },
        probe=lambda pipe: sorted(pipe.components),
    ),
]


def _generates_mar(config):
    stacks = (config.encoder_config, config.decoder_config, config.head_config)
    if max(s.hidden_size + s.num_hidden_layers for s in stacks) > 1000:
        return config.to_dict()
    sizes = (*config.latent_shape, config.patch_size, config.cond_vocab_size, config.num_cond_slots)
    if max(*sizes, config.diffusion_batch_mul) > 1000:
        return config.to_dict()
    model = rq_hf.MARTransformerModel(config).eval()
    cond_ids = None
    if config.cond_vocab_size > 1:
        cond_ids = torch.zeros(2, config.cond_length, dtype=torch.long)
    latents = model.generate(cond_ids, num_images=2, num_iterations=1, num_inference_steps=2)
    return latents, model(latents, cond_ids).loss, config.to_dict()


def mar_stack(**changes):
    return {"hidden_size": E, "num_hidden_layers": 1, "num_attention_heads": 2} | changes


NAMES["mar_stack"] = mar_stack
NAMES["stack_in_mar"] = lambda **changes: tiny.tiny_mar_config(
    encoder_config=mar_stack(**changes), decoder_config=mar_stack(**changes)
)
NAMES["head_in_mar"] = lambda **changes: tiny.tiny_mar_config(head_config={"hidden_size": 8} | changes)
mar_latents = floats(2, C, H, W)
mar_latents_of_one = floats(1, C, H, W)


def token_masks(*counts):
    def plain(value):
        if not isinstance(value, torch.Tensor) or value.dtype != torch.bool or value.layout != torch.strided:
            raise Invalid
        if value.ndim != 2 or value.shape[0] not in counts or value.shape[1] != T or not value.any(dim=1).all():
            raise Invalid
        return value

    return Kind(
        plain,
        expressions(
            "torch.arange(6)[None] > 2; (torch.arange(6)[None] > 2).repeat(2, 1); torch.ones(1, 6); torch.eye(6) > 0;"
            "torch.ones(2, 6, dtype=torch.bool); torch.zeros(2, 6, dtype=torch.bool); torch.eye(6)[:2] > 0;"
            "torch.ones(1, 6, dtype=torch.bool); torch.zeros(1, 6, dtype=torch.bool); torch.ones(6, dtype=torch.bool);"
            "torch.ones(2, 2, 3, dtype=torch.bool); torch.ones(1, 5, dtype=torch.bool); torch.eye(2, 6).int();"
            "np.ones((2, 6), bool); [[True] * 6] * 2; (torch.eye(6) > 0).to_sparse(); torch.eye(6)[:0] > 0"
        ),
    )


def _pixel_masks(value):
    """Masks in every accepted form -> (B, height, width)."""
    found = []
    for mask in value if isinstance(value, list | tuple) else [value]:
        if isinstance(mask, PIL.Image.Image):
            mask = np.asarray(images.to_rgb(mask).convert("L")) / 255
        if isinstance(mask, torch.Tensor) and not mask.is_meta:
            mask = mask.detach()
            mask = mask[:, 0] if mask.ndim == 4 and mask.shape[1] == 1 else mask
        elif isinstance(mask, np.ndarray) and mask.dtype.kind in "fb":
            mask = torch.from_numpy(mask.astype("float64"))
            mask = mask[..., 0] if mask.ndim == 4 and mask.shape[-1] == 1 else mask
        else:
            raise Invalid
        mask = mask[None] if mask.ndim == 2 else mask
        if not (mask.is_floating_point() or mask.dtype == torch.bool) or mask.layout != torch.strided:
            raise Invalid
        if mask.ndim != 3 or mask.shape[1:] != (HEIGHT, WIDTH) or not mask.numel():
            raise Invalid
        found.append(mask.float())
    if not found or isinstance(value, list | tuple) and len({type(mask) for mask in value}) > 1:
        raise Invalid
    found = torch.cat(found)
    if len(found) != 1 or not 0 <= found.min() <= found.max() <= 1 or found.max() < 0.5:
        raise Invalid
    return found


mask_image = Kind(
    _pixel_masks,
    expressions(
        "pil('L'); pil('1'); pil('RGB'); [pil('L')]; [pil('L')] * 2; pil('L', (8, 8)); pil('F'); 'mask.png';"
        "np.ones((4, 6)); np.zeros((4, 6)); np.ones((4, 6), int); np.eye(4, 6) > 0; np.ones((4, 6, 1));"
        "np.ones((1, 4, 6, 1)); torch.ones(4, 6); torch.ones(1, 4, 6); torch.ones(1, 1, 4, 6); torch.ones(6, 4);"
        "torch.ones(1, 3, 4, 6); torch.ones(4, 6) * 255; torch.ones(4, 6) * nan; torch.ones(4, 6).to('meta');"
        "torch.ones(4, 6).to_sparse(); torch.ones(4, 6).half(); [torch.ones(4, 6), np.ones((4, 6))]; []; (0, 1)"
    ),
)
mar_iterations = optional(integer(1, T))
mar_steps = one_or_several(
    integer(2, 1000), 2, "(4, 2); [2, 3]; (3, 3); (2, 2, 2); (1, 2); (2, 1001); (2.0, 3); (2, None); np.array([3, 2])"
)
scheduler = anything(
    "None; default_scheduler(); diffusers.DDPMScheduler(); diffusers.DDIMScheduler(); 'ddpm'; default_scheduler;"
    "diffusers.EulerDiscreteScheduler(); diffusers.DDPMScheduler.from_config(default_scheduler().config,"
    "prediction_type='v_prediction'); default_scheduler().config",
    lambda v: v is None or type(v) is diffusers.DDPMScheduler and v.config == default_scheduler().config,
)


def _iteration_callback_plain(value):
    if value is None:
        return None
    marker = torch.zeros(1)
    try:
        found = value(0, marker, None)
    except Exception:
        raise Invalid from None
    if found is None or found is marker:
        return None
    raise Invalid


on_iteration = Kind(
    _iteration_callback_plain,
    expressions(
        "lambda i, x, m: None; lambda i, x, m: x; lambda i, x, m: True; lambda i, x, m: {'latents': x};"
        "lambda i, x, m: x.long(); lambda i, x, m: x[:1]; lambda i, x, m: x.flatten(1); lambda i, x, m: 'abc'; 3"
    ),
)
mar_sampling = {
    "num_iterations": mar_iterations,
    "num_inference_steps": mar_steps,
    "temperature": at_least_0,
    "guidance_schedule": one_of("linear", "constant", "cosine"),
}
guided = {"guidance_scale": at_least_0}
mar_fast = {"num_iterations": "2", "num_inference_steps": "2"}
mar_common = {
    "num_images_per_prompt": integer(1),
    **mar_sampling,
    MAX_BATCH: optional(integer(1, is_bounded=False)),
    "output_type": output_type,
    "callback_on_step_end": step_end("latents"),
    "callback_on_step_end_tensor_inputs": step_end_inputs("latents"),
    "scorer": anything("mean; len; 3; lambda i, c: torch.zeros(1)", lambda v: v is None),
    "num_candidates": integer(1, 1),
    "image": anything("pil(); 'cat.png'", lambda v: v is None),
    "mask": anything("torch.ones(3, 6, dtype=torch.bool)", lambda v: v is None),
}
MAR = [
    Target(
        "stack_in_mar",
        {},
        {
            "hidden_size": restricted(boundless(2), lambda n: n % 2 == 0),
            "num_hidden_layers": boundless(1),
            "num_attention_heads": divisor_of_E,
            "intermediate_size": optional(integer(1)),
            "hidden_act": one_of("gelu", "relu", "silu", "quick_gelu"),
            "attention_dropout": share,
            "hidden_dropout": share,
            "layer_norm_eps": positive,
        },
        probe=_generates_mar,
    ),
    Target(
        "head_in_mar",
        {},
        {
            "hidden_size": boundless(1),
            "num_hidden_layers": boundless(0),
            "frequency_embedding_size": restricted(integer(2), lambda n: n % 2 == 0),
            "layer_norm_eps": positive,
        },
        probe=_generates_mar,
    ),
    Target(
        "tiny_mar_config",
        {},
        {
            "latent_shape": several(
                integer(1),
                3,
                "(6, 2, 3); [6, 2, 3]; (0, 2, 3); (2, 3); (2, 3, 4.0); '234'; np.array([2, 3, 4]); (2, 3, True); 24",
            ),
            "patch_size": integer(1, 1),
            "cond_vocab_size": boundless(1),
            "cond_length": integer(1),
            "cond_repeats": integer(1),
            "null_cond_id": optional(integer(0, 0)),
            "encoder_config": anything(
                "mar_stack(); mar_stack(hidden_size=8); 3; 'abc'; rq_hf.MARTransformerConfig(); [1];"
                "rq_hf.MARStackConfig(**mar_stack()); mar_stack(num_hidden_layers=0)",
                lambda v: (
                    isinstance(v, rq_hf.MARStackConfig)
                    or v in (None, {}, {"a": 1}, mar_stack(), mar_stack(hidden_size=8))
                ),
            ),
            "head_config": anything(
                "{'hidden_size': 8}; rq_hf.MARHeadConfig(hidden_size=8); rq_hf.MARStackConfig(); 3; 'abc'",
                lambda v: isinstance(v, rq_hf.MARHeadConfig) or v in (None, {}, {"a": 1}, {"hidden_size": 8}),
            ),
            "mask_ratio_min": number(lambda x: 0 < x <= 1),
            "diffusion_batch_mul": integer(1),
            "initializer_range": at_least_0,
        },
        {"encoder_config": "num_hidden_layers"},
        probe=_generates_mar,
    ),
    Target(
        "mar('class')",
        {
            "latents": "torch.randn(2, 6, 2, 3)",
            "cond_ids": "tiny_condition('class')",
            "mask": "torch.eye(2, 6) > 0",
            "noise": "torch.randn(3, 2, 6, 6)",
            "timesteps": "torch.randint(1000, (3, 2, 6))",
        },
        {
            "latents": floats(2, C, H, W, finite=False),
            "cond_ids": class_ids,
            "mask": optional(token_masks(2)),
            "noise": floats(3, 2, T, C, finite=False),
            "timesteps": integers(3, 2, T, below=1000),
        },
        {"latents": "cond_ids|mask", "noise": "timesteps"},
        is_right=lambda result: True,
    ),
    Target(
        "mar('text').generate",
        {"cond_ids": "tiny_condition('text')", "num_images": "2", **mar_fast},
        {
            "cond_ids": text_ids,
            "num_images": optional(integer(2, 2)),
            "scheduler": scheduler,
            "generator": _generators(2),
            "on_iteration": on_iteration,
            **mar_sampling,
            **guided,
        },
    ),
    Target(
        "mar('class').generate",
        {"cond_ids": "torch.tensor([0, 3])", "num_images": "2", "guidance_scale": "2.0", **mar_fast},
        {"cond_ids": class_ids, "negative_cond_ids": optional(class_ids), **mar_sampling, **guided},
        {"guidance_scale": "negative_cond_ids"},
    ),
    Target(
        "mar('none').generate",
        {"known_latents": "tiny_latents(2)", "mask": "torch.eye(6)[:2] > 0", "num_inference_steps": "2"},
        {
            "known_latents": mar_latents,
            "mask": token_masks(2),
            "num_images": optional(integer(2, 2)),
            "num_iterations": optional(integer(1, 1)),
            "generator": _generators(2),
            "guidance_scale": number(lambda x: x == 1),
        },
        {"mask": "num_iterations|known_latents"},
    ),
    Target(
        "mar_pipe('class')",
        labels_call | fast | mar_fast,
        {
            "class_labels": class_labels,
            "prompt": anything("'red'", lambda v: v is None),
            "generator": _generators(2),
            **mar_common,
            **guided,
        },
    ),
    Target(
        "mar_pipe('text')",
        {"prompt": "['red', 'green']", "guidance_scale": "2.0", **fast, **mar_fast},
        {"prompt": prompts, "negative_prompt": optional(several_prompts), "generator": _generators(2), **guided},
        {"prompt": "negative_prompt", "negative_prompt": "prompt", "guidance_scale": "negative_cond_ids"},
    ),
    Target(
        "mar_pipe('none')",
        {"known_latents": "tiny_latents(1)", "mask": "torch.arange(6)[None] > 2", **fast, **mar_fast},
        {
            "known_latents": mar_latents_of_one,
            "mask": token_masks(1),
            "num_iterations": optional(integer(1, 3)),
            "num_inference_steps": mar_steps,
            "generator": _generators(1),
            "guidance_scale": number(lambda x: x == 1),
        },
        {"mask": "num_iterations"},
    ),
    Target(
        "mar_pipe('none')",
        {"image": "torch.rand(1, 3, 4, 6)", "mask_image": "pil('L')", "num_inference_steps": "2", **fast},
        {"image": restricted(image, lambda x: x.shape == (1, 3, HEIGHT, WIDTH)), "mask_image": mask_image},
        {"image": "images|width", "mask_image": "image"},
    ),
    Target(
        "mar_pipe('none')",
        {"image": "torch.rand(1, 3, 4, 6)", "strength": "0.5", "num_inference_steps": "2", **fast},
        {
            "image": restricted(image, lambda x: x.shape == (1, 3, HEIGHT, WIDTH)),
            "strength": number(lambda x: 0 < x <= 1),
        },
        {"image": "images|width|strength", "strength": "image"},
    ),
    Target(
        "mar_pipe('class')",
        scored | fast | mar_fast,
        {"num_candidates": integer(2), "num_images_per_prompt": integer(1), MAX_BATCH: optional(integer(1))},
    ),
    Target(
        "mar_pipe('class').encode_image",
        {"image": "torch.rand(2, 3, 4, 6)"},
        {"image": image, "resize": anything("'crop'", lambda v: v is False)},
        {"image": "images|pixels|height"},
    ),
    Target(
        "mar_pipe('class').reconstruct",
        {"image": "torch.rand(2, 3, 4, 6)", **fast},
        {"image": image, "output_type": image_type},
        {"image": "images|pixels|height"},
    ),
    Target(
        "mar_pipe('class').decode_latents",
        {"latents": "tiny_latents()", **fast},
        {"latents": floats(None, C, None, None), "output_type": image_type},
        {"latents": "vae"},
    ),
    Target(
        "rq_hf.MARPipeline",
        {"vae": "tiny_kl()", "transformer": "None", "scheduler": "None"},
        {
            "vae": anything(
                "tiny_kl(); vae(); None; mar('none'); vae().config; 'vae'",
                lambda v: v is None or isinstance(v, rq_hf.RQVAEModel | diffusers.AutoencoderKL),
            ),
            "transformer": anything("transformer('none'); vae(); 'abc'; None", lambda v: v is None),
            "scheduler": scheduler,
            "tokenizer": anything(
                "tokenizer(); None; 'abc'; vae(); 3", lambda v: v is None or hasattr(v, "pad_token_id")
            ),
        },
        probe=lambda pipe: sorted(pipe.components),
    ),
]


def of_two(*shape):
    """Pixels or their reconstructions; that they are NaN shows in the result."""
    return floats(2, *shape, finite=False)


pictures = {"pixels": "tiny_pixels(2, 16, 16)", "other_pixels": "tiny_pixels(2, 16, 16)"}
anywhere = {"is_right": lambda result: True}


def rows(columns=None, smallest=None):
    """Features, finite; of the sets that are compared, at least two."""
    at_least = smallest or (2 if columns else 1)
    return tensor(
        lambda x: (
            x.ndim == 2
            and len(x) >= at_least
            and x.shape[1] > 0
            and columns in (None, x.shape[1])
            and bool(x.isfinite().all())
        )
    )


def without_nan(*shape):
    return tensor(lambda x: x.shape == shape and not bool(x.isnan().any()))


def finite_maxima(logits):
    return bool(logits.amax(dim=1).isfinite().all())


def _moments(moments):
    return moments.tensors()


directions = restricted(rows(3), lambda x: bool(x.norm(dim=1).all()))
one_generator = anything(
    "None; seeded(); seeded(1); [seeded()]; 3; np.int64(1)", lambda v: v is None or isinstance(v, torch.Generator)
)
METRICS = [
    Target(
        "metrics.psnr",
        {"pixels": "tiny_pixels()", "reconstructions": "tiny_pixels()"},
        {"pixels": of_two(3, HEIGHT, WIDTH), "reconstructions": of_two(3, HEIGHT, WIDTH)},
        also={"pixels": "reconstructions"},
        **anywhere,
    ),
    Target(
        "metrics.count_codes",
        {"codes": "tiny_codes()", "codebook_size": "12"},
        {
            "codes": tensor(lambda x: x.ndim > 0 and x.numel() > 0 and 0 <= x.min() <= x.max() < K, is_integer=True),
            "codebook_size": integer(K),
        },
        {"codebook_size": "codes"},
    ),
    Target(
        "metrics.codebook_usage",
        {"counts": "metrics.count_codes(tiny_codes(), 12)"},
        {
            "counts": tensor(
                lambda x: x.ndim == 2 and x.shape[1] > 0 and len(x) > 0 and bool((x >= 0).all()), is_integer=True
            )
        },
    ),
    Target(
        "metrics.ssim",
        {"pixels": "torch.rand(2, 3, 12, 11)", "reconstructions": "torch.rand(2, 3, 12, 11)"},
        {"pixels": without_nan(2, 3, 12, 11), "reconstructions": without_nan(2, 3, 12, 11)},
        also={"pixels": "reconstructions"},
    ),
    Target("metrics.FeatureMoments", {"num_features": "3"}, {"num_features": integer(1, 2**16)}, probe=_moments),
    Target("metrics.FeatureMoments.of", {"features": "torch.randn(9, 3)"}, {"features": rows()}, probe=_moments),
    Target(
        "metrics.FeatureMoments.from_moments",
        {"count": "9", "mean": "torch.randn(3)", "covariance": "torch.ones(3, 3)"},
        {
            "count": optional(integer(2, 2**63 - 1)),
            "mean": floats(3)._replace(is_tensor=False),  # has one dimension, variants need two
            "covariance": tensor(lambda x: x.shape == (3, 3) and bool(x.isfinite().all()) and torch.equal(x, x.T)),
        },
        {"mean": "covariance"},
        probe=_moments,
    ),
    Target(
        "metrics.FeatureMoments.of(torch.randn(4, 3)).merge",
        {"other": "metrics.FeatureMoments.of(torch.randn(9, 3))"},
        {
            "other": anything(
                "metrics.FeatureMoments(2); metrics.FeatureMoments(3); torch.randn(9, 3);"
                "metrics.FeatureMoments.from_moments(None, torch.zeros(3), torch.eye(3))",
                lambda v: isinstance(v, metrics.FeatureMoments) and v.num_features == 3 and v.count is not None,
            )
        },
        {"other": "moments"},
    ),
    Target(
        "metrics.frechet_distance",
        {"features": "torch.randn(9, 3)", "other_features": "torch.randn(8, 3)"},
        {"features": rows(3), "other_features": rows(3)},
    ),
    Target(
        "metrics.frechet_distance_infinity",
        {"features": "torch.randn(9, 3)", "reference": "torch.randn(8, 3)", "smallest": "4", "sizes": "3"},
        {
            "features": rows(3, smallest=9),
            "reference": rows(3),
            "sizes": integer(2, 9),
            "smallest": integer(2, 8),
            "generator": one_generator,
        },
        {"features": "smallest|sizes"},
    ),
    Target(
        "metrics.kernel_inception_distance",
        {"features": "torch.randn(9, 3)", "reference": "torch.randn(8, 3)", "subsets": "2", "subset_size": "8"},
        {
            "features": rows(3, smallest=8),
            "reference": rows(3, smallest=8),
            "subsets": integer(1, is_bounded=True),
            "subset_size": integer(2, 8),
            "generator": one_generator,
        },
        {"features": "subset_size", "reference": "subset_size"},
    ),
    Target(
        "metrics.cmmd",
        {"features": "torch.randn(9, 3)", "reference": "torch.randn(8, 3)"},
        {"features": directions, "reference": directions},
    ),
    Target(
        "metrics.precision_recall",
        {"features": "torch.randn(9, 3)", "reference": "torch.randn(8, 3)", "neighbours": "3"},
        {"features": rows(3, smallest=4), "reference": rows(3, smallest=4), "neighbours": integer(1, 7)},
        {"features": "neighbours", "reference": "neighbours"},
    ),
    Target(
        "metrics.inception_score",
        {"logits": "torch.randn(9, 3)", "splits": "2"},
        {
            "logits": tensor(lambda x: x.ndim == 2 and x.shape[1] > 0 and len(x) > 1 and finite_maxima(x)),
            "splits": integer(1, 9),
            "deviation": one_of("population", "sample"),
            "shuffle": one_generator,
        },
        {"logits": "splits"},
        **anywhere,
    ),
    Target(
        "metrics.clip_score",
        {"image_embeds": "torch.randn(4, 3)", "text_embeds": "torch.randn(4, 3)"},
        {"image_embeds": floats(4, 3), "text_embeds": floats(4, 3)},
        {"image_embeds": "text_embeds"},
    ),
    Target(
        "lpips()", pictures, {name: of_two(3, 16, 16) for name in pictures}, {"pixels": "other_pixels"}, **anywhere
    ),
    Target(
        "metrics.LPIPS.from_pretrained",
        {"vgg": "'/nope.pth'", "heads": "'/nope.pth'"},
        {"vgg": anything("'a/b'; '/nope/x.safetensors'; ''"), "heads": anything("3")},
        {"vgg": "file", "heads": "file"},
    ),
    Target("classifier().features", {"pixels": "tiny_pixels(2, 32, 32)"}, {"pixels": of_two(3, 32, 32)}, **anywhere),
    Target(
        "meter().measure",
        {"pixels": "tiny_pixels(2, 16, 16)"},
        {"pixels": restricted(of_two(3, 16, 16), lambda x: bool((x.abs() <= 1).all()))},
        {"pixels": "images"},
        **anywhere,
    ),
    Target(
        "figure",
        {"metric": "'psnr'", "value": "21.5", "n": "10", "std": "2.0"},
        {
            "metric": one_of("psnr"),
            "value": anything("3; -1.5; np.float32(2.5); torch.tensor(0.5)", lambda value: True),
            "n": integer(1),
            "std": optional(at_least_0),
        },
        {"value": "psnr"},
        probe=lambda figure: [figure.metric, figure.value, figure.n, figure.std],
        **anywhere,
    ),
    Target(
        "generation.GenerationPlan",
        {"num_images": "6", "conditions": "[0, 1, 2]", "seed": "0", "num_candidates": "1", "shard_size": "4"},
        {
            "num_images": integer(1),
            "conditions": anything(
                "None; ['a', 'b']; ('a',); [np.int64(1)]; ['a', 1]; [0.5]; 'abc'; []; [True]",
                lambda value: (
                    value is None
                    or (isinstance(value, list | tuple) and len(value) > 0 and len({type(v) for v in value}) == 1)
                    and isinstance(value[0], str | int | np.integer)
                    and not isinstance(value[0], bool)
                ),
            ),
            "seed": integer(0, 2**32 - 6),
            "num_candidates": integer(1),
            "shard_size": integer(1),
        },
        probe=lambda plan: plan.description(),
        **anywhere,
    ),
    Target(
        "captions.choose_captions",
        {"captions": "['a', 'b', 'c']", "count": "2", "seed": "0"},
        {
            "captions": anything("('a', 'b'); ['a']; []; 'abc'", lambda value: isinstance(value, list | tuple)),
            "count": integer(1, 3),
            "seed": optional(integer(0, 2**32 - 1)),
        },
        probe=lambda chosen: len(chosen),
        **anywhere,
    ),
    Target(
        "statistics",
        {"dataset": "'shapes'", "count": "6", "network_sha256": "'a' * 64", "uint8_rule": "'round'"},
        {
            "dataset": anything(
                "'faces'; ''; ' '; 3; None", lambda name: isinstance(name, str) and name.strip() != ""
            ),
            "count": integer(6, 6),
            "network_sha256": anything("'b' * 64; 'a' * 63; 'A' * 64; b'a' * 64; ''", lambda text: text == "b" * 64),
            "uint8_rule": one_of("round", "truncate", "stored", "none"),
        },
        probe=lambda statistics: statistics.provenance,
        **anywhere,
    ),
]


def _collated(collate):
    return collate(examples())


columns = {"image_column": "'image'", "resolution": "8"}
CONTINUOUS_LATENTS = [
    Target(
        "continuous_latents.encode_latents",
        {"vae": "kl()", "pixels": "tiny_pixels()"},
        {"vae": anything("vae(); kl(); None; 'kl'; lpips()", lambda v: hasattr(v, "config")), "pixels": even_pixels},
        {"pixels": "height and width"},
        **anywhere,
    ),
    Target(
        "continuous_latents.sample_latents",
        {"vae": "vae()", "moments": "torch.randn(2, 6, 2, 3)"},
        {"moments": floats(None, C, None, None, finite=False)},
        **anywhere,
    ),
    Target(
        "continuous_latents.decode_latents",
        {"vae": "vae()", "latents": "torch.randn(2, 6, 2, 3)"},
        {"latents": floats(None, C, None, None, finite=False)},
        **anywhere,
    ),
]
COLLATORS = [
    Target(
        "data.ImageCollator",
        columns | {"label_column": "'label'"},
        {
            "resolution": integer(1, 512),
            "image_column": one_of("image"),
            "random_flip": flag,
            "skip_corrupt_images": flag,
            "label_column": anything("None; 'label'; 'nope'; 'text'; 'image'", lambda v: v in (None, "label")),
            "center_crop": flag,
            "num_classes": optional(integer(3)),
        },
        also={"label_column": "label", "image_column": "image", "num_classes": "label"},
        probe=_collated,
    ),
    Target(
        "data.ImageCollator",
        columns | {"text_column": "'text'", "tokenizer": "tokenizer()"},
        {
            "text_column": one_of("text"),
            "tokenizer": anything("tokenizer(); None; 'abc'", lambda v: hasattr(v, "pad_token_id")),
        },
        also={"text_column": "column"},
        probe=_collated,
    ),
    Target(
        "data.LatentCollator",
        {"shape": "(2, 3, 6)"},
        {
            "shape": restricted(
                several(
                    integer(1),
                    3,
                    "(2, 3, 6); [2, 3, 6]; (2, 3); (0, 3, 6); (-1, 3, 6); (2, 3, 6.0); ('2', 3, 6); 36; None; "
                    "(1, 1, 36); (2, 3, 5)",
                ),
                lambda shape: np.prod(shape) == 36,
            )
        },
        {"shape": "latents"},
        probe=lambda collate: collate([{"latents": data.latents_to_bytes(torch.zeros(1, 2, 3, 6))[0]}]),
    ),
    Target(
        "data.ImageCollator('image', 8, label_column='label', num_classes=3)",
        {"examples": "examples()"},
        {
            "examples": anything(
                "examples(label='a'); examples(label=None); examples(label=3); examples(label=-1); "
                "examples(label=1.0); examples(label=True);"
                "examples(image=None); examples(image='cat.png'); examples(image={'bytes': b'', 'path': None}); "
                "examples(image=3); [];"
                "examples(label=nan); [{}]; examples(label=[1]); examples(label=np.int64(1)); examples(label='1')",
                lambda v: (
                    isinstance(v, list)
                    and len(v) == 4
                    and v[0].get("label") in (0, 1)
                    and isinstance(v[0]["image"], dict)
                    and v[0]["image"]["bytes"]
                ),
            )
        },
        {"examples": "label of example 0|image of example 0|no column"},
    ),
    Target(
        "data.ImageCollator('image', 8, text_column='text', tokenizer=tokenizer())",
        {"examples": "examples()"},
        {
            "examples": anything(
                "examples(text=None); examples(text=3); examples(text=b'a'); examples(text=['a']); examples(text='')",
                lambda v: v[0]["text"] == "",
            )
        },
        {"examples": "caption of example 0"},
    ),
    Target(
        "data.latents_to_bytes",
        {"latents": "torch.randn(2, 2, 3, 6)"},
        {
            "latents": floats(None, None, None, None, finite=False),
            "dtype": anything(
                "torch.float32; torch.bfloat16; torch.float16; torch.int64; 'float32'; None; 2",
                lambda v: v in (torch.float32, torch.bfloat16),
            ),
        },
        **anywhere,
    ),
    Target(
        "data.bytes_to_latents",
        {"stored": "data.latents_to_bytes(torch.randn(2, 2, 3, 6))", "shape": "(2, 3, 6)"},
        {
            "stored": anything(
                "[b'']; [b'123']; [b'1' * 72]; [b'1' * 73]; [b'1' * 71, b'1' * 73]; ['a' * 72]; [None]; "
                "b'1' * 72; data.latents_to_bytes(torch.zeros(1, 2, 3, 6))",
                lambda v: isinstance(v, list) and len(v) > 0 and all(isinstance(b, bytes) and len(b) == 72 for b in v),
            ),
            "shape": anything(
                "(2, 3, 6); (2, 3); (2, 3, 5); (-1, 3, 6); (2, 3, 6, 1); '236'; (2, 3, '6'); None",
                lambda v: isinstance(v, tuple | list) and tuple(v) == (2, 3, 6),
            ),
        },
        {"stored": "latents", "shape": "latents"},
        **anywhere,
    ),
    Target(
        "data.load_image_dataset",
        {"data_files": "'/nope.parquet'"},
        {
            "data_files": anything("'/nope.xyz'; '/nope/*.parquet'; ['a.parquet']; '/x[1].tar'"),
            "dataset_name": anything("'/nope'; 'nope/nope'"),
        },
        {"dataset_name": "data_files"},
    ),
    Target(
        "data.TrainingStream",
        {"dataset": "shapes()", "collate": "data.ImageCollator('image', 8)", "batch_size": "2", "seed": "0"},
        {
            "batch_size": integer(1, is_bounded=False),
            "seed": integer(0),
            "rank": integer(0, 0),
            "world_size": integer(1),
            "num_workers": anything("0; np.int64(0)", lambda v: v == 0 and not isinstance(v, bool)),
            "max_skipped": integer(1),
            "shuffle_buffer_size": integer(1),
        },
        probe=lambda stream: next(iter(stream))["pixels"],
    ),
    Target(
        "data.load_latents",
        {"folder": "'/nope'", "vae": "vae()"},
        {"folder": anything("'/tmp/nope'; '.'")},
        {"folder": "latents"},
    ),
]
TEXT = [
    Target(
        "text.encode_captions",
        {"tokenizer": "tokenizer()", "captions": "['red', 'green']", "length": "5"},
        {
            "captions": anything("'red'; ['red', 3]; [None]; 3; b'red'"),
            "length": integer(1, 10**6),
            "tokenizer": anything("None; 'abc'; 3"),
        },
    ),
    Target(
        "text.train_tokenizer",
        {"texts": "iter(CAPTIONS)", "vocab_size": "270", "max_length": "5"},
        {
            "vocab_size": integer(257, 10**5),
            "max_length": integer(1),
            "texts": anything(
                "[]; CAPTIONS; ['a', None]; [3]; 'red'; [b'a']",
                lambda v: all(isinstance(s, str) for s in listed(v)),
            ),
        },
        probe=lambda t: sorted(t.get_vocab().items()),
    ),
    Target(
        "text.load_tokenizer",
        {"name": "rq_hf.EMOJI_MODEL + '/tokenizer'", "length": "5"},
        {"length": integer(1)},
        probe=lambda found: found.model_max_length,
    ),
    Target(
        "text.with_bpe_dropout",
        {"tokenizer": "tokenizer()", "dropout": "0.5"},
        {"dropout": share, "tokenizer": anything("None; 3; 'abc'")},
        probe=lambda t: (t.backend_tokenizer.model.dropout, len(t)),
    ),
    Target(
        "images.to_pixels",
        {"image": "pil()", "resolution": "8"},
        {"resolution": integer(1, 512), "center_crop": flag, "image": anything("pil('CMYK'); 3; 'cat.png'")},
    ),
    Target(
        "images.image_grid",
        {"images": "torch.rand(3, 3, 4, 6)"},
        {"images": floats(None, 3, None, None, finite=False), "columns": integer(1, 1000)},
    ),
    Target(
        "images.to_uint8",
        {"images": "torch.rand(2, 3, 4, 6)", "rule": "'round'"},
        {"images": unit_images, "rule": one_of(*images.UINT8_RULES)},
    ),
]


def _bytes(value):
    if not (isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and fits(value, (None, 3, None, None))):
        raise Invalid
    return value


byte_images = Kind(_bytes, (), is_tensor=True)


def _features_of_bytes(network):
    return network(bytes_of_images()).features


three = "[0.5] * 3; (0.1, 0.2, 0.3); [1, 2, 3]; [np.float32(0.5)] * 3; [0.5] * 4; [-1, 0, 1]; np.full(3, 0.5); 0.5"
FEATURE_NETWORKS = [
    Target(
        "network().__call__",
        {"images": "bytes_of_images()"},
        {"images": byte_images},
        is_right=lambda output: bool(output.features.isfinite().all()),
    ),
    Target(
        "metrics.FeatureNetwork.from_module",
        {"module": "torch.nn.Flatten()", "name": "'own'", "size": "4", "mean": "[0.5] * 3", "std": "[0.5] * 3"},
        {
            "module": anything("torch.nn.Identity(); torch.relu; None; 'own'"),
            "name": anything("'another'; ''; None; 3", lambda name: isinstance(name, str) and name),
            "size": integer(1, 1000),
            "mean": several(finite, 3, three),
            "std": several(positive, 3, three),
        },
        {"module": "features"},
        probe=_features_of_bytes,
    ),
    Target(
        "metrics.load_feature_network",
        {"network": "'pytorch-fid'", "weights": "'/nope.pth'"},
        {
            "network": anything("'fid'; ''; 'a/b'; '/nope'; None; 3; 'inception'"),
            "weights": anything("None; 'a/b'; '/nope/x.safetensors'; ''; 3"),
            "sha256": anything("''; '6726825d'; 'f' * 64; 'F' * 64; 3"),
        },
        {"weights": "file|network", "network": "file", "sha256": "file|network"},
    ),
]

TRAINING = [
    Target(
        "training.PatchDiscriminator",
        {"width": "4"},
        {"in_channels": integer(1), "width": integer(1), "num_layers": integer(1), "norm": one_of("batch", "act")},
        probe=lambda d: d(torch.rand(2, d.main[0].in_channels, 64, 64)),
    ),
    Target(
        "training.EMA",
        {"model": "vae()", "decay": "0.9"},
        {"decay": share},
        probe=lambda ema: (ema.update(), ema.average),
    ),
    Target(
        "training.RQVAELoss",
        {"model": "vae()"},
        {"reconstruction_loss": one_of("mse", "l1"), "commitment_weight": at_least_0, "perceptual_weight": at_least_0},
        probe=lambda loss: loss(shared(tiny.tiny_vae), {"pixels": tiny.tiny_pixels()}).loss,
    ),
    Target(
        "training.AutoencoderKLLoss",
        {"model": "training.AutoencoderKLForTraining(kl())"},
        {"reconstruction_loss": one_of("mse", "l1"), "kl_weight": at_least_0, "perceptual_weight": at_least_0},
        probe=lambda loss: (
            loss(training.AutoencoderKLForTraining(shared(tiny.tiny_kl)), {"pixels": tiny.tiny_pixels()}).loss
        ),
    ),
    Target(
        "training.RQTransformerLoss",
        {"vae": "vae()", "null_cond_id": "4"},
        {
            "null_cond_id": optional(integer(0, 4)),
            "soft_label_temperature": optional(positive),
            "stochastic_codes": flag,
            "cond_dropout": share,
        },
        {"null_cond_id": "cond_ids"},
        probe=lambda loss: (
            loss(
                shared(tiny.tiny_transformer, "class"),
                {"pixels": tiny.tiny_pixels(), "cond_ids": tiny.tiny_condition("class")},
            ).loss
        ),
    ),
    Target(
        "training.create_transformer",
        {
            "vae": "tiny_vae(sample_size=4)",
            "hidden_size": "16",
            "num_attention_heads": "2",
            "spatial_layers": "1",
            "depth_layers": "1",
        },
        {
            "hidden_size": integer(16, 16),
            "num_attention_heads": divisor_of_E,
            "spatial_layers": integer(1),
            "depth_layers": integer(0),
            "hidden_dropout": share,
            "cond_vocab_size": integer(1),
            "cond_length": integer(1),
            "null_cond_id": optional(integer(0, 0)),
        },
        {"spatial_layers": "num_hidden_layers", "depth_layers": "num_hidden_layers"},
        probe=lambda m: m.config.to_dict(),
    ),
]

TARGETS = [
    *QUANTIZER,
    *VAE,
    *EMBEDDING,
    *CONFIGS,
    *TRANSFORMER,
    *PIPELINE,
    *MAR,
    *METRICS,
    *CONTINUOUS_LATENTS,
    *COLLATORS,
    *TEXT,
    *FEATURE_NETWORKS,
    *TRAINING,
]
