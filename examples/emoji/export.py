"""Export a trained pipeline for publication: half-precision files, default sampling settings and a model card.

    python examples/emoji/export.py --pipeline runs/emoji/pipeline --average_with runs/emoji-soft/pipeline \\
        --average_weight 0.2 --output src/rq_hf/emoji_model --card model_cards/emoji.md --temperature 0.2
    python examples/emoji/export.py --pipeline runs/emoji-mar/pipeline --output src/rq_hf/mar_emoji_model \\
        --card model_cards/emoji-mar.md

Weights are stored in float16 and loaded as float32. The transformer can be averaged with one that was fine-tuned from
it (Wortsman et al., "Robust fine-tuning of zero-shot models", 2022).
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import rq_hf  # noqa: F401
from rq_hf.files import atomic_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True, help="folder of the trained pipeline")
    parser.add_argument("--average_with", type=Path, help="folder of a pipeline that was fine-tuned from it")
    parser.add_argument(
        "--average_weight", type=float, default=0.5, help="weight of --average_with in the average, in [0, 1]"
    )
    parser.add_argument("--output", type=Path, required=True, help="new folder to write to")
    parser.add_argument("--card", type=Path, help="model card, copied to README.md")
    parser.add_argument("--temperature", type=float, help="default temperature of an RQ-Transformer")
    parser.add_argument("--top_k", type=int, help="default top-k")
    parser.add_argument("--top_p", type=float, help="default top-p")
    parser.add_argument("--guidance_scale", type=float, help="default guidance scale")
    args = parser.parse_args()
    if args.output.exists():
        raise ValueError(f"{args.output} exists already; move it away first")

    pipe = DiffusionPipeline.from_pretrained(str(args.pipeline))
    if args.average_with is not None:
        tuned = DiffusionPipeline.from_pretrained(str(args.average_with)).transformer.state_dict()
        weights = pipe.transformer.state_dict()
        pipe.transformer.load_state_dict({n: w.lerp(tuned[n], args.average_weight) for n, w in weights.items()})
    defaults = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "guidance_scale")}
    defaults = {name: value for name, value in defaults.items() if value is not None}
    if defaults:
        pipe.transformer.generation_config.update(do_sample=True, **defaults)

    with atomic_folder(args.output) as folder:
        pipe.to(dtype=torch.float16, silence_dtype_warnings=True).save_pretrained(folder)
        config_file = folder / "transformer" / "config.json"
        config = json.loads(config_file.read_text())
        config["dtype"] = "float32"
        # What loads a folder without `import rq_hf` is of no use inside the package.
        del config["auto_map"]
        for name in ("pipeline.py", "transformer/code_rq.py"):
            (folder / name).unlink()
        config_file.write_text(json.dumps(config, indent=2) + "\n")
        if args.card is not None:
            shutil.copy(args.card, folder / "README.md")
    size = sum(file.stat().st_size for file in args.output.rglob("*") if file.is_file())
    print(f"{args.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
