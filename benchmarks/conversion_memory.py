"""
Peak memory and time of converting synthetic checkpoints of the size of the 1.4B RQ model and of MAR-L (Linux).

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
from diffusers import AutoencoderKL

from rq_hf import MARTransformerConfig, MARTransformerModel, RQTransformerModel, RQVAEModel
from rq_hf.convert.configs import Section, rqtransformer_config, rqvae_config
from rq_hf.convert.mar_weights import mar_parts
from rq_hf.convert.weights import rqtransformer_parts, rqvae_parts
from rq_hf.models.presets import load_preset

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
model = {call}
print(f"{{time.perf_counter() - start:.0f}} s, peak {{memory('VmHWM'):.2f}} GB")
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


def write_rq(folder: Path) -> str:
    """Writes both stages, and returns the call that converts them."""
    with torch.device("meta"):
        vae = RQVAEModel(**rqvae_config(Section(yaml.safe_load(RQVAE))))
        transformer = RQTransformerModel(rqtransformer_config(Section(yaml.safe_load(RQTRANSFORMER)), True))
    for stage, config, model, parts_of in (
        ("stage1", RQVAE, vae, rqvae_parts),
        ("stage2", RQTRANSFORMER, transformer, rqtransformer_parts),
    ):
        (folder / stage).mkdir()
        (folder / stage / "config.yaml").write_text(config)
        torch.save({"state_dict": random_weights(model, parts_of)}, folder / stage / "model.pt")
    return f"rq_hf.convert_original_checkpoint({str(folder)!r}, *sys.argv[1:])"


def write_mar(folder: Path) -> str:
    """Writes a transformer with its moving average and an autoencoder, and returns the call that converts them."""
    with torch.device("meta"):
        transformer = MARTransformerModel(MARTransformerConfig.from_preset("mar-large"))
        vae = AutoencoderKL(**load_preset("mar-large", "autoencoder_kl"))
    checkpoint, kl = folder / "checkpoint-last.pth", folder / "kl16.ckpt"
    torch.save({name: random_weights(transformer, mar_parts) for name in ("model", "model_ema")}, checkpoint)
    torch.save({"model": random_weights(vae, rqvae_parts)}, kl)
    return f"rq_hf.convert_mar_checkpoint({str(checkpoint)!r}, *sys.argv[1:], vae={str(kl)!r})"


def main() -> None:
    for write in (write_rq, write_mar):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "checkpoint")
            source.mkdir()
            call = write(source)
            size = sum(file.stat().st_size for file in source.rglob("*") if file.is_file()) / 1e9
            print(f"checkpoint: {size:.2f} GB")
            for kind, destination in (("written to a folder", [str(Path(folder, "converted"))]), ("in memory", [])):
                command = [sys.executable, "-c", CONVERT.format(call=call), *destination]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                print(f"converted, {kind}: {output.splitlines()[-1]}")


if __name__ == "__main__":
    main()
