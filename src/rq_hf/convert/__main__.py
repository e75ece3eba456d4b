"""
Converts checkpoints of kakaobrain/rq-vae-transformer, the code of "Autoregressive Image Generation using Residual
Quantization" (CVPR 2022), into a folder for RQPipeline.from_pretrained; and those of LTH14/mar, the code of
"Autoregressive Image Generation without Vector Quantization" (NeurIPS 2024), into one for MARPipeline.from_pretrained;
and semantic-ID models of OpenOneRec, LC-Rec, LETTER, MiniOneRec and RQ-VAE-Recommender, into
one for RQEmbeddingModel.from_pretrained.
"""

import argparse
import signal
import sys
from pathlib import Path

from .card import sizes, summary
from .conversion import convert_checkpoints
from .embedding import ACTIVATIONS, convert_embedding, embedding_sizes, is_embedding_checkpoint
from .mar import LAYER_NORM_EPS, SCALING_FACTOR, convert_mar_checkpoints
from .mar_card import mar_sizes

OPTIONS = {
    "an RQ model": ("ema", "rqvae", "rqtransformer", "tokenizer"),
    "a MAR model": ("ema", "vae", "heads", "patch_size", "grid_size", "layer_norm_eps", "scaling_factor"),
    "a semantic-ID model": ("activation", "codebook_normalize"),
}
EPILOG = """\
examples:
  %(prog)s imagenet_1.4B.tar.gz models/imagenet-1.4b
  %(prog)s cc3m.tar.gz models/cc3m --tokenizer rqvae/txtimg_datasets/tokenizers/pretrained
  %(prog)s models/cat --rqvae stage1/model.pt --rqtransformer stage2/model.pt --ema
  %(prog)s models/rqvae --rqvae stage1/model.pt
  %(prog)s mar_base/checkpoint-last.pth models/mar-base --vae kl16.ckpt
  %(prog)s models/kl16 --vae kl16.ckpt
  %(prog)s best_collision_model.pth models/games-ids
  %(prog)s model.safetensors models/beauty-ids --activation silu

files:
  SOURCE            of an RQ model, a tar archive as released, or a folder with config.yaml and one .pt file per stage,
                    such as stage1/{model.pt,config.yaml} and stage2/{model.pt,config.yaml}; of a MAR model, the .pth
                    file; of a semantic-ID model, the file, which the names of its weights tell apart
  DESTINATION       model_index.json, vae/, transformer/ (safetensors of at most 2 GB), scheduler/, tokenizer/ and a
                    model card, README.md; for one part alone, its config.json and weights. A new folder appears only
                    when it is complete. An existing one must be empty; what is unfinished lies in .rq_hf-... there.
  --tokenizer       one *vocab.json and one *merges.txt; or the authors' folder with several pairs, one of which
                    config.yaml names

Disk: an archive is unpacked in DESTINATION, or beside it if it is new, and removed afterwards.
Memory: at most the checkpoint plus 2 GB. Every weight and checksum is looked at once before anything is written.
Only tensors are read from .pt, .pth and .ckpt files, and the options of the authors' training scripts. No code in them
is executed, and archives cannot write outside their folder.

The RQ weights that the authors released are under CC BY-NC-SA 4.0: no commercial use. The authors of MAR link theirs
from a repository under the MIT licence. Semantic-ID models are their authors'.
"""


def main(arguments: list[str] | None = None, prog: str = "python -m rq_hf.convert") -> None:
    """The command line; `prog` is how its help calls it."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [SOURCE] DESTINATION [--rqvae FILE] [--rqtransformer FILE] [--vae FILE] [options]",
    )
    parser.add_argument("source", nargs="?", type=Path, metavar="SOURCE", help="archive, folder or .pth file")
    parser.add_argument("destination", type=Path, metavar="DESTINATION", help="new or empty folder to write to")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="use the moving average of the weights: of an RQ model (of the last stage given) only with this option, "
        "of a MAR model unless --no-ema",
    )
    rq = parser.add_argument_group("RQ-VAE and RQ-Transformer")
    rq.add_argument("--rqvae", type=Path, metavar="FILE", help=".pt file of the RQ-VAE, config.yaml beside it")
    rq.add_argument("--rqtransformer", type=Path, metavar="FILE", help=".pt file of the RQ-Transformer, likewise")
    rq.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="folder with vocab.json and merges.txt of a text model"
    )
    mar = parser.add_argument_group("MAR", "What weights do not say; see rq_hf.convert_mar_checkpoint.")
    mar.add_argument("--vae", type=Path, metavar="FILE", help="the autoencoder, such as kl16.ckpt")
    mar.add_argument("--heads", type=int, nargs=2, metavar="N", help="attention heads of encoder and decoder")
    mar.add_argument("--patch-size", type=int, metavar="P", help="a token is a patch of P×P latents")
    mar.add_argument("--grid-size", type=int, nargs=2, metavar=("H", "W"), help="rows and columns of tokens")
    mar.add_argument("--layer-norm-eps", type=float, default=LAYER_NORM_EPS, metavar="E", help="(%(default)s)")
    mar.add_argument(
        "--scaling-factor",
        type=float,
        default=SCALING_FACTOR,
        metavar="S",
        help="what latents are multiplied by (%(default)s)",
    )
    embedding = parser.add_argument_group("Semantic-ID models", "See rq_hf.convert_embedding_checkpoint.")
    embedding.add_argument(
        "--activation",
        choices=ACTIVATIONS.values(),
        help="of RQ-VAE-Recommender: silu until 27 March 2026, relu since",
    )
    embedding.add_argument(
        "--codebook-normalize",
        action=argparse.BooleanOptionalAction,
        help="of RQ-VAE-Recommender, as its training says",
    )
    arguments = vars(parser.parse_intermixed_args(arguments))
    source, destination = arguments["source"], arguments["destination"]
    if source is not None and source.is_file() and is_embedding_checkpoint(source):
        kind = "a semantic-ID model"
    elif arguments["vae"] is not None or source is not None and source.suffix == ".pth":
        kind = "a MAR model"
    else:
        kind = "an RQ model"
    options = {name: arguments.pop(name) for name in OPTIONS[kind]}
    for name, value in arguments.items():
        if name not in ("source", "destination") and value != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is not an option of {kind}")
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if kind == "a semantic-ID model":
            model, *files = convert_embedding(source, destination, **options)
            print(summary(embedding_sizes(model), *files))
        elif kind == "a MAR model":
            options["ema"] = options["ema"] is not False
            model, *files = convert_mar_checkpoints(source, destination, **options)
            print(summary(mar_sizes(model), *files))
        else:
            options["ema"] = bool(options["ema"])
            model, *files = convert_checkpoints(source, destination, **options)
            print(summary(sizes(model), *files))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    main()
