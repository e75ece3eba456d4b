"""The MAR transformer against recorded runs of the authors' implementation (see tests/support/golden_mar.py)."""

import functools
import re

import golden_mar as golden
import torch
from torch.testing import assert_close

from rq_hf.models.continuous_latents import decode_latents
from rq_hf.models.mar_transformer import generation_mar_transformer
from rq_hf.models.mar_transformer.denoising import AncestralStep, denoise
from rq_hf.models.mar_transformer.diffusion import (
    DiffusionProcess,
    add_noise,
    diffusion_loss,
    spaced_timesteps,
)
from rq_hf.models.mar_transformer.masking import mask_rate, sampling_masks
from rq_hf.training.loop import create_optimizer

close = functools.partial(assert_close, rtol=1e-4, atol=1e-5)


def sampled_close(actual, expected, num_steps):
    """At t = 999 the chain multiplies rounding errors by 2e4, and few steps even them out less."""
    assert_close(actual, expected, rtol=0, atol=1e-4 if num_steps >= 100 else 1e-2 if num_steps >= 12 else 3e-2)


def runs_of(io, prefix):
    """The names of recorded runs below a prefix, "in/sample" say."""
    return sorted({name.removeprefix(f"{prefix}/").split("/")[0] for name in io if name.startswith(f"{prefix}/")})


def model_and_records(case):
    return golden.converted_transformer(case), golden.recorded(case)


# The diffusion process


@golden.require("diffusion")
def test_tables_of_the_process():
    io = golden.diffusion()
    for steps in {name.split("/")[1] for name in io if name.endswith("/timestep_map")}:
        timesteps = torch.arange(1000) if steps == "train" else spaced_timesteps(int(steps))
        assert torch.equal(timesteps, io[f"out/{steps}/timestep_map"])
        process = DiffusionProcess.over(timesteps)
        for name in [name for name in io if re.fullmatch(f"out/{steps}/[a-z_0-9]+", name)]:
            if not name.endswith("timestep_map"):
                assert_close(getattr(process, name.split("/")[-1]), io[name], rtol=1e-9, atol=0, msg=name)


@golden.require("diffusion")
def test_reverse_steps():
    io, seen = golden.diffusion(), 0
    for name in [name for name in io if "sample_temperature" in name]:
        _, steps, index, what = name.split("/")
        if steps == "train":
            continue
        steps, index, temperature = int(steps), int(index.removeprefix("index")), float(what.split("temperature")[1])
        chain_index = steps - 1 - index
        noise = io[f"in/{steps}/noise"]
        step = AncestralStep(spaced_timesteps(steps), noise.expand(1 + steps, -1, -1), temperature)
        predicted, fraction = io[f"in/{steps}/model_output"].chunk(2, dim=-1)
        x = step(chain_index, io[f"in/{steps}/x"], predicted, fraction)
        is_first = step.timesteps[chain_index] == 999
        assert_close(x, io[name], rtol=1e-4, atol=2e-3 if is_first else 1e-5, msg=name)
        seen += 1
    assert seen


@golden.require("diffusion")
def test_loss_of_the_process():
    io = golden.diffusion()
    tokens, t, noise = (io[f"in/loss/{name}"] for name in ("x_start", "t", "noise"))
    prediction = io["in/loss/model_output"].clone().requires_grad_()
    close(add_noise(tokens, noise, t), io["out/loss/x_t"])
    squared_errors, bounds = diffusion_loss(tokens, noise, t, prediction)
    close(squared_errors, io["out/loss/mse"])
    close(bounds, io["out/loss/vb"])
    (squared_errors + bounds).sum().backward()
    assert_close(prediction.grad, io["out/loss/grad_model_output"], rtol=1e-3, atol=1e-5)


# Masks


@golden.cases("mar")
def test_masks(case):
    io, options = golden.recorded(case), golden.config("mar", case)
    rates = mask_rate(io["in/mask_rate_quantiles"], options["mask_ratio_min"])
    assert_close(rates, io["out/mask_rate_ppf"], rtol=1e-9, atol=1e-9, check_dtype=False)
    num_tokens = io["in/orders"].shape[-1]
    assert torch.equal((num_tokens * rates).ceil().long(), io["out/num_masked_ppf"].long())
    for rate, mask in zip(io["in/mask_rates"], io["out/random_masking"]):
        ranks = io["in/orders"].argsort(dim=-1)
        assert torch.equal(ranks < (num_tokens * rate).ceil(), mask.bool())


@golden.cases("mar")
def test_masks_of_sampling(case):
    io = golden.recorded(case)
    for run in runs_of(io, "in/sample"):
        recorded = io[f"out/sample/{run}/masks"].bool()
        masks = sampling_masks(io[f"in/sample/{run}/orders"], torch.ones_like(recorded[0]), len(recorded))
        assert torch.equal(torch.stack(masks[:-1]), recorded)
        assert not masks[-1].any()


# The networks


@golden.cases("mar")
def test_patchify(case):
    model, io = model_and_records(case)
    tokens = model.patchify(io["in/latents"])
    assert torch.equal(tokens, io["out/tokens"])
    assert torch.equal(model.unpatchify(tokens), io["out/unpatchify"])


