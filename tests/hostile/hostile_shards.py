"""Webdataset shards that lie: ``SHARDS`` maps a name to (file name, function that makes its bytes, rows that fail).

``None`` for the rows: the shard as a whole must be refused.
"""

import gzip
import io
import json
import tarfile

from hostile_rows import turns

GOOD = json.dumps({"conversations": turns("hi")}).encode()


def member(name, content=GOOD, **fields):
    """Return a member as bytes, header and content; ``fields`` change its header."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    for field, value in fields.items():
        setattr(header, field, value)
    return header.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def shard(*members):
    """Return a whole shard."""
    return b"".join(members) + bytes(1024)


def rows(num):
    """Return good members."""
    return [member(f"{i:04d}.json") for i in range(num)]


def damaged(header):
    """Return a member whose header has another checksum."""
    return header[:150] + b"1" + header[151:]


def with_size(content, size):
    """Return a member's bytes with another size field, of 12 bytes, and the checksum that goes with it."""
    header = bytearray(content[:512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content[512:]


def extended(records, size=None):
    """Return an extended header with raw records; ``size`` bytes of it unless given."""
    return member("x", records if size is None else records.ljust(size, b"0"), type=tarfile.XHDTYPE)


def record(name, value):
    """Return a record of an extended header."""
    text = f" {name}={value}\n"
    length = len(text) + 1
    while len(f"{length}{text}") != length:
        length += 1
    return f"{length}{text}".encode()


def zeros_in_gzip(num_bytes, before=b""):
    """Return a gzip file of that many zeros behind some bytes."""
    file = io.BytesIO()
    with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=9) as packed:
        packed.write(before)
        for _ in range(num_bytes // 2**20):
            packed.write(bytes(2**20))
    return file.getvalue()


def large(name, num_bytes):
    """Return the header of a member of that many bytes, which do not follow."""
    header = tarfile.TarInfo(name)
    header.size = num_bytes
    return header.tobuf(tarfile.GNU_FORMAT)


OUTSIDE = json.dumps({"conversations": turns(), "image": "../../outside/secret.png"}).encode()

SHARDS = {
    "good": ("s.tar", lambda: shard(*rows(3)), set()),
    "good, gzip": ("s.tar.gz", lambda: gzip.compress(shard(*rows(3))), set()),
    "gzip named tar": ("s.tar", lambda: gzip.compress(shard(*rows(3))), {3}),
    "xz named tar": ("s.tar", lambda: b"\xfd7zXZ\0" + bytes(600), None),
    "empty": ("s.tar", lambda: b"", None),
    "only an end": ("s.tar", lambda: bytes(1024), None),
    "text": ("s.tar", lambda: b"hello" * 300, None),
    "gzip of text": ("s.tar.gz", lambda: gzip.compress(b"hello" * 300), None),
    "gzip cut": ("s.tar.gz", lambda: gzip.compress(shard(*rows(3)))[:40], None),
    "name with parents": ("s.tar", lambda: shard(*rows(1), member("../../0001.json")), set()),
    "absolute name": ("s.tar", lambda: shard(*rows(1), member("/etc/0001.json")), set()),
    "symbolic link": (
        "s.tar",
        lambda: shard(*rows(1), member("0001.json", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")),
        set(),
    ),
    "hard link": (
        "s.tar",
        lambda: shard(*rows(1), member("0001.json", b"", type=tarfile.LNKTYPE, linkname="0000.json")),
        set(),
    ),
    "device": ("s.tar", lambda: shard(*rows(1), member("0001.json", b"", type=tarfile.CHRTYPE)), set()),
    "pipe": ("s.tar", lambda: shard(*rows(1), member("0001.json", b"", type=tarfile.FIFOTYPE)), set()),
    "image by a path outside": ("s.tar", lambda: shard(*rows(1), member("0001.json", OUTSIDE)), {1}),
    "json nested": ("s.tar", lambda: shard(*rows(1), member("0001.json", b"[" * 100_000)), {1}),
    "json not utf-8": ("s.tar", lambda: shard(*rows(1), member("0001.json", b'{"id": "\xff"}')), {1}),
    "json empty": ("s.tar", lambda: shard(*rows(1), member("0001.json", b"")), {1}),
    "json missing": ("s.tar", lambda: shard(*rows(1), member("0001.png", b"x")), {1}),
    "image is text": (
        "s.tar",
        lambda: shard(member("0000.json", json.dumps({"conversations": turns()}).encode()), member("0000.png", b"x")),
        {0},
    ),
    "cut in a member": ("s.tar", lambda: b"".join(rows(3))[:-700], {2}),
    "damaged header in the middle": ("s.tar", lambda: shard(*rows(2), damaged(rows(3)[2]), *rows(1)), {2}),
    "size beyond the end": ("s.tar", lambda: shard(*rows(1), with_size(rows(2)[1], b"77777777777\0")), {1}),
    "size of a terabyte in gzip": ("s.tar.gz", lambda: zeros_in_gzip(2**20, large("0000.json", 2**40)), None),
    "negative size": ("s.tar", lambda: shard(*rows(1), with_size(rows(2)[1], b"\xff" * 11 + b"\x00")), {1}),
    "gzip bomb in a member": ("s.tar.gz", lambda: zeros_in_gzip(2**29, large("0000.json", 2**29)), {0}),
    "gzip bomb in a name": (
        "s.tar.gz",
        lambda: zeros_in_gzip(2**29, with_size(member("x", b"", type=tarfile.GNUTYPE_LONGNAME), b"04000000000\0")),
        None,
    ),
    "long names in a row": ("s.tar", lambda: shard(*[member("x", b"y\0", type=b"L")] * 3000, *rows(1)), None),
    "extended header of digits": ("s.tar", lambda: shard(extended(b"1", 2**20), *rows(1)), None),
    "extended header with a negative size": ("s.tar", lambda: shard(extended(record("size", -1024)), *rows(2)), None),
    "extended header with no number": ("s.tar", lambda: shard(extended(record("size", "many")), *rows(1)), {0, 1}),
    "sparse member of a terabyte": (
        "s.tar",
        lambda: shard(
            *rows(1),
            extended(record("GNU.sparse.size", 2**40) + record("GNU.sparse.map", "0,4")),
            *rows(2)[1:],
        ),
        {1},
    ),
}
