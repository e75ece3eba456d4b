import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

from rq_hf.files import checksum
from rq_hf.metrics import FeatureNetwork, load_feature_network
from rq_hf.metrics.feature_networks import INCEPTION_INPUTS, INCEPTION_SHA256

TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY_IMAGES = {"image_size": 8, "patch_size": 4}
CLIP = CLIPConfig(
    text_config=TINY | {"vocab_size": 9, "max_position_embeddings": 8},
    vision_config=TINY | TINY_IMAGES,
    projection_dim=12,
)
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
MODELS = {
    "clip": lambda: CLIPModel(CLIP),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**TINY, **TINY_IMAGES)),
    "dinov2_with_registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**TINY, **TINY_IMAGES)),
}


def random_images(*shape):
    return torch.randint(256, shape, dtype=torch.uint8)


def bilinear(positions, length):
    """Shares (299, length) of the pixels of a row in its values at the positions, constant beyond the outer ones."""
    shares, positions = np.zeros((299, length)), positions.clip(0, length - 1)
    for row, position in zip(shares, positions):
        lower = int(position)
        row[lower] += 1 - (position - lower)
        row[min(lower + 1, length - 1)] += position - lower
    return shares


def bicubic(length):
    """As Pillow: Keys' kernel with a = -1/2, as much wider as the row becomes shorter."""
    scale = max(length / 299, 1)
    centres = (np.arange(299)[:, None] + 0.5) * length / 299
    x = np.abs(np.arange(length) + 0.5 - centres) / scale
    shares = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
    return shares / shares.sum(axis=1, keepdims=True)


SHARES = {
    "pytorch-fid": lambda length: bilinear((np.arange(299) + 0.5) * length / 299 - 0.5, length),
    "torch-fidelity": lambda length: bilinear(np.arange(299) * length / 299, length),
    "clean-fid": bicubic,
}
SCALES = {"pytorch-fid": (127.5, 127.5), "torch-fidelity": (128, 128), "clean-fid": (128, 128)}  # shift, divisor


class TestInceptionInputs:
    @pytest.mark.parametrize("size", [(7, 5), (299, 299), (320, 640)])
    @pytest.mark.parametrize("protocol", INCEPTION_INPUTS)
    def test_resizing(self, protocol, size):
        images = random_images(2, 3, *size)
        rows, columns = map(SHARES[protocol], size)
        shift, divisor = SCALES[protocol]
        expected = ((rows @ images.double().numpy() @ columns.T).clip(0, 255) - shift) / divisor
        found = INCEPTION_INPUTS[protocol](images)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=0, atol=3e-4)

    def test_tensorflow_moves_the_image_to_the_upper_left(self):
        columns = torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 2, 2)
        left = [INCEPTION_INPUTS[protocol](columns)[0, 0, 0] for protocol in ("torch-fidelity", "pytorch-fid")]
        reached = [int((row >= row.max()).int().argmax()) for row in left]
        assert reached == [150, 224]

    def test_floats_are_the_same_images(self):
        images, prepare = random_images(1, 3, 8, 8), INCEPTION_INPUTS["pytorch-fid"]
        assert torch.equal(prepare(images), prepare(images / 255))


