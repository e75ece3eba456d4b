"""
Peak memory and time of converting a synthetic checkpoint of the size of the published 1.4B model (Linux).

    python benchmarks/conversion_memory.py

The conversion runs in a separate process. Its peak resident memory, including memory-mapped files (VmHWM), is compared
with the size of the checkpoint. The aim is an excess of at most 2 GB.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml

from rq_hf import RQTransformerModel, RQVAEModel
from rq_hf.convert.configs import Section, rqtransformer_config, rqvae_config
from rq_hf.convert.weights import rqtransformer_parts, rqvae_parts

RQVAE = """
arch:
  type: rq-vae
  hparams: {bottleneck_type: rq, embed_dim: 256, n_embed: 16384, latent_shape: [8, 8, 256], code_shape: [8, 8, 4],
    shared_codebook: true, decay: 0.99, restart_unused_codes: true}
  ddconfig: {double_z: false, z_channels: 256, resolution: 256, in_channels: 3, out_ch: 3, ch: 128,
    ch_mult: [1, 1, 2, 2, 4, 4], num_res_blocks: 2, attn_resolutions: [8], dropout: 0.0}
"""
RQTRANSFORMER = """
arch:
  type: rq-transformer
  vocab_size: 16384
  block_size: [8, 8, 4]
  embed_dim: 1536
  input_embed_dim: 256
  shared_tok_emb: true
  shared_cls_emb: true
  input_emb_vqvae: true
  head_emb_vqvae: true
  cumsum_depth_ctx: true
  vocab_size_cond: 1000
  block_size_cond: 1
  body: {n_layer: 42, block: {n_head: 24}}
  head: {n_layer: 6, block: {n_head: 24}}
sampling: {temp: 1.0, top_k: 16384, top_p: 0.92}
"""
CONVERT = """
import sys, time
import rq_hf
def memory(name):
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines[name].split()[0]) * 1024 / 1e9
start = time.perf_counter()
model = rq_hf.convert_original_checkpoint(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
print(f"{time.perf_counter() - start:.0f} s, peak {memory('VmHWM'):.2f} GB")
"""


def random_weights(model: torch.nn.Module, parts_of) -> dict[str, torch.Tensor]:
    """Random weights for a model on the meta device, with the authors' names and shapes."""
    state_dict = {}
    for name, weight in model.state_dict().items():
        if name != "codebook":
            for theirs, shape in parts_of(name, weight.shape, model).items():
                state_dict[theirs] = torch.randn(shape) * 0.02
    for name in [name for name in state_dict if "codebooks.0" in name]:
        state_dict.update({name.replace("codebooks.0", f"codebooks.{d}"): state_dict[name] for d in (1, 2, 3)})
    return state_dict


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "checkpoint")
        with torch.device("meta"):
            vae = RQVAEModel(**rqvae_config(Section(yaml.safe_load(RQVAE))))
            transformer = RQTransformerModel(rqtransformer_config(Section(yaml.safe_load(RQTRANSFORMER)), True))
        for stage, config, state_dict in (
            ("stage1", RQVAE, random_weights(vae, rqvae_parts)),
            ("stage2", RQTRANSFORMER, random_weights(transformer, rqtransformer_parts)),
        ):
            (source / stage).mkdir(parents=True)
            (source / stage / "config.yaml").write_text(config)
            torch.save({"state_dict": state_dict}, source / stage / "model.pt")
        size = sum(file.stat().st_size for file in source.rglob("*.pt")) / 1e9
        print(f"checkpoint: {size:.2f} GB")
        for kind, destination in (("written to a folder", [str(Path(folder, "converted"))]), ("in memory", [])):
            command = [sys.executable, "-c", CONVERT, str(source), *destination]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            print(f"converted, {kind}: {output.splitlines()[-1]}")


if __name__ == "__main__":
    main()