@golden.cases("mar")
@torch.no_grad()
def test_encoder_and_decoder(case):
    model, io = model_and_records(case)
    tokens, labels, mask = io["out/tokens"], io["in/labels"][:, None], io["out/random_masking"][1].bool()
    inputs = {}
    for name in ("encoder", "decoder"):
        hook = functools.partial(lambda name, module, args: inputs.__setitem__(name, args[0]), name)
        getattr(model, name).register_forward_pre_hook(hook)
    outputs = {}
    model.encoder.register_forward_hook(lambda module, args, output: outputs.__setitem__("encoder", output))
    close(model.predict_conditions(tokens, labels, mask), io["out/masked/z"])
    close(inputs["encoder"], io["out/masked/encoder_in"])
    close(outputs["encoder"], io["out/masked/encoder_out"])
    close(inputs["decoder"], io["out/masked/decoder_in"])
    hidden = torch.ones_like(mask)
    null = torch.full_like(labels, model.config.null_cond_id)
    close(model.predict_conditions(tokens, null, mask), io["out/unconditional/z"])
    close(model.predict_conditions(tokens, labels, hidden), io["out/all_masked/z"])
    close(model.predict_conditions(tokens, labels, ~hidden), io["out/none_masked/z"])
    if "out/model/z" in io:
        trained = golden.converted_transformer(case, ema=False)
        close(trained.predict_conditions(tokens, labels, mask), io["out/model/z"])


@golden.cases("mar")
@torch.no_grad()
def test_head(case):
    model, io = model_and_records(case)
    x, t, conditions = (io[f"in/net/{name}"] for name in "xtc")
    close(model.head(x, t, conditions), io["out/net/output"])
    close(model.head.embed_timesteps(t, torch.float32), io["out/net/time_embed"])


# Losses and gradients


@golden.cases("mar")
def test_loss_and_its_gradient(case):
    model, io = model_and_records(case)
    tokens, z = io["out/tokens"], io["out/masked/z"].clone().requires_grad_()
    mask = io["out/random_masking"][1].bool()
    repeats = len(io["in/loss/t"]) // mask.numel()
    t, noise = io["in/loss/t"], io["in/loss/noise"]
    rows = tokens.flatten(0, 1).repeat(repeats, 1)
    prediction = model.head(add_noise(rows, noise, t), t, z.flatten(0, 1).repeat(repeats, 1))
    squared_errors, bounds = diffusion_loss(rows, noise, t, prediction)
    close(squared_errors, io["out/loss/per_token/mse"])
    close(bounds, io["out/loss/per_token/vb"])
    loss = (squared_errors + bounds)[mask.flatten().repeat(repeats)].mean()
    close(loss, io["out/loss/value"])
    loss.backward()
    assert_close(z.grad, io["out/loss/grad_z"], rtol=1e-3, atol=1e-5)


def recorded_forward(model, io, label_drop_prob):
    """Arguments of the model for the recorded draws of a whole training forward."""
    num_tokens = model.config.num_tokens
    mask = io["in/forward/orders"].argsort(dim=-1) < (num_tokens * io["in/forward/mask_rate"]).ceil()
    dropped = io["in/forward/drop_rand"] < label_drop_prob
    shape = (-1, *mask.shape)
    return {
        "latents": io["in/latents"],
        "cond_ids": io["in/labels"].masked_fill(dropped, model.config.null_cond_id),
        "mask": mask,
        "noise": io["in/forward/noise"].view(*shape, io["in/forward/noise"].shape[-1]),
        "timesteps": io["in/forward/t"].view(shape),
    }


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for stack in (model.config.encoder_config, model.config.decoder_config):
        stack.attention_dropout = 0.0
    return model.train()


