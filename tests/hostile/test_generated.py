"""Generated input: good rows, images, model folders and recipes with random damage.

Each is either refused with a message that names it, or taken as what it says. The examples are the same in every run.
"""

import io
import json
import shutil
import struct
import warnings
from copy import deepcopy
from types import SimpleNamespace

import pytest
import yaml
from hostile_images import encoded
from hostile_rows import IMAGE, TEXT, parts, row, turns, write_row_world
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cal_train.cli.recipe import load_recipe
from cal_train.conf import DataArguments
from cal_train.data.examples import build_encoder
from cal_train.data.images import ImageLimits, open_image, read_size
from cal_train.data.processor import load_processor
from cal_train.data.records import parse_row
from cal_train.types import BadSampleError


def amounts(fast, thorough):
    """Run a test on some examples, and on many where there is time."""
    return pytest.mark.parametrize("num_examples", [fast, pytest.param(thorough, marks=pytest.mark.slow)])


def run(check, strategy, num_examples):
    """Run a check on that many examples; a warning of a library is no fault of the input."""
    calm = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    options = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": calm}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings(max_examples=num_examples, **options)(given(strategy)(check))()


# Rows

TEXTS = st.text(max_size=30) | st.sampled_from(
    ["<image>", "<image>\nhi", "<image><image>", "</s>", "a </s> b", "\ud800", "\0", "gpt", "human", "assistant", " "]
)
NAMES = st.sampled_from(
    ["ok.png", "../outside/secret.png", "link-out.png", "loop.png", "pipe.png", "folder.png", "zero.png", "x" * 300]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | NAMES
KEYS = TEXTS | st.sampled_from(["id", "from", "value", "image", "images", "role", "content", "type", "text", "url"])
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)
GOOD_ROWS = (row(), row("hi", image=None), parts(IMAGE, TEXT), {"id": 1, "conversations": turns("hi") * 3})


