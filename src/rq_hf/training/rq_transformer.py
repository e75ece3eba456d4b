"""What the stage-2 scripts share: the transformer's arguments, its data (images or latents) and its loss on them."""

import glob
import hashlib
import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

from ..data import Collator, DataArguments, LatentCollator, load_images
from ..models import RQTransformerConfig, RQTransformerModel, RQVAEModel

LATENTS_DESCRIPTION = "latents.json"


@dataclass
class TransformerArguments:
    _argument_group_name = "transformer"

    rqvae: str = field(metadata={"help": "Trained RQ-VAE: a folder or a Hub id."})
    transformer: str | None = field(
        default=None,
        metadata={"help": "Trained transformer to go on from: a folder or a Hub id (default: a new one)."},
    )
    latents: str | None = field(
        default=None,
        metadata={"help": "Instead of pictures: a folder of their latents, written by extract_latents.py."},
    )
    hidden_size: int = field(default=512, metadata={"help": "Width of both stacks."})
    spatial_layers: int = field(default=12, metadata={"help": "Blocks of the spatial transformer."})
    depth_layers: int = field(default=4, metadata={"help": "Blocks of the depth transformer; 0 with depth 1 only."})
    num_attention_heads: int = field(default=8, metadata={"help": "Attention heads."})
    hidden_dropout: float = field(default=0.1, metadata={"help": "Dropout in the blocks."})
    attn_implementation: str = field(
        default="sdpa",
        metadata={
            "help": "Attention kernel; on a CPU in bf16, eager trains short maps 1.5 times faster than sdpa.",
            "choices": ["eager", "sdpa", "flash_attention_2"],
        },
    )
    labels: str = field(
        default="soft",
        metadata={
            "help": "Targets: the nearest code, or soft labels over all codes with codes drawn from them.",
            "choices": ["hard", "soft"],
        },
    )
    soft_label_temperature: float = field(
        default=0.5, metadata={"help": "τ of the soft labels softmax(−‖r − e(k)‖²/τ)."}
    )
    cond_dropout: float = field(
        default=0.1, metadata={"help": "Share of conditions replaced by none, for classifier-free guidance."}
    )

    def __post_init__(self):
        if self.labels not in ("hard", "soft"):
            raise ValueError(f"--labels must be hard or soft, got {self.labels!r}")
        if self.soft_label_temperature <= 0:
            raise ValueError(f"--soft_label_temperature must be greater than 0, got {self.soft_label_temperature}")
        if not 0 <= self.cond_dropout < 1:
            raise ValueError(f"--cond_dropout must lie in [0, 1), got {self.cond_dropout}")


