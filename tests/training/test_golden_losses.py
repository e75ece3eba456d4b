"""Losses of stage 1 against recorded runs of the authors' implementation (see `golden.py`)."""

import json
import zlib

import golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from rq_hf.metrics import frechet_distance
from rq_hf.metrics.lpips import LPIPS, TAPS
from rq_hf.training import EMA, create_scheduler
from rq_hf.training.adversarial import PatchDiscriminator, adaptive_weight, hinge_loss, vanilla_loss

pytestmark = [golden.require("losses"), golden.require("metrics")]


@pytest.fixture(scope="module")
def io():
    return load_file(golden.FOLDER / "losses" / "io.safetensors")


def under(io, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in io.items() if name.startswith(prefix)}


def close(ours, theirs, **tolerance):
    torch.testing.assert_close(ours, theirs, **({"rtol": 1e-4, "atol": 1e-5} | tolerance))


def test_adversarial_losses(io):
    real, fake = io["in/gan/logits_real"], io["in/gan/logits_fake"]
    close(hinge_loss(real, fake), io["out/gan/hinge_d_mean"])
    close(vanilla_loss(real, fake), io["out/gan/vanilla_d_mean"])
    close(-fake.mean(), io["out/gan/vanilla_g_mean"])


@pytest.mark.parametrize("norm", ["batch", "act"])
@torch.no_grad()
def test_discriminator(io, norm):
    name = f"disc_{norm}norm"
    fake, real = io[f"in/{name}/fake"], io[f"in/{name}/real"]
    discriminator = PatchDiscriminator(width=8, num_layers=2, norm=norm)
    discriminator.load_state_dict(under(io, f"in/{name}/state_dict/"))
    discriminator.eval()
    close(discriminator(fake), io[f"out/{name}/eval_out_fake"])
    close(discriminator(real), io[f"out/{name}/eval_out_real"])
    discriminator.train()
    close(discriminator(fake), io[f"out/{name}/train_out_fake"])
    close(discriminator(real), io[f"out/{name}/train_out_real"])
    state = discriminator.state_dict()
    for key, expected in under(io, f"out/{name}/after_train_forward/").items():
        close(state[key], expected)
    close(discriminator.eval()(fake), io[f"out/{name}/eval_after_train_out_fake"])


@pytest.mark.parametrize("kind, scale", [("plain", 1.0), ("tiny_gan", 1e-9), ("big_gan", 100.0), ("zero_gan", 0.0)])
def test_adaptive_weight(io, kind, scale):
    last_layer = io["in/adaptive/last_layer_weight"].clone().requires_grad_()
    sample = F.conv2d(io["in/adaptive/features"], last_layer, padding=1)
    reconstruction = F.mse_loss(sample, io["in/adaptive/target"])
    generator = -F.conv2d(torch.tanh(sample), io["in/adaptive/disc_weight"] * scale).mean()
    close(reconstruction, io[f"out/adaptive/{kind}/nll_loss"])
    close(generator, io[f"out/adaptive/{kind}/g_loss"])
    close(adaptive_weight(reconstruction, generator, last_layer), io[f"out/adaptive/{kind}/weight"])


def from_recipe(name, tensor, heads):
    """Reproducible weights that need no file (golden README, "Weight recipe")."""
    name = name.replace("heads.", "lin").replace(".weight", ".model.1.weight") if heads else name
    if not heads:
        index = int(name.split(".")[1])
        part = next(i for i, tap in enumerate(TAPS) if index <= tap) + 1
        name = f"net.slice{part}.{name.removeprefix('features.')}"
    state = np.random.RandomState((zlib.crc32(f"lpips.{name}".encode()) + 991) % 2**32)
    draws = state.standard_normal(tuple(tensor.shape))
    if heads:
        return torch.from_numpy(np.abs(np.float32(draws * 0.1)))
    deviation = np.sqrt(2 / (tensor.shape[1] * 9)) if tensor.ndim == 4 else 0.05
    return torch.from_numpy(np.float32(draws * deviation))


@pytest.fixture(scope="module")
def lpips(io, tmp_path_factory):
    """Through the files that a user names."""
    folder, template = tmp_path_factory.mktemp("lpips"), LPIPS().state_dict()
    vgg = {name: from_recipe(name, w, heads=False) for name, w in template.items() if name.startswith("features.")}
    save_file(vgg, folder / "vgg16.safetensors")
    torch.save(under(io, "in/lpips/state_dict/"), folder / "vgg.pth")
    return LPIPS.from_pretrained(str(folder / "vgg16.safetensors"), str(folder / "vgg.pth"))


@torch.no_grad()
def test_lpips_parts(io, lpips):
    for i, head in enumerate(lpips.heads):
        close(head.weight, io[f"in/lpips/state_dict/lin{i}.model.1.weight"])
        close(head.weight, from_recipe(f"heads.{i}.weight", head.weight, heads=True))
        features = [F.normalize(io[f"in/lpips/features{k}/{i}"], dim=1, eps=1e-10) for k in (0, 1)]
        if f"out/lpips/normalized0/{i}" in io:
            close(features[0], io[f"out/lpips/normalized0/{i}"])
        distance = head((features[0] - features[1]).square())
        close(distance, io[f"out/lpips/lin_out/{i}"])
        close(distance.mean(dim=(1, 2, 3)), io[f"out/lpips/spatial_average/{i}"].flatten())
    close((io["in/lpips/image0"] - lpips.shift) / lpips.scale, io["out/lpips/scaling_layer/out0"])


@torch.no_grad()
def test_lpips(io, lpips):
    distances = lpips(io["in/lpips/image0"], io["in/lpips/image1"])
    close(distances, io["out/lpips/full_recipe_vgg_none"].flatten())
    assert torch.equal(lpips(io["in/lpips/image0"], io["in/lpips/image0"]), torch.zeros(2))


def test_frechet_distance():
    metrics = load_file(golden.FOLDER / "metrics" / "io.safetensors")
    for pair, atol in (("a_b", 1e-6), ("a_a", 1e-6), ("a_few", 1e-3), ("few_b", 1e-3)):
        features = [metrics[f"in/fid/features_{name}"] for name in pair.split("_")]
        assert abs(frechet_distance(*features) - metrics[f"out/fid/{pair}"].item()) < atol


@pytest.mark.parametrize(
    ("case", "lr_scheduler", "warmup_epochs"),
    [("imagenet_stage1", "constant", 0.5), ("no_warmup_cosine", "cosine", 0)],
)
def test_learning_rates(case, lr_scheduler, warmup_epochs):
    recorded = json.loads((golden.FOLDER / "losses" / "lr_schedules.json").read_text())[case]
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=recorded["init_lr"])
    num_warmup_steps = round(warmup_epochs * recorded["steps_per_epoch"])
    scheduler = create_scheduler(optimizer, lr_scheduler, num_warmup_steps, len(recorded["lr_used_at_step"]))
    for expected in recorded["lr_used_at_step"]:
        assert scheduler.get_last_lr()[0] == pytest.approx(expected)
        optimizer.step()
        scheduler.step()


def test_ema(io):
    model = nn.Linear(3, 2)
    model.load_state_dict(under(io, "in/model_ema/step0/"))
    ema = EMA(model, decay=0.999)
    for step, weights in ((0, 1), (1, 2), (20000, 3)):
        model.load_state_dict(under(io, f"in/model_ema/step{weights}/"))
        ema.step = step
        ema.update()
        close(ema.average, under(io, f"out/model_ema/after_step{step}/"))
