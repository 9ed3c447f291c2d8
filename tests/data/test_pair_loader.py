"""The stream of batches: resume, ranks and workers, broken rows, augmentation and tokens."""

import io
import json
import tarfile
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import processors
from transformers import CLIPImageProcessorPil

from cal_train.data.pair_batches import BatchMaker, CaptionEncoder, pair_stream
from cal_train.data.pair_images import training_transform
from cal_train.data.pairs import PairSource
from cal_train.data.stream_loader import StreamLoader
from cal_train.data.stream_plan import Share
from cal_train.testing import tiny_tokenizer
from cal_train.types import Problem

SIZE = 8
ONE = Share()


def write_table(folder, count=23, captions=lambda i: f"dog {i}", bad=()):
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        Image.new("RGB", (12, 10), (10 * i % 256, i, 255 - i)).save(folder / f"{i}.png")
        rows.append({"id": str(i), "image": f"{i}.png", "captions": captions(i)})
    for i in bad:
        (folder / f"{i}.png").write_bytes(b"broken")
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "p.jsonl")


def write_shards(folder, sizes=(5, 1, 9, 8)):
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"s-{shard}.tar", "w") as tar:
            for _ in range(size):
                file = io.BytesIO()
                Image.new("RGB", (12, 10), (number, 0, 0)).save(file, "PNG")
                for name, data in ((f"{number}.png", file.getvalue()), (f"{number}.txt", b"a dog")):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                number += 1
    return str(folder)


def image_processor():
    return CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


def loader(*paths, batch_size=4, share=ONE, pool=8, workers=0, max_bad=0, seed=0, context=8, **maker):
    encoder = CaptionEncoder(tiny_tokenizer(), context)
    stream = pair_stream(
        [PairSource(path) for path in paths],
        BatchMaker(training_transform(image_processor()), encoder, **maker),
        batch_size,
        share,
        pool,
        seed,
    )
    return StreamLoader(stream, workers, max_bad)


def equal(first, second):
    first, second = first.inputs, second.inputs
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def ids_of(pair_loader):
    return [batch.sample_ids for batch in pair_loader]


def test_a_batch_has_the_shapes_that_towers_take(tmp_path):
    batch = next(iter(loader(write_table(tmp_path)))).inputs
    assert batch["pixel_values"].shape == (4, 3, SIZE, SIZE) and batch["pixel_values"].dtype == torch.float32
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, 8)
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    padding = tiny_tokenizer().pad_token_id
    assert ((batch["input_ids"] == padding) == (batch["attention_mask"] == 0)).all()
    assert (batch["attention_mask"].diff(dim=1) <= 0).all(), "padding is on the right"
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask"}


@pytest.mark.parametrize("kind", ["table", "shards", "both"])
def test_resuming_at_any_position_is_going_straight_through(tmp_path, kind):
    paths = [write_table(tmp_path / "t")] if kind != "shards" else []
    paths += [write_shards(tmp_path / "s")] if kind != "table" else []
    straight = loader(*paths)
    batches, states = [], [straight.state_dict()]
    for _ in range(2):
        for batch in straight:
            batches.append(batch)
            states.append(json.loads(json.dumps(straight.state_dict())))
    assert len(batches) == 2 * len(straight)
    for position, state in enumerate(states[:-1]):
        resumed = loader(*paths)
        resumed.load_state_dict(state)
        following = [*resumed, *resumed][: len(batches) - position]
        for k, batch in enumerate(following[:3]):
            assert equal(batch, batches[position + k]), (position, k)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores, on purpose
