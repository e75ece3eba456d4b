"""Write the commands for the published figures, with what they cost, from src/rq_hf/evaluation/protocols.json.

python docs/make_protocols.py --output docs/evaluation-protocols.md
"""

import argparse
from functools import cache, partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode

from rq_hf import (
    PRESETS,
    MARTransformerConfig,
    MARTransformerModel,
    RQTransformerConfig,
    RQTransformerModel,
    RQVAEModel,
)
from rq_hf.evaluation import Protocol, PublishedRow, read_protocols
from rq_hf.models.presets import load_preset

# Two CPU cores, from benchmarks/README.md: the codes of ffhq-355m in bf16 at batch 8, and decoding, in seconds per
# image; and MAR-B at 8 iterations of 25 steps with guidance, in seconds of one of the cores and in operations.
FFHQ_SECONDS, DECODING_SECONDS = 0.316, 0.290
MAR_SECONDS, MAR_OPERATIONS = 12.9 / 2, 2.1e12
GPU_RATE = 250e12  # operations per second, assumed: a quarter of what an H200 can do in bf16
FORMATS = {"fid": "FID {:.2f}", "inception_score": "IS {:.1f}"}
IMAGES = {"cc3m-validation": 15_840}  # of protocols that do not say it: as many as there are captions

TEXT = """# Published figures and how to compute them

`python docs/make_protocols.py --output docs/evaluation-protocols.md` writes this page from
`src/rq_hf/evaluation/protocols.json`. `--protocol NAME` of `examples/evaluate_generation.py` sets the options of a
protocol; options given as well override them. The figures are the authors', see the cards; none of
these commands has been run with the published weights yet.

{table}

*Operations* are those of all images, a multiplication and an addition being two: computed from the shapes of the
models, without the networks of the metrics and the scorer (less than 4 %). *Two CPU cores* is computed from the
measured speeds in [benchmarks](../benchmarks/README.md): RQ codes at the rate of `ffhq-355m` ({ffhq_rate:.2f} TFLOP/s)
and {decoding} s for decoding an image, MAR at the rate of MAR-B ({mar_rate:.2f} TFLOP/s), all in bf16. *One H200* is
not measured: it assumes {gpu_rate:.0f} TFLOP/s, a quarter of its peak in bf16. N processes take an N-th of the time.

## Reference statistics

The statistics of the authors do not say what they are of. This notes it beside them, and the evaluation takes nothing
without it. `INCEPTION` is [pt_inception-2015-12-05-6726825d.pth](
https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights). For the RQ models, the files are those of
`fid_stats.tar.gz`, to which the README of
[kakaobrain/rq-vae-transformer](https://github.com/kakaobrain/rq-vae-transformer) links; `adm_in256_stats.npz` is in
[LTH14/mar](https://github.com/LTH14/mar/tree/main/fid_stats). How the authors resized the images, and the numbers of
images, are what their code and the data sets say; `$COUNT` is a number that they do not say.

<!-- not run: needs the authors' statistics and the weights of the Inception network -->
```
{statistics}
```

## Protocols

{protocols}"""


