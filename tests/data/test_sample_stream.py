"""Streamed samples: every layout gives the rows that map-style data gives, each once over ranks and workers."""

import argparse
import io
import json
import subprocess
import sys
import tarfile
from collections import Counter

import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from cal_train.cli import check_data
from cal_train.cli.estimate import row_lengths
from cal_train.cli.main import main
from cal_train.cli.recipe import load_recipe
from cal_train.conf import DataArguments
from cal_train.data.collate import Collator
from cal_train.data.dataset import VlmDataset
from cal_train.data.examples import build_encoder
from cal_train.data.sample_stream import ExampleMaker, SampleRows, open_sources, sample_stream
from cal_train.data.sources import Source
from cal_train.data.stream_files import open_files
from cal_train.data.stream_loader import StreamLoader
from cal_train.data.stream_plan import Share
from cal_train.testing import tiny_processor, tiny_tokenizer, write_tiny_data, write_tiny_vlm
from cal_train.types import Problem, Sample


def png(i, side=20):
    file = io.BytesIO()
    Image.new("RGB", (side, side), (i % 256, 9, 9)).save(file, "PNG")
    return file.getvalue()


def talk(i, num_images=1):
    question = "<image>\n" * num_images + f"what is {i}?"
    return [{"from": "human", "value": question}, {"from": "gpt", "value": f"a red square {i}"}]


def write_tar(path, rows):
    """``rows``: (key, record, image members by ending)."""
    with tarfile.open(path, "w") as tar:
        for key, record, images in rows:
            data = record if isinstance(record, bytes) else json.dumps(record).encode()
            for name, content in ((f"{key}.json", data), *((f"{key}.{end}", value) for end, value in images.items())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def write_shards(folder, numbers, per_shard=5):
    folder.mkdir(parents=True, exist_ok=True)
    numbers = list(numbers)
    for first in range(0, len(numbers), per_shard):
        rows = [
            (f"k{i}", {"id": f"r{i}", "conversations": talk(i)}, {"png": png(i)}) for i in numbers[first:][:per_shard]
        ]
        write_tar(folder / f"s-{first:04}.tar", rows)
    return str(folder)


def write_parquet(file, numbers, kind="struct", rows_per_group=4):
    file.parent.mkdir(parents=True, exist_ok=True)
    image = {"struct": lambda i: {"bytes": png(i), "path": None}, "bytes": png, "list": lambda i: [{"bytes": png(i)}]}[
        kind
    ]
    column = "images" if kind == "list" else "image"
    rows = {"id": [f"r{i}" for i in numbers], column: [image(i) for i in numbers]}
    table = pa.table(rows | {"conversations": [talk(i) for i in numbers]})
    parquet.write_table(table, file, row_group_size=rows_per_group)
    return str(file)


def samples(path, image_root=None):
    rows = SampleRows(image_root)
    blocks = open_files(str(path), image_root, rows)
    return [row for block, n in enumerate(blocks.lengths.tolist()) for row in blocks.read(block, 0, n)]


def options(*paths, **others):
    return DataArguments(data=[{"path": str(path)} for path in paths], template="chatml", streaming=True, **others)


def loader(data, share=Share(), workers=0, batch_size=2, seed=0, pack_tokens=None):  # noqa: B008
    maker = ExampleMaker(build_encoder(data, tiny_processor()), Collator(tiny_tokenizer().pad_token_id, pack_tokens))
    stream = sample_stream(open_sources(data), maker, batch_size, share, data.shuffle_pool, seed)
    return StreamLoader(stream, workers, max_bad_samples=None)


def ids_of(batches):
    return [batch.sample_ids for batch in batches]


def equal(first, second):
    assert first.inputs.keys() == second.inputs.keys() and first.sample_ids == second.sample_ids
    return all(torch.equal(first.inputs[name], second.inputs[name]) for name in first.inputs)


def test_every_layout_gives_the_same_samples(tmp_path):
    folder = tmp_path / "plain"
    folder.mkdir()
    for i in range(7):
        (folder / f"{i}.png").write_bytes(png(i))
    rows = [{"id": f"r{i}", "image": f"{i}.png", "conversations": talk(i)} for i in range(7)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows[:3])))
    (folder / "b.jsonl").write_text("\n".join(map(json.dumps, rows[3:])))
    places = {
        "jsonl": folder,
        "tar": write_shards(tmp_path / "tar", range(7)),
        "braces": f"{tmp_path}/tar/s-{{0000,0005}}.tar",
        **{kind: write_parquet(tmp_path / f"{kind}.parquet", range(7), kind) for kind in ("struct", "bytes", "list")},
    }
    for kind, place in places.items():
        found = samples(place)
        assert all(isinstance(row, Sample) for row in found), found
        shown = [row.images[0] if isinstance(row.images[0], bytes) else row.images[0].read_bytes() for row in found]
        assert [(row.id, row.messages[1].content) for row in found] == [
            (f"r{i}", f"a red square {i}") for i in range(7)
        ]
        assert shown == [png(i) for i in range(7)], kind


