"""
Converts checkpoints of kakaobrain/rq-vae-transformer, the code of "Autoregressive Image Generation using Residual
Quantization" (CVPR 2022), into a folder for RQPipeline.from_pretrained.
"""

import argparse
import signal
import sys
from pathlib import Path

from .card import summary
from .conversion import convert_checkpoints

EPILOG = """\
examples:
  python -m rq_hf.convert imagenet_1.4B.tar.gz models/imagenet-1.4b
  python -m rq_hf.convert cc3m.tar.gz models/cc3m --tokenizer rqvae/txtimg_datasets/tokenizers/pretrained
  python -m rq_hf.convert models/cat --rqvae stage1/model.pt --rqtransformer stage2/model.pt --ema
  python -m rq_hf.convert models/rqvae --rqvae stage1/model.pt

files:
  SOURCE            a tar archive as released, or a folder with config.yaml and one .pt file per stage, such as
                    stage1/{model.pt,config.yaml} and stage2/{model.pt,config.yaml}
  DESTINATION       model_index.json, vae/, transformer/ (safetensors of at most 2 GB), tokenizer/ and a model card,
                    README.md; for an RQ-VAE alone, its config.json and weights. A new folder appears only when it is
                    complete. An existing one must be empty; what is unfinished lies in .rq_hf-... there.
  --tokenizer       one *vocab.json and one *merges.txt; or the authors' folder with several pairs, one of which
                    config.yaml names

Disk: an archive is unpacked in DESTINATION, or beside it if it is new, and removed afterwards.
Memory: at most the checkpoint plus 2 GB. Every weight and checksum is looked at once before anything is written.
Only tensors are read from .pt files. No code in them is executed, and archives cannot write outside their folder.

The released weights are under CC BY-NC-SA 4.0: no commercial use.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rq_hf.convert",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [SOURCE] DESTINATION [--rqvae FILE] [--rqtransformer FILE] [--ema] [--tokenizer FOLDER]",
    )
    parser.add_argument("source", nargs="?", type=Path, metavar="SOURCE", help="archive or folder with both stages")
    parser.add_argument("destination", type=Path, metavar="DESTINATION", help="new or empty folder to write to")
    parser.add_argument("--rqvae", type=Path, metavar="FILE", help=".pt file of the RQ-VAE, config.yaml beside it")
    parser.add_argument("--rqtransformer", type=Path, metavar="FILE", help=".pt file of the RQ-Transformer, likewise")
    parser.add_argument(
        "--ema", action="store_true", help="use the moving average of the weights (of the last stage given)"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="folder with vocab.json and merges.txt of a text model"
    )
    arguments = vars(parser.parse_intermixed_args())
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        print(summary(*convert_checkpoints(**arguments)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    main()