def operations(module: torch.nn.Module, *inputs: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops()


@cache
def rq_operations(preset: str) -> tuple[float, float]:
    """Of an image: sampling its codes and decoding them."""
    zeros = partial(torch.zeros, device="meta")
    with torch.device("meta"):
        model = RQTransformerModel(RQTransformerConfig.from_preset(preset))
        vae = RQVAEModel.from_preset(preset)
    height, width, depth = model.config.code_shape
    hidden_size, length = model.config.spatial_config.hidden_size, model.config.cond_length + height * width - 1
    spatial = operations(model.spatial_stack, zeros(1, length, hidden_size))
    by_depth = operations(model.depth_stack, zeros(height * width, depth, hidden_size))
    classifier = 2 * height * width * depth * hidden_size * model.config.codebook_size
    decode = torch.nn.Sequential(vae.post_quant_conv, vae.decoder)
    return spatial + by_depth + classifier, operations(decode, zeros(1, vae.config.latent_channels, height, width))


@cache
def mar_operations(preset: str, num_iterations: int, num_inference_steps: int) -> float:
    """Of an image with guidance, whose batch has two rows; on average, half of the tokens are known."""
    zeros = partial(torch.zeros, device="meta")
    with torch.device("meta"):
        model = MARTransformerModel(MARTransformerConfig.from_preset(preset))
        vae = AutoencoderKL(**load_preset(preset, "autoencoder_kl"))
    config = model.config
    tokens, slots, width = config.num_tokens, config.num_cond_slots, config.decoder_config.hidden_size
    encoder = operations(model.encoder, zeros(2, slots + tokens // 2, config.encoder_config.hidden_size), None)
    decoder = operations(model.decoder, zeros(2, slots + tokens, width))
    head = 2 * 2 * sum(weight.numel() for weight in model.head.parameters() if weight.ndim == 2)
    transformer = num_iterations * (encoder + decoder) + tokens * num_inference_steps * head
    return transformer + operations(vae.decode, zeros(1, *config.latent_shape))


def cost(protocol: Protocol, row: PublishedRow) -> tuple[float, float, float]:
    """Operations, and seconds on two CPU cores and on one H200."""
    settings = protocol.settings
    count = settings.get("num_images", IMAGES.get(protocol.name)) / settings.get("acceptance_rate", 1)
    preset = next(preset for preset in sorted(PRESETS, key=len, reverse=True) if row.model.startswith(preset))
    if protocol.name.startswith("mar"):
        per_image = mar_operations(preset, settings["num_iterations"], settings["num_inference_steps"][0])
        cpu = per_image * MAR_SECONDS / MAR_OPERATIONS
    else:
        codes, decoding = rq_operations(preset)
        per_image = codes + decoding
        cpu = codes * FFHQ_SECONDS / rq_operations("ffhq-355m")[0] + DECODING_SECONDS
    return count * per_image, count * cpu, count * per_image / GPU_RATE


def duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3_600)):
        if seconds >= 2 * length:
            return f"{seconds / length:.2g} {unit}" if seconds < 100 * length else f"{seconds / length:,.0f} {unit}"
    return f"{seconds / 60:.2g} minutes"


def statistics_name(protocol: Protocol) -> str:
    return protocol.reference["file"].replace(".npz", ".safetensors")


def statistics_command(protocol: Protocol) -> str:
    reference = protocol.reference
    count = "$COUNT" if reference["count"] is None else reference["count"]
    return (
        f"python examples/compute_statistics.py --moments {reference['file']} --name '{reference['dataset']}' \\\n"
        f"    --split {reference['split']} --count {count} --transform '{reference['transform']}' \\\n"
        f"    --uint8_rule {reference['uint8_rule']} --network {protocol.settings['network']} \\\n"
        f"    --network_weights INCEPTION --output_file {statistics_name(protocol)}"
    )


def evaluation_command(protocol: Protocol) -> str:
    """For all models of a protocol."""
    captions = " --captions CAPTIONS.txt" if "truncate_captions" in protocol.settings else ""
    models = [row.model for row in protocol.rows]
    model = models[0] if len(models) == 1 else "$model"
    command = (
        f"accelerate launch examples/evaluate_generation.py --protocol {protocol.name} --model models/{model} \\\n"
        f"    --reference {statistics_name(protocol)} --network_weights INCEPTION{captions} \\\n"
        f"    --dtype bfloat16 --compile --output_dir runs/{protocol.name}/{model}"
    )
    return command if len(models) == 1 else f"for model in {' '.join(models)}; do\n{command}\ndone"


def table(protocols: list[Protocol]) -> str:
    lines = [
        "| model | protocol | published | operations | two CPU cores | one H200 |",
        "|---|---|---|---|---|---|",
    ]
    for protocol in protocols:
        for row in protocol.rows:
            published = ", ".join(FORMATS[name].format(value) for name, value in row.published.items())
            model, name = f"[`{row.model}`](../model_cards/{row.model}.md)", f"[`{protocol.name}`](#{protocol.name})"
            total, cpu, gpu = cost(protocol, row)
            lines.append(
                f"| {model} | {name} | {published} | {total / 1e15:,.0f} PFLOP | {duration(cpu)} | {duration(gpu)} |"
            )
    return "\n".join(lines)


def section(protocol: Protocol) -> str:
    """A protocol with its settings and commands."""
    settings = " ".join(
        f"--{name}" if value is True else f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in protocol.settings.items()
    )
    return "\n".join(
        [
            f"### {protocol.name}",
            "",
            f"{protocol.title}. Source: {protocol.source}",
            "",
            f"Settings: `{settings}`",
            "",
            *(f"* {difference}" for difference in protocol.differences),
            "",
            "<!-- not run: needs the authors' weights -->",
            "```",
            evaluation_command(protocol),
            "```",
            "",
        ]
    )


def page() -> str:
    protocols = list(read_protocols().values())
    commands = dict.fromkeys(statistics_command(protocol) for protocol in protocols)
    return TEXT.format(
        table=table(protocols),
        ffhq_rate=rq_operations("ffhq-355m")[0] / FFHQ_SECONDS / 1e12,
        decoding=DECODING_SECONDS,
        mar_rate=MAR_OPERATIONS / MAR_SECONDS / 1e12,
        gpu_rate=GPU_RATE / 1e12,
        statistics="\n".join(commands),
        protocols="\n".join(map(section, protocols)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="Markdown file to write.")
    Path(parser.parse_args().output).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
