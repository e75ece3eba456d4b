import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from shapes import draw_shape

from rq_hf.images import captioned_grid, image_grid, to_pixels, to_rgb, wrap


def reopened(image, format="PNG", **kwargs):
    """The image as it is read from a file, with the metadata and modes of its format."""
    file = io.BytesIO()
    image.save(file, format, **kwargs)
    return Image.open(file)


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
        images = [Image.new("RGB", (100, 20), color) for color in ("red", "lime", "blue")]
        grid = captioned_grid(images, ["", "a caption", ""], columns=2, scale=3)
        cell_width, cell_height = grid.width // 2, grid.height // 2
        assert cell_width >= 300 and cell_height > 60
        centres = [(cell_width // 2 + i % 2 * cell_width, 8 + 30 + i // 2 * cell_height) for i in range(4)]
        assert [grid.getpixel(centre) for centre in centres] == [
            (255, 0, 0),
            (0, 255, 0),
            (0, 0, 255),
            (255, 255, 255),
        ]
        below = [(i * cell_width, 8 + 60, (i + 1) * cell_width, cell_height) for i in range(2)]
        assert [grid.crop(box).convert("L").getextrema()[0] < 128 for box in below] == [False, True]

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
