import contextlib
import io
import os
import resource
import struct

import numpy as np
import pytest
import torch
from diffusers.utils import numpy_to_pil
from PIL import Image, ImageFont
from shapes import draw_shape

from rq_hf.images import (
    UINT8_RULES,
    captioned_grid,
    color_mode,
    image_grid,
    to_pixels,
    to_rgb,
    to_uint8,
    wrap,
)


def reopened(image, format="PNG", **kwargs):
    """The image as it is read from a file, with the metadata and modes of its format."""
    file = io.BytesIO()
    image.save(file, format, **kwargs)
    return Image.open(file)


def tiff(bits, data, byte_order="<", sample_format=1):
    """A greyscale TIFF file of one row; Pillow writes few of the kinds that it reads."""
    width = len(data) * 8 // bits
    entries = {
        256: width,
        257: 1,
        258: bits,
        259: 1,
        262: 1,
        273: 0,
        277: 1,
        278: 1,
        279: len(data),
        339: sample_format,
    }
    entries[273] = 8 + 2 + 12 * len(entries) + 4  # where the data begins
    header = (b"II" if byte_order == "<" else b"MM") + struct.pack(f"{byte_order}HIH", 42, 8, len(entries))
    fields = [struct.pack(f"{byte_order}HHII", tag, 4, 1, value) for tag, value in entries.items()]
    return Image.open(io.BytesIO(header + b"".join(fields) + bytes(4) + data))


@contextlib.contextmanager
def memory_limit(megabytes):
    """Allocations of so much more raise `MemoryError`."""
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class TestToRGB:
    @pytest.mark.parametrize(
        ("mode", "color", "rgb"),
        [
            ("RGB", (200, 30, 60), (200, 30, 60)),
            ("L", 100, (100, 100, 100)),
            ("1", 1, (255, 255, 255)),
            ("I;16", 32896, (128, 128, 128)),
            ("LA", (100, 255), (100, 100, 100)),
            ("LA", (100, 0), (255, 255, 255)),
            ("RGBA", (200, 30, 60, 255), (200, 30, 60)),
            ("RGBA", (200, 30, 60, 0), (255, 255, 255)),
            ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ],
    )
    def test_makes_rgb_with_white_where_it_is_transparent(self, mode, color, rgb):
        image = to_rgb(reopened(Image.new(mode, (2, 3), color)))
        assert (image.mode, image.size) == ("RGB", (2, 3))
        assert image.getpixel((1, 2)) == rgb

    def test_looks_up_palettes(self):
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 200, 100, 50])
        image.putpixel((1, 0), 1)
        assert list(to_rgb(reopened(image)).get_flattened_data()) == [(10, 20, 30), (200, 100, 50)]
        assert list(to_rgb(reopened(image, transparency=0)).get_flattened_data()) == [
            (255, 255, 255),
            (200, 100, 50),
        ]

    def test_converts_cmyk(self):
        image = to_rgb(reopened(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"))
        assert image.getpixel((4, 4)) == (255, 0, 0)

    @pytest.mark.parametrize("byte_order", ["<", ">"])
    def test_scales_16_bits(self, byte_order):
        image = to_rgb(tiff(16, struct.pack(f"{byte_order}4H", 0, 255, 32896, 65535), byte_order))
        assert list(image.convert("L").get_flattened_data()) == [0, 0, 128, 255]

    def test_scales_12_bits(self):
        image = to_rgb(tiff(12, bytes([0x00, 0x08, 0x08, 0xFF, 0xF0, 0x00])))
        assert list(image.convert("L").get_flattened_data()) == [0, 128, 255, 0]

    @pytest.mark.parametrize(("white", "values"), [(65535, (0, 32896, 65535)), (1000, (0, 502, 1000))])
    def test_scales_pgm(self, white, values):
        file = io.BytesIO(f"P5 3 1 {white}\n".encode() + struct.pack(">3H", *values))
        assert list(to_rgb(Image.open(file)).convert("L").get_flattened_data()) == [0, 128, 255]

    def test_makes_the_transparent_grey_of_16_bits_white(self):
        image = Image.fromarray(np.array([[300, 30000, 60000]], dtype=np.uint16))
        image = to_rgb(reopened(image, transparency=300))
        assert list(image.convert("L").get_flattened_data()) == [255, 117, 234]

    @pytest.mark.parametrize(
        ("image", "kind"),
        [
            (Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)), "floats"),
            (Image.fromarray(np.array([[0, 30000, 61440]], dtype=np.int32)), "integers"),
            (tiff(32, struct.pack("<2I", 0, 2**31)), "integers"),
            (tiff(16, struct.pack("<2h", -5, 5), sample_format=2), "integers"),
            (Image.open(io.BytesIO(b"Pf 1 1 -1.0\n" + struct.pack("<f", 0.5))), "floats"),
        ],
        ids=["float array", "int32 array", "uint32 TIFF", "signed TIFF", "PFM"],
    )
    def test_refuses_what_does_not_say_what_is_white(self, image, kind):
        with pytest.raises(ValueError, match=f"32-bit {kind} do not say what is white: save .* 8 or 16 bits"):
            to_rgb(image)

    def test_turns_photographs_upright(self):
        exif = Image.Exif()
        exif[0x112] = 6  # orientation: the camera was turned by 90°
        assert to_rgb(reopened(Image.new("RGB", (20, 10)), "JPEG", exif=exif)).size == (10, 20)


