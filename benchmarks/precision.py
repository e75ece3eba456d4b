"""
Effect of bfloat16 and int8 weights on the probabilities of the emoji model (a minute, on a CPU).

    python benchmarks/precision.py

The float32 model samples 8 code maps for each of 24 captions like those of the demo. Every variant of the transformer
predicts these codes, and its probabilities are compared with those of float32: the divergence KL(float32 ‖ variant) in
nats per code, and the share of codes for which the most likely code is the same. int8 is torchao's weight-only
quantization of all linear layers except the classifier.
"""

import torch
from transformers import TorchAoConfig

from rq_hf import EMOJI_MODEL, RQPipeline, RQTransformerModel

SUBJECTS = ("woman astronaut", "man farmer", "person swimming", "waving hand")
TONES = ("light", "medium-light", "medium-dark", "dark")
WORDS = ("sunflower", "pizza", "octopus", "fire engine", "rainbow", "grapes", "rocket", "tiger")


@torch.no_grad()
def log_probabilities(model, codes, cond_ids):
    """`(B, H, W, D, K)`"""
    batches = zip(codes.split(64), cond_ids.split(64))
    return torch.cat([model(*batch).logits.float().log_softmax(dim=-1) for batch in batches])


def main() -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    int8 = TorchAoConfig(Int8WeightOnlyConfig())
    variants = {
        "bfloat16": {"dtype": torch.bfloat16},
        "int8 weights": {"dtype": torch.float32, "quantization_config": int8},
        "int8 weights, bfloat16": {"dtype": torch.bfloat16, "quantization_config": int8},
    }
    pipe = RQPipeline.from_pretrained(EMOJI_MODEL)
    captions = [f"{subject} {tone} skin tone" for subject in SUBJECTS for tone in TONES] + list(WORDS)
    generator = torch.Generator().manual_seed(0)
    codes = pipe(captions, num_images_per_prompt=8, temperature=1.0, generator=generator, output_type="latent").codes
    cond_ids = pipe.encode_prompt(captions).repeat_interleave(8, dim=0)
    expected = log_probabilities(pipe.transformer, codes, cond_ids)
    for name, options in variants.items():
        model = RQTransformerModel.from_pretrained(f"{EMOJI_MODEL}/transformer", **options)
        actual = log_probabilities(model, codes, cond_ids)
        divergence = (expected.exp() * (expected - actual)).sum(dim=-1).mean()
        same = (expected.argmax(dim=-1) == actual.argmax(dim=-1)).float().mean()
        print(f"{name}: KL {divergence:.1e} nats per code, {same:.2%} of the most likely codes are the same")


if __name__ == "__main__":
    main()
