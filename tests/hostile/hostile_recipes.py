"""Recipes that are no recipes: ``RECIPES`` maps a name to the bytes of the file. All must be refused by name."""

_SOURCES = b"model_name_or_path: {model}\noutput_dir: {output}\nuse_cpu: true\ndata: "
_GOOD = "model_name_or_path: {model}\ndata_path: {data}\noutput_dir: {output}\nuse_cpu: true\nreport_to: none\n"


def laughs(levels, last):
    """Return aliases of aliases: ten more values with each level."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join([*lines, f"{last}: *a{levels - 1}", ""])


MERGED = "\n".join(
    ["m0: &m0 {k: 1}", *(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 10)}]}}" for i in range(1, 9)), ""]
)

RECIPES = {
    "empty": b"",
    "only a comment": b"# nothing",
    "a list": b"- a\n- b\n",
    "a number": b"7",
    "a string": b"hello",
    "not yaml": b"a: [1, 2\n",
    "tabs": b"a:\n\t- b\n",
    "latin-1": "output_dir: caf\xe9\n".encode("latin-1"),
    "utf-16": "a: 1\n".encode("utf-16-le"),
    "nul": b"a: \0\n",
    "nested a hundred thousand deep": b"a: " + b"[" * 100_000,
    "mappings nested ten thousand deep": b"{a: " * 10_000,
    "billion laughs": laughs(10, "data").encode(),
    "billion laughs in an option": laughs(10, "learning_rate").encode(),
    "billion laughs by merging": MERGED.encode(),
    "contains itself": b"data: &a [*a]\n",
    "alias of nothing": b"data: *nothing\n",
    "python object": b"data: !!python/object/apply:os.system [touch canary]\n",
    "python name": b"data: !!python/name:os.system\n",
    "unknown tag": b"data: !secret x\n",
    "impossible day": b"output_dir: 2001-99-99\n",
    "number of five thousand digits": b"seed: " + b"9" * 5000 + b"\n",
    "broken binary": b"output_dir: !!binary '***'\n",
    "key that is a list": b"[a]: 1\n",
    "two documents": b"a: 1\n---\nb: 2\n",
    "same key twice": (_GOOD + "seed: 1\nseed: 2\n").encode(),
    "unknown option": (_GOOD + "learning_rat: 1\n").encode(),
    "number as key": (_GOOD + "7: 1\n").encode(),
    "no output": b"model_name_or_path: x\n",
    "text as number": (_GOOD + "max_steps: many\n").encode(),
    "list as number": (_GOOD + "max_steps: [1, 2]\n").encode(),
    "mapping as number": (_GOOD + "learning_rate: {a: 1}\n").encode(),
    "number as bool": (_GOOD + "cal: 7\n").encode(),
    "unknown choice": (_GOOD + "stage: third\n").encode(),
    "unknown schedule": (_GOOD + "lr_scheduler_type: foo\n").encode(),
    "unknown engine option": (_GOOD + "accelerator_config: {bogus: 1}\n").encode(),
    "sources as text": _SOURCES + b"hello\n",
    "source of a number": _SOURCES + b"[7]\n",
    "source of nan weight": _SOURCES + b"[{path: {data}, weight: .nan}]\n",
    "source of endless weight": _SOURCES + b"[{path: {data}, weight: .inf}]\n",
    "source of huge weight": _SOURCES + b"[{path: {data}, weight: 1.0e+12}]\n",
    "model of a device": (_GOOD.replace("{model}", "/dev/zero")).encode(),
    "data of a device": (_GOOD.replace("{data}", "/dev/zero")).encode(),
    "data of a folder": (_GOOD.replace("{data}", "/tmp")).encode(),
    "template of a path": (_GOOD + "template: ../../outside/secret\n").encode(),
}
