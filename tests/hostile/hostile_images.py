"""Image files that are broken, unusual or bombs.

``IMAGES`` maps a name to (file name, function that makes its bytes, whether a row with it is kept).
"""

import io
import struct
import zlib
from functools import cache

import numpy as np
from PIL import Image

KEPT, DROPPED = True, False


def encoded(mode="RGB", size=(40, 30), format="PNG", **options):
    """Return the bytes of an image of noise."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    file = io.BytesIO()
    noise.convert(mode).save(file, format, **options)
    return file.getvalue()


def chunk(kind, content):
    """Return a PNG chunk."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, data=b"", depth=8, colour=2, extra=b"", interlace=0):
    """Return a PNG whose header claims a size, whatever its data are."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@cache
def zeros(num_bytes):
    """Return a zlib stream of that many zeros, made without holding them."""
    packer, block = zlib.compressobj(1), bytes(2**20)
    pieces = [packer.compress(block) for _ in range(num_bytes // 2**20)]
    return b"".join([*pieces, packer.flush()])


def bomb_png():
    """Return a PNG of little more than 100 KB and 25,000 x 10,000 pixels that decodes without an error."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 25_000, 10_000, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zeros(3126 * 10_000)) + chunk(b"IEND", b"")


def text_bomb(kind):
    """Return a PNG with a compressed text or profile of 200 MB."""
    head = {b"zTXt": b"Comment\0\0", b"iTXt": b"Comment\0\1\0\0\0", b"iCCP": b"profile\0\0"}[kind]
    return png(8, 8, bytes(8 * 25), extra=chunk(kind, head + zeros(200 * 2**20)))


def gif(width, height, frame=(0, 0, 1, 1)):
    """Return a GIF with a canvas and one frame of any size."""
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return screen + b"," + struct.pack("<HHHHB", *frame, 0) + b"\x02\x02\x4c\x01\x00;"


def tiff(*tags):
    """Return a little-endian TIFF of one directory; tags are (number, type, count, value)."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)


def tiff_in_a_circle():
    """Return a TIFF whose directory names itself as the next one."""
    return tiff((256, 4, 1, 8), (257, 4, 1, 8))[:-4] + struct.pack("<I", 8)


def bmp(width, height, bits=24, compression=0, data=b""):
    """Return a BMP with any header."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(data), 0, 0, 54) + header + data


def webp(width, height):
    """Return a WebP whose header claims a size."""
    canvas = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


def exif(orientation):
    """Return a JPEG with an EXIF orientation."""
    tags = Image.Exif()
    tags[0x0112] = orientation
    return encoded(format="JPEG", exif=tags)


def animated(format):
    """Return an animation of three frames."""
    file = io.BytesIO()
    frames = [Image.new("RGB", (24, 24), colour) for colour in ("red", "green", "blue")]
    frames[0].save(file, format, save_all=True, append_images=frames[1:])
    return file.getvalue()


def palette():
    """Return a palette PNG with transparency."""
    file = io.BytesIO()
    Image.new("P", (24, 24)).save(file, "PNG", transparency=b"\0\x80")
    return file.getvalue()


JPEG, PNG = encoded(format="JPEG"), encoded()