@pytest.mark.parametrize("workers", [1, 3])
def test_resuming_with_worker_processes_is_going_straight_through(tmp_path, workers):
    path = write_shards(tmp_path)
    batches = list(loader(path, batch_size=3, workers=workers))
    assert len(batches) == 7
    for position in (1, 2, 5):
        first, second = loader(path, batch_size=3, workers=workers), loader(path, batch_size=3, workers=workers)
        list(islice(first, position))
        second.load_state_dict(first.state_dict())
        assert all(equal(a, b) for a, b in zip(second, batches[position:], strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_with_workers_see_every_row_once(tmp_path, workers):
    paths = [write_shards(tmp_path / "s"), write_table(tmp_path / "t", 9)]
    ranks = [loader(*paths, share=Share(rank, 2), workers=workers) for rank in range(2)]
    seen = [ids_of(rank) for rank in ranks]
    assert [len(batches) for batches in seen] == [4, 4] == [len(rank) for rank in ranks]
    flat = [name for batches in seen for batch in batches for name in batch]
    every_id = [str(i) for i in [*range(23), *range(9)]]
    assert len(flat) == 32 and sorted(flat) == sorted(every_id)


def test_ranks_that_do_not_divide_the_rows_have_equally_many_batches(tmp_path):
    path = write_table(tmp_path, 23)
    ranks = [loader(path, batch_size=2, share=Share(rank, 3)) for rank in range(3)]
    seen = [ids_of(rank) for rank in ranks]
    assert [len(batches) for batches in seen] == [3, 3, 3]
    flat = [name for batches in seen for batch in batches for name in batch]
    assert len(set(flat)) == len(flat) == 18 and ranks[0].stream.plan.left_out(3) == 5


def test_the_next_iteration_is_the_next_epoch_and_set_epoch_goes_to_a_beginning(tmp_path):
    path = write_table(tmp_path)
    first = loader(path)
    epochs = [ids_of(first), ids_of(first)]
    assert epochs[0] != epochs[1]
    second = loader(path)
    next(iter(second))
    second.set_epoch(1)
    assert ids_of(second) == epochs[1]
    second.set_epoch(0)
    assert ids_of(second) == epochs[0]


def test_a_state_of_another_run_layout_is_refused(tmp_path):
    path = write_table(tmp_path)
    state = loader(path).state_dict()
    for change, name in (({"batch_size": 2}, "batch_size"), ({"workers": 2}, "num_workers"), ({"seed": 1}, "seed")):
        with pytest.raises(ValueError, match=name):
            loader(path, **change).load_state_dict(state)
    with pytest.raises(ValueError, match="rows"):
        loader(write_table(tmp_path / "other", 24)).load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_are_replaced_counted_once_and_bounded(tmp_path, workers):
    path = write_table(tmp_path, 24, bad=(3, 11))
    tolerant = loader(path, workers=workers, max_bad=2)
    sizes = [len(batch.inputs["input_ids"]) for _ in range(2) for batch in tolerant]
    assert sizes == [4] * 12
    report = tolerant.report
    assert report.bad.count == 2 and {problem.id for problem in report.bad.problems} == {"3", "11"}
    assert report.num_repeated == 4, "two bad rows in each of two epochs"
    with pytest.raises(ValueError, match=r"2 bad rows, max_bad_samples is 1.*png.*cannot be read|p.jsonl"):
        list(loader(path, workers=workers, max_bad=1))


def test_a_replacement_is_another_row_of_the_window_while_there_is_one(tmp_path):
    path = write_table(tmp_path, 24, bad=(3, 11))
    tolerant = loader(path, max_bad=2)
    for batch in ids_of(tolerant):
        assert len(set(batch)) == 4 and not {"3", "11"} & set(batch)
    only_batch = loader(write_table(tmp_path / "small", 4, bad=(1,)), max_bad=1)
    (names,) = ids_of(only_batch)
    assert len(names) == 4 and set(names) == {"0", "2", "3"}


def test_a_resume_with_bad_rows_is_exact_too(tmp_path):
    path = write_table(tmp_path, 24, bad=(3, 11))
    batches = list(loader(path, max_bad=2))
    for position in range(1, 6):
        first, second = loader(path, max_bad=2), loader(path, max_bad=2)
        list(islice(first, position))
        second.load_state_dict(first.state_dict())
        assert all(equal(a, b) for a, b in zip(second, batches[position:], strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_data_without_a_usable_pair_is_an_error_not_a_hang(tmp_path, workers):
    path = write_table(tmp_path, 6, bad=range(6))
    with pytest.raises(ValueError, match="no usable pair"):
        list(loader(path, workers=workers, max_bad=100))


def test_too_few_pairs_for_a_batch_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="rows do not fill a batch of 4 on each of 2 ranks"):
        loader(write_table(tmp_path, 7), share=Share(0, 2))


def test_a_batch_of_one_works(tmp_path):
    batches = list(loader(write_table(tmp_path, 3), batch_size=1))
    assert [batch.inputs["pixel_values"].shape[0] for batch in batches] == [1, 1, 1]


def test_a_truncated_shard_counts_before_the_first_batch(tmp_path):
    folder = write_shards(tmp_path, (6,))
    shard = tmp_path / "s-0.tar"
    shard.write_bytes(shard.read_bytes()[: 5 * 2048 + 700])
    with pytest.raises(ValueError, match="cut off"):
        loader(folder, batch_size=2)
    tolerant = loader(folder, batch_size=2, max_bad=2)
    assert all(set(batch) <= set("01234") for batch in ids_of(tolerant))


def test_waiting_time_is_measured_and_reset(tmp_path):
    pair_loader = loader(write_table(tmp_path))
    next(iter(pair_loader))
    assert pair_loader.read_and_reset_wait_s() > 0 and pair_loader.read_and_reset_wait_s() == 0


def test_the_global_generators_stay_untouched(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(loader(write_table(tmp_path)))
    assert torch.equal(torch.rand(3), expected)


def test_crops_and_captions_change_with_the_epoch_and_the_seed(tmp_path):
    path = write_table(tmp_path, 4, captions=lambda i: ["red dog", "blue cat", "no"])
    pixels = {}
    for seed in (0, 1):
        pair_loader = loader(path, seed=seed)
        for epoch in (0, 1):
            (batch,) = pair_loader
            pixels[seed, epoch] = (batch.inputs["input_ids"].sum().item(), batch.inputs["pixel_values"].sum().item())
    assert len(set(pixels.values())) == 4


def test_several_captions_of_an_image_share_its_pixels_and_its_id(tmp_path):
    path = write_table(tmp_path, 8, captions=lambda i: [f"red {i}", f"blue {i}", f"green {i}"])
    tokenizer = tiny_tokenizer()
    for batch in (made.inputs for made in loader(path, captions_per_image=2, with_image_ids=True)):
        texts = [text.replace("<pad>", "") for text in tokenizer.batch_decode(batch["input_ids"])]
        for a, b in ((0, 1), (2, 3)):
            assert torch.equal(batch["pixel_values"][a], batch["pixel_values"][b])
            assert batch["image_ids"][a] == batch["image_ids"][b]
            assert texts[a] != texts[b] and texts[a].split()[-1] == texts[b].split()[-1]
        assert batch["image_ids"][0] != batch["image_ids"][2]
    with pytest.raises(ValueError, match="no multiple of captions_per_image"):
        loader(path, batch_size=5, captions_per_image=2, with_image_ids=True)


def test_image_ids_agree_across_ranks_and_files(tmp_path):
    first, second = write_shards(tmp_path / "a", (4,)), write_shards(tmp_path / "b", (2, 2))
    ids = []
    for path in (first, second):
        pair_loader = loader(path, with_image_ids=True)
        (batch,) = pair_loader
        ids.append(dict(zip(batch.sample_ids, batch.inputs["image_ids"].tolist(), strict=True)))
    assert ids[0] == ids[1] and len(set(ids[0].values())) == 4


def closing_tokenizer():
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", end)]
    )
    return tokenizer


def test_a_long_caption_is_cut_keeps_its_end_token_and_is_counted():
    tokenizer = closing_tokenizer()
    short, long = "dog", " ".join(["dog"] * 50)
    tokens, num_cut = CaptionEncoder(tokenizer, 6).encode([short, long])
    assert num_cut == 1
    expected = tokenizer(long)["input_ids"]
    assert tokens["input_ids"][1].tolist() == [*expected[:5], tokenizer.eos_token_id]
    whole = tokenizer(short)["input_ids"]
    assert tokens["input_ids"][0].tolist() == whole + [tokenizer.pad_token_id] * (6 - len(whole))
    assert tokens["attention_mask"].sum(1).tolist() == [len(whole), 6]


def test_a_caption_of_exactly_the_context_is_not_counted_and_one_token_is_valid():
    tokenizer = tiny_tokenizer()
    length = len(tokenizer("red square")["input_ids"])
    tokens, num_cut = CaptionEncoder(tokenizer, length).encode(["red square", "0"])
    assert num_cut == 0 and tokens["attention_mask"].sum(1).tolist() == [length, 1]
    _, num_cut = CaptionEncoder(tokenizer, length - 1).encode(["red square"])
    assert num_cut == 1


def test_cut_captions_are_counted_by_the_loader(tmp_path):
    pair_loader = loader(write_table(tmp_path, 4, captions=lambda i: "dog " * (1 + 20 * (i % 2))))
    list(pair_loader)
    assert pair_loader.report.num_cut == 2


def test_a_tokenizer_without_padding_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        CaptionEncoder(tokenizer, 8)


def test_the_maker_reports_the_problem_of_a_row_that_was_bad_from_the_start():
    maker = BatchMaker(training_transform(image_processor()), CaptionEncoder(tiny_tokenizer(), 4))
    problem = Problem("f", 1, "x", "broken", "mend it")
    with pytest.raises(ValueError, match=r"f, row 1 \(id 'x'\): broken"):
        maker.make([problem], [0], [], np.random.default_rng(0))
