import copy
import json
from pathlib import Path

import datasets
import pytest
import torch
from shapes import CAPTIONS, SHAPES, draw_shape
from tiny import C, tiny_kl, tiny_tokenizer, tiny_vae

from rq_hf.data import (
    LatentCollator,
    TrainingStream,
    bytes_to_latents,
    describe_latents,
    latents_to_bytes,
    load_latents,
    stored_dtype,
    stored_shape,
    write_description,
    write_latents,
)
from rq_hf.images import to_pixels
from rq_hf.models.continuous_latents import encode_moments, latent_shape

COUNT, GRID = 20, 4
LABELS = [number % 3 for number in range(COUNT)]
streaming_or_not = pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streaming"])


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 seconds after every stream


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return tiny_vae()


@pytest.fixture(scope="module")
def vectors(vae):
    """What the encoder gives for shapes, `(N, H, W, C)`."""
    pixels = torch.stack([to_pixels(draw_shape(number, 16), 8) for number in range(COUNT)])
    with torch.no_grad():
        return vae.encode_to_vectors(pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vae, vectors):
    """Latents of shapes, with their captions and labels."""
    folder = tmp_path_factory.mktemp("latents")
    rows = (
        {"latents": latents, "text": text, "label": label}
        for latents, text, label in zip(latents_to_bytes(vectors), CAPTIONS, LABELS)
    )
    features = datasets.Features(
        {
            "latents": datasets.Value("binary"),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=list(SHAPES)),
        }
    )
    write_latents(rows, features, folder, "latents-000", rows_per_file=8)
    write_description(folder, vae)
    return str(folder)


def test_bytes_hold_the_latents_in_bfloat16(vectors):
    assert torch.equal(bytes_to_latents(latents_to_bytes(vectors), (GRID, GRID, C)), vectors.bfloat16())


def test_bytes_hold_the_latents_in_float32(vectors):
    stored = latents_to_bytes(vectors, torch.float32)
    assert torch.equal(bytes_to_latents(stored, (GRID, GRID, C), torch.float32), vectors)


def first_epoch(dataset, collate):
    stream, batches = TrainingStream(dataset, collate, batch_size=8, seed=0), []
    for batch in stream:
        if stream.epoch == 1:
            return batches
        batches.append(batch)


class TestLoadLatents:
    @streaming_or_not
    def test_batches_have_the_latents_with_their_conditions(self, folder, vae, vectors, streaming):
        dataset, shape = load_latents(folder, vae, streaming), stored_shape(vae)
        by_class = first_epoch(dataset, LatentCollator(shape, label_column="label"))
        by_text = first_epoch(dataset, LatentCollator(shape, text_column="text", tokenizer=tiny_tokenizer()))
        seen, stored = [], vectors.bfloat16()
        for batch, texts in zip(by_class, by_text, strict=True):
            assert torch.equal(batch["latents"], texts["latents"])
            rows = [next(n for n in range(COUNT) if torch.equal(stored[n], latent)) for latent in batch["latents"]]
            assert batch["cond_ids"].tolist() == [[LABELS[row]] for row in rows]
            expected = tiny_tokenizer()([CAPTIONS[row] for row in rows], padding="max_length", truncation=True)
            assert texts["cond_ids"].tolist() == expected["input_ids"]
            assert batch["counts"] == {"images": len(rows)}
            seen += rows
        assert sorted(seen) == list(range(COUNT))

    @streaming_or_not
    def test_classes_are_declared(self, folder, vae, streaming):
        dataset = load_latents(folder, vae, streaming)
        assert dataset.features["label"] == datasets.ClassLabel(names=list(SHAPES))

    @pytest.mark.parametrize("part", ["encoder.conv_in.weight", "quant_conv.bias", "quantizer.codebook"])
    def test_refuses_another_rqvae(self, folder, vae, part):
        other = copy.deepcopy(vae)
        other.state_dict()[part].view(-1)[-1] += 1e-3
        with pytest.raises(ValueError) as refused:
            load_latents(folder, other)
        assert f"{folder} was extracted with another autoencoder" in str(refused.value)
        assert describe_latents(vae)["rqvae_sha256"] in str(refused.value)
        assert describe_latents(other)["rqvae_sha256"] in str(refused.value)

    def test_description_is_that_of_folders_of_version_0_1(self, folder):
        description = json.loads(Path(folder, "latents.json").read_text())
        assert list(description) == ["shape", "dtype", "rqvae_sha256"]
        assert (description["shape"], description["dtype"]) == ([GRID, GRID, C], "bfloat16")

    def test_refuses_another_size_of_images(self, folder, vae):
        other = copy.deepcopy(vae)
        other.register_to_config(sample_size=16)
        with pytest.raises(ValueError) as refused:
            load_latents(folder, other)
        assert f"says {{'shape': [{GRID}, {GRID}, {C}]" in str(refused.value)
        assert f"needs {{'shape': [{2 * GRID}, {2 * GRID}, {C}]" in str(refused.value)

    def test_accepts_an_rqvae_with_another_decoder(self, folder, vae):
        other = copy.deepcopy(vae)
        other.decoder.conv_out.bias.data += 1
        assert len(load_latents(folder, other)) == COUNT

    def test_refuses_a_folder_without_latents(self, vae, tmp_path):
        with pytest.raises(ValueError, match=f"there is no {tmp_path / 'latents.json'}"):
            load_latents(str(tmp_path), vae)

    def test_refuses_a_broken_description(self, vae, tmp_path):
        (tmp_path / "latents.json").write_text('{"shape": [4,')
        with pytest.raises(ValueError, match="latents.json is broken .*extract the latents again"):
            load_latents(str(tmp_path), vae)

    def test_names_the_columns_when_one_is_missing(self, folder, vae):
        with pytest.raises(ValueError, match=r"no column 'kind'; its columns are \['latents', 'text', 'label'\]"):
            load_latents(folder, vae, required_columns=("kind",))