@pytest.mark.parametrize(
    ("record", "members", "order"),
    [
        pytest.param({}, {"jpg": 1}, [1], id="one"),
        pytest.param({}, {"1.jpg": 2, "0.jpg": 1, "10.png": 3}, [1, 2, 3], id="numbered"),
        pytest.param({"image": ["0.jpg", "k.1.jpg"]}, {"1.jpg": 2, "0.jpg": 1}, [1, 2], id="named"),
        pytest.param({"image": ["1.jpg", "0.jpg"]}, {"1.jpg": 2, "0.jpg": 1}, [2, 1], id="other-order"),
        pytest.param({"image": "coco/train/000009.jpg"}, {"jpg": 1}, [1], id="path-of-before"),
        pytest.param({"id": "x"}, {}, [], id="text-only"),
    ],
)
def test_images_of_a_row_of_a_shard_are_its_members(tmp_path, record, members, order):
    images = {name: png(i) for name, i in members.items()}
    row = {**record, "conversations": talk(0, len(order))}
    (found,) = samples(write_tar(tmp_path / "s.tar", [("k", row, images)]))
    assert isinstance(found, Sample), found
    assert list(found.images) == [png(i) for i in order] and found.id == record.get("id", "k")


@pytest.mark.parametrize(
    ("names", "members", "order"),
    [
        pytest.param(["1.png", "0.png"], {"0.png": 0, "1.png": 1}, [1, 0], id="named"),
        pytest.param(["coco/9.jpg", "coco/3.jpg"], {"0.jpg": 0, "1.jpg": 1}, [0, 1], id="paths-of-before"),
        pytest.param([{"url": "coco/9.jpg"}], {"jpg": 4}, [4], id="url-form"),
        pytest.param(["k.1.png", None], {"0.png": 0, "1.png": 1}, None, id="named-once"),
        pytest.param(["coco/9.jpg", "1.png"], {"0.png": 0, "1.png": 1}, None, id="named-in-part"),
    ],
)
def test_images_inside_messages_are_members_too(tmp_path, names, members, order):
    kind = "image_url" if isinstance(names[0], dict) else "image"
    parts = [*({"type": kind, kind: name} for name in names), {"type": "text", "text": "what?"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "yes"}]}
    images = {name: png(i) for name, i in members.items()}
    (found,) = samples(write_tar(tmp_path / "s.tar", [("k", row, images)]))
    if order is None:
        assert isinstance(found, Problem), found
    else:
        assert isinstance(found, Sample), found
        assert list(found.images) == [png(i) for i in order]


