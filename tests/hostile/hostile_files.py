"""Data files that are no data files.

``FILES`` maps a name to (file name, function that makes its bytes, rows that fail).

``None`` for the rows: the file as a whole must be refused. Otherwise check_data must name exactly these of its rows.
"""

import io
import json

import pyarrow
import pyarrow.parquet
from hostile_rows import turns

GOOD = json.dumps({"id": "good", "conversations": turns("hi")})


def parquet(**columns):
    """Return a Parquet file with the columns and two good rows' conversations."""
    file = io.BytesIO()
    good = [turns("hi")] * 2
    pyarrow.parquet.write_table(pyarrow.table({"conversations": good} | columns), file)
    return file.getvalue()


def lines(*rows):
    """Return JSON lines as bytes."""
    return b"".join((row.encode() if isinstance(row, str) else row) + b"\n" for row in rows)


FILES = {
    "empty json": ("d.json", lambda: b"", None),
    "empty jsonl": ("d.jsonl", lambda: b"", None),
    "blank jsonl": ("d.jsonl", lambda: b"\n \n", None),
    "empty list": ("d.json", lambda: b"[]", None),
    "an object": ("d.json", lambda: GOOD.encode(), None),
    "a number": ("d.json", lambda: b"7", None),
    "list cut": ("d.json", lambda: f"[{GOOD}, {GOOD[:20]}".encode(), None),
    "list without its end": ("d.json", lambda: f"[{GOOD}".encode(), None),
    "comma at the end": ("d.json", lambda: f"[{GOOD},]".encode(), None),
    "jsonl named json": ("d.json", lambda: lines(GOOD, GOOD), None),
    "json named jsonl": ("d.jsonl", lambda: f"[{GOOD}]".encode(), {0}),
    "byte order mark, json": ("d.json", lambda: b"\xef\xbb\xbf[" + GOOD.encode() + b"]", set()),
    "byte order mark, jsonl": ("d.jsonl", lambda: b"\xef\xbb\xbf" + lines(GOOD, GOOD), set()),
    "utf-16 json": ("d.json", lambda: f"[{GOOD}]".encode("utf-16"), None),
    "latin-1 json": ("d.json", lambda: f'[{GOOD}, "caf\xe9"]'.encode("latin-1"), None),
    "latin-1 jsonl": ("d.jsonl", lambda: lines(GOOD, b'{"id": "caf\xe9"}'), {1}),
    "windows line ends": ("d.jsonl", lambda: f"{GOOD}\r\n{GOOD}\r\n".encode(), set()),
    "blank lines": ("d.jsonl", lambda: lines("", GOOD, "  ", GOOD, ""), set()),
    "no end of line": ("d.jsonl", lambda: GOOD.encode(), set()),
    "last line cut": ("d.jsonl", lambda: lines(GOOD, GOOD) + GOOD[:30].encode(), {2}),
    "line of binary": ("d.jsonl", lambda: lines(GOOD, bytes(range(1, 10)) + b"\xff\xfe"), {1}),
    "json nested without end": ("d.json", lambda: b"[" * 100_000, None),
    "jsonl nested without end": ("d.jsonl", lambda: lines(GOOD, b"[" * 100_000), {1}),
    "objects nested without end": ("d.jsonl", lambda: lines(b'{"a":' * 100_000, GOOD), {0}),
    "number of five thousand digits, json": ("d.json", lambda: b'[{"id": ' + b"9" * 5000 + b"}]", None),
    "number of five thousand digits, jsonl": ("d.jsonl", lambda: lines(b'{"id": ' + b"9" * 5000 + b"}", GOOD), {0}),
    "hundred thousand empty rows": ("d.json", lambda: b"[" + b"{}," * 200 + b"{}]", set(range(201))),
    "same id twice": ("d.jsonl", lambda: lines(GOOD, GOOD), set()),
    "one line of 40 MB": ("d.jsonl", lambda: lines(GOOD, b'{"id": "' + b"x" * 40_000_000 + b'"}'), {1}),
    "unknown ending": ("d.csv", lambda: b"id,image\n", None),
    "gzip": ("d.json.gz", lambda: b"\x1f\x8b", None),
    "parquet of text": ("d.parquet", lambda: b"PAR1 no PAR1", None),
    "parquet empty": ("d.parquet", lambda: b"", None),
    "parquet cut": ("d.parquet", lambda: parquet()[:-20], None),
    "parquet with a lying footer": ("d.parquet", lambda: parquet()[:-8] + b"\xff\xff\xff\x7fPAR1", None),
    "parquet": ("d.parquet", lambda: parquet(id=[1, 2]), set()),
    "parquet without turns": ("d.parquet", lambda: parquet(conversations=[None, None]), {0, 1}),
    "parquet with bytes as ids": ("d.parquet", lambda: parquet(id=[b"\xff", b"a"]), set()),
    "parquet with the year 300000": (
        "d.parquet",
        lambda: parquet(when=pyarrow.array([2**43, 0], pyarrow.timestamp("s"))),
        {0},
    ),
    "parquet with image of no bytes": (
        "d.parquet",
        lambda: parquet(image=[{"bytes": None, "path": None}, {"bytes": b"", "path": None}]),
        {0, 1},
    ),
}