class TestLatentsOfAnAutoencoderKL:
    @pytest.fixture
    def kl(self):
        return tiny_kl()

    @pytest.fixture
    def moments(self, kl):
        """Of shapes, `(N, 2·C, H, W)`."""
        pixels = torch.stack([to_pixels(draw_shape(number, 16), 8) for number in range(3)])
        with torch.no_grad():
            return encode_moments(kl, pixels)

    @pytest.fixture
    def folder(self, tmp_path, kl, moments):
        folder = tmp_path / "moments"
        folder.mkdir()
        rows = ({"latents": row} for row in latents_to_bytes(moments.permute(0, 2, 3, 1), torch.float32))
        write_latents(rows, datasets.Features({"latents": datasets.Value("binary")}), folder, "latents", 8)
        write_description(folder, kl, torch.float32)
        return folder

    def test_batches_have_the_moments(self, folder, kl, moments):
        dataset = load_latents(folder, kl)
        batch = LatentCollator(stored_shape(kl), dtype=stored_dtype(folder))(list(dataset))
        assert torch.equal(batch["latents"].permute(0, 3, 1, 2), moments)

    def test_description_says_what_is_stored(self, folder, kl):
        channels, height, width = latent_shape(kl)
        description = json.loads((folder / "latents.json").read_text())
        assert description == describe_latents(kl, torch.float32)
        assert description["shape"] == [height, width, 2 * channels]
        assert description["dtype"] == "float32"

    @pytest.mark.parametrize("part", ["encoder.conv_in.weight", "quant_conv.bias"])
    def test_refuses_another_encoder(self, folder, kl, part):
        other = copy.deepcopy(kl)
        other.state_dict()[part].view(-1)[-1] += 1e-3
        with pytest.raises(ValueError, match="was extracted with another autoencoder: .* this AutoencoderKL needs"):
            load_latents(folder, other)

    def test_refuses_an_rqvae(self, folder, vae):
        with pytest.raises(ValueError, match="autoencoder_kl_sha256.* this RQVAEModel needs .*rqvae_sha256"):
            load_latents(folder, vae)

    def test_does_not_depend_on_the_decoder_and_the_scale(self, folder, kl):
        other = copy.deepcopy(kl)
        other.decoder.conv_out.bias.data += 1
        other.register_to_config(scaling_factor=3.0)
        assert len(load_latents(folder, other)) == 3

    def test_refuses_an_unknown_type(self, kl, tmp_path):
        (tmp_path / "latents.json").write_text(json.dumps(describe_latents(kl) | {"dtype": "float16"}))
        with pytest.raises(ValueError, match="latents.json is broken .dtype must be one of .*got 'float16'"):
            load_latents(tmp_path, kl)
