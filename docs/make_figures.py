"""Make the figures of docs/sampling.md and of model_cards/emoji.md with the model that comes with the package.

    python docs/make_figures.py --output_dir docs/images --card_image model_cards/emoji.png

Those of docs/sampling.md have a row of images for each of `SUBJECTS`; that of the card is what `make demo` makes.
"""

import argparse
import runpy
from pathlib import Path

import torch
from manifest import write_manifest

from rq_hf import EMOJI_MODEL, RQPipeline
from rq_hf.images import captioned_grid, image_grid

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"

SUBJECTS = ("sunflower", "woman astronaut medium skin tone", "octopus", "fire engine")


def coarse_to_fine(pipe: RQPipeline, codes: torch.Tensor) -> torch.Tensor:
    """A row for each image: decoded from the first code of every position, from the first two, and so on."""
    depths = [pipe.decode_codes(codes, depth=d, output_type="pt") for d in range(1, codes.shape[-1] + 1)]
    return torch.stack(depths, dim=1).flatten(0, 1)


def variations(pipe: RQPipeline, codes: torch.Tensor, count: int = 3) -> torch.Tensor:
    """A row for each image: itself, and `count` variations that keep the first code of every position."""
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
    """A row for each image: its upper half, and completions of this half for every subject."""
    _, height, width, _ = codes.shape
    half = height * width // 2
    shown = pipe.decode_codes(codes, num_positions=half, output_type="pt")
    completed = [
        pipe([subject] * len(codes), prefix_codes=codes, start=half, generator=[0] * len(codes), output_type="pt")
        for subject in SUBJECTS
    ]
    return torch.stack([shown, *(output.images for output in completed)], dim=1).flatten(0, 1)


def being_drawn(pipe: RQPipeline, every: int = 16) -> torch.Tensor:
    """A row for each subject: the image after every `every` sampled positions."""
    previews = []

    def preview(pipe, step, position, tensors):
        if (position + 1) % every == 0:
            previews.append(pipe.decode_codes(tensors["codes"], num_positions=position + 1, output_type="pt"))
        return {}

    pipe(list(SUBJECTS), generator=list(range(len(SUBJECTS))), callback_on_step_end=preview)
    return torch.stack(previews, dim=1).flatten(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EMOJI_MODEL, help="folder of any text-to-image RQPipeline")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the figures")
    parser.add_argument("--card_image", type=Path, required=True, help="file for the images of the demo")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

    pipe = RQPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    prompts = runpy.run_path(str(DEMO))["PROMPTS"]
    images = pipe(prompts, generator=torch.Generator().manual_seed(0)).images
    captioned_grid(images, prompts).save(args.card_image)

    codes = pipe(list(SUBJECTS), generator=list(range(len(SUBJECTS))), output_type="latent").codes
    figures = {
        "coarse_to_fine.png": image_grid(coarse_to_fine(pipe, codes), columns=4),
        "variations.png": image_grid(variations(pipe, codes), columns=4),
        "completions.png": image_grid(completions(pipe, codes), columns=5),
        "being_drawn.png": image_grid(being_drawn(pipe), columns=4),
    }
    for name, figure in figures.items():
        figure.save(args.output_dir / name)
    made = [args.card_image, *(args.output_dir / name for name in figures)]
    write_manifest(args.output_dir / "make_figures.json", [Path(__file__), DEMO], [args.model], made)


if __name__ == "__main__":
    main()
