"""Equality with the authors' implementation, all of it through the converter (see `golden.py`)."""

import json
import re

import golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch.func import functional_call

from rq_hf import convert_original_checkpoint
from rq_hf.convert.tokenizer import convert_tokenizer
from rq_hf.convert.weights import concatenate, rqtransformer_weights, rqvae_weights
from rq_hf.images import to_pixels
from rq_hf.metrics import codebook_usage, count_codes
from rq_hf.models.rq_transformer import code_sampling, generation_rq_transformer
from rq_hf.models.rq_transformer.code_sampling import filter_logits

CODEBOOK_STATE = {"weight": "codebook", "cluster_size_ema": "cluster_size", "embed_ema": "cluster_sum"}


def close(ours, theirs, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def grid(latents):
    """Theirs (B, H, W, C) -> ours (B, C, H, W)."""
    return latents.permute(0, 3, 1, 2)


# Refused, by name


@golden.cases("stage1", accepted=False)
def test_refused_rqvae(case):
    with pytest.raises(ValueError, match=re.escape(golden.reason_to_refuse("stage1", case))):
        golden.converted_vae(case)


@golden.cases("stage2", accepted=False)
def test_refused_pipeline(case):
    stage1 = golden.stage1_of(case) or next(
        name for name in golden.all_cases("stage1") if golden.reason_to_refuse("stage1", name) is None
    )
    with pytest.raises(ValueError, match=re.escape(golden.reason_to_refuse("stage2", case))):
        convert_original_checkpoint(
            rqvae=golden.weights("stage1", stage1), rqtransformer=golden.weights("stage2", case)
        )


# RQ-VAE


@golden.cases("stage1")
def test_features_codes_and_reconstruction(case):
    vae, io = golden.converted_vae(case), golden.recorded("stage1", case)
    with torch.no_grad():
        latents = vae.encode(io["in/x"]).latents
        quantization = vae.quantize(latents)
        close(latents, grid(io["out/z_e"]))
        if "out/z_e_code_shape" in io:
            close(vae.patchify(latents), io["out/z_e_code_shape"])
        assert torch.equal(quantization.codes, io["out/codes"])
        assert torch.equal(vae.get_codes(io["in/x"]), io["out/codes"])
        close(quantization.quantized, grid(io["out/z_q"]))
        close(quantization.commitment_loss, io["out/loss_latent"])
        sample = vae(io["in/x"]).sample
        close(sample, io["out/recon"])
        close((sample / 2 + 0.5).clamp(0, 1), io["out/recon_imgs/recon"])


@golden.cases("stage1")
def test_losses_and_gradients(case):
    io, original = golden.recorded("stage1", case), golden.state_dict("stage1", case)
    hparams = golden.config("stage1", case)["arch"]["hparams"]
    vae = golden.converted_vae(case)
    weights = {name: concatenate(parts) for name, parts in rqvae_weights(original, vae).items()}
    x = io["in/x"].clone().requires_grad_()
    out = functional_call(vae, weights, (x,))
    reconstruction_loss = {"mse": F.mse_loss, "l1": F.l1_loss}[hparams["loss_type"]](out.sample, x)
    close(reconstruction_loss, io["out/loss_recon"])
    close(out.commitment_loss, io["out/loss_latent"])
    loss = reconstruction_loss + hparams["latent_loss_weight"] * out.commitment_loss
    close(loss, io["out/loss_total"])
    loss.backward()
    gradients = {name.removeprefix("out/grad/"): g for name, g in io.items() if name.startswith("out/grad/")}
    assert len(gradients) > 1
    close(x.grad, gradients.pop("x"), rtol=1e-3)
    for name, gradient in gradients.items():
        close(original[name].grad, gradient, rtol=1e-3)


@golden.cases("stage1")
@torch.no_grad()
def test_codewords_and_partial_decodes(case):
    vae, io = golden.converted_vae(case), golden.recorded("stage1", case)
    codes = io["out/codes"]
    codewords = vae.embed_codes(codes)  # (B, H, W, D, C)
    close(codewords, io["out/code_emb_with_depth"])
    close(codewords.cumsum(dim=-2), io["out/quant_cumulative"])
    close(vae.unpatchify(codewords.sum(dim=-2)), grid(io["out/embed_code"]))
    close(vae.decode_codes(codes).sample, io["out/decode_code"])
    for d in range(vae.config.depth):
        alone = vae.unpatchify(codewords[..., d, :])
        if "out/code_emb_with_depth_latent_shape" in io:
            close(alone, grid(io["out/code_emb_with_depth_latent_shape"][..., d, :]))
        close(alone, grid(io[f"out/partial_embed_select/{d}"]))
        close(vae.decode(alone).sample, io[f"out/partial_select/{d}"])
        together = vae.unpatchify(codewords[..., : d + 1, :].sum(dim=-2))
        close(together, grid(io[f"out/partial_embed_add/{d}"]))
        close(vae.decode_codes(codes, depth=d + 1).sample, io[f"out/partial_add/{d}"])


@golden.cases("stage1")
def test_soft_codes(case):
    vae, io = golden.converted_vae(case), golden.recorded("stage1", case)
    targets, codes = vae.get_soft_codes(io["in/x"], temperature=0.5)
    close(targets, io["out/soft/targets"])
    assert torch.equal(codes, io["out/soft/codes"])
    torch.manual_seed(golden.MANIFEST["stage1"][case]["seed_soft"])
    _, codes = vae.get_soft_codes(io["in/x"], temperature=0.5, stochastic=True)
    assert torch.equal(codes, io["out/soft_stochastic/codes"])


def assert_codebooks(quantizer, io, prefix):
    for m in range(len(quantizer.codebook)):
        for theirs, ours in CODEBOOK_STATE.items():
            expected = io[f"{prefix}/codebook{m}/{theirs}"]
            close(getattr(quantizer, ours)[m], expected[:-1] if theirs == "weight" else expected, rtol=1e-3)


@golden.cases("stage1")
@pytest.mark.parametrize("start", ["ema", "ema_fresh"])
def test_moving_average_step_by_step(case, start):
    vae, io = golden.converted_vae(case).train(), golden.recorded("stage1", case)
    quantizer = vae.quantizer
    quantizer.restart_unused_codes = False
    if start == "ema_fresh":
        quantizer.cluster_size.zero_()
        quantizer.cluster_sum.copy_(quantizer.codebook)
    assert_codebooks(quantizer, io, f"out/{start}/before")
    for step in (1, 2, 3):
        out = vae.quantize(grid(io[f"in/train/z{step}"]))
        assert torch.equal(out.codes, io[f"out/{start}/step{step}/codes"])
        close(out.quantized, grid(io[f"out/{start}/step{step}/z_q"]), rtol=1e-3)
        close(out.commitment_loss, io[f"out/{start}/step{step}/loss_latent"], rtol=1e-3)
        if step in (1, 3):
            assert_codebooks(quantizer, io, f"out/{start}/after{step}")


@golden.cases("stage1")
@pytest.mark.parametrize("run, inputs", [("restart", "z1"), ("restart_tiled", "z_small")])
def test_restarts_depth_by_depth(case, run, inputs, monkeypatch):
    vae, io = golden.converted_vae(case).train(), golden.recorded("stage1", case)
    quantizer = vae.quantizer
    quantizer.restart_unused_codes = True
    update, checked = quantizer._update_codebook, []

    def update_and_compare(residual, code, d):
        prefix = f"out/{run}/depth{d}"
        close(residual, io[f"{prefix}/residual_in"].flatten(0, -2), rtol=1e-3)
        update(residual, code, d)
        m = 0 if quantizer.shared_codebook else d
        for theirs, ours in CODEBOOK_STATE.items():
            expected = io[f"{prefix}/{theirs}"]
            close(getattr(quantizer, ours)[m], expected[:-1] if theirs == "weight" else expected, rtol=1e-3)
        assert (quantizer.cluster_size[m][io[f"{prefix}/restarted_mask"]] == 1).all()
        checked.append(d)

    monkeypatch.setattr(quantizer, "_update_codebook", update_and_compare)
    torch.manual_seed(golden.MANIFEST["stage1"][case]["seed_restart"])
    out = vae.quantize(grid(io[f"in/train/{inputs}"]))
    assert checked == list(range(vae.config.depth))
    assert torch.equal(out.codes, io[f"out/{run}/codes"])
    close(out.quantized, grid(io[f"out/{run}/z_q"]), rtol=1e-3)
    close(out.commitment_loss, io[f"out/{run}/loss_latent"], rtol=1e-3)


@golden.cases("stage1")
def test_training_forward(case):
    vae, io = golden.converted_vae(case).train(), golden.recorded("stage1", case)
    vae.quantizer.restart_unused_codes = False
    out = vae(io["in/x"])
    assert torch.equal(out.codes, io["out/train_forward/codes"])
    close(out.sample, io["out/train_forward/recon"])
    close(out.commitment_loss, io["out/train_forward/loss_latent"])
    assert_codebooks(vae.quantizer, io, "out/train_forward/after")


@golden.cases("stage1")
def test_moving_average_of_an_rqvae(case):
    io = golden.recorded("stage1", case)
    if "out/state_dict_ema/recon" not in io:
        with pytest.raises(ValueError, match="has no state_dict_ema; it has .*state_dict"):
            golden.converted_vae(case, ema=True)
        return
    with torch.no_grad():
        out = golden.converted_vae(case, ema=True)(io["in/x"])
    assert torch.equal(out.codes, io["out/state_dict_ema/codes"])
    close(out.sample, io["out/state_dict_ema/recon"])
    close(out.commitment_loss, io["out/state_dict_ema/loss_latent"])


# RQ-Transformer


def condition(io, transformer):
    """The recorded condition; where none was given, the id 0 that the authors put in its place."""
    length = transformer.config.cond_length
    return io["in/cond"].reshape(-1, length) if "in/cond" in io else torch.zeros(len(io["in/codes"]), length).long()


@golden.cases("stage2")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_logits(case, attention):
    transformer, io = golden.converted_pipeline(case).transformer, golden.recorded("stage2", case)
    transformer.set_attn_implementation(attention)
    seen = {}
    transformer.spatial_stack.register_forward_hook(lambda module, args, output: seen.update(body_out=output))
    transformer.depth_stack.register_forward_hook(lambda module, args, output: seen.update(head_in=args[0]))
    out = transformer(io["in/codes"], condition(io, transformer))
    close(out.logits, io["out/logits"])
    close(seen["body_out"], io["out/body_out"])
    close(seen["head_in"], io["out/head_in"])
    if "out/cond_logits" in io:
        close(out.cond_logits, io["out/cond_logits"])
    if "out/logits_cond_none" in io:
        no_condition = torch.zeros(len(io["in/codes"]), transformer.config.cond_length).long()
        close(transformer(io["in/codes"], no_condition).logits, io["out/logits_cond_none"])


def residuals_of(pipe, case):
    """The residuals that the recorded soft targets are made of, after a check that they are."""
    vectors = golden.recorded("stage1", golden.stage1_of(case))
    vectors = pipe.vae.encode_to_vectors(vectors["in/x"])
    close(pipe.vae.quantizer.get_soft_codes(vectors, 0.5)[0], golden.recorded("stage2", case)["in/soft_targets"])
    return pipe.vae.quantizer.encode(vectors).residuals


@golden.cases("stage2")
@torch.no_grad()
def test_losses(case):
    pipe, io = golden.converted_pipeline(case), golden.recorded("stage2", case)
    arguments = {
        "hard": {"labels": io["in/codes"]},
        "soft": {"residuals": residuals_of(pipe, case), "target_temperature": 0.5},
    }
    for kind, labels in arguments.items():
        out = pipe.transformer(io["in/codes"], condition(io, pipe.transformer), **labels)
        close(out.depth_losses, io[f"out/codebook_loss_{kind}"])
        close(out.depth_losses.mean(), io[f"out/loss_{kind}"])
        if "out/loss_cond" in io:
            close(out.cond_loss, io["out/loss_cond"])
            close(out.loss, io[f"out/loss_total_txt0.1_img0.9_{kind}"])
        else:
            close(out.loss, io[f"out/loss_{kind}"])


@golden.cases("stage2")
def test_gradients(case):
    pipe, io, original = (
        golden.converted_pipeline(case),
        golden.recorded("stage2", case),
        golden.state_dict("stage2", case),
    )
    transformer = pipe.transformer
    weights = {name: concatenate(parts) for name, parts in rqtransformer_weights(original, transformer).items()}
    labels = {"residuals": residuals_of(pipe, case), "target_temperature": 0.5, "return_logits": False}
    arguments = (io["in/codes"], condition(io, transformer))
    functional_call(transformer, weights, arguments, labels).loss.backward()
    gradients = {name.removeprefix("out/grad/"): g for name, g in io.items() if name.startswith("out/grad/")}
    assert gradients
    for name, gradient in gradients.items():
        ours = original[name].grad
        close(torch.zeros_like(gradient) if ours is None else ours, gradient, rtol=1e-3)


@golden.cases("stage2")
def test_greedy_samples(case):
    transformer, io = golden.converted_pipeline(case).transformer, golden.recorded("stage2", case)
    cond_ids, logits = condition(io, transformer), []
    transformer.classifier.register_forward_hook(lambda module, args, output: logits.append(output[:, 0]))
    codes = transformer.generate(cond_ids, do_sample=False)
    assert torch.equal(codes, io["out/sample/greedy"])
    close(torch.stack(logits, dim=1).view_as(io["out/sample/greedy_logits"]), io["out/sample/greedy_logits"])


@golden.cases("stage2")
def test_greedy_completions(case):
    transformer, io = golden.converted_pipeline(case).transformer, golden.recorded("stage2", case)
    completions = {name: codes for name, codes in io.items() if name.startswith("out/sample/partial_greedy_start_")}
    assert completions
    for name, expected in completions.items():
        row, column = map(int, name.split("_")[-2:])
        codes = transformer.generate(
            condition(io, transformer),
            prefix_codes=io["in/sample_partial_init"],
            start=row * transformer.config.code_shape[1] + column,
            do_sample=False,
        )
        assert torch.equal(codes, expected), name


@golden.cases("stage2")
def test_seeded_samples(case, monkeypatch):
    """With their draw, which takes other random numbers than ours: `multinomial` of what top-k and top-p leave."""

    def draw_as_they_do(logits, top_k, top_p, uniform):
        return filter_logits(logits, top_k, top_p).softmax(dim=-1).multinomial(1).squeeze(-1)

    monkeypatch.setattr(code_sampling, "sample_codes", draw_as_they_do)
    no_numbers = lambda generator, shape, device: torch.zeros(shape)  # noqa: E731
    monkeypatch.setattr(generation_rq_transformer, "uniform_numbers", no_numbers)
    transformer, io = golden.converted_pipeline(case).transformer, golden.recorded("stage2", case)
    settings = dict(golden.MANIFEST["stage2"][case]["seeded_sampling"])
    torch.manual_seed(settings.pop("seed"))
    settings = {k: v[0] if isinstance(v, list) and len(v) == 1 else v for k, v in settings.items()}
    assert torch.equal(transformer.generate(condition(io, transformer), **settings), io["out/sample/seeded"])


@golden.cases("stage2")
@torch.no_grad()
def test_moving_average_of_an_rqtransformer(case):
    io = golden.recorded("stage2", case)
    if "out/state_dict_ema/logits" not in io:
        with pytest.raises(ValueError, match="has no state_dict_ema; it has .*state_dict"):
            golden.converted_pipeline(case, ema=True)
        return
    transformer = golden.converted_pipeline(case, ema=True).transformer
    close(transformer(io["in/codes"], condition(io, transformer)).logits, io["out/state_dict_ema/logits"])


# Codebook statistics, sampling, tokenizer, transforms


@golden.require("metrics")
def test_codebook_statistics():
    io = load_file(golden.FOLDER / "metrics" / "io.safetensors")
    histogram, maps = io["out/codebook/usage_histogram"], (io["in/codebook/codes0"], io["in/codebook/codes1"])
    counts = sum(count_codes(codes, histogram.shape[-1]) for codes in maps)
    close(counts / maps[0][0, :, :, 0].numel(), histogram)
    close(codebook_usage(counts)["perplexity"], io["out/codebook/perplexity_exp_entropy"])


@golden.require("sampling")
def test_filtered_probabilities():
    io = load_file(golden.FOLDER / "sampling" / "filters.safetensors")
    combos = {c["index"]: c for c in json.loads((golden.FOLDER / "sampling" / "combos.json").read_text())}
    compared = 0
    for name, expected in io.items():
        if not name.startswith("out/probs/"):
            continue
        kind, index = name.split("/")[2:]
        combo, logits = combos[int(index)], io[f"in/logits/{kind}"].float()
        top_p = 1.0 if combo["top_p"] is None else combo["top_p"]
        logits = logits / combo["temperature"]
        if kind == "nan_inf":  # a NaN is no logit here: drawing from it is an error
            logits, expected = (rows[~io["in/logits/nan_inf"].isnan().any(dim=-1)] for rows in (logits, expected))
        probabilities = filter_logits(logits, combo["top_k"] or logits.shape[-1], top_p).softmax(dim=-1)
        if kind in ("ties", "exact_halves"):  # which of equal codes survive depends on the sort
            probabilities, expected = probabilities.sort().values, expected.sort().values
        close(probabilities, expected)
        compared += 1
    assert compared


@golden.require("tokenizer")
@golden.require("tokenizer.json")
def test_tokenizer_ids():
    compared = 0
    tokenizers = {}

    def compare(text, length, ids):
        if length not in tokenizers:
            tokenizers[length] = convert_tokenizer(golden.FOLDER / "tokenizer", length, name="bpe16k_huggingface")
        assert tokenizers[length](text, padding="max_length", truncation=True)["input_ids"] == ids, text

    runs = json.loads((golden.FOLDER / "tokenizer.json").read_text())
    for run in runs["runs"]:
        if run["tokenizer"] == "bpe16k_huggingface":
            for text, ids in zip(runs["texts"], run["ids"], strict=True):
                compare(text, run["context_length"], ids)
                compared += 1
    for case in json.loads((golden.FOLDER / "tokenizer" / "cases.json").read_text()):
        if case["lowercase"]:
            compare(case["text"], case["context_length"], case["ids"])
            compared += 1
    assert compared


@golden.require("transforms.safetensors")
def test_validation_transforms():
    io = load_file(golden.FOLDER / "transforms.safetensors")
    outputs = {name: pixels for name, pixels in io.items() if name.startswith("out/")}
    assert outputs
    for name, expected in outputs.items():
        _, transform, picture = name.split("/")
        kind, resolution = re.fullmatch(r"(ffhq|dalle-vqvae)(\d+)_val", transform).groups()
        image = Image.fromarray(np.asarray(io[f"in/image/{picture}"]))
        close(to_pixels(image, int(resolution), center_crop=kind == "ffhq"), expected)
