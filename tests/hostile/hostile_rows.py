"""Rows that real and malicious data files hold. Each is a whole row, and whether it can be trained on.

``ROWS`` maps a name to ``(row, is_kept)``. The image root has ``ok.png`` and what `write_row_world` puts there. Rows
are written as JSON by `line_of`, so a lone surrogate stands there as an escape.
"""

import json
import os
from pathlib import Path

from PIL import Image

KEPT, DROPPED = True, False
QUESTION, ANSWER = "<image>\nwhat is in the image?", "a red square"


def turns(question=QUESTION, answer=ANSWER):
    """Return LLaVA's list of one question and one answer."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def row(question=QUESTION, answer=ANSWER, image="ok.png", **more):
    """Return a row in LLaVA's layout; ``image=None`` leaves the column out."""
    columns = {} if image is None else {"image": image}
    return {"id": "x", "conversations": turns(question, answer), **columns, **more}


def parts(*content, answer=ANSWER, **more):
    """Return a row in the layout of messages, whose question is a list of parts."""
    return {
        "id": "x",
        "messages": [{"role": "user", "content": list(content)}, {"role": "assistant", "content": answer}],
        **more,
    }


TEXT, IMAGE = {"type": "text", "text": "what?"}, {"type": "image", "image": "ok.png"}

FORM = {
    "null": (None, DROPPED),
    "number": (7, DROPPED),
    "string": ("row", DROPPED),
    "list": ([], DROPPED),
    "list-of-rows": ([row()], DROPPED),
    "true": (True, DROPPED),
    "nan": (float("nan"), DROPPED),
    "infinity": (float("inf"), DROPPED),
    "empty-object": ({}, DROPPED),
    "no-turns": ({"id": "x", "conversations": []}, DROPPED),
    "turns-null": ({"id": "x", "conversations": None}, DROPPED),
    "turns-string": ({"id": "x", "conversations": "hello"}, DROPPED),
    "turns-object": ({"id": "x", "conversations": {"from": "human"}}, DROPPED),
    "turns-of-numbers": ({"id": "x", "conversations": [1, 2]}, DROPPED),
    "turns-of-lists": ({"id": "x", "conversations": [["human", "hi"], ["gpt", "yes"]]}, DROPPED),
    "both-layouts": (parts(TEXT) | {"conversations": turns("hi")}, DROPPED),
    "turn-without-text": ({"id": "x", "conversations": [{"from": "human"}, {"from": "gpt", "value": "a"}]}, DROPPED),
    "turn-without-role": ({"id": "x", "conversations": [{"value": "q"}, {"from": "gpt", "value": "a"}]}, DROPPED),
    "role-unknown": ({"id": "x", "conversations": [{"from": "robot", "value": "q"}, *turns()[1:]]}, DROPPED),
    "role-null": ({"id": "x", "conversations": [{"from": None, "value": "q"}, *turns()[1:]]}, DROPPED),
    "role-list": ({"id": "x", "conversations": [{"from": ["human"], "value": "q"}, *turns()[1:]]}, DROPPED),
    "role-object": ({"id": "x", "conversations": [{"from": {}, "value": "q"}, *turns()[1:]]}, DROPPED),
    "role-of-other-layout": ({"id": "x", "conversations": [{"from": "user", "value": "q"}, *turns()[1:]]}, DROPPED),
    "role-with-space": ({"id": "x", "conversations": [{"from": "human ", "value": "q"}, *turns()[1:]]}, DROPPED),
    "role-surrogate": ({"id": "x", "conversations": [{"from": "\ud800", "value": "q"}, *turns()[1:]]}, DROPPED),
    "two-questions": ({"id": "x", "conversations": [turns("a")[0], *turns("b")]}, DROPPED),
    "two-answers": ({"id": "x", "conversations": [*turns("a"), turns("a")[1]]}, DROPPED),
    "answer-only": ({"id": "x", "conversations": turns()[1:]}, DROPPED),
    "question-only": ({"id": "x", "conversations": turns("hi")[:1]}, DROPPED),
    "answer-first": ({"id": "x", "conversations": [turns()[1], *turns("hi")]}, KEPT),
    "system-last": ({"id": "x", "conversations": [*turns("hi"), {"from": "system", "value": "s"}]}, DROPPED),
    "system-only": ({"id": "x", "conversations": [{"from": "system", "value": "s"}]}, DROPPED),
    "text-null": (row(question=None, image=None), DROPPED),
    "text-number": (row(question=3, image=None), DROPPED),
    "text-object": (row(question={"text": "hi"}, image=None), DROPPED),
    "text-list": (row(question=["hi"], image=None), DROPPED),
    "answer-null": (row(answer=None), DROPPED),
    "answer-true": (row(answer=True), DROPPED),
    "duplicate-keys": (f'{{"id": "x", "conversations": 3, "conversations": {json.dumps(turns("hi"))}}}', KEPT),
    "open-turn-behind-answer": ({"id": "x", "conversations": [*turns("hi"), turns("and?")[0]]}, KEPT),
    "foreign-columns": (row(image="ok.png", score=float("nan"), meta={"a": [1, {"b": None}]}), KEPT),
}

