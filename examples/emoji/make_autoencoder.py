"""Make the autoencoder of the MAR emoji model from the RQ-VAE that comes with the package: nothing is trained.

    python examples/emoji/make_autoencoder.py --data_files data/emoji/train.parquet --output_dir runs/emoji-autoencoder

The vectors of this RQ-VAE, before they are quantized, have 64 dimensions but lie in a space of 8. The AutoencoderKL
written here has the same encoder and decoder, and the 8 principal components of the vectors as latents. Components are
divided by the square root of their standard deviation, which halves the logarithm of the range of their sizes:
denoising would hardly learn the small ones otherwise. The folding is exact but at the border of the image, where the
decoder pads with zeros; the PSNR on the training images is printed.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from rq_hf import EMOJI_MODEL, RQVAEModel
from rq_hf.data import ImageCollator, first_batches, load_image_dataset
from rq_hf.metrics import psnr
from rq_hf.models.continuous_latents import decode_latents, encode_latents

DIMENSIONS = 8
LOG_VARIANCE = -30.0  # the smallest of an AutoencoderKL: its posterior is a point


def principal_components(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Args:
        vectors: `(N, C)`.

    Returns:
        their mean `(C,)`, a matrix `(8, C)` from centred vectors to latents, and its inverse `(C, 8)` on their space.
    """
    mean = vectors.mean(dim=0)
    variances, directions = torch.linalg.eigh((vectors - mean).T @ (vectors - mean) / len(vectors))
    variances, directions = variances.flip(0)[:DIMENSIONS], directions.flip(1)[:, :DIMENSIONS]
    sizes = variances**0.25
    sizes = sizes * (variances / sizes**2).mean().sqrt()  # so that the mean variance of the latents is 1
    return mean, (directions / sizes).T, directions * sizes


def fold(vae: RQVAEModel, mean: torch.Tensor, to_latents: torch.Tensor, to_vectors: torch.Tensor) -> AutoencoderKL:
    """The `AutoencoderKL` whose latents are those of the vectors of `vae`."""
    kl = AutoencoderKL(
        in_channels=vae.config.in_channels,
        out_channels=vae.config.out_channels,
        down_block_types=vae.config.down_block_types,
        up_block_types=vae.config.up_block_types,
        block_out_channels=vae.config.block_out_channels,
        layers_per_block=vae.config.layers_per_block,
        norm_num_groups=vae.config.norm_num_groups,
        latent_channels=DIMENSIONS,
        sample_size=vae.config.sample_size,
        scaling_factor=1.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    weights = kl.state_dict()
    weights |= {name: weight for name, weight in vae.state_dict().items() if name in weights}

    last, project = vae.encoder.conv_out, vae.quant_conv
    matrix = to_latents @ project.weight[:, :, 0, 0]
    kernel = torch.einsum("ij,jkhw->ikhw", matrix, last.weight)
    bias = matrix @ last.bias + to_latents @ (project.bias - mean)
    weights["encoder.conv_out.weight"] = torch.cat([kernel, torch.zeros_like(kernel)])
    weights["encoder.conv_out.bias"] = torch.cat([bias, torch.full_like(bias, LOG_VARIANCE)])

    project, first = vae.post_quant_conv, vae.decoder.conv_in
    matrix = project.weight[:, :, 0, 0]
    weights["decoder.conv_in.weight"] = torch.einsum("ojhw,jk->okhw", first.weight, matrix @ to_vectors)
    constant = matrix @ mean + project.bias
    weights["decoder.conv_in.bias"] = first.bias + first.weight.sum(dim=(2, 3)) @ constant
    kl.load_state_dict(weights)
    return kl.eval()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_files", required=True, help="the training images that make_dataset.py wrote")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the autoencoder")
    args = parser.parse_args()

    vae = RQVAEModel.from_pretrained(EMOJI_MODEL, subfolder="vae")
    dataset = load_image_dataset(data_files=args.data_files)
    collate = ImageCollator("image", vae.config.sample_size)
    batches = [batch["pixels"] for batch in first_batches(dataset, collate, len(dataset), batch_size=64)]
    vectors = torch.cat([vae.encode_to_vectors(batch).flatten(0, 2) for batch in batches])
    kl = fold(vae, *principal_components(vectors))
    quality = [psnr(batch, decode_latents(kl, encode_latents(kl, batch))) for batch in batches]
    kl.save_pretrained(args.output_dir)
    print(f"saved {args.output_dir}; PSNR {torch.cat(quality).mean():.1f} dB")


if __name__ == "__main__":
    main()
