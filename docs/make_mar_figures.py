"""Make the figures of docs/mar.md with the MAR model that comes with the package.

python docs/make_mar_figures.py --output_dir docs/images --card_image model_cards/emoji-mar.png
"""

import argparse
from pathlib import Path

import torch
from manifest import write_manifest

from rq_hf import MAR_EMOJI_MODEL, MARPipeline
from rq_hf.images import image_grid

SUBJECTS = ("woman astronaut medium skin tone", "mage", "sunflower", "cat face")
SETTINGS = {"guidance_scale": 3.0, "num_inference_steps": 25, "output_type": "pt"}
STRENGTHS = (0.25, 0.5, 0.75, 0.9)


def masks(size: int) -> torch.Tensor:
    """Masks `(4, 1, size, size)`, 1 where pixels are to be sampled: the lower half, the right half, the middle, and
    all but the middle."""
    mask = torch.zeros(4, 1, size, size)
    half, quarter = size // 2, size // 4
    mask[0, :, half:] = 1
    mask[1, :, :, half:] = 1
    mask[2, :, quarter:-quarter, quarter:-quarter] = 1
    mask[3] = 1 - mask[2]
    return mask


def inpaintings(pipe: MARPipeline, images: torch.Tensor) -> torch.Tensor:
    """A row for each image: itself, what is kept of it, and inpaintings with the prompts of the other images."""
    mask = masks(images.shape[-1])
    rows, seeds = [images, images * (1 - mask) + 0.5 * mask], list(range(len(images)))
    for shift in (0, 1, 2):
        prompts = [SUBJECTS[(i + shift) % len(SUBJECTS)] for i in range(len(images))]
        edited = pipe(prompts, image=images, mask_image=mask, generator=seeds, **SETTINGS)
        rows.append(edited.images)
    return torch.stack(rows, dim=1).flatten(0, 1)


def variations(pipe: MARPipeline, images: torch.Tensor) -> torch.Tensor:
    """A row for each image: itself, and variations of growing strength."""
    varied = [
        pipe(list(SUBJECTS), image=images, strength=strength, generator=list(range(len(images))), **SETTINGS).images
        for strength in STRENGTHS
    ]
    return torch.stack([images, *varied], dim=1).flatten(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MAR_EMOJI_MODEL, help="folder of any text-to-image MARPipeline")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the figures")
    parser.add_argument("--card_image", type=Path, required=True, help="file for the inpaintings")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

    pipe = MARPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(list(SUBJECTS), generator=list(range(len(SUBJECTS))), **SETTINGS).images
    image_grid(inpaintings(pipe, images), columns=5).save(args.card_image)
    image_grid(variations(pipe, images), columns=5).save(args.output_dir / "mar_variations.png")
    made = [args.card_image, args.output_dir / "mar_variations.png"]
    write_manifest(args.output_dir / "make_mar_figures.json", [Path(__file__)], [args.model], made)


if __name__ == "__main__":
    main()
