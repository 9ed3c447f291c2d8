import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from cal_train.data.images import DEFAULT_LIMITS, ImageLimits, apply_aspect_ratio, count_image_tokens, open_image
from cal_train.testing import tiny_processor


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def noise(height: int = 24, width: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "GIF", "JPEG"])
def test_raster_formats_open_from_bytes_and_from_a_file(tmp_path, format):
    data = encoded(noise(), format, **({"lossless": True} if format == "WEBP" else {}))
    (tmp_path / "image.jpg").write_bytes(data)  # OCR-VQA names every image .jpg; the content decides
    for source in (data, tmp_path / "image.jpg"):
        image = open_image(source)
        assert image.mode == "RGB" and image.size == (32, 24)
        if format not in ("GIF", "JPEG"):
            assert np.array_equal(np.asarray(image), np.asarray(noise()))


def test_first_frame_of_an_animation_is_taken():
    frames = [Image.new("P", (8, 8), 0), Image.new("P", (8, 8), 1)]
    for frame in frames:
        frame.putpalette([255, 0, 0, 0, 0, 255])
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(data).getpixel((4, 4)) == (255, 0, 0)


def test_grey_16_bit_keeps_its_upper_8_bits():
    values = np.array([[0, 256, 0x7F80, 65535]] * 4, np.uint16)
    data = encoded(Image.fromarray(values))
    assert Image.open(io.BytesIO(data)).mode.startswith("I")
    assert np.asarray(open_image(data))[0, :, 0].tolist() == [0, 1, 0x7F, 255]


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "1"])
def test_other_modes_become_rgb(mode):
    image = open_image(encoded(noise().convert(mode), "TIFF"))
    assert image.mode == "RGB" and image.size == (32, 24)


def test_palette_with_transparency_becomes_the_palettes_colour():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    assert open_image(encoded(image, "PNG", transparency=1)).getpixel((0, 0)) == (10, 200, 30)


def test_exif_orientation_is_ignored_like_in_the_original():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert open_image(encoded(noise(), "JPEG", exif=exif)).size == (32, 24)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_truncated_image_is_refused(format, keep):
    data = encoded(noise(64, 64), format)
    with pytest.raises(ValueError, match="cannot be read"):
        open_image(data[: int(keep * len(data))])


@pytest.mark.parametrize(
    "data", [b"", b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\x89PNG\r\n\x1a\n"]
)
def test_what_is_no_raster_image_is_refused(data):
    with pytest.raises(ValueError, match="cannot be read"):
        open_image(data)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        open_image(tmp_path / "none.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(20_000, 10_000), (10_500, 10_000), (2, 1_000_000)])
def test_huge_image_is_refused_from_its_header(width, height):
    with pytest.raises(ValueError, match=r"too large|above max_image_pixels|long side"):
        open_image(png_header(width, height))


def test_header_within_the_limits_gets_as_far_as_decoding():
    with pytest.raises(ValueError, match="cannot be read"):  # shows that the sizes above are what is refused there
        open_image(png_header(200, 100))


def test_one_pixel_image_is_refused_unless_allowed():
    data = encoded(Image.new("RGB", (1, 1)))
    with pytest.raises(ValueError, match=r"1 x 1 pixels.*min_image_side"):
        open_image(data)
    assert open_image(data, ImageLimits(min_side=1)).size == (1, 1)


def test_thin_image_is_refused():
    with pytest.raises(ValueError, match="200 times"):
        open_image(encoded(Image.new("RGB", (402, 2))))
    assert open_image(encoded(Image.new("RGB", (400, 2))), DEFAULT_LIMITS).size == (400, 2)


def test_pad_frames_the_image_with_the_mean_colour_and_square_crops_it():
    processor = tiny_processor()
    image = Image.new("RGB", (56, 28), (255, 255, 255))
    mean = np.array(processor.image_processor.image_mean)
    std = np.array(processor.image_processor.image_std)

    def corner_and_centre() -> tuple[np.ndarray, np.ndarray]:
        pixels = processor.image_processor(images=[image], return_tensors="np")["pixel_values"][0]
        pixels = (pixels * std[:, None, None] + mean[:, None, None]) * 255
        return pixels[:, 0, 14], pixels[:, 14, 14]

    apply_aspect_ratio(processor, "pad")
    corner, centre = corner_and_centre()
    assert np.allclose(corner, [122, 116, 104], atol=1e-3)  # LLaVA's int(255 * mean) of CLIP
    assert np.allclose(centre, 255, atol=1e-3)
    apply_aspect_ratio(processor, "square")
    assert np.allclose(corner_and_centre(), 255, atol=1e-3)


def test_unset_aspect_ratio_leaves_the_processor_alone():
    processor = tiny_processor()
    apply_aspect_ratio(processor, "pad")
    apply_aspect_ratio(processor, None)
    assert processor.image_processor.do_pad is True


def test_pad_is_refused_of_a_processor_that_cannot():
    processor = tiny_processor()
    processor.image_processor = CLIPImageProcessorPil()
    with pytest.raises(ValueError, match="CLIPImageProcessorPil cannot pad"):
        apply_aspect_ratio(processor, "pad")


def test_image_tokens_are_counted_as_the_model_fills_them():
    assert count_image_tokens(tiny_processor(), [(30, 40), (500, 2)]) == [4, 4]  # (28 / 14) ** 2 patches
    assert count_image_tokens(tiny_processor(), []) == []
