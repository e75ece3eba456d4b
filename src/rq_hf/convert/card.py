"""Reports of the converter: a summary for the terminal and a model card for the Hub."""

from pathlib import Path

from ..models import MARTransformerConfig, RQTransformerConfig, RQVAEModel
from ..pipelines import RQPipeline

INTRODUCTION = """\
Converted with `rq_hf` from a checkpoint of
[kakaobrain/rq-vae-transformer](https://github.com/kakaobrain/rq-vae-transformer), the authors' code of *Autoregressive
Image Generation using Residual Quantization* ([Lee et al., CVPR 2022](https://arxiv.org/abs/2203.01941))."""

LICENCE = """\
## Licence

The weights that the authors released, © Kakao Brain Corp., are under
[CC BY-NC-SA 4.0](https://creativecommons.org/licenses/by-nc-sa/4.0/): attribution, share alike, and
**no commercial use**. Their conversion is under the same licence; the code that runs it, `rq_hf`, is under
Apache-2.0."""


def conversion_card(model: RQPipeline | RQVAEModel, place: str) -> str:
    """A card with valid Hub metadata, code that loads the model from `place`, its sizes, and the licence of the
    weights."""
    sections = {}
    if isinstance(model, RQPipeline):
        sections = {"call": f"image = {model.example_call}.images[0]", "tags": ["rq-vae", "rq-transformer"]}
    facts = "\n".join(f"* {fact}" for fact in sizes(model))
    return model.card(
        place,
        introduction=INTRODUCTION,
        details=f"{facts}\n\n{LICENCE}",
        license="other",
        license_name="cc-by-nc-sa-4.0",
        license_link="https://creativecommons.org/licenses/by-nc-sa/4.0/",
        **sections,
    )


def summary(sizes: list[str], ignored: dict[str, list[str]], destination: Path | None) -> str:
    """One line for each file read, model converted, file with contents that were ignored, and folder written."""
    lines = [f"read     {label}" for label in ignored]
    lines += [f"made     {size}" for size in sizes]
    lines += [f"ignored  {label}: {', '.join(names) or 'nothing'}" for label, names in ignored.items()]
    if destination is not None:
        lines.append(f"written  {destination}")
    return "\n".join(lines)


def sizes(model: RQPipeline | RQVAEModel) -> list[str]:
    vae = model if isinstance(model, RQVAEModel) else model.vae
    quantizer = vae.quantizer
    parameters = sum(p.numel() for p in vae.parameters()) - quantizer.codebook.numel()
    codebooks = "one codebook" if quantizer.shared_codebook else f"{quantizer.depth} codebooks"
    lines = [
        f"RQ-VAE: {parameters:,} parameters; {codebooks} of {quantizer.codebook_size:,} × {quantizer.codebook_dim}, "
        f"depth {quantizer.depth}"
    ]
    if isinstance(model, RQPipeline):
        config: RQTransformerConfig = model.transformer.config
        lines += [
            f"RQ-Transformer: {model.transformer.num_parameters():,} parameters; codes "
            f"{'×'.join(map(str, config.code_shape))} of {config.codebook_size:,}; {condition(config)}",
            f"sampling: {sampling(model.transformer.generation_config)}",
        ]
        if model.is_text_conditional:
            lines.append(tokenizer_line(model))
    return lines


def condition(config: RQTransformerConfig | MARTransformerConfig) -> str:
    if config.cond_length > 1:
        return f"conditioned on {config.cond_length} tokens of {config.cond_vocab_size:,}"
    classes = config.cond_vocab_size - (config.null_cond_id is not None)
    return f"conditioned on {classes:,} classes" if config.cond_vocab_size > 1 else "unconditional"


def sampling(config) -> str:
    settings = {name: getattr(config, name, None) for name in ("temperature", "top_k", "top_p")}
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None) or "no settings"


def tokenizer_line(pipeline: RQPipeline) -> str:
    if pipeline.tokenizer is None:
        return "no tokenizer: prompts need one, condition ids do not"
    known, accepted = len(pipeline.tokenizer), pipeline.transformer.config.cond_vocab_size
    note = "" if known <= accepted else f", BUT THE MODEL ONLY TAKES THE FIRST {accepted:,}"
    return f"tokenizer: {known:,} tokens{note}"
