"""LoRA adapters (peft) and 8-bit weights (torchao, bitsandbytes) on the RQ-Transformer."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from tiny import HEIGHT, WIDTH, tiny_codes, tiny_condition, tiny_pipeline, tiny_transformer
from transformers import BitsAndBytesConfig, TorchAoConfig

from rq_hf import RQPipeline, RQTransformerModel
from rq_hf.images import captioned_grid

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj", "o_proj", "up_proj", "down_proj"]}
GREEDY = {"do_sample": False}
EXAMPLE = Path(__file__).parents[2] / "examples" / "train_lora.py"


@pytest.fixture
def trained():
    """A model with an adapter that learned one batch, the losses, and the batch."""
    model = get_peft_model(tiny_transformer("class"), LoraConfig(**LORA))
    codes, ids = tiny_codes(4), tiny_condition("class", 4)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.02)
    losses = []
    for _ in range(40):
        loss = model(codes, ids, labels=codes).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.eval(), losses, codes, ids


class TestLoRA:
    def test_learns_and_leaves_the_model_as_it_is(self, trained):
        model, losses, codes, ids = trained
        assert losses[-1] < losses[0] - 0.3
        with model.disable_adapter():
            assert model(codes, ids, labels=codes).loss.item() == pytest.approx(losses[0], rel=1e-4)

    def test_fused_draws_the_same(self, trained):
        model, _, codes, ids = trained
        logits, drawn = model(codes, ids).logits, model.generate(ids, **GREEDY)
        fused = model.merge_and_unload()
        assert type(fused) is RQTransformerModel
        torch.testing.assert_close(fused(codes, ids).logits, logits)
        fused.pack_weights()
        assert torch.equal(fused.generate(ids, **GREEDY), drawn)

    def test_is_packed_only_when_fused(self, trained):
        model, *_ = trained
        with pytest.raises(ValueError, match="weights can be packed, got <class 'peft.*; merge adapters"):
            model.base_model.model.pack_weights()

    def test_is_packed_only_when_fused_wherever_it_is(self):
        model = tiny_transformer()
        model.add_adapter(LoraConfig(r=2, target_modules=["code_projection"]))
        with pytest.raises(ValueError, match="weights can be packed, got <class 'peft.*; merge adapters"):
            model.pack_weights()

    def test_is_saved_alone_and_loaded_onto_the_model(self, trained, tmp_path):
        model, _, codes, ids = trained
        expected = model(codes, ids).logits
        model.save_pretrained(tmp_path / "adapter")
        base = model.unload()
        base.save_pretrained(tmp_path / "base")
        size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
        assert size < (tmp_path / "base" / "model.safetensors").stat().st_size
        again = PeftModel.from_pretrained(RQTransformerModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
        torch.testing.assert_close(again(codes, ids).logits, expected)
        mixed_in = RQTransformerModel.from_pretrained(tmp_path / "base")
        mixed_in.load_adapter(tmp_path / "adapter")
        torch.testing.assert_close(mixed_in(codes, ids).logits, expected)


def execute(folder):
    """A card, and the images that its code makes."""
    card = ModelCard.load(folder / "README.md")
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    variables = {}
    exec(code, variables)
    return card, variables["images"]


def test_example_learns_new_words(tmp_path):
    pipe = tiny_pipeline("text")
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for name in ("red fire", "green"):
        pixels = torch.randint(256, (HEIGHT, WIDTH + 3, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "images" / f"{name}.png")
    command = [EXAMPLE, tmp_path / "images", "--keep", "apple", "red", "--model", tmp_path / "model"]
    command += ["--output_dir", tmp_path / "out", "--steps", "60", "--learning_rate", "0.02"]
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", run.stdout)]
    assert losses[-1] < losses[0] - 0.3

    taught = RQPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    ids, codes = taught.encode_prompt(["red fire", "apple"]), tiny_codes(2)
    pipe.load_lora_weights(tmp_path / "out" / "adapter")
    torch.testing.assert_close(taught.transformer(codes, ids).logits, pipe.transformer(codes, ids).logits)
    assert (tmp_path / "out" / "samples.png").exists()

    # The code of the cards makes the images that they show.
    captions, prompts = ["green", "red fire"], ["green", "red fire", "apple", "red"]
    given = [Image.open(tmp_path / "images" / f"{name}.png").resize((WIDTH, HEIGHT), 1) for name in captions]
    base = RQPipeline.from_pretrained(tmp_path / "model")
    before = base(captions, generator=torch.Generator().manual_seed(0)).images
    card, images = execute(tmp_path / "out" / "adapter")
    cells = [f"{row}: {caption}" for row in ("given", "before", "after") for caption in captions]
    shown = captioned_grid([*given, *before, *images], cells, columns=2)
    assert Image.open(tmp_path / "out" / "adapter" / "samples.png").tobytes() == shown.tobytes()
    assert f"weights, for `{tmp_path / 'model'}`" in card.text and card.data.base_model is None
    assert "| learning_rate | 0.02 |" in card.text and f"python {EXAMPLE} " in card.text and "red fire" in card.text
    card, images = execute(tmp_path / "out" / "pipeline")
    shown = captioned_grid(images, prompts)
    assert Image.open(tmp_path / "out" / "pipeline" / "samples.png").tobytes() == shown.tobytes()
    assert "with a LoRA adapter merged" in card.text

    again = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert again.returncode != 0
    assert "--output_dir must be new" in again.stderr


def divergence_of_int8(tmp_path, config):
    """KL(float32 ‖ int8) per code, in nats, of a model and the same one loaded with 8-bit weights."""
    model, codes, ids = tiny_transformer("class"), tiny_codes(8), tiny_condition("class", 8)
    model.save_pretrained(tmp_path)
    quantized = RQTransformerModel.from_pretrained(tmp_path, quantization_config=config).eval()
    assert quantized.generate(ids, **GREEDY).shape == codes.shape
    with pytest.raises(ValueError, match="weights can be packed, got <class '(torchao|bitsandbytes)"):
        quantized.pack_weights()
    log_p, log_q = (m(codes, ids).logits.float().log_softmax(dim=-1) for m in (model, quantized))
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean().item()


def test_torchao_changes_the_probabilities_little(tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed: rq_hf[int8]")
    assert 0 < divergence_of_int8(tmp_path, TorchAoConfig(quantization.Int8WeightOnlyConfig())) < 0.01


def test_bitsandbytes_changes_the_probabilities_little(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    skip = ["code_projection", "depth_projection"]
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    assert 0 < divergence_of_int8(tmp_path, config) < 0.01