@pytest.mark.parametrize(
    ("record", "members", "problem"),
    [
        pytest.param({"image": "../secret.png", "conversations": talk(0)}, {}, "leaves the image root", id="outside"),
        pytest.param({"image": "/etc/passwd", "conversations": talk(0)}, {}, "leaves the image root", id="absolute"),
        pytest.param({"image": "http://x/y.png", "conversations": talk(0)}, {}, "is a URL", id="url"),
        pytest.param({"image": "none.png", "conversations": talk(0)}, {}, "does not exist", id="missing"),
        pytest.param({"conversations": talk(0)}, {"0.png": 1, "1.png": 2}, "1 image marks but 2 images", id="count"),
        pytest.param(b"{", {"png": 1}, "not JSON", id="json"),
        pytest.param([1], {}, "a row is an object", id="list"),
    ],
)
def test_a_bad_row_of_a_shard_is_a_problem_and_the_next_is_read(tmp_path, record, members, problem):
    (tmp_path / "secret.png").write_bytes(png(3))
    folder = tmp_path / "data"
    folder.mkdir()
    bad = ("k", record, {name: png(i) for name, i in members.items()})
    good = ("l", {"conversations": talk(1)}, {"png": png(1)})
    first, second = samples(write_tar(folder / "s.tar", [bad, good]))
    assert isinstance(first, Problem) and problem in str(first) and "s.tar, row 0" in str(first), first
    assert isinstance(second, Sample) and second.images == (png(1),)


def test_members_that_point_outside_are_read_as_bytes_and_never_written(tmp_path):
    row = ("../../evil", {"conversations": talk(0)}, {"png": png(0)})
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (found,) = samples(write_tar(folder / "s.tar", [row]))
    assert isinstance(found, Sample) and found.images == (png(0),)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["s.tar"]


@pytest.mark.parametrize("path", ["http://x/{0..3}.tar", "pipe:cat x.tar"])
def test_urls_and_commands_are_refused(path):
    with pytest.raises(ValueError, match="URL or a command"):
        open_sources(DataArguments(data_path=path, streaming=True))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (2, 1), (3, 0), (3, 2)])
