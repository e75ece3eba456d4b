"""Draw the pictures of docs/sampling.md with the model that comes with the package.

    python examples/controls.py --output_dir docs/images

Four rows, one for each of `SUBJECTS`: from coarse to fine, variations, completions, and pictures being drawn.
"""

import argparse
from pathlib import Path

import torch

from rq_hf import EMOJI_MODEL, RQPipeline
from rq_hf.images import image_grid

SUBJECTS = ("sunflower", "woman astronaut medium skin tone", "octopus", "fire engine")


def coarse_to_fine(pipe: RQPipeline, codes: torch.Tensor) -> torch.Tensor:
    """A row for each picture: from its first code of every position, from two, and so on."""
    depths = [pipe.decode_codes(codes, depth=d, output_type="pt") for d in range(1, codes.shape[-1] + 1)]
    return torch.stack(depths, dim=1).flatten(0, 1)


def variations(pipe: RQPipeline, codes: torch.Tensor, count: int = 3) -> torch.Tensor:
    """A row for each picture: itself, and `count` times with its first code of every position and other finer ones."""
    varied = pipe(
        list(SUBJECTS),
        num_images_per_prompt=count,
        prefix_codes=codes.repeat_interleave(count, dim=0),
        keep_depth=1,
        temperature=1.0,
        generator=list(range(len(codes) * count)),
        output_type="pt",
    ).images
    given = pipe.decode_codes(codes, output_type="pt")
    return torch.cat([given[:, None], varied.unflatten(0, (-1, count))], dim=1).flatten(0, 1)


def completions(pipe: RQPipeline, codes: torch.Tensor) -> torch.Tensor:
    """A row for each picture: its upper half, and what it becomes when it is completed for every subject."""
    _, height, width, _ = codes.shape
    half = height * width // 2
    shown = pipe.decode_codes(codes, num_positions=half, output_type="pt")
    completed = [
        pipe([subject] * len(codes), prefix_codes=codes, start=half, generator=[0] * len(codes), output_type="pt")
        for subject in SUBJECTS
    ]
    return torch.stack([shown, *(output.images for output in completed)], dim=1).flatten(0, 1)


def being_drawn(pipe: RQPipeline, every: int = 16) -> torch.Tensor:
    """A row for each subject: the picture after so many positions, and so on."""
    previews = []

    def show(pipe, step, position, tensors):
        if (position + 1) % every == 0:
            previews.append(pipe.decode_codes(tensors["codes"], num_positions=position + 1, output_type="pt"))
        return {}

    pipe(list(SUBJECTS), generator=list(range(len(SUBJECTS))), callback_on_step_end=show)
    return torch.stack(previews, dim=1).flatten(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMOJI_MODEL, help="any text-to-image pipeline: a folder or a Hub id")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the pictures")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

    pipe = RQPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    codes = pipe(list(SUBJECTS), generator=list(range(len(SUBJECTS))), output_type="latent").codes
    image_grid(coarse_to_fine(pipe, codes), columns=4).save(args.output_dir / "coarse_to_fine.png")
    image_grid(variations(pipe, codes), columns=4).save(args.output_dir / "variations.png")
    image_grid(completions(pipe, codes), columns=5).save(args.output_dir / "completions.png")
    image_grid(being_drawn(pipe), columns=4).save(args.output_dir / "being_drawn.png")


if __name__ == "__main__":
    main()