class TestToPixels:
    def test_keeps_pixels_of_an_image_that_fits(self):
        image = draw_shape(0, 16)
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        assert torch.equal(((to_pixels(image, 16) + 1) * 127.5).round().byte(), expected)

    def test_spans_minus_one_to_one(self):
        assert to_pixels(Image.new("RGB", (4, 4), "black"), 4).unique().tolist() == [-1]
        assert to_pixels(Image.new("RGB", (4, 4), "white"), 4).unique().tolist() == [1]

    @pytest.mark.parametrize("size", [(16, 16), (17, 16), (16, 33), (3, 200), (201, 8), (1, 1), (100, 99)])
    def test_is_square_whatever_the_size(self, size):
        pixels = to_pixels(Image.new("RGB", size, (255, 0, 0)), 16)
        assert pixels.shape == (3, 16, 16)
        assert pixels[0].unique().tolist() == [1]
        assert pixels[1:].unique().tolist() == [-1]

    @pytest.mark.parametrize("upright", [False, True])
    def test_cuts_out_the_centre(self, upright):
        image = Image.new("RGB", (48, 16), "red")
        image.paste("lime", (16, 0, 32, 16))
        image = image.transpose(Image.Transpose.ROTATE_90) if upright else image
        assert torch.equal(to_pixels(image, 16), to_pixels(Image.new("RGB", (16, 16), "lime"), 16))

    def test_averages_pixels_bilinearly(self):
        image = Image.new("L", (4, 4), "black")
        image.paste("white", (0, 0, 2, 4))
        pixels = to_pixels(image.convert("RGB"), 2)
        expected = torch.tensor([6 / 7, 1 / 7]).expand(3, 2, 2) * 2 - 1  # a triangle filter: (3 + 3) / (3 + 3 + 1)
        torch.testing.assert_close(pixels, expected, atol=0.01, rtol=0)

    def test_resizes_the_shorter_side(self):
        image = Image.new("RGB", (96, 32), "red")
        image.paste("lime", (32, 0, 64, 32))
        pixels = to_pixels(image, 8)
        assert torch.equal(pixels[:, :, 1:-1], to_pixels(Image.new("RGB", (8, 8), "lime"), 8)[:, :, 1:-1])

    @pytest.mark.parametrize("size", [(65499, 1), (1, 65499), (3000, 2)])
    def test_of_a_strip_takes_little_memory(self, size):
        image = Image.new("RGB", size, "red")
        middle = [(side - min(size)) // 2 for side in size]
        image.paste("lime", (*middle, middle[0] + min(size), middle[1] + min(size)))
        with memory_limit(megabytes=100):
            pixels = to_pixels(image, 512)
        assert ((pixels[:, 256, 256] + 1) * 127.5).tolist() == [0, 255, 0]

    def test_keeps_the_middle_of_wide_images_as_it_does_of_others(self):
        panorama = Image.new("RGB", (1000, 10), "red")
        panorama.paste(draw_shape(0, 10).resize((70, 10)), (465, 0))
        assert torch.equal(to_pixels(panorama, 8), to_pixels(panorama.crop((460, 0, 540, 10)), 8))

    def test_of_a_grey_image_has_one_channel(self):
        image = draw_shape(0, 24)
        grey = to_pixels(image.convert("L"), 16)
        assert grey.shape == (1, 16, 16)
        assert torch.equal(grey.expand(3, -1, -1), to_pixels(image.convert("L").convert("RGB"), 16))

    def test_refuses_an_image_without_pixels(self):
        with pytest.raises(ValueError, match=r"an image must have pixels, got the size \(0, 5\)"):
            to_pixels(Image.new("RGB", (0, 5)), 16)


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_colors_have_one_or_three_channels(channels):
    with pytest.raises(ValueError, match=rf"1 channel \(grey\) or 3 \(RGB\), got {channels}"):
        color_mode(channels)


class TestToUint8:
    def test_rules_differ_between_levels(self):
        between = ((torch.arange(4) + torch.tensor([[0.25], [0.5], [0.75]])) / 255)[None, None]
        levels = {rule: to_uint8(between, rule)[0, 0].tolist() for rule in UINT8_RULES}
        assert levels == {
            "round": [[0, 1, 2, 3], [0, 2, 2, 4], [1, 2, 3, 4]],
            "round-half-up": [[0, 1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4]],
            "truncate": [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]],
        }

    @pytest.mark.parametrize("rule", UINT8_RULES)
    def test_keeps_images_of_8_bits(self, rule):
        images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
        assert torch.equal(to_uint8(images / 255, rule), images)

    def test_rounds_as_diffusers_and_truncates_as_adm(self):
        pixels = torch.rand(2, 3, 64, 64) * 2 - 1
        images = pixels / 2 + 0.5
        saved = numpy_to_pil(images.permute(0, 2, 3, 1).numpy())
        assert np.array_equal(to_uint8(images, "round").permute(0, 2, 3, 1), np.stack(saved))
        assert torch.equal(to_uint8(images, "truncate"), ((pixels + 1) * 127.5).clamp(0, 255).to(torch.uint8))

    def test_of_half_precision_is_that_of_single_precision(self):
        images = torch.rand(1, 3, 16, 16).bfloat16()
        assert torch.equal(to_uint8(images, "truncate"), to_uint8(images.float(), "truncate"))

    @pytest.mark.parametrize(
        "images, rule, error, message",
        [
            (torch.full((1, 3, 2, 2), 1.01), "round", ValueError, r"images must lie in \[0, 1\], got values from 1.0"),
            (
                torch.full((1, 3, 2, 2), -0.5),
                "round",
                ValueError,
                r"images must lie in \[0, 1\], got values from -0.5",
            ),
            (torch.full((1, 3, 2, 2), torch.nan), "round", ValueError, r"images must lie in \[0, 1\], got .* nan"),
            (
                torch.zeros(1, 3, 2, 2, dtype=torch.uint8),
                "round",
                TypeError,
                "images must be floating point, got torch.u",
            ),
            (torch.zeros(3, 2, 2), "round", ValueError, r"images must have the shape \(B, C, height, width\), got"),
            (
                torch.zeros(1, 3, 2, 2),
                "floor",
                ValueError,
                r"rule must be one of \['round', 'round-half-up', 'truncate'\]",
            ),
            (torch.zeros(1, 3, 2, 2, device="meta"), "round", ValueError, "images must have values"),
        ],
    )
    def test_refuses_other_values(self, images, rule, error, message):
        with pytest.raises(error, match=message):
            to_uint8(images, rule)


