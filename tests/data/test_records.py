import json
import pickle
import tracemalloc
from pathlib import Path

import datasets
import pytest
from PIL import Image

from cal_train.data.records import Rows, parse_row, starts_with_answer
from cal_train.types import BadSampleError, Message


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png", "../outside.png"):
        Image.new("RGB", (8, 8)).save(root / name)
    return root


QUESTION = {"from": "human", "value": "<image>\nq"}
ANSWER = {"from": "gpt", "value": "a"}


def llava(*turns: dict, **row) -> dict:
    return {"id": "x", "image": "a.png", "conversations": list(turns or (QUESTION, ANSWER)), **row}


def parse(raw, root: Path):
    return parse_row(raw, "data.json", 3, root)


def problem_of(raw, root: Path) -> str:
    with pytest.raises(BadSampleError) as error:
        parse(raw, root)
    problem = error.value.problem
    assert (problem.file, problem.row) == ("data.json", 3) and problem.cure
    return problem.problem


def test_llava_row_is_read(root):
    sample = parse(llava({"from": "system", "value": "s"}, QUESTION, ANSWER), root)
    assert (sample.id, sample.file, sample.row) == ("x", "data.json", 3)
    assert sample.messages == (Message("system", "s"), Message("user", "<image>\nq"), Message("assistant", "a"))
    assert sample.images == (root / "a.png",)


def test_image_list_and_absent_image_are_read(root):
    two = llava({"from": "human", "value": "<image><image>?"}, ANSWER, image=["a.png", "sub/b.png"])
    assert parse(two, root).images == (root / "a.png", root / "sub" / "b.png")
    text_only = {"conversations": [{"from": "human", "value": "q"}, ANSWER], "image": None}
    assert parse(text_only, root).images == ()


def test_row_without_id_is_named_after_file_and_row(root):
    row = llava()
    del row["id"]
    assert parse(row, root).id == "data-3"
    assert parse(llava(id=17), root).id == "17"


def test_messages_with_parts_read_like_the_string_they_stand_for(root):
    text = {"type": "text", "text": "q", "image": None}  # Parquet fills the keys that other parts have
    answer = {"role": "assistant", "content": "a"}

    def messages(content, **columns):
        return {"messages": [{"role": "user", "content": content}, answer], **columns}

    by_column = parse(messages([{"type": "image"}, text], images=["a.png"]), root)
    in_string = parse(messages("<image>\nq", images=["a.png"]), root)
    inline = parse(messages([{"type": "image", "image": "a.png"}, text]), root)
    url_form = parse(messages([{"type": "image_url", "image_url": {"url": "a.png"}}, text]), root)
    assert by_column.messages == in_string.messages == inline.messages == url_form.messages
    assert by_column.messages[0].content == "<image>\nq"
    assert by_column.images == inline.images == url_form.images == (root / "a.png",)
    middle = parse(messages([text, {"type": "image"}, text], images=["a.png"]), root)
    assert middle.messages[0].content == "q<image>q"


def test_encoded_bytes_in_a_row_are_kept(root):
    row = llava(image={"bytes": b"png...", "path": "elsewhere.png"})
    assert parse(row, root).images == (b"png...",)


def test_leading_answer_is_dropped_and_can_be_counted(root):
    row = llava(ANSWER, QUESTION, ANSWER)
    assert [message.role for message in parse(row, root).messages] == ["user", "assistant"]
    assert starts_with_answer(row) and not starts_with_answer(llava())


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (["not", "an", "object"], "a row is an object"),
        ({"id": "x"}, "neither 'conversations' nor 'messages'"),
        (llava(messages=[]), "both 'conversations' and 'messages'"),
        (llava(conversations=[]), "empty"),
        (llava(conversations="hi"), "not a list"),
        (llava({"from": "robot", "value": "q"}, ANSWER), "unknown role 'robot'"),
        (llava({"from": ["gpt"], "value": "q"}, ANSWER), "unknown role"),
        (llava({"value": "q"}, ANSWER), "lacks 'from'"),
        (llava({"from": "human"}, ANSWER), "'value'"),
        (llava({"from": "human", "value": 3}, ANSWER), "is int, not text"),
        (llava(QUESTION), "no assistant turn"),
        (llava(ANSWER), "no assistant turn"),
        (llava(QUESTION, QUESTION, ANSWER), "do not alternate"),
        (llava(QUESTION, ANSWER, ANSWER), "do not alternate"),
        (llava(QUESTION, {"from": "system", "value": "s"}, ANSWER), "do not alternate"),
        (llava({"from": "human", "value": "q"}, ANSWER), "0 image marks but 1 images"),
        (llava(image=None), "1 image marks but 0 images"),
        (llava(image=["a.png", "sub/b.png"]), "1 image marks but 2 images"),
        (llava(QUESTION, {"from": "gpt", "value": "<image>"}), "contains <image>"),
        (llava({"from": "human", "value": "<image>\ud83d"}, ANSWER), "surrogate"),
        (llava(image="missing.png"), "'missing.png' does not exist"),
        (llava(image="sub"), "'sub' does not exist"),
        (llava(image="../outside.png"), "leaves the image root"),
        (llava(image="sub/../../outside.png"), "leaves the image root"),
        (llava(image="/etc/hostname"), "leaves the image root"),
        (llava(image="http://example.com/a.png"), "is a URL"),
        (llava(image="data:image/png;base64,AAAA"), "is a URL"),
        (llava(image=""), "not an image path"),
        (llava(image="a\0.png"), "not an image path"),
        (llava(image=7), "not an image path"),
        (llava(image="a" * 5000), "cannot be looked up"),
        (llava(images=["a.png"]), "both 'image' and 'images'"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "neither text nor an image"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "has no image_url"),
        ({"messages": [{"role": "human", "content": "q"}]}, "unknown role 'human'"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]},
                    {"role": "assistant", "content": "a"},
                ]
            },
            "is a URL",
        ),
    ],
)
def test_bad_row_is_named_with_its_problem(root, row, expected):
    assert expected in problem_of(row, root)