TEXTS = {
    "empty-question": (row(question="", image=None), KEPT),
    "white-question": (row(question=" \n\t ", image=None), KEPT),
    "empty-answer": (row(answer=""), KEPT),  # its end mark is supervised
    "white-answer": (row(answer=" \n "), KEPT),
    "special-token-in-question": (row(question="<image>\n</s> hi"), DROPPED),
    "special-token-in-answer": (row(answer="yes</s>"), DROPPED),
    "image-mark-in-answer": (row(answer="an <image>"), DROPPED),
    "image-mark-in-system": (
        {"id": "x", "conversations": [{"from": "system", "value": "<image>"}, *turns("hi")], "image": "ok.png"},
        DROPPED,
    ),
    "half-surrogate-question": (row(question="<image> \ud83d"), DROPPED),
    "half-surrogate-answer": (row(answer="\udc00"), DROPPED),
    "surrogate-pair": (row(answer="\U0001f600"), KEPT),
    "nul": (row(answer="a\0b"), KEPT),
    "control-characters": (row(answer="".join(map(chr, range(1, 32)))), KEPT),
    "terminal-escape": (row(answer="\x1b[2J\x1b]0;title\x07"), KEPT),
    "right-to-left-marks": (row(question="<image> \u202eabc\u202c \u200f", answer="\u2067x\u2069"), KEPT),
    "byte-order-mark-in-text": (row(question="\ufeff<image>\nhi"), KEPT),
    "noncharacters": (row(answer="\uffff\ufdd0\U0010ffff"), KEPT),
    "combining-marks": (row(answer="a" + "\u0301" * 2000), KEPT),
    "line-separators": (row(answer="a\u2028b\u2029c\x85d"), KEPT),
    "rich-markup": (row(answer="[bold red]no[/] [link=file:///etc/passwd]x[/link]"), KEPT),
    "template-syntax": (row(question="<image> {{ 7 * 7 }} {% raw %}", answer="{% endgeneration %}{{ x }}"), KEPT),
    "percent-and-braces": (row(question="<image> %s %n {0} {}", answer="%d{}"), KEPT),
    "mark-in-two-halves": (row(question="<image", image=None), KEPT),
    "mark-in-capitals": (row(question="<IMAGE>", image=None), KEPT),
    "mark-without-image": (row(image=None), DROPPED),
    "image-without-mark": (row(question="hi"), DROPPED),
    "two-marks-one-image": (row(question="<image><image>"), DROPPED),
    "one-mark-two-images": (row(image=["ok.png", "ok.png"]), DROPPED),
    "ten-thousand-marks": (row(question="<image>" * 10_000), DROPPED),
    "ten-thousand-images": (row(question="<image>" * 10_000, image=["ok.png"] * 10_000), DROPPED),
    "image-beyond-the-limit": (row(question="word " * 3000 + "<image>"), DROPPED),
    "answer-beyond-the-limit": (row(question="<image>" + "word " * 3000), DROPPED),
    "long-answer-is-cut": (row(answer="word " * 3000), KEPT),
    "five-thousand-turns": ({"id": "x", "conversations": turns("hi") * 2500}, DROPPED),
    "four-million-characters": (row(answer="a b " * 1_000_000), DROPPED),
    "one-word-of-a-million": (row(question="<image> " + "x" * 1_000_000, answer="y"), DROPPED),
    "no-words-at-all": (row(question="<image>", answer="." * 1000), KEPT),
}