def create_transformer(
    vae: RQVAEModel,
    args: TransformerArguments,
    cond_vocab_size: int = 1,
    cond_length: int = 1,
    null_cond_id: int | None = None,
) -> RQTransformerModel:
    """A transformer on the codes of `vae`: a new one with a copy of its codebook, or the trained one that `args` name.

    Raises `ValueError` when the trained one has another codebook or other conditions.
    """
    height, width = (vae.config.sample_size // pixels for pixels in vae.pixels_per_code)
    code_shape = (height, width, vae.config.depth)
    if args.transformer is not None:
        model = RQTransformerModel.from_pretrained(args.transformer, dtype=torch.float32)
        config = model.config
        found = (config.code_shape, config.cond_vocab_size, config.cond_length, config.null_cond_id)
        needed = (code_shape, cond_vocab_size, cond_length, null_cond_id)
        if found != needed:
            raise ValueError(
                f"--transformer {args.transformer} has (code shape, condition ids, length, null id) {found}, "
                f"this data needs {needed}"
            )
        if not torch.equal(model.codebook, vae.quantizer.codebook.cpu()):
            raise ValueError(f"--transformer {args.transformer} has another codebook than --rqvae {args.rqvae}")
    else:
        stack = {
            "hidden_size": args.hidden_size,
            "num_attention_heads": args.num_attention_heads,
            "hidden_dropout": args.hidden_dropout,
        }
        config = RQTransformerConfig(
            code_shape=code_shape,
            codebook_size=vae.config.codebook_size,
            codebook_dim=vae.config.codebook_dim,
            shared_codebook=vae.config.shared_codebook,
            cond_vocab_size=cond_vocab_size,
            cond_length=cond_length,
            null_cond_id=null_cond_id,
            spatial_config={**stack, "num_hidden_layers": args.spatial_layers},
            depth_config={**stack, "num_hidden_layers": args.depth_layers},
        )
        model = RQTransformerModel(config)
        model.set_codebook(vae.quantizer.codebook)
    model.set_attn_implementation(args.attn_implementation)
    return model


def describe_latents(vae: RQVAEModel) -> dict:
    """What distinguishes the latents of `vae`: their shape `(H, W, C)`, how they are stored, and a fingerprint of the
    weights that codes depend on, those of the encoder and the codebook."""
    height, width = (vae.config.sample_size // pixels for pixels in vae.pixels_per_code)
    fingerprint = hashlib.sha256()
    for name, weight in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.", "quantizer.codebook")):
            fingerprint.update(weight.float().cpu().numpy().tobytes())
    return {
        "shape": [height, width, vae.config.codebook_dim],
        "dtype": "bfloat16",
        "rqvae_sha256": fingerprint.hexdigest(),
    }


def load_examples(
    vae: RQVAEModel, args: TransformerArguments, data: DataArguments, required_columns: tuple[str, ...] = ()
):
    """
    Opens the latents that `args` name or, if they name none, the images that `data` names (see [`load_images`]).

    Raises:
        `ValueError`: latents of another RQ-VAE, a folder without latents, options that only images have, and what
        [`load_images`] refuses.
    """
    if args.latents is None:
        return load_images(data, required_columns)
    for option in fields(data):
        concerns_images = option.name not in ("streaming", "dataloader_num_workers", "shuffle_buffer_size")
        if concerns_images and getattr(data, option.name) != option.default:
            raise ValueError(f"--{option.name} concerns images, not --latents: see extract_latents.py --help")
    description = Path(args.latents, LATENTS_DESCRIPTION)
    if not description.exists():
        raise ValueError(f"--latents must be a folder that extract_latents.py wrote; there is no {description}")
    found, needed = json.loads(description.read_text()), describe_latents(vae)
    if found != needed:
        raise ValueError(
            f"--latents {args.latents} was extracted with another RQ-VAE than --rqvae {args.rqvae}: "
            f"its {LATENTS_DESCRIPTION} says {found}, this RQ-VAE needs {needed}"
        )
    files = str(Path(glob.escape(args.latents), "*.parquet"))
    return load_images(replace(data, data_files=files, image_column="latents"), required_columns)


def create_collator(
    vae: RQVAEModel, args: TransformerArguments, data: DataArguments, **conditions
) -> Collator | LatentCollator:
    """What makes batches of the examples of [`load_examples`]; `conditions` are the collators' other arguments."""
    if args.latents is not None:
        return LatentCollator(describe_latents(vae)["shape"], **conditions)
    return Collator(
        data.image_column,
        vae.config.sample_size,
        data.random_flip,
        data.skip_corrupt_images,
        center_crop=data.center_crop,
        **conditions,
    )


class TransformerLoss:
    """(model, batch) -> loss and metrics: encodes the pixels, if the batch has no latents yet, draws the codes, drops
    conditions, scores the codes."""

    def __init__(self, vae: RQVAEModel, config: RQTransformerConfig, args: TransformerArguments, autocast):
        self.vae = vae
        self.config = config
        self.args = args
        self.autocast = autocast

    def __call__(self, model, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        soft = self.args.labels == "soft"
        with torch.no_grad(), self.autocast():
            if "latents" in batch:
                vectors = batch["latents"]  # (B, H, W, C)
            else:
                vectors = self.vae.latents_to_vectors(self.vae.encode(batch["pixels"]).latents)
            temperature = self.args.soft_label_temperature if soft else None
            codes, residuals = self.vae.quantizer.get_codes(vectors, temperature)
        with self.autocast():  # a sharded model does not bring its own
            output = model(
                codes,
                self.drop_conditions(batch.get("cond_ids")),
                labels=None if soft else codes,
                residuals=residuals if soft else None,
                soft_label_temperature=self.args.soft_label_temperature,
                return_logits=False,
            )
        metrics = {f"loss_depth_{d}": loss for d, loss in enumerate(output.depth_losses, start=1)}
        if output.cond_loss is not None:
            metrics["loss_text"] = output.cond_loss
        return output.loss, metrics

    def drop_conditions(self, cond_ids: torch.Tensor | None) -> torch.Tensor | None:
        """Condition ids `(B, L)` with a random share of the rows replaced by the null condition."""
        if cond_ids is None or self.config.null_cond_id is None:
            return cond_ids
        dropped = torch.rand(len(cond_ids), 1, device=cond_ids.device) < self.args.cond_dropout
        return cond_ids.masked_fill(dropped, self.config.null_cond_id)


def model_card(model: RQTransformerModel, usage: str) -> str:
    """A model card with valid Hub metadata and the lines that load and use the pipeline."""
    height, width, depth = model.config.code_shape
    kind = "text-to-image" if model.config.cond_length > 1 else "unconditional-image-generation"
    return (
        f"---\nlibrary_name: rq_hf\npipeline_tag: {kind}\ntags:\n- rq-transformer\n---\n\n"
        f"# RQ-Transformer on {height}×{width}×{depth} codes, {model.num_parameters():,} parameters\n\n"
        f"```python\nfrom rq_hf import RQPipeline\n\npipe = RQPipeline.from_pretrained(...)\n{usage}.images\n```\n"
    )