@golden.cases("mar")
def test_training_forward(case):
    model, io = model_and_records(case)
    arguments = recorded_forward(model, io, golden.config("mar", case)["label_drop_prob"])
    assert torch.equal(arguments["mask"], io["out/forward/mask"].bool())
    output = without_dropout(model)(**arguments)
    close(output.loss, io["out/forward/loss"])
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert_close(norm, io["out/forward/grad_norm"], rtol=1e-3, atol=1e-5)
    recorded = {name.removeprefix("out/forward/grad/"): io[name] for name in io if "/grad/" in name}
    step = golden.MANIFEST["mar"][case].get("train_step")
    scale = 1 if step is None else min(1, step["grad_clip"] / norm)  # the recorded step clipped them in place
    assert recorded
    ours = golden.by_original_names(model, gradients)
    for name, gradient in recorded.items():
        assert_close(scale * ours[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    arguments["cond_ids"] = io["in/labels"]
    close(model.eval()(**arguments).loss, io["out/forward_eval/loss"])


@golden.cases("mar", lambda case: any("train_step" in name for name in golden.recorded(case)))
def test_training_step(case):
    model, io = model_and_records(case)
    recipe = golden.MANIFEST["mar"][case]["train_step"]
    options = golden.config("mar", case)
    model = without_dropout(model)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = create_optimizer(model, recipe["lr"], (0.9, 0.95), recipe["weight_decay"])
    model(**recorded_forward(model, io, options["label_drop_prob"])).loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["grad_clip"])
    assert_close(norm, io["out/train_step/grad_norm"], rtol=1e-3, atol=1e-5)
    optimizer.step()
    after = golden.by_original_names(model, dict(model.named_parameters()))
    decay = recipe["ema_rate"]
    average = {name: decay * old + (1 - decay) * model.get_parameter(name) for name, old in before.items()}
    average = golden.by_original_names(model, average)
    for kind, weights in (("after", after), ("ema", average)):
        names = [name for name in io if name.startswith(f"out/train_step/{kind}/")]
        assert names
        for name in names:
            weight = weights[name.split("/", 3)[-1]]
            assert_close(weight.reshape(io[name].shape), io[name], rtol=1e-4, atol=1e-5, msg=name)


@golden.cases("mar", lambda case: (golden.FOLDER / "mar" / case / "weight_decay.json").exists())
def test_groups_of_weight_decay(case):
    model = golden.converted_transformer(case)
    decayed, others = create_optimizer(model, 1e-3, (0.9, 0.95), 0.02).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ours = golden.by_original_names(model, {names[id(p)]: torch.ones_like(p) for p in decayed["params"]})
    assert set(ours) == golden.decayed_names(case)


# Sampling


@golden.cases("mar")
@torch.no_grad()
def test_chains_of_the_head(case):
    model, io = model_and_records(case)
    for run in runs_of(io, "in/diffloss"):
        if run == "z":
            continue
        steps, temperature, guidance = re.fullmatch(r"steps(\d+)_temperature([\d.]+)_cfg([\d.]+)", run).groups()
        start, noise = io[f"in/diffloss/{run}/init_noise"], io[f"in/diffloss/{run}/step_noise"]
        is_guided = float(guidance) != 1
        z = io["in/diffloss/z"].view(2, len(start), -1)
        tokens = denoise(
            model.head,
            z if is_guided else z[:1],
            torch.cat([start[None], noise[:, : len(start)]]),
            temperature=float(temperature),
            guidance_scales=torch.full([len(start), 1], float(guidance)) if is_guided else None,
        )
        sampled_close(tokens, io[f"out/diffloss/{run}"], int(steps))


def sample_like(model, io, run, num_steps, monkeypatch):
    """Samples with the recorded draws of a run: latents, and the tokens after every iteration."""
    pattern = r"iter(\d+)_cfg([\d.]+)_(\w+?)_temperature([\d.]+)(_unconditional)?"
    iterations, guidance, schedule, temperature, unconditional = re.fullmatch(pattern, run).groups()
    prefix = f"in/sample/{run}/"
    recorded = {name.removeprefix(prefix): tensor for name, tensor in io.items() if name.startswith(prefix)}
    orders, tokens = recorded["orders"], []
    starts = [recorded[name] for name in sorted(recorded) if name.endswith("init_noise")]
    steps = [recorded[name] for name in sorted(recorded) if name.endswith("step_noise")]
    draws = iter(
        [torch.cat([start[None], noise[:, : len(start)]]) for start, noise in zip(starts, steps, strict=True)]
    )
    monkeypatch.setattr(generation_mar_transformer, "uniform_numbers", lambda *args: orders.argsort(dim=-1))
    monkeypatch.setattr(generation_mar_transformer, "normal_numbers", lambda *args: next(draws))
    null = torch.full([len(orders)], model.config.null_cond_id)
    latents = model.generate(
        recorded["labels"] if unconditional is None else null,
        num_iterations=int(iterations),
        num_inference_steps=num_steps,
        temperature=float(temperature),
        guidance_scale=float(guidance),
        guidance_schedule=schedule,
        on_iteration=lambda k, latents, mask: tokens.append(model.patchify(latents)),
    )
    assert next(draws, None) is None
    return latents, tokens


@golden.cases("mar")
def test_whole_samples(case, monkeypatch):
    model, io = model_and_records(case)
    options = golden.config("mar", case)
    num_steps = int(options["num_sampling_steps"])
    for run in runs_of(io, "in/sample"):
        latents, tokens = sample_like(model, io, run, num_steps, monkeypatch)
        masks = io[f"out/sample/{run}/masks"].bool()
        masks = [*masks, torch.zeros_like(masks[0])]
        for k, known in enumerate(tokens):
            revealed = masks[k] & ~masks[k + 1]
            sampled_close(known[revealed], io[f"out/sample/{run}/{k:03d}/tokens"], num_steps)
        sampled_close(latents, io[f"out/sample/{run}/latents"], num_steps)
        if options["vae"] is not None:
            with torch.no_grad():
                pixels = decode_latents(golden.converted_vae(options["vae"]), latents)
            images = (pixels / 2 + 0.5).mul(255).clamp(0, 255).round().permute(0, 2, 3, 1)
            assert_close(images, io[f"out/sample/{run}/uint8"].float(), rtol=0, atol=2)