IMAGES = {
    "empty file": ("a.png", lambda: b"", DROPPED),
    "one byte": ("a.png", lambda: b"\x89", DROPPED),
    "text": ("a.png", lambda: b"not an image", DROPPED),
    "html": ("a.jpg", lambda: b"<html>404 Not Found</html>", DROPPED),
    "svg": (
        "a.svg",
        lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        DROPPED,
    ),
    "postscript": ("a.eps", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n", DROPPED),
    "pdf": ("a.pdf", lambda: b"%PDF-1.4\n%%EOF", DROPPED),
    "icon": ("a.ico", lambda: encoded(format="ICO", size=(16, 16)), DROPPED),
    "jpeg named png": ("a.png", lambda: JPEG, KEPT),
    "png without extension": ("a", lambda: PNG, KEPT),
    "jpeg cut in half": ("a.jpg", lambda: JPEG[: len(JPEG) // 2], DROPPED),
    "jpeg without its end": ("a.jpg", lambda: JPEG[:-2] + b"", DROPPED),
    "jpeg header alone": ("a.jpg", lambda: JPEG[:20], DROPPED),
    "jpeg with a lying size": (
        "a.jpg",
        lambda: JPEG.replace(struct.pack(">HH", 30, 40), struct.pack(">HH", 60_000, 60_000)),
        DROPPED,
    ),
    "jpeg of 0 rows": ("a.jpg", lambda: JPEG.replace(struct.pack(">HH", 30, 40), struct.pack(">HH", 0, 40)), DROPPED),
    "jpeg in grey": ("a.jpg", lambda: encoded("L", format="JPEG"), KEPT),
    "jpeg in cmyk": ("a.jpg", lambda: encoded("CMYK", format="JPEG"), KEPT),
    "jpeg, progressive": ("a.jpg", lambda: encoded(format="JPEG", progressive=True), KEPT),
    "jpeg turned by exif": ("a.jpg", lambda: exif(6), KEPT),
    "jpeg with exif orientation 99": ("a.jpg", lambda: exif(99), KEPT),
    "jpeg with broken exif": ("a.jpg", lambda: encoded(format="JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), KEPT),
    "jpeg with a broken profile": ("a.jpg", lambda: encoded(format="JPEG", icc_profile=b"\0" * 500), KEPT),
    "jpeg with a trailing archive": ("a.jpg", lambda: JPEG + b"PK\x03\x04" * 1000, KEPT),
    "png cut in half": ("a.png", lambda: PNG[: len(PNG) // 2], DROPPED),
    "png with a wrong checksum": ("a.png", lambda: PNG[:50] + bytes([PNG[50] ^ 1]) + PNG[51:], DROPPED),
    "png of 0 columns": ("a.png", lambda: png(0, 10), DROPPED),
    "png of 0 rows": ("a.png", lambda: png(10, 0), DROPPED),
    "png of one pixel": ("a.png", lambda: encoded(size=(1, 1)), DROPPED),
    "png one pixel wide": ("a.png", lambda: encoded(size=(1, 50)), DROPPED),
    "png of 2 x 2": ("a.png", lambda: encoded(size=(2, 2)), KEPT),
    "png like a thread": ("a.png", lambda: encoded(size=(2, 401)), DROPPED),
    "png header of 2^31": ("a.png", lambda: png(2**31 - 1, 2**31 - 1), DROPPED),
    "png header of 10^9 pixels": ("a.png", lambda: png(31_623, 31_623), DROPPED),
    "png header of 170 million": ("a.png", lambda: png(13_000, 13_000), DROPPED),
    "png bomb": ("a.png", bomb_png, DROPPED),
    "png without data": ("a.png", lambda: png(30, 30), DROPPED),
    "png of an unknown depth": ("a.png", lambda: png(8, 8, bytes(300), depth=7), DROPPED),
    "png with zTXt bomb": ("a.png", lambda: text_bomb(b"zTXt"), DROPPED),
    "png with iTXt bomb": ("a.png", lambda: text_bomb(b"iTXt"), DROPPED),
    "png with a profile bomb": ("a.png", lambda: text_bomb(b"iCCP"), DROPPED),
    "png with 16 bits": ("a.png", lambda: encoded("I;16"), KEPT),
    "png with alpha": ("a.png", lambda: encoded("RGBA"), KEPT),
    "png in one bit": ("a.png", lambda: encoded("1"), KEPT),
    "png with grey and alpha": ("a.png", lambda: encoded("LA"), KEPT),
    "png with a palette": ("a.png", palette, KEPT),
    "png, animated": ("a.png", lambda: animated("PNG"), KEPT),
    "gif, animated": ("a.gif", lambda: animated("GIF"), KEPT),
    "gif of 65535 squared": ("a.gif", lambda: gif(65_535, 65_535), DROPPED),
    "gif with a frame beyond its canvas": ("a.gif", lambda: gif(8, 8, (0, 0, 60_000, 60_000)), DROPPED),
    "gif cut": ("a.gif", lambda: gif(8, 8)[:14], DROPPED),
    "webp": ("a.webp", lambda: encoded(format="WEBP"), KEPT),
    "webp, animated": ("a.webp", lambda: animated("WEBP"), KEPT),
    "webp header of 2^24 squared": ("a.webp", lambda: webp(2**24, 2**24), DROPPED),
    "webp cut": ("a.webp", lambda: encoded(format="WEBP")[:60], DROPPED),
    "tiff": ("a.tif", lambda: encoded(format="TIFF"), KEPT),
    "tiff in floating point": ("a.tif", lambda: encoded("F", format="TIFF"), DROPPED),
    "tiff in cmyk": ("a.tif", lambda: encoded("CMYK", format="TIFF"), KEPT),
    "tiff without tags": ("a.tif", lambda: tiff(), DROPPED),
    "tiff in a circle": ("a.tif", tiff_in_a_circle, DROPPED),
    "tiff of 2^32 pixels": ("a.tif", lambda: tiff((256, 4, 1, 65_536), (257, 4, 1, 65_536)), DROPPED),
    "tiff with 2^32 strips": ("a.tif", lambda: tiff((256, 4, 1, 64), (257, 4, 1, 64), (273, 4, 2**32 - 1, 8)), DROPPED),
    "tiff with data beyond its end": ("a.tif", lambda: encoded(format="TIFF")[:200], DROPPED),
    "bmp": ("a.bmp", lambda: encoded(format="BMP"), KEPT),
    "bmp of negative width": ("a.bmp", lambda: bmp(-8, 8), DROPPED),
    "bmp of 2^31 rows": ("a.bmp", lambda: bmp(8, -(2**31)), DROPPED),
    "bmp with endless runs": ("a.bmp", lambda: bmp(2000, 2000, 8, 1, b"\0\x02\xff\xff" * 4000), KEPT),
    "ppm": ("a.ppm", lambda: encoded(format="PPM"), KEPT),
    "ppm with a huge header": ("a.ppm", lambda: b"P6 99999 99999 255\n", DROPPED),
    "ppm with a number without end": ("a.ppm", lambda: b"P6 " + b"9" * 100_000, DROPPED),
    "ppm of negative size": ("a.ppm", lambda: b"P6 -5 5 255\n" + bytes(75), DROPPED),
    "plain ppm cut": ("a.ppm", lambda: b"P3 9 9 255\n1 2 3", DROPPED),
    "90 million pixels": ("a.png", lambda: png(9000, 10_000), DROPPED),
}
