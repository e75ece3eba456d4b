"""What the converter says about a MAR model: its sizes, and a model card for the Hub."""

from diffusers import AutoencoderKL

from ..models import MARTransformerConfig, MARTransformerModel
from ..models.continuous_latents import autoencoder_kl_card
from ..models.mar_transformer import MARStackConfig
from ..pipelines import MARPipeline

INTRODUCTION = """\
Converted with `rq_hf` from a checkpoint of [LTH14/mar](https://github.com/LTH14/mar), the authors' code of
*Autoregressive Image Generation without Vector Quantization*
([Li et al., NeurIPS 2024](https://arxiv.org/abs/2406.11838))."""

LICENCE = """\
## Licence

The authors' code is under the [MIT licence](https://github.com/LTH14/mar/blob/main/LICENSE). They link the weights of
their models from there and say nothing else about them; these were trained on ImageNet. The code that converted them,
`rq_hf`, is under Apache-2.0."""

PUBLISHED = {  # preset: name, FID, inception score, guidance scale
    "mar-base": ("MAR-B", 2.31, 281.7, 2.9),
    "mar-large": ("MAR-L", 1.78, 296.0, 3.0),
    "mar-huge": ("MAR-H", 1.55, 303.7, 3.2),
}
FIGURES = """\
## Figures

This model has the sizes of {name}. Of their checkpoint of {name}, the authors
[report](https://github.com/LTH14/mar), on ImageNet 256×256 and 50,000 samples:

| FID | inception score |
|---|---|
| {fid} | {inception_score} |

with `num_iterations=256`, `num_inference_steps=100`, `temperature=1.0`, `guidance_scale={guidance_scale}` and the
linear guidance schedule. The figures are theirs; they were not measured with this conversion."""


def mar_card(model: MARPipeline | MARTransformerModel | AutoencoderKL, place: str) -> str:
    """A card with valid Hub metadata, code that loads the model from `place`, its sizes, the authors' figures for a
    model of these sizes, and what is known of the licence."""
    facts = "\n".join(f"* {fact}" for fact in mar_sizes(model))
    figures = ""
    if not isinstance(model, AutoencoderKL):
        figures = published_figures(getattr(model, "transformer", model).config)
    sections = {
        "introduction": INTRODUCTION,
        "details": "\n\n".join(filter(None, (facts, figures, LICENCE))),
        "license": "other",
        "license_name": "mit",
        "license_link": "https://github.com/LTH14/mar/blob/main/LICENSE",
    }
    if isinstance(model, AutoencoderKL):
        return autoencoder_kl_card(model, place, **sections)
    sections["tags"] = ["mar", "diffusion-loss"]
    if isinstance(model, MARPipeline):
        sections["call"] = f"image = {model.example_call}.images[0]"
    return model.card(place, **sections)


def published_figures(config: MARTransformerConfig) -> str:
    """The authors' figures for a model of these sizes, if there are any."""
    for preset, (name, fid, inception_score, guidance_scale) in PUBLISHED.items():
        if parts(config) == parts(MARTransformerConfig.from_preset(preset)):
            return FIGURES.format(name=name, fid=fid, inception_score=inception_score, guidance_scale=guidance_scale)
    return ""


def parts(config: MARTransformerConfig) -> list[str]:
    """A line for the tokens, each stack, and the head."""
    height, width = config.grid_size
    tokens = f"{height}×{width} tokens of {config.token_dim}"
    if config.patch_size > 1:
        tokens += f" (patches of {config.patch_size}×{config.patch_size} latents)"
    classes = config.cond_vocab_size - (config.null_cond_id is not None)
    head = config.head_config
    return [
        f"{tokens}, conditioned on {classes:,} classes in {config.num_cond_slots} slots",
        f"encoder: {stack(config.encoder_config)}",
        f"decoder: {stack(config.decoder_config)}",
        f"diffusion head: {head.num_hidden_layers} blocks of width {head.hidden_size:,}",
    ]


def stack(config: MARStackConfig) -> str:
    return (
        f"{config.num_hidden_layers} blocks of {config.num_attention_heads} heads, width {config.hidden_size:,}, MLP "
        f"{config.intermediate_size:,}"
    )


def mar_sizes(model: MARPipeline | MARTransformerModel | AutoencoderKL) -> list[str]:
    if isinstance(model, MARPipeline):
        return [*mar_sizes(model.vae), *mar_sizes(model.transformer)]
    if isinstance(model, AutoencoderKL):
        config = model.config
        return [
            f"KL autoencoder: {model.num_parameters():,} parameters; {config.latent_channels} channels, 1/"
            f"{2 ** (len(config.block_out_channels) - 1)} of height and width, scaling factor {config.scaling_factor}"
        ]
    return [f"MAR transformer: {model.num_parameters():,} parameters", *parts(model.config)]