def test_path_that_leaves_the_root_by_a_symbolic_link_is_refused(root):
    (root / "link.png").symlink_to(root.parent / "outside.png")
    (root / "folder").symlink_to(root.parent)
    assert "leaves the image root" in problem_of(llava(image="link.png"), root)
    assert "leaves the image root" in problem_of(llava(image="folder/outside.png"), root)
    (root / "inside.png").symlink_to(root / "a.png")
    assert parse(llava(image="inside.png"), root).images == (root / "a.png",)


def test_absolute_path_inside_the_root_is_accepted(root):
    assert parse(llava(image=str(root / "a.png")), root).images == (root / "a.png",)


def test_image_root_may_itself_be_a_link(root):
    (root.parent / "alias").symlink_to(root)
    assert parse(llava(), root.parent / "alias").images == (root / "a.png",)


def test_bad_sample_error_survives_pickling(root):
    with pytest.raises(BadSampleError) as error:
        parse({}, root)
    assert pickle.loads(pickle.dumps(error.value)).problem == error.value.problem


ROWS = [{"id": "1", "text": 'é 世 "[{'}, {"id": "2", "nested": {"list": [1, 2, {"a": "]"}]}}, {"id": "3"}]


@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_rows_come_back_as_written(tmp_path, ensure_ascii, indent):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS, ensure_ascii=ensure_ascii, indent=indent) + "\n", encoding="utf-8")
    rows = Rows(path)
    assert len(rows) == 3 and list(rows) == ROWS and rows[2] == ROWS[2]


def test_jsonl_rows_come_back_as_written_and_blank_lines_do_not_count(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([lines[0], "", *lines[1:]]).encode())
    assert list(Rows(path)) == ROWS


AWKWARD = b"\xef\xbb\xbf \n" + b'{"a": 1}\r\n\r\n \t\x0c\n{"a": "\xe2\x80\xa8\xc2\x85"}\r{"a"\n{"a": 4}'


def test_a_jsonl_file_left_on_disk_gives_the_rows_of_one_that_is_held(tmp_path):
    path = tmp_path / "rows.jsonl"
    for text in (AWKWARD, AWKWARD + b"\n", AWKWARD + b"\r\n\n"):
        path.write_bytes(text)
        for rows in (Rows(path), pickle.loads(pickle.dumps(Rows(path, in_memory=False)))):
            assert len(rows) == 4
            assert [rows[i] for i in (3, 1, 0)] == [{"a": 4}, {"a": "\u2028\x85"}, {"a": 1}]
            with pytest.raises(BadSampleError, match="not JSON"):
                rows[2]


def test_a_jsonl_file_left_on_disk_costs_memory_for_the_places_of_its_rows_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    line = json.dumps({"text": "x" * 2000}) + "\n"
    path.write_text(line * 20_000)  # 40 MB
    tracemalloc.start()
    rows = Rows(path, in_memory=False)
    assert rows[19_999]["text"] == "x" * 2000
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == 20_000 and held < 20_000 * 8 + 100_000


def test_a_jsonl_file_that_went_away_is_a_bad_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n{}\n")
    rows = Rows(path, in_memory=False)
    path.unlink()
    with pytest.raises(BadSampleError, match="cannot be read"):
        rows[1]


def test_parquet_rows_come_back_with_their_images_undecoded(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    table = datasets.Dataset.from_dict(
        {"id": ["1", "2"], "images": [[{"bytes": b"not a png", "path": None}], []]},
        features=datasets.Features({"id": datasets.Value("string"), "images": datasets.List(datasets.Image())}),
    )
    table.to_parquet(str(path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = Rows(path)
    assert [row["id"] for row in rows] == ["1", "2"]
    assert rows[0]["images"] == [{"bytes": b"not a png", "path": None}] and rows[1]["images"] == []


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("rows.json", "[]", "has no rows"),
        ("rows.jsonl", "\n \n", "has no rows"),
        ("rows.json", '{"id": 1}', "not a JSON list"),
        ("rows.json", '[{"id": 1}, {"id"', "not a JSON list"),
        ("rows.json", '[{"id": 1} {"id": 2}]', "not a JSON list"),
        ("rows.csv", "id", "is not .json, .jsonl or .parquet"),
    ],
)
def test_file_that_is_no_data_file_is_refused(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=expected) as error:
        Rows(tmp_path / name)
    assert name in str(error.value)


def test_missing_data_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        Rows(tmp_path / "none.json")


def test_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "rows.json").write_bytes(b'[{"id": "\xff"}]')
    with pytest.raises(ValueError, match="not UTF-8"):
        Rows(tmp_path / "rows.json")


def test_broken_line_of_jsonl_is_a_bad_row_with_its_number(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"id": 1}\n{"id"\n{"id": 3}\n')
    rows = Rows(tmp_path / "rows.jsonl")
    assert rows[2] == {"id": 3}
    with pytest.raises(BadSampleError) as error:
        rows[1]
    assert error.value.problem.row == 1


def test_a_path_with_half_a_character_is_a_problem_of_its_row(root):
    assert "cannot be looked up" in problem_of(llava(image="\ud800.png"), root)


def test_a_file_that_is_not_parquet_is_named(tmp_path):
    for content in (b"nope", b"PAR1" + bytes(100) + b"PAR1"):
        (tmp_path / "x.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.parquet is not a Parquet file"):
            Rows(tmp_path / "x.parquet")