PATHS = {
    "parent": (row(image="../outside/secret.png"), DROPPED),
    "two-parents": (row(image="a/../../../outside/secret.png"), DROPPED),
    "absolute": (row(image="/ABSOLUTE/secret.png"), DROPPED),  # see `line_of`
    "home": (row(image="~/secret.png"), DROPPED),
    "environment-variable": (row(image="$HOME/secret.png"), DROPPED),
    "link-to-outside": (row(image="link-out.png"), DROPPED),
    "link-to-a-folder-outside": (row(image="folder-out/secret.png"), DROPPED),
    "link-to-itself": (row(image="loop.png"), DROPPED),
    "two-links-in-a-circle": (row(image="ping.png"), DROPPED),
    "link-into-nothing": (row(image="dangling.png"), DROPPED),
    "link-to-inside": (row(image="link-in.png"), KEPT),
    "sixty-links-in-a-row": (row(image="chain-0.png"), KEPT),
    "link-to-dev-zero": (row(image="zero.png"), DROPPED),
    "link-to-environ": (row(image="environ.png"), DROPPED),
    "dev-zero": (row(image="/dev/zero"), DROPPED),
    "environ": (row(image="/proc/self/environ"), DROPPED),
    "own-file-descriptor": (row(image="/proc/self/fd/0"), DROPPED),
    "standard-input": (row(image="/dev/stdin"), DROPPED),
    "pipe": (row(image="pipe.png"), DROPPED),
    "folder": (row(image="folder.png"), DROPPED),
    "root-itself": (row(image="."), DROPPED),
    "file-below-a-file": (row(image="ok.png/x"), DROPPED),
    "trailing-slash": (row(image="ok.png/"), KEPT),
    "doubled-slashes": (row(image=".//./ok.png"), KEPT),
    "empty": (row(image=""), DROPPED),
    "blank": (row(image="  "), DROPPED),
    "nul-in-name": (row(image="ok.png\0.jpg"), DROPPED),
    "half-surrogate-in-name": (row(image="\ud800.png"), DROPPED),
    "escape-in-name": (row(image="\x1b[31m.png"), DROPPED),
    "name-of-300": (row(image="a" * 300), DROPPED),
    "path-of-100000": (row(image="a/" * 50_000 + "b"), DROPPED),
    "ten-thousand-parents": (row(image="../" * 10_000 + "outside/secret.png"), DROPPED),
    "backslashes": (row(image="..\\outside\\secret.png"), DROPPED),
    "percent-encoded": (row(image="%2e%2e/outside/secret.png"), DROPPED),
    "url": (row(image="http://127.0.0.1:9/x.png"), DROPPED),
    "file-url": (row(image="file:///etc/passwd"), DROPPED),
    "data-url": (row(image="data:image/png;base64,AAAA"), DROPPED),
    "network-share": (row(image="//host/share/x.png"), DROPPED),
    "number": (row(image=3), DROPPED),
    "true": (row(image=True), DROPPED),
    "false": (row(image=False), DROPPED),
    "object": (row(image={"a": 1}), DROPPED),
    "object-with-path-outside": (row(image={"path": "../outside/secret.png"}), DROPPED),
    "object-with-text-as-bytes": (row(image={"bytes": "AAAA", "path": None}), DROPPED),
    "object-with-path": (row(image={"path": "ok.png", "bytes": None}), KEPT),
    "null-in-list": (row(image=[None]), DROPPED),
    "nested-list": (row(image=[["ok.png"]]), DROPPED),
    "empty-list": (row(question="hi", image=[]), KEPT),
    "image-and-images": (row(images=["ok.png"]), DROPPED),
}

