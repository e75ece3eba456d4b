import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from shapes import CAPTIONS, draw_shape

from rq_hf.data import ImageCollator, LatentCollator, decode_image
from rq_hf.images import to_pixels
from rq_hf.text import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(CAPTIONS), vocab_size=300, max_length=8)


def encoded(image, format="PNG", **kwargs):
    file = io.BytesIO()
    image.save(file, format, **kwargs)
    return {"bytes": file.getvalue(), "path": None}


class TestDecodeImage:
    def test_takes_pil_images_and_paths(self, tmp_path):
        image = draw_shape(0, 16)
        image.save(tmp_path / "shape.png")
        assert decode_image(image).tobytes() == image.tobytes()
        assert decode_image({"bytes": None, "path": str(tmp_path / "shape.png")}).tobytes() == image.tobytes()


class TestImageCollator:
    CORRUPT = {"bytes": b"\x89PNG no image", "path": None}

    def examples(self, count=4):
        return [
            {
                "image": encoded(draw_shape(number, 16)),
                "text": CAPTIONS[number],
                "label": number % 3,
                "example_index": 100 + number,
            }
            for number in range(count)
        ]

    def test_stacks_pixels(self):
        batch = ImageCollator("image", 16)(self.examples())
        assert torch.equal(batch["pixels"], torch.stack([to_pixels(draw_shape(n, 16), 16) for n in range(4)]))
        assert batch["counts"]["skipped_images"] == 0
        assert "cond_ids" not in batch

    def test_gives_labels(self):
        batch = ImageCollator("image", 16, label_column="label")(self.examples())
        assert batch["cond_ids"].tolist() == [[0], [1], [2], [0]]

    def test_pads_captions_on_the_right(self, tokenizer):
        batch = ImageCollator("image", 16, text_column="text", tokenizer=tokenizer)(self.examples())
        ids = tokenizer(CAPTIONS[0])["input_ids"]
        assert batch["cond_ids"].shape == (4, 8)
        assert batch["cond_ids"][0].tolist() == ids + [0] * (8 - len(ids))
        assert batch["counts"]["truncated_captions"] == 0

    def test_cuts_long_captions_and_counts_them(self, tokenizer):
        examples = self.examples(3)
        examples[1]["text"] = "a red circle " * 10
        batch = ImageCollator("image", 16, text_column="text", tokenizer=tokenizer)(examples)
        assert batch["cond_ids"][1].tolist() == tokenizer(examples[1]["text"])["input_ids"][:8]
        assert batch["counts"]["truncated_captions"] == 1

    def test_mirrors_about_half_of_the_images(self):
        image = Image.new("RGB", (2, 2), "black")
        image.paste("white", (0, 0, 1, 2))
        torch.manual_seed(0)
        pixels = ImageCollator("image", 2, random_flip=True)([{"image": image, "example_index": 0}] * 200)["pixels"]
        plain = to_pixels(image, 2)
        mirrored = [torch.equal(p, plain.flip(-1)) for p in pixels]
        assert all(flipped or torch.equal(p, plain) for flipped, p in zip(mirrored, pixels))
        assert 70 < sum(mirrored) < 130

    def test_stops_at_a_corrupt_image_and_names_it(self):
        examples = self.examples()
        examples[2]["image"] = self.CORRUPT
        with pytest.raises(ValueError, match="example 102 cannot be decoded.*skip_corrupt_images"):
            ImageCollator("image", 16)(examples)

    def test_stops_at_a_truncated_image(self):
        examples = self.examples()
        examples[1]["image"]["bytes"] = examples[1]["image"]["bytes"][:-40]
        with pytest.raises(ValueError, match="example 101 cannot be decoded"):
            ImageCollator("image", 16)(examples)

    def test_leaves_out_corrupt_images_with_their_captions_and_counts_them(self, tokenizer):
        examples = self.examples()
        examples[0]["image"] = examples[2]["image"] = self.CORRUPT
        batch = ImageCollator("image", 16, skip_corrupt_images=True, text_column="text", tokenizer=tokenizer)(examples)
        assert batch["counts"]["skipped_images"] == 2
        assert torch.equal(batch["pixels"], torch.stack([to_pixels(draw_shape(n, 16), 16) for n in (1, 3)]))
        assert [tokenizer.decode(row, skip_special_tokens=True).strip() for row in batch["cond_ids"]] == [
            CAPTIONS[1],
            CAPTIONS[3],
        ]

    def test_batch_may_be_left_without_images(self):
        examples = [{"image": self.CORRUPT, "text": "a", "example_index": 0}] * 2
        batch = ImageCollator("image", 16, skip_corrupt_images=True, label_column="label")(examples)
        assert batch["counts"] == {"images": 0, "skipped_images": 2}

    def test_stops_at_a_caption_that_is_not_a_string(self, tokenizer):
        examples = self.examples()
        examples[3]["text"] = None
        with pytest.raises(ValueError, match="caption of example 103 must be a string, got None"):
            ImageCollator("image", 16, text_column="text", tokenizer=tokenizer)(examples)

    @pytest.mark.parametrize("label", [-1, 3])
    def test_stops_at_a_label_that_is_no_class(self, label):
        examples = self.examples()
        examples[1]["label"] = label
        with pytest.raises(ValueError, match=rf"label of example 101 must lie in \[0, 3\), got {label}"):
            ImageCollator("image", 16, label_column="label", num_classes=3)(examples)

    @pytest.mark.parametrize("label", [None, 1.5, "1"])
    def test_stops_at_a_label_that_is_not_an_integer(self, label):
        examples = self.examples()
        examples[1]["label"] = label
        with pytest.raises(ValueError, match=f"label of example 101 must be an integer, got {label!r}"):
            ImageCollator("image", 16, label_column="label")(examples)

    def test_names_become_their_numbers(self):
        examples = self.examples(3)
        for example, label in zip(examples, ["dog", "ant", 1]):
            example["label"] = label
        collate = ImageCollator("image", 16, label_column="label", num_classes=2, class_names=["ant", "dog"])
        assert collate(examples)["cond_ids"].tolist() == [[1], [0], [1]]
        examples[0]["label"] = "cat"
        with pytest.raises(ValueError, match="label of example 100 must be one of 2 names, got 'cat'"):
            collate(examples)

    def test_gives_one_channel(self):
        batch = ImageCollator("image", 16, in_channels=1)(self.examples())
        assert torch.equal(
            batch["pixels"], torch.stack([to_pixels(draw_shape(n, 16).convert("L"), 16) for n in range(4)])
        )

    def test_refuses_other_numbers_of_channels(self):
        with pytest.raises(ValueError, match=r"1 channel \(grey\) or 3 \(RGB\), got 4"):
            ImageCollator("image", 16, in_channels=4)

    @pytest.mark.parametrize(
        ("image", "message"),
        [
            (None, "there is none"),
            (Image.fromarray(np.zeros((4, 4), np.float32)), "32-bit floats do not say what is white"),
            (Image.fromarray(np.zeros((4, 4), np.int32)), "32-bit integers do not say what is white"),
            (None, "exceeds limit"),
        ],
        ids=["none", "floats", "integers", "60,000²"],
    )
    def test_counts_images_that_it_cannot_decode_and_says_why(self, image, message):
        examples = self.examples(2)
        examples[1]["image"] = image and encoded(image, "TIFF")
        if "limit" in message:
            png = bytearray(encoded(Image.new("1", (8, 8)))["bytes"])
            png[16:24] = struct.pack(">2I", 60_000, 60_000)
            png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
            examples[1]["image"] = {"bytes": bytes(png), "path": None}
        with pytest.raises(ValueError, match=f"example 101 cannot be decoded .*{message}.*skip_corrupt_images"):
            ImageCollator("image", 16)(examples)
        assert ImageCollator("image", 16, skip_corrupt_images=True)(examples)["counts"] == {
            "images": 1,
            "skipped_images": 1,
        }


def test_latent_collator_takes_names_of_classes():
    examples = [{"latents": bytes(4), "label": name, "example_index": 7} for name in ("dog", "ant")]
    collate = LatentCollator((1, 1, 2), label_column="label", num_classes=2, class_names=["ant", "dog"])
    assert collate(examples)["cond_ids"].tolist() == [[1], [0]]


@pytest.mark.parametrize("latents", [b"", bytes(5), bytes(16), None])
def test_latent_collator_stops_at_latents_of_another_length(latents):
    examples = [{"latents": bytes(8), "example_index": 6}, {"latents": latents, "example_index": 7}]
    found = len(latents or b"")
    with pytest.raises(ValueError, match=f"latents of example 7 must have 8 bytes, got {found}"):
        LatentCollator((1, 2, 2))(examples)


def test_latent_collator_stops_at_a_label_that_is_no_class():
    examples = [{"latents": bytes(2 * 2), "label": 2, "example_index": 7}]
    with pytest.raises(ValueError, match=r"label of example 7 must lie in \[0, 2\), got 2"):
        LatentCollator((1, 1, 2), label_column="label", num_classes=2)(examples)
