"""Files to pairs: every layout says the same, nothing leaves its root, and what is broken is named."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from cal_train.data.pair_rows import open_pairs
from cal_train.data.pair_set import read_pair_set
from cal_train.data.pairs import Pair, PairOptions, PairSource, pair_sources
from cal_train.data.stream_files import source_files
from cal_train.data.stream_shards import listed_rows
from cal_train.types import Problem


def png(i: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (i, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_images(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i}.png").write_bytes(png(i))


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def members_of(numbers):
    return [item for i in numbers for item in ((f"k{i}.png", png(i)), (f"k{i}.txt", f"caption {i}".encode()))]


def read_all(path, **options):
    blocks = open_pairs(PairSource(str(path), **options))
    return [row for block, n in enumerate(blocks.lengths.tolist()) for row in blocks.read(block, 0, n)]


def content(pair):
    assert isinstance(pair, Pair), pair
    data = pair.image if isinstance(pair.image, bytes) else pair.image.read_bytes()
    return np.asarray(Image.open(io.BytesIO(data)))[0, 0, 0].item(), pair.captions


EXPECTED = [(i, (f"caption {i}",)) for i in range(5)]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json"])
def test_tables_are_read_with_images_from_their_root(tmp_path, suffix):
    write_images(tmp_path / "images", 5)
    rows = [{"filepath": f"{i}.png", "title": f"caption {i}"} for i in range(5)]
    file = tmp_path / f"pairs.{suffix}"
    if suffix in ("csv", "tsv"):
        sep = "," if suffix == "csv" else "\t"
        lines = [sep.join(rows[0]), *(sep.join(row.values()) for row in rows)]
        file.write_text("\n".join(lines))
    else:
        file.write_text("\n".join(map(json.dumps, rows)) if suffix == "jsonl" else json.dumps(rows))
    assert [content(row) for row in read_all(file, image_root=str(tmp_path / "images"))] == EXPECTED


def test_shards_are_read_by_braces_by_folder_and_compressed(tmp_path):
    write_tar(tmp_path / "s-0.tar", [("__meta__", b"x"), *members_of([0, 1])])
    write_tar(tmp_path / "s-1.tar", members_of([2, 3, 4]))
    assert [content(row) for row in read_all(f"{tmp_path}/s-{{0..1}}.tar")] == EXPECTED
    assert [content(row) for row in read_all(tmp_path)] == EXPECTED
    (tmp_path / "z").mkdir()
    with tarfile.open(tmp_path / "z" / "s.tar.gz", "w:gz") as tar:
        for name, data in members_of(range(5)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert [content(row) for row in read_all(tmp_path / "z")] == EXPECTED


@pytest.mark.parametrize("kind", ["bytes", "struct", "path"])
def test_parquet_holds_images_as_bytes_as_datasets_column_or_as_paths(tmp_path, kind):
    write_images(tmp_path, 5)
    image = {"bytes": png, "struct": lambda i: {"bytes": png(i), "path": None}, "path": lambda i: f"{i}.png"}[kind]
    table = pa.table({"image": [image(i) for i in range(5)], "text": [f"caption {i}" for i in range(5)]})
    parquet.write_table(table, tmp_path / "p.parquet", row_group_size=2)
    blocks = open_pairs(PairSource(str(tmp_path / "p.parquet")))
    assert blocks.lengths.tolist() == [2, 2, 1]
    assert [content(row) for row in read_all(tmp_path / "p.parquet")] == EXPECTED


def test_a_range_of_a_block_is_the_same_rows_as_in_the_whole(tmp_path):
    write_tar(tmp_path / "s.tar", members_of(range(5)))
    blocks = open_pairs(PairSource(str(tmp_path / "s.tar")))
    for start in range(5):
        for stop in range(start + 1, 6):
            assert [content(row) for row in blocks.read(0, start, stop)] == EXPECTED[start:stop]
    one_by_one = [content(row) for i in range(5) for row in blocks.read(0, i, i + 1)]
    assert one_by_one == EXPECTED


def test_a_shard_is_opened_once_when_read_in_sequence(tmp_path, monkeypatch):
    from cal_train.data import stream_files

    write_tar(tmp_path / "s.tar", members_of(range(5)))
    blocks = open_pairs(PairSource(str(tmp_path / "s.tar")))
    opened, original = [], stream_files.read_shard
    monkeypatch.setattr(stream_files, "read_shard", lambda *args: opened.append(args[0]) or original(*args))
    assert [content(row) for i in range(5) for row in blocks.read(0, i, i + 1)] == EXPECTED
    assert len(opened) == 1


def test_several_captions_come_from_a_list_and_from_a_json_member(tmp_path):
    record = json.dumps({"captions": ["one", " two ", ""]}).encode()
    write_tar(tmp_path / "s.tar", [("a.png", png(0)), ("a.json", record)])
    write_images(tmp_path, 1)
    (tmp_path / "p.jsonl").write_text(json.dumps({"image": "0.png", "captions": ["one", " two ", ""]}))
    for path in ("s.tar", "p.jsonl"):
        assert [content(row) for row in read_all(tmp_path / path)] == [(0, ("one", "two"))]


@pytest.mark.parametrize(
    ("image", "caption", "problem"),
    [
        ("../secret.png", "a", "leaves the image root"),
        ("link.png", "a", "leaves the image root"),
        ("http://x/y.png", "a", "is a URL"),
        ("missing.png", "a", "does not exist"),
        ("0.png", "  ", "blank"),
        ("0.png", [], "no caption"),
        ("0.png", 3, "int, not text"),
        (None, "a", "not an image path"),
    ],
)
def test_a_bad_row_is_a_problem_that_names_it(tmp_path, image, caption, problem):
    root = tmp_path / "images"
    write_images(root, 1)
    (tmp_path / "secret.png").write_bytes(png(1))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    file = tmp_path / "p.jsonl"
    good = {"image": "0.png", "captions": "fine"}
    file.write_text("\n".join(map(json.dumps, [good, {"image": image, "captions": caption}])))
    first, second = read_all(file, image_root=str(root))
    assert content(first) == (0, ("fine",))
    assert isinstance(second, Problem) and problem in str(second) and second.row == 1 and str(file) in str(second)


def test_csv_rows_of_a_wrong_width_are_problems_and_the_others_keep_their_text(tmp_path):
    write_images(tmp_path, 2)
    (tmp_path / "p.csv").write_text('image,caption\n0.png,"a, b"\n1.png,too,many\n1.png,007\n')
    blocks = open_pairs(PairSource(str(tmp_path / "p.csv")))
    assert [content(row) for row in read_all(tmp_path / "p.csv")] == [(0, ("a, b",)), (1, ("007",))]
    (problem,) = blocks.problems
    assert "line 3 has 3 columns instead of 2" in str(problem)


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ([("a.png", png(0))], "no caption member"),
        ([("a.txt", b"x")], "no image member"),
        ([("a.png", png(0)), ("a.txt", b"\xff\xfe")], "utf-8"),
        ([("a.png", png(0)), ("a.json", b"{")], "Expecting"),
        ([("a.png", png(0)), ("a.json", b"[" * 100_000)], "nested too deep"),
        ([("a.png", png(0)), ("a.json", b'{"url": "x"}')], "none of the fields"),
        ([("a.png", png(0)), ("a.txt", b" ")], "blank"),
    ],
)
def test_a_bad_member_of_a_shard_is_a_problem_and_the_next_row_is_read(tmp_path, members, problem):
    write_tar(tmp_path / "s.tar", [*members, *members_of([4])])
    bad, good = read_all(tmp_path / "s.tar")
    assert isinstance(bad, Problem) and problem in str(bad) and bad.id == "a"
    assert content(good) == EXPECTED[4]


@pytest.mark.parametrize("cut", [1, 100, 600, 1030, 1536, 2000, 2048, 2560, 3000])
def test_a_truncated_shard_gives_the_rows_before_the_cut_and_says_so(tmp_path, cut):
    whole = write_tar(tmp_path / "whole.tar", members_of(range(5))).read_bytes()
    kept = 5 * 4 * 512 - cut
    (tmp_path / "s.tar").write_bytes(whole[:kept])
    blocks = open_pairs(PairSource(str(tmp_path / "s.tar")))
    assert len(blocks.problems) == 1 and "cut off" in str(blocks.problems[0])
    rows = list(blocks.read(0, 0, int(blocks.lengths[0])))
    good = [content(row) for row in rows if isinstance(row, Pair)]
    assert good == EXPECTED[: len(good)] and len(rows) - len(good) <= 1
    # A row takes four blocks of 512 bytes: two headers, an image, and a caption of 9 bytes with padding behind it.
    assert len(good) == (kept + 2048 - (3 * 512 + 9)) // 2048


def test_a_sizes_json_is_read_once_for_all_its_shards(tmp_path, monkeypatch):
    names = [f"s-{i}.tar" for i in range(20)]
    (tmp_path / "sizes.json").write_text(json.dumps(dict.fromkeys(names, 3)))
    read, reads = Path.read_text, []
    monkeypatch.setattr(Path, "read_text", lambda self, **options: reads.append(self) or read(self, **options))
    assert [listed_rows(tmp_path / name).rows for name in names] == [3] * 20
    assert reads == [tmp_path / "sizes.json"]


def test_a_wrong_sizes_json_is_noticed_in_both_directions(tmp_path, caplog):
    write_tar(tmp_path / "s.tar", members_of(range(5)))
    (tmp_path / "sizes.json").write_text('{"s.tar": 7}')
    rows = read_all(tmp_path / "s.tar")
    assert [content(row) for row in rows[:5]] == EXPECTED
    assert all(isinstance(row, Problem) and "ends before" in str(row) for row in rows[5:]) and len(rows) == 7
    (tmp_path / "sizes.json").write_text('{"s.tar": 3}')
    assert [content(row) for row in read_all(tmp_path / "s.tar")] == EXPECTED[:3]
    assert "more than the 3 rows" in caplog.text


def test_what_cannot_be_read_at_all_is_an_error_that_names_the_file(tmp_path):
    def refuse(name, data, message):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message) as error:
            open_pairs(PairSource(str(tmp_path / name)))
        assert name in str(error.value)

    refuse("empty.tar", write_tar(tmp_path / "e.tar", []).read_bytes(), "no rows")
    refuse("zero.tar", b"", "not a readable tar")
    refuse("text.tar", b"hello" * 500, "not a readable tar")
    refuse("text.parquet", b"hello", "not a Parquet")
    refuse("header.csv", b"image,caption\n", "no rows")
    refuse("columns.csv", b"a,b\n1,2\n", "no image column")
    refuse("nothing.jsonl", b"", "no rows")
    refuse("list.jsonl", b"[1]\n", "JSON object")
    refuse("film.mp4", b"x", "a source is")
    parquet.write_table(
        pa.table({"image": pa.array([], pa.string()), "text": pa.array([], pa.string())}), tmp_path / "e"
    )
    refuse("rows.parquet", (tmp_path / "e").read_bytes(), "no rows")


@pytest.mark.parametrize("path", ["http://x/{0..3}.tar", "pipe:cat x.tar", "gs://b/x.tar"])
def test_urls_and_commands_are_refused(path):
    with pytest.raises(ValueError, match="URL or a command"):
        source_files(path)


def test_missing_shards_are_counted_and_the_first_is_named(tmp_path):
    write_tar(tmp_path / "s-0.tar", members_of([0]))
    with pytest.raises(ValueError, match=r"2 of 3 files .* first .*s-1\.tar"):
        source_files(f"{tmp_path}/s-{{0..2}}.tar")


def test_an_evaluation_set_joins_the_captions_of_an_image(tmp_path):
    write_images(tmp_path, 2)
    lines = ["image,caption", "1.png,a", "0.png,b", "1.png,c"]
    (tmp_path / "p.csv").write_text("\n".join(lines))
    pairs = read_pair_set([PairSource(str(tmp_path / "p.csv"))])
    assert [pair.captions for pair in pairs.images] == [("a", "c"), ("b",)]
    assert pairs.captions == ("a", "c", "b") and pairs.image_of_text.tolist() == [0, 0, 1]


def test_an_evaluation_set_counts_broken_images(tmp_path):
    write_images(tmp_path, 2)
    (tmp_path / "0.png").write_bytes(png(0)[:40])
    (tmp_path / "p.csv").write_text("image,caption\n0.png,a\n1.png,b\n")
    with pytest.raises(ValueError, match=r"row 0.*cannot be read"):
        read_pair_set([PairSource(str(tmp_path / "p.csv"))])
    assert len(read_pair_set([PairSource(str(tmp_path / "p.csv"))], max_bad_samples=1).images) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one"),
        ({"data_path": "a", "data": [{"path": "b"}]}, "exactly one"),
        ({"data": []}, "list of sources"),
        ({"data": [{"path": "a", "wieght": 2}]}, "unknown keys .*wieght"),
        ({"data": [{"path": "a", "weight": 0}]}, "not a positive number"),
        ({"data": [{"image_root": "a"}]}, "write {path"),
    ],
)
def test_a_malformed_mixture_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pair_sources(PairOptions(**options))


def test_several_captions_per_image_need_multiple_positives():
    with pytest.raises(ValueError, match="multiple_positives"):
        PairOptions(data_path="x", captions_per_image=2)
    assert PairOptions(data_path="x", captions_per_image=2, multiple_positives=True).captions_per_image == 2