class TestImageGrid:
    def test_places_images_row_by_row_and_leaves_the_rest_white(self):
        shades = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8])
        grid = image_grid(shades[:, None, None, None].expand(5, 3, 2, 4), columns=3)
        assert grid.size == (12, 4)
        corners = [grid.getpixel((column * 4 + 3, row * 2 + 1)) for row in range(2) for column in range(3)]
        assert corners == [(shade, shade, shade) for shade in (0, 51, 102, 153, 204, 255)]

    def test_keeps_pixels_and_clamps(self):
        image = torch.tensor([[[[-1.0, 0.5]], [[1.0, 0.0]], [[0.2, 3.0]]]])
        grid = image_grid(image)
        assert (grid.getpixel((0, 0)), grid.getpixel((1, 0))) == ((0, 255, 51), (128, 0, 255))


class TestCaptionedGrid:
    def test_places_enlarged_images_above_their_captions(self):
        images = [Image.new("RGB", (40, 20), color) for color in ("red", "lime", "blue")]
        grid = captioned_grid(images, ["", "a caption", ""], columns=2)
        cell_width, cell_height = grid.width // 2, grid.height // 2
        assert cell_width >= 3 * 40 and cell_height > 60
        centres = [(cell_width // 2 + i % 2 * cell_width, 8 + 30 + i // 2 * cell_height) for i in range(4)]
        assert [grid.getpixel(centre) for centre in centres] == [
            (255, 0, 0),
            (0, 255, 0),
            (0, 0, 255),
            (255, 255, 255),
        ]
        below = [(i * cell_width, 8 + 60, (i + 1) * cell_width, cell_height) for i in range(2)]
        assert [grid.crop(box).convert("L").getextrema()[0] < 128 for box in below] == [False, True]

    def test_has_room_for_long_captions(self):
        images = [Image.new("RGB", (128, 128), color) for color in ("red", "lime")]
        short, long = (captioned_grid(images, [caption, ""], columns=1) for caption in ("word", "word " * 40))
        assert long.height > short.height
        top = long.height // 2 + 8
        below_the_caption = long.crop((0, top, long.width, top + 128)).convert("L")
        assert sorted(set(below_the_caption.get_flattened_data())) == [150, 255]  # lime and white: no text

    def test_does_not_enlarge_large_images(self):
        grid = captioned_grid([Image.new("L", (200, 100), 60)], ["grey"])
        assert grid.mode == "RGB"
        assert grid.convert("L").histogram()[60] == pytest.approx(200 * 100, rel=0.01)

    def test_breaks_captions_between_words(self):
        font = ImageFont.load_default(13)
        text, width = "woman astronaut medium skin tone", 100
        lines = wrap(text, font, width).split("\n")
        assert len(lines) > 1
        assert " ".join(lines) == text
        assert all(font.getlength(line) <= width for line in lines)
        assert all(
            font.getlength(f"{line} {following.split()[0]}") > width for line, following in zip(lines, lines[1:])
        )

    def test_keeps_words_that_are_wider_than_a_line(self):
        assert wrap("unbreakable a unbreakable", ImageFont.load_default(13), 30).split("\n") == [
            "unbreakable",
            "a",
            "unbreakable",
        ]