IDS = {
    "missing": ({"conversations": turns("hi")}, KEPT),
    "null": ({"id": None, "conversations": turns("hi")}, KEPT),
    "number": ({"id": 17, "conversations": turns("hi")}, KEPT),
    "huge-number": ({"id": 10**400, "conversations": turns("hi")}, KEPT),
    "nan": ({"id": float("nan"), "conversations": turns("hi")}, KEPT),
    "list": ({"id": [1, [2]], "conversations": turns("hi")}, KEPT),
    "object": ({"id": {"a": 1}, "conversations": turns("hi")}, KEPT),
    "true": ({"id": True, "conversations": turns("hi")}, KEPT),
    "empty": ({"id": "", "conversations": turns("hi")}, KEPT),
    "half-surrogate": ({"id": "\ud800", "conversations": turns("hi")}, KEPT),
    "half-surrogate-of-a-bad-row": ({"id": "\udfff", "conversations": turns()}, DROPPED),
    "line-breaks": ({"id": "a\nb\r\nc", "conversations": turns("hi")}, KEPT),
    "rich-markup-of-a-bad-row": ({"id": "[/red] [bold", "conversations": turns()}, DROPPED),
    "escape-of-a-bad-row": ({"id": "\x1b[2Jx", "conversations": turns()}, DROPPED),
    "right-to-left-of-a-bad-row": ({"id": "\u202eevil", "conversations": turns()}, DROPPED),
    "hundred-thousand-characters": ({"id": "i" * 100_000, "conversations": turns("hi")}, KEPT),
}

MESSAGES = {
    "text-part": (parts(TEXT), KEPT),
    "image-part": (parts(IMAGE, TEXT), KEPT),
    "image-url-part": (parts({"type": "image_url", "image_url": {"url": "ok.png"}}, TEXT), KEPT),
    "image-url-remote": (parts({"type": "image_url", "image_url": {"url": "https://127.0.0.1/x"}}, TEXT), DROPPED),
    "image-url-outside": (
        parts({"type": "image_url", "image_url": {"url": "../outside/secret.png"}}, TEXT),
        DROPPED,
    ),
    "image-url-missing": (parts({"type": "image_url"}, TEXT), DROPPED),
    "image-url-nested": (parts({"type": "image_url", "image_url": {"url": {"url": "ok.png"}}}, TEXT), DROPPED),
    "part-null": (parts(None), DROPPED),
    "part-string": (parts("what?"), DROPPED),
    "part-number": (parts(3), DROPPED),
    "part-type-object": (parts({"type": {}, "text": "a"}), DROPPED),
    "part-type-unknown": (parts({"type": "video", "video": "x.mp4"}), DROPPED),
    "part-text-number": (parts({"type": "text", "text": 3}), DROPPED),
    "no-parts": (parts(), KEPT),
    "images-in-both-places": (parts(IMAGE, TEXT, images=["ok.png"]), DROPPED),
    "images-column": (parts({"type": "image"}, TEXT, images=["ok.png"]), KEPT),
    "image-in-the-answer": (parts(TEXT, answer=[IMAGE]), DROPPED),
    "role-tool": (
        {"id": "x", "messages": [{"role": "tool", "content": "q"}, {"role": "assistant", "content": "a"}]},
        DROPPED,
    ),
}

KINDS = {"form": FORM, "text": TEXTS, "path": PATHS, "id": IDS, "messages": MESSAGES}
ROWS = {f"{kind}: {name}": case for kind, cases in KINDS.items() for name, case in cases.items()}


def line_of(content, outside: Path) -> str:
    """Return the line of a row; a row that JSON can only hold as text is written as that text."""
    text = content if isinstance(content, str) and content.startswith("{") else json.dumps(content)
    return text.replace("/ABSOLUTE", str(outside))


def write_row_world(root: Path, outside: Path) -> None:
    """Write the image root: an image, and links, pipes and folders with names of images."""
    root.mkdir(parents=True)
    Image.new("RGB", (30, 20), "blue").save(root / "ok.png")
    (root / "folder.png").mkdir()
    os.mkfifo(root / "pipe.png")
    links = {
        "link-out.png": outside / "secret.png",
        "folder-out": outside,
        "loop.png": "loop.png",
        "ping.png": "pong.png",
        "pong.png": "ping.png",
        "dangling.png": "nothing.png",
        "link-in.png": "ok.png",
        "zero.png": "/dev/zero",
        "environ.png": "/proc/self/environ",
        **{f"chain-{i}.png": f"chain-{i + 1}.png" for i in range(60)},
        "chain-60.png": "ok.png",
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