def test_each_row_is_seen_once_over_ranks_and_workers(tmp_path, world_size, workers):
    paths = [write_shards(tmp_path / "t", range(17)), write_parquet(tmp_path / "p.parquet", range(17, 30))]
    data = options(*paths, shuffle_pool=6)
    ranks = [loader(data, Share(rank, world_size), workers) for rank in range(world_size)]
    seen = [ids_of(rank) for rank in ranks]
    left_out = ranks[0].stream.plan.left_out(world_size)
    assert {len(batches) for batches in seen} == {30 // (2 * world_size)} and left_out == 30 % (2 * world_size)
    counts = Counter(id for batches in seen for batch in batches for id in batch)
    assert set(counts.values()) == {1} and set(counts) <= {f"r{i}" for i in range(30)}
    assert len(counts) == 30 - left_out


def test_weights_say_how_many_rows_a_source_gives(tmp_path):
    paths = [write_shards(tmp_path / "t", range(10)), write_parquet(tmp_path / "p.parquet", range(10, 20))]
    data = options(*paths)
    data.data[0]["weight"], data.data[1]["weight"] = 0.75, 2.0
    (counts,) = (Counter(id for batch in ids_of(loader(data, batch_size=1)) for id in batch),)
    assert sum(n for id, n in counts.items() if int(id[1:]) < 10) == round(0.75 * 10)
    assert [counts[f"r{i}"] for i in range(10, 20)] == [2] * 10


def test_order_follows_from_seed_and_epoch(tmp_path):
    data = options(write_shards(tmp_path, range(20)))
    first, second, other_seed = loader(data), loader(data), loader(data, seed=1)
    epochs = [ids_of(first), ids_of(first)]
    assert [ids_of(second), ids_of(second)] == epochs and epochs[0] != epochs[1]
    assert ids_of(other_seed) != epochs[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_resumed_at_any_position_is_the_same_and_opens_only_what_it_needs(tmp_path, workers):
    data = options(write_shards(tmp_path / "t", range(17)), write_parquet(tmp_path / "p.parquet", range(17, 30)))
    data.shuffle_pool = 4
    straight = loader(data, workers=workers, pack_tokens=90)
    batches = [*straight, *straight]
    for position in (1, 14, 16) if workers else range(1, 30, 3):
        first, second = loader(data, workers=workers, pack_tokens=90), loader(data, workers=workers, pack_tokens=90)
        first.stream.plan, first.stream.position = straight.stream.plan, position
        state = {**first.state_dict(), "epoch": position // 15, "position": position % 15}
        second.load_state_dict(json.loads(json.dumps(state)))
        following = [*second, *([] if position >= 15 else second)]
        assert len(following) == 30 - position
        assert all(equal(a, b) for a, b in zip(following, batches[position:], strict=True))


def test_batches_are_those_of_the_map_style_data_set(tmp_path):
    folder = tmp_path / "images"
    path = write_tiny_data(tmp_path, 12)
    rows = json.loads(path.read_text())
    shard = [
        (
            row["id"],
            {k: v for k, v in row.items() if k != "image"},
            {"png": (folder / row["image"]).read_bytes()} if "image" in row else {},
        )
        for row in rows
    ]
    write_tar(tmp_path / "s.tar", shard)
    dataset = VlmDataset([Source(path, folder)], tiny_processor(), "chatml", 2048)
    row_of = {row["id"]: i for i, row in enumerate(rows)}
    collate = Collator(tiny_tokenizer().pad_token_id)
    for batch in loader(options(tmp_path / "s.tar"), batch_size=3):
        expected = collate([dataset[row_of[id]] for id in batch.sample_ids])
        assert set(batch.inputs) == set(expected) - {"sample_ids", "dropped", "num_truncated"}
        assert all(torch.equal(value, expected[name]) for name, value in batch.inputs.items())


def test_a_parquet_file_of_text_alone_takes_no_images_from_the_files_after_it(tmp_path):
    text = {"id": ["t0"], "conversations": [talk(0, num_images=0)]}
    parquet.write_table(pa.table(text), tmp_path / "a.parquet")
    write_parquet(tmp_path / "b.parquet", range(1, 4))
    found = samples(tmp_path)
    assert [(row.id, len(row.images)) for row in found] == [("t0", 0), ("r1", 1), ("r2", 1), ("r3", 1)]


def test_a_broken_row_group_costs_its_rows_and_no_others(tmp_path):
    file = tmp_path / "p.parquet"
    write_parquet(file, range(12))
    offset = parquet.read_metadata(file).row_group(1).column(0).data_page_offset
    damaged = bytearray(file.read_bytes())
    damaged[offset : offset + 40] = b"\xff" * 40
    file.write_bytes(bytes(damaged))
    found = samples(file)
    assert [row.id for row in found if isinstance(row, Sample)] == [f"r{i}" for i in (0, 1, 2, 3, 8, 9, 10, 11)]
    assert [row.row for row in found if isinstance(row, Problem)] == [4, 5, 6, 7]
    batches = list(loader(options(file)))
    assert sum(len(batch.dropped) for batch in batches) == 4


def test_a_truncated_shard_gives_what_is_before_the_cut_and_says_so(tmp_path):
    file = tmp_path / "s.tar"
    write_tar(file, [(f"k{i}", {"id": f"r{i}", "conversations": talk(i)}, {"png": png(i)}) for i in range(6)])
    file.write_bytes(file.read_bytes()[: 4 * 2048 + 600])
    (files,) = open_sources(options(file))
    (problem,) = files.blocks.problems
    assert "cut off" in str(problem) and str(file) in str(problem)
    assert [row.id for row in files if isinstance(row, Sample)] == ["r0", "r1", "r2", "r3"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_by_modality_length": True}, "packing: true"),
        ({"vision_feature_cache": "x"}, "vision_feature_cache"),
        ({"shuffle_pool": 0}, "shuffle_pool"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_with_the_cure(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        loader(options(write_shards(tmp_path, range(4)), **changes))


def test_an_empty_source_and_columns_without_a_conversation_are_errors_that_name_the_file(tmp_path):
    parquet.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    write_tar(tmp_path / "e.tar", [])
    (tmp_path / "empty").mkdir()
    for name, message in (("a.parquet", "neither a column"), ("e.tar", "no rows"), ("empty", "holds no")):
        with pytest.raises(ValueError, match=message) as error:
            open_sources(options(tmp_path / name))
        assert name in str(error.value)


@pytest.fixture
def recipe(tmp_path):
    write_tiny_vlm(tmp_path / "model")
    rows = [(f"k{i}", {"id": f"r{i % 3}", "conversations": talk(i)}, {"png": png(i)}) for i in range(4)]
    rows.append(("k4", {"conversations": talk(4)}, {"png": b"broken"}))
    rows.append(("k5", {"conversations": [{"from": "gpt", "value": "x"}, *talk(5, 0)]}, {}))
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "s.tar", rows)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model_name_or_path: {tmp_path / 'model'}\ndata_path: {tmp_path / 'shards'}\nstreaming: true\n"
        f"output_dir: {tmp_path / 'out'}\n"
    )
    return path


def test_check_data_goes_over_every_row_of_a_streaming_recipe(recipe, capsys):
    assert check_data.run(argparse.Namespace(path=str(recipe), image_root=None, options=[])) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "6 rows, 1 would fail; 4 images, 1 text-only rows, 1 repeated ids, 1 rows whose leading" in out
    assert "k4" in out and "cannot be read" in out


def test_preview_and_estimate_look_at_the_first_rows_of_a_streaming_recipe(recipe, capsys):
    assert main(["preview", str(recipe), "--rows", "2"]) == 0
    out = " ".join(capsys.readouterr().out.split())  # long paths are wrapped
    assert "row 0, id r0" in out and "row 1, id r1" in out and "row 2" not in out
    loaded = load_recipe(recipe, [], will_train=False)
    lengths, is_measured = row_lengths(loaded, None, 6)
    assert is_measured and list(lengths.image) == [4, 4, 4, 4, 0] and lengths.num_bad == 1


MEASURE = """
import resource, sys
from cal_train.conf import DataArguments
from cal_train.data.sample_stream import SampleRows, open_sources
from cal_train.data.stream_loader import RowStream, StreamBatch
import torch

class Maker:
    def make(self, window, chosen, spare, rng):
        return StreamBatch({}, [window[i].id for i in chosen])

files = open_sources(DataArguments(data_path=sys.argv[1], streaming=True))
stream = RowStream([own.blocks for own in files], [1.0], Maker().make, 8, shuffle_pool=512)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
num_rows = sum(len(batch.sample_ids) for batch in stream)
print(num_rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_memory_stays_within_a_few_pools_however_many_rows_are_streamed(tmp_path, kind):
    num_rows, image = 20_000, torch.randint(256, (50_000,), dtype=torch.uint8).numpy().tobytes()
    for first in range(0, num_rows, 1000):
        numbers = range(first, first + 1000)
        if kind == "tar":
            rows = [(f"k{i}", {"conversations": talk(i)}, {"png": image}) for i in numbers]
            write_tar(tmp_path / f"s-{first:05}.tar", rows)
        else:
            table = pa.table({"image": [image] * 1000, "conversations": [talk(i) for i in numbers]})
            parquet.write_table(table, tmp_path / f"s-{first:05}.parquet", row_group_size=100, use_dictionary=False)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    seen, grown_kib = map(int, done.stdout.split())
    assert seen == num_rows
    print(f"{kind}: {grown_kib / 2**10:.1f} MiB more for {num_rows} rows")
    pool_mib = 512 * 50_000 / 2**20  # 24 MiB; all rows are 954 MiB
    assert grown_kib / 2**10 < 4 * pool_mib + 60, grown_kib