def places(value, path=()):
    """Yield the path of every value in nested lists and objects."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from places(inner, (*path, key))


@st.composite
def damaged_rows(draw):
    """Return a good row some of whose values were replaced, removed or doubled."""
    content = deepcopy(draw(st.sampled_from(GOOD_ROWS)))
    for _ in range(draw(st.integers(0, 3))):
        paths = list(places(content))[1:] if isinstance(content, dict | list) else []
        if not paths:
            break
        *parents, key = draw(st.sampled_from(paths))
        inner = content
        for parent in parents:
            inner = inner[parent]
        how = draw(st.sampled_from(["replace", "text", "remove", "double", "add"]))
        if how == "remove":
            del inner[key]
        elif how == "double" and isinstance(inner, list):
            inner.insert(key, deepcopy(inner[key]))
        elif how == "add" and isinstance(inner, dict):
            inner[draw(KEYS)] = draw(JSON)
        else:
            inner[key] = draw(TEXTS | NAMES if how == "text" else JSON)
    return content


@pytest.fixture(scope="module")
def reader(world):
    """The encoder of a run, and an image root with links that lead out of it."""
    root = world.folder("generated-rows") / "images"
    write_row_world(root, world.outside)
    options = DataArguments(data_path="unused", model_max_length=512)
    processor = load_processor(world.model, options.template, "pad")
    return SimpleNamespace(root=root.resolve(), encoder=build_encoder(options, processor), processor=processor)


def check_taken(reader, raw, sample, example):
    """Raise unless an example holds all turns and images of the row that it was made of."""
    said = raw.get("conversations") or raw.get("messages")
    first = said[0].get("from") or said[0].get("role")
    is_open = len(said) > 1 and (said[-1].get("from") or said[-1].get("role")) in ("human", "user")
    assert len(said) - (first in ("gpt", "assistant")) - is_open <= len(sample.messages) <= len(said)
    assert all(isinstance(image, bytes) or image.is_relative_to(reader.root) for image in sample.images)
    ids, labels = example["input_ids"], example["labels"]
    is_label = labels != -100
    assert ids.shape == labels.shape and bool((labels[is_label] == ids[is_label]).all()) and bool(is_label.any())
    # 28 pixels in patches of 14 are 4 places for each image
    assert int((ids == reader.processor.image_token_id).sum()) == 4 * len(sample.images)
    learned = reader.processor.tokenizer.decode(labels[is_label])
    for message in sample.messages:
        if message.role == "assistant" and not example["num_cut"]:
            assert message.content.strip() in learned


@amounts(150, 4000)
def test_a_row_is_named_or_taken_whole(reader, num_examples):
    outcomes = {"taken": 0, "refused": 0}

    def check(raw):
        raw = json.loads(json.dumps(raw))
        try:
            sample = parse_row(raw, "generated.json", 7, reader.root)
            example = reader.encoder.encode(sample)
        except BadSampleError as error:
            assert str(error).startswith("generated.json, row 7 ") and error.problem.problem and error.problem.cure
            str(error).encode()  # can be printed
            outcomes["refused"] += 1
        else:
            check_taken(reader, raw, sample, example)
            outcomes["taken"] += 1

    run(check, damaged_rows(), num_examples)
    assert min(outcomes.values()) >= num_examples // 10, outcomes


# Images

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
ENCODED = {name: encoded(format=name, size=(20, 16)) for name in FORMATS}
SMALL = ImageLimits(max_pixels=200_000)
NUMBERS = [bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\0\0\0", b"\0\x01\0\0", b"\1\0\0\0"]


@st.composite
def damaged_files(draw):
    """Return an image file with other bytes in its header, pieces cut out, doubled or put behind."""
    content = bytearray(draw(st.sampled_from(sorted(ENCODED.values()))))
    for _ in range(draw(st.integers(0, 4))):
        end = min(len(content), 80) if draw(st.booleans()) else len(content)
        start = draw(st.integers(0, end))
        stop = min(len(content), start + draw(st.integers(0, 12)))
        new = draw(st.binary(max_size=8) | st.sampled_from(NUMBERS))
        how = draw(st.sampled_from(["write", "cut out", "insert", "end here", "double"]))
        if how == "write":
            content[start : start + len(new)] = new
        elif how == "cut out":
            del content[start:stop]
        elif how == "insert":
            content[start:start] = new
        elif how == "double":
            content[start:start] = content[start:stop]
        else:
            del content[max(start, 8) :]
    return bytes(content)


@amounts(400, 20_000)
def test_an_image_is_refused_or_read_within_its_limits(num_examples):
    outcomes = {"taken": 0, "refused": 0}

    def check(content):
        try:
            image = open_image(content, SMALL)
        except ValueError as error:
            assert str(error).startswith("image ")
            outcomes["refused"] += 1
        else:
            assert image.mode == "RGB" and image.width * image.height <= 200_000
            assert read_size(content, SMALL) == (image.height, image.width)
            assert len(image.tobytes()) == 3 * image.width * image.height
            outcomes["taken"] += 1

    run(check, damaged_files(), num_examples)
    assert min(outcomes.values()) >= num_examples // 20, outcomes


def test_undamaged_images_are_read_as_they_are():
    for name, content in ENCODED.items():
        reference = Image.open(io.BytesIO(content)).convert("RGB")
        assert open_image(content, SMALL).tobytes() == reference.tobytes(), name


# Model folders

NESTED = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "X9", ""]) | NESTED,
        "shape": st.lists(st.integers(-2, 2**40), max_size=4) | NESTED,
        "data_offsets": st.lists(st.integers(-8, 2**40), max_size=3) | NESTED,
    },
)
SHARD_NAMES = st.sampled_from(
    ["model.safetensors", "../model.safetensors", "/dev/zero", "config.json", "model.safetensors/", "", ".", "\0"]
)
SPOILS = (
    st.tuples(st.just("tensor"), st.integers(0, 30), ENTRIES)
    | st.tuples(st.just("header"), st.integers(0, 30), st.binary(max_size=20))
    | st.tuples(st.just("length"), st.integers(0, 2**64 - 1), st.none())
    | st.tuples(st.just("index"), st.none(), st.dictionaries(st.text(max_size=8), SHARD_NAMES | NESTED, max_size=3))
    | st.tuples(st.just("config"), st.sampled_from(["model_type", "text_config", "vision_config", "dtype"]), NESTED)
)


def spoil(folder, what, where, value):
    """Spoil one thing of a model folder."""
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    if what == "tensor":
        tensors = json.loads(content[8 : 8 + size])
        name = sorted(tensors)[1 + where % (len(tensors) - 1)]
        tensors[name] = tensors[name] | value
        header = json.dumps(tensors).encode()
        weights.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])
    elif what == "header":
        at = 8 + where * (size - 30) // 30
        weights.write_bytes(content[:at] + value + content[at + len(value) :])
    elif what == "length":
        weights.write_bytes(struct.pack("<Q", where) + content[8:])
    elif what == "index":
        weights.rename(folder / "one.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": value}))
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {where: value}))


@amounts(15, 300)
def test_a_model_folder_is_refused_by_name_or_converted(attack, world, num_examples):
    codes = set()

    def check(damage):
        model = world.model_copy("generated-folder")
        spoil(model, *damage)
        outcome = attack("convert", "--from", model, "--output", model.parent / "output", max_mib=600)
        codes.add(outcome.code)
        assert outcome.code in (0, 2) and "Traceback" not in outcome.stderr, outcome.stderr[-2000:]
        assert outcome.code == 0 or str(model) in outcome.stderr[outcome.stderr.rfind("error:") :], outcome.stderr
        shutil.rmtree(model.parent)

    run(check, SPOILS, num_examples)
    assert 2 in codes


# Recipes

VALUES = st.sampled_from(
    ["3", "-1", "1e-3", "true", "no", "~", "''", "text", "[1, 2]", "{a: 1}", "&a [*a]", "*b", "!!python/name:os.system",
     "!x y", "2001-99-99", ".nan", ".inf", "9" * 60, "|\n  x", "[", "{", "'", "@", "%", "- a", "!!binary '*'", "0x1F"]
)  # fmt: skip
OPTIONS = st.sampled_from(
    ["model_max_length", "learning_rate", "cal", "stage", "data", "max_steps", "optim", "lora_r", "streaming",
     "image_folder", "logging_steps", "learning_rat", "seed", "cal_clamp", "template", "'a b'", "7", "[a]", "report_to"]
)  # fmt: skip
LINES = st.builds("{}: {}\n".format, OPTIONS, VALUES) | st.text(max_size=12).map(lambda text: f"{text}\n")
PLAIN = {"model_max_length": "data", "max_steps": "training", "seed": "training", "logging_steps": "training"}


@amounts(100, 3000)
def test_a_recipe_is_refused_by_name_or_read_as_it_stands(world, num_examples):
    path = world.folder("generated-recipe") / "recipe.yaml"
    base = f"model_name_or_path: {world.model}\noutput_dir: {path.parent / 'run'}\ndata_path: {world.data}\n"
    outcomes = {"taken": 0, "refused": 0}

    def check(lines):
        path.write_text(base + "".join(lines), encoding="utf-8", errors="surrogatepass")
        try:
            recipe = load_recipe(path, will_train=False)
        except ValueError as error:
            assert str(path) in str(error)
            outcomes["refused"] += 1
        else:
            for name, value in (yaml.safe_load(path.read_text(encoding="utf-8"))).items():
                if name in PLAIN and type(value) is int:
                    assert getattr(getattr(recipe, PLAIN[name]), name) == value
            outcomes["taken"] += 1

    run(check, st.lists(LINES, max_size=3), num_examples)
    assert min(outcomes.values()) >= num_examples // 20, outcomes