class TestInception:
    @pytest.mark.parametrize("protocol", ["torch-fidelity", "clean-fid"])
    def test_protocols_differ_before_the_network_and_in_the_bias(self, inception, inception_file, protocol):
        weights, sha256 = inception_file
        network, images = load_feature_network(protocol, weights, sha256), random_images(1, 3, 16, 24)
        output = network(images)
        with torch.no_grad():
            features, logits = inception.module(INCEPTION_INPUTS[protocol](images))
        torch.testing.assert_close(output.features, features)
        bias = inception.module.fc.bias if protocol == "torch-fidelity" else 0
        torch.testing.assert_close(output.logits, logits - bias, rtol=1e-4, atol=1e-4)
        assert network.num_features == 2048
        name = f"inception-{sha256[:8]}"
        assert network.identity() == {"network": name, "protocol": protocol, "network_sha256": sha256}

    def test_only_the_weights_of_fid_give_fid(self, inception, inception_file):
        assert inception.distance_name == f"Fréchet distance (inception-{inception_file[1][:8]})"

    def test_features_do_not_depend_on_the_batch(self, inception):
        images = random_images(2, 3, 32, 32)
        together = inception(images)
        for i, image in enumerate(images.split(1)):
            alone = inception(image)
            torch.testing.assert_close(alone.features[0], together.features[i], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(alone.logits[0], together.logits[i], rtol=1e-4, atol=1e-4)

    def test_reads_safetensors(self, inception, inception_file, tmp_path):
        path = tmp_path / "inception.safetensors"
        save_file(torch.load(inception_file[0], mmap=True), path)
        network = load_feature_network("pytorch-fid", str(path), checksum(path))
        assert torch.equal(network.module.Mixed_7c.branch_pool.bn.bias, inception.module.Mixed_7c.branch_pool.bn.bias)

    def test_refuses_another_file_than_that_of_fid(self, inception_file):
        weights, sha256 = inception_file
        with pytest.raises(ValueError, match=f"has the SHA-256 {sha256}, not {INCEPTION_SHA256}; name the hash"):
            load_feature_network("clean-fid", weights)


def save_model(folder, kind, **changes):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    model.save_pretrained(folder)
    settings = {"size": {"shortest_edge": 10}, "crop_size": {"height": 8, "width": 8}, "do_center_crop": True}
    statistics = {"image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | statistics | changes))
    return model


class TestTransformers:
    @pytest.mark.parametrize("kind", MODELS)
    @torch.no_grad()
    def test_features(self, tmp_path, kind):
        folder = tmp_path / "tiny"
        folder.mkdir()
        model, images = save_model(folder, kind), random_images(3, 3, 8, 8)
        pixels = (images / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        if kind == "clip":
            expected = model.get_image_features(pixel_values=pixels)
            expected = getattr(expected, "pooler_output", expected)
        else:
            expected = model(pixels).last_hidden_state[:, 0]
        network = load_feature_network(str(folder))
        output = network(images)
        torch.testing.assert_close(output.features, expected)
        assert output.logits is None
        assert network.num_features == expected.shape[1]
        assert network.distance_name == "Fréchet distance (tiny)"
        sha256 = checksum(folder / "model.safetensors")
        assert network.identity() == {"network": "tiny", "protocol": "bicubic 8", "network_sha256": sha256}

    def test_computes_in_single_precision(self, tmp_path):
        model = save_model(tmp_path, "dinov2")
        model.bfloat16().save_pretrained(tmp_path)
        assert load_feature_network(str(tmp_path))(random_images(1, 3, 8, 8)).features.dtype == torch.float32

    def test_resizes_like_pillow_without_cropping(self, tmp_path):
        save_model(tmp_path, "clip")
        images = random_images(1, 3, 20, 13)
        prepared = load_feature_network(str(tmp_path)).prepare(images)
        channels = [Image.fromarray(channel.numpy().astype(np.float32)) for channel in images[0]]
        resized = torch.tensor(np.stack([c.resize((8, 8), Image.Resampling.BICUBIC) for c in channels]) / 255)
        expected = (resized.clamp(0, 1) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        torch.testing.assert_close(prepared[0], expected, rtol=0, atol=1e-4)

    def test_reads_pytorch_files(self, tmp_path):
        model, images = save_model(tmp_path, "dinov2"), random_images(1, 3, 8, 8)
        expected = load_feature_network(str(tmp_path))(images).features
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        network = load_feature_network(str(tmp_path))
        assert torch.equal(network(images).features, expected)
        assert network.sha256 == checksum(tmp_path / "pytorch_model.bin")

    def test_refuses_missing_weights(self, tmp_path):
        save_model(tmp_path, "clip")
        weights = load_file(tmp_path / "model.safetensors")
        del weights["visual_projection.weight"]
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match="lacks visual_projection.weight and 0 more weights"):
            load_feature_network(str(tmp_path))

    def test_refuses_weights_in_parts(self, tmp_path):
        model = save_model(tmp_path, "clip")
        (tmp_path / "model.safetensors").unlink()
        model.save_pretrained(tmp_path, max_shard_size="10KB")
        with pytest.raises(ValueError, match="in one file, model.safetensors or pytorch_model.bin"):
            load_feature_network(str(tmp_path))

    def test_refuses_another_hash(self, tmp_path):
        save_model(tmp_path, "clip")
        with pytest.raises(ValueError, match=f"has the SHA-256 [0-9a-f]+, not {INCEPTION_SHA256}"):
            load_feature_network(str(tmp_path), sha256=INCEPTION_SHA256)

    def test_refuses_other_models(self, tmp_path):
        ViTModel(ViTConfig(**TINY, **TINY_IMAGES)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="'pytorch-fid', .* a model of one of .*'clip', .* is a model of vit$"):
            load_feature_network(str(tmp_path))


class Precisions(nn.Module):
    """Its features are whether products are in full precision while it computes."""

    def forward(self, pixels):
        backends = torch.backends
        found = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv]
        full = [operation.fp32_precision == "ieee" for operation in found]
        return torch.tensor([*full, not torch.is_autocast_enabled("cpu")]).float().expand(len(pixels), -1)


class Thirds(nn.Module):
    def forward(self, pixels):
        return pixels.flatten(1).chunk(3, dim=1)


def own_network(module, **changes):
    settings = {"name": "own", "size": 8, "mean": MEAN, "std": STD}
    return FeatureNetwork.from_module(module, **(settings | changes))


class TestModules:
    def test_features_of_normalized_images(self):
        images = random_images(2, 3, 8, 8)
        network = own_network(nn.Flatten())
        expected = (images / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        torch.testing.assert_close(network(images).features, expected.flatten(1))
        assert (network.num_features, network.protocol) == (192, "bicubic 8")
        assert network.distance_name == "Fréchet distance (own)"

    def test_is_in_evaluation_mode(self):
        network = own_network(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192)))
        images = random_images(2, 3, 8, 8)
        torch.testing.assert_close(network(images[:1]).features[0], network(images).features[0])

    def test_logits(self):
        class Classifier(nn.Linear):
            def forward(self, pixels):
                return pixels.flatten(1), super().forward(pixels.flatten(1))

        output = own_network(Classifier(192, 5))(random_images(2, 3, 4, 4))
        assert output.logits.shape == (2, 5)

    def test_hash_is_that_of_the_weights(self):
        module = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
        before, again = own_network(module).sha256, own_network(module, name="other").sha256
        with torch.no_grad():
            module[1].weight[0, 0] += 1
        assert before == again != own_network(module).sha256

    def test_computes_in_full_precision_whatever_is_allowed_elsewhere(self):
        network = own_network(Precisions())
        convolutions = torch.backends.cudnn.conv.fp32_precision
        torch.set_float32_matmul_precision("medium")
        try:
            with torch.autocast("cpu", torch.bfloat16):
                assert network(random_images(1, 3, 8, 8)).features.tolist() == [[1] * 5]
                assert torch.is_autocast_enabled("cpu")
            assert torch.backends.cuda.matmul.fp32_precision == "tf32"
            assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
            assert torch.backends.cudnn.conv.fp32_precision == convolutions
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision("highest")

    @pytest.mark.parametrize(
        "module, changes, error, message",
        [
            (
                nn.Identity(),
                {},
                ValueError,
                r"the features of own must have the shape \(1, features\), got \(1, 3, 8, 8\)",
            ),
            (nn.Flatten(0), {}, ValueError, r"the features of own must have the shape \(1, features\), got \(192,\)"),
            (
                nn.Linear(8, 8).half(),
                {},
                ValueError,
                "weights of module must be float32, got torch.float16 for weight",
            ),
            (Thirds(), {}, TypeError, "own must give out features, or features and logits, got"),
            (torch.relu, {}, TypeError, "module must be of type Module"),
            (nn.Flatten(), {"name": ""}, ValueError, "name must not be empty"),
            (nn.Flatten(), {"size": 0}, ValueError, "size must be at least 1"),
            (nn.Flatten(), {"mean": [0.5, 0.5]}, ValueError, "mean must have 3 items"),
            (nn.Flatten(), {"std": [1, 1, 0]}, ValueError, r"std\[2\] must be greater than 0"),
        ],
    )
    def test_refuses_other_modules(self, module, changes, error, message):
        with pytest.raises(error, match=message):
            own_network(module, **changes)


FLOATS = torch.full((1, 3, 8, 8), 0.5)


@pytest.mark.parametrize(
    "images, error, message",
    [
        (FLOATS, TypeError, r"must be uint8 \(see rq_hf.images.to_uint8\) for own \(bicubic 8\), got torch.float32"),
        (FLOATS.long(), TypeError, "must be uint8 .* got torch.int64"),
        (FLOATS.byte()[0], ValueError, r"must have the shape \(B, 3, height, width\), got \(3, 8, 8\)"),
        (FLOATS.byte()[:, :1], ValueError, r"must have the shape \(B, 3, height, width\), got \(1, 1, 8, 8\)"),
        (FLOATS.byte().to("meta"), ValueError, "must have values"),
        (FLOATS.byte()[:0], ValueError, r"must have the shape \(B, 3, height, width\), not empty"),
        ([FLOATS], TypeError, "must be a torch.Tensor"),
    ],
)
def test_refuses_other_images(images, error, message):
    with pytest.raises(error, match=f"images {message}"):
        own_network(nn.Flatten())(images)


@pytest.mark.parametrize(
    "images, error, message",
    [
        (FLOATS + 1, ValueError, r"must lie in \[0, 1\], got values from 1.5 to 1.5"),
        (FLOATS * torch.nan, ValueError, r"must lie in \[0, 1\], got values from nan"),
        (FLOATS.long(), TypeError, "must be uint8 or floating point for inception-"),
    ],
)
def test_refuses_floats_outside_of_their_range(inception, images, error, message):
    with pytest.raises(error, match=f"images {message}"):
        inception(images)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (("pytorch-fid",), ValueError, r"pytorch-fid needs weights, the file pt_inception-2015-12-05-6726825d\.pth"),
        (("pytorch-fid", "missing.pth"), ValueError, "missing.pth is neither a file nor user/repository/file"),
        (
            ("pytorch-fid", "missing.pth", "6726825d"),
            ValueError,
            "sha256 must have 64 hexadecimal digits in lower case, got '6726825d'",
        ),
        (
            ("facebook/dinov2-base", "weights.pth"),
            ValueError,
            "network must be one of .* to have a file of weights",
        ),
        (("pytorch_fid",), OSError, r"network must be one of \['pytorch-fid', .*; pytorch_fid cannot be read"),
        (("no/such/folder",), FileNotFoundError, "network must be a folder or user/name on the Hub"),
        ((nn.Flatten(),), TypeError, "network must be of type str"),
    ],
)
def test_refuses_other_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        load_feature_network(*arguments)
