"""Model folders that must be refused: ``FOLDERS`` maps a name to what spoils a good one, ``spoil(folder, outside)``."""

import json
import os
import struct


def text(name, content):
    """Replace a file's content."""
    return lambda folder, outside: (folder / name).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def field(name, *path, value):
    """Set a field of a JSON file."""

    def spoil(folder, outside):
        content = json.loads((folder / name).read_text())
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        (folder / name).write_text(json.dumps(content))

    return spoil


def link(name, target):
    """Replace a file by a link; ``target`` is below the folder outside unless absolute."""

    def spoil(folder, outside):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(outside / target)

    return spoil


def pipe(name):
    """Replace a file by a pipe, which never answers."""

    def spoil(folder, outside):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return spoil


def index(shard):
    """Replace the weights by an index that names a shard; OUTSIDE stands for the folder outside."""

    def spoil(folder, outside):
        (folder / "model.safetensors").unlink()
        name = shard.replace("OUTSIDE", str(outside)) if isinstance(shard, str) else shard
        content = {"metadata": {}, "weight_map": {"language_model.lm_head.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return spoil


def header(change=None, length=None, raw=None):
    """Change the header of the safetensors file, its length, or both."""

    def spoil(folder, outside):
        file = folder / "model.safetensors"
        content = file.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        tensors = json.loads(content[8 : 8 + size])
        new = raw if raw is not None else json.dumps(change(tensors) if change else tensors).encode()
        file.write_bytes(struct.pack("<Q", len(new) if length is None else length) + new + content[8 + size :])

    return spoil


def tensor(**fields):
    """Return a change of the first tensor's entry in a safetensors header."""

    def change(tensors):
        name = next(name for name in tensors if name != "__metadata__")
        return tensors | {name: tensors[name] | fields}

    return header(change)


def template(source):
    """Replace the chat template."""
    return text("chat_template.jinja", source)


WEIGHTS, CONFIG = "model.safetensors", "config.json"
ESCAPE = "{{ ''.__class__.__mro__[1].__subclasses__() }}"

FOLDERS = {
    "weights: empty": text(WEIGHTS, b""),
    "weights: text": text(WEIGHTS, "hello"),
    "weights: cut": lambda folder, outside: os.truncate(folder / WEIGHTS, 50_000),
    "weights: pickle": text(WEIGHTS, b"\x80\x04cos\nsystem\n(S'touch canary'\ntR."),
    "weights: missing": lambda folder, outside: (folder / WEIGHTS).unlink(),
    "weights: pipe": pipe(WEIGHTS),
    "weights: link outside": link(WEIGHTS, "model.safetensors"),
    "weights: link to a device": link(WEIGHTS, "/dev/zero"),
    "weights: folder": lambda folder, outside: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()),
    "header: length 2^60": header(length=2**60),
    "header: length 2^64 - 1": header(length=2**64 - 1),
    "header: length 0": header(length=0),
    "header: not json": header(raw=b"{" * 100),
    "header: nested": header(raw=b"[" * 100_000),
    "header: a list": header(raw=b"[]"),
    "header: not utf-8": header(raw=b'{"\xff": 1}'),
    "header: offset beyond the file": tensor(data_offsets=[0, 2**40]),
    "header: offsets backwards": tensor(data_offsets=[100, 0]),
    "header: negative offset": tensor(data_offsets=[-4, 0]),
    "header: unknown dtype": tensor(dtype="F17"),
    "header: dtype too large": tensor(dtype="F64"),
    "header: shape too large": tensor(shape=[2**40, 2**40]),
    "header: shape too small": tensor(shape=[1]),
    "header: shape of text": tensor(shape=["a"]),
    "header: metadata of numbers": header(lambda tensors: tensors | {"__metadata__": {"format": 7}}),
    "header: metadata of a list": header(lambda tensors: tensors | {"__metadata__": []}),
    "index: parent": index("../model.safetensors"),
    "index: outside": index("OUTSIDE/model.safetensors"),
    "index: device": index("/dev/zero"),
    "index: number": index(7),
    "index: nul": index("a\0b"),
    "index: empty name": index(""),
    "index: missing": index("nothing.safetensors"),
    "index: backslash": index("..\\model.safetensors"),
    "index: not json": text("model.safetensors.index.json", "{"),
    "index: list": text("model.safetensors.index.json", "[]"),
    "index: nested": text("model.safetensors.index.json", "[" * 100_000),
    "index: pipe": pipe("model.safetensors.index.json"),
    "config: empty": text(CONFIG, ""),
    "config: list": text(CONFIG, "[]"),
    "config: nested": text(CONFIG, '{"a":' * 100_000),
    "config: not utf-8": text(CONFIG, b'{"a": "\xff"}'),
    "config: link outside": link(CONFIG, "config.json"),
    "config: pipe": pipe(CONFIG),
    "config: unknown model": field(CONFIG, "model_type", value="canary"),
    "config: model of a number": field(CONFIG, "model_type", value=7),
    "config: a billion layers": field(CONFIG, "text_config", "num_hidden_layers", value=10**9),
    "config: layers of text": field(CONFIG, "text_config", "num_hidden_layers", value="two"),
    "config: negative width": field(CONFIG, "text_config", "hidden_size", value=-32),
    "config: another width": field(CONFIG, "text_config", "hidden_size", value=64),
    "config: a million pixels square": field(CONFIG, "vision_config", "image_size", value=10**6),
    "config: no heads": field(CONFIG, "text_config", "num_attention_heads", value=0),
    "config: text model of text": field(CONFIG, "text_config", value="llama"),
    "adapter beside the model": text(
        "adapter_config.json", '{"base_model_name_or_path": "/dev/zero", "peft_type": "LORA"}'
    ),
    "tokenizer: empty": text("tokenizer.json", ""),
    "tokenizer: list": text("tokenizer.json", "[]"),
    "tokenizer: nested": text("tokenizer.json", '{"a":' * 100_000),
    "tokenizer: no model": field("tokenizer.json", "model", value={"type": "canary"}),
    "tokenizer: link outside": link("tokenizer.json", "tokenizer.json"),
    "tokenizer: pipe": pipe("tokenizer.json"),
    "processor: list": text("processor_config.json", "[]"),
    "processor: empty": text("processor_config.json", ""),
    "processor: unknown class": field("processor_config.json", "processor_class", value="os.system"),
    "processor: size of text": field("processor_config.json", "image_processor", value="x"),
    "template: escape": template(ESCAPE),
    "template: syntax": template("{% for %}"),
    "template: large loop": template("{% for i in range(10**9) %}x{% endfor %}"),
    "template: division": template("{{ 1 / 0 }}"),
    "template: macro calls itself": template("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"),
    "template: import": template("{% include '/etc/passwd' %}"),
    "template: empty": template(""),
    "template: refuses": template("{{ raise_exception('no') }}"),
    "template: link outside": link("chat_template.jinja", "secret.jinja"),
}
