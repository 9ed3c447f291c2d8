"""Each beginner's mistake, made on purpose, is named in the preview with its cure; good rows raise nothing."""

import json
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from cal_train.data.dataset import VlmDataset
from cal_train.data.preview import preview_sample, to_html, to_terminal
from cal_train.data.sources import Source
from cal_train.data.suspicions import image_suspicion, labelled_stretches
from cal_train.testing import tiny_processor, tiny_tokenizer

LLAMA_HEADS = "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>' }}"


def noise(seed=0, size=(60, 60)):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def preview(folder, template="chatml", answer="a red dog.", image=None, kind="bytelevel", max_length=2048, **row):
    """Preview of one row with these settings; a template that is no name is Jinja source of the model folder."""
    (image or noise()).save(folder / "0.png")
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": answer}]
    (folder / "data.json").write_text(json.dumps([{"id": "r", "image": "0.png", "conversations": turns, **row}]))
    processor = tiny_processor(tiny_tokenizer(kind))
    if "{%" in template:
        processor.chat_template, template = template, "chat"
    return first_row(VlmDataset([Source(folder / "data.json", folder)], processor, template, max_length))


def first_row(dataset):
    return preview_sample(dataset.load_sample(0), dataset.encoder)


def only(found):
    (suspicion,) = found.suspicions
    return str(suspicion)


@pytest.mark.parametrize("kind", ["bytelevel", "metaspace"])
@pytest.mark.parametrize("template", ["chatml", "llama3", "gemma", "plain"])
@pytest.mark.parametrize("answer", ["a red dog.", "ﬁne  —  naïve 猫\n\ntwo lines ", "1"])
def test_a_good_row_raises_no_suspicion(tmp_path, kind, template, answer):
    row = preview(tmp_path, template, answer, kind=kind)
    assert row.problem is None
    begins = [s for s in row.suspicions if "does not begin with" not in s.problem]
    assert begins == []


def test_several_turns_are_compared_turn_by_turn(tmp_path):
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a dog"}]
    turns += [{"from": "human", "value": "and?"}, {"from": "gpt", "value": "a cat"}]
    assert preview(tmp_path, conversations=turns).suspicions == ()


def test_a_template_without_the_marks_of_the_tokenizer_is_named_with_those_that_fit(tmp_path):
    said = only(preview(tmp_path, "vicuna_v1"))
    assert "turn marks <|start_header_id|>" in said and "uses none of them" in said and "llama3" in said


def test_marks_that_the_tokenizer_cuts_in_pieces_are_named(tmp_path):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|strange|>' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
        "{% endfor %}"
    )
    assert "<|strange|> is no token of this tokenizer" in only(preview(tmp_path, template))


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        # the generation marks are one piece too early, cut the answer's front off, reach too far, or stop too early
        (
            "{% generation %}{{ '<|end_header_id|>' + m['content'] + '<|eot_id|>' }}{% endgeneration %}",
            "begin '<|end_header_id|>ared",
        ),
        (
            "{{ m['content'][:1] }}{% generation %}{{ m['content'][1:] + '<|eot_id|>' }}{% endgeneration %}",
            "begin 'reddog.<|eot_id|>', but the answer begins 'a red dog.'",
        ),
        (
            "{% generation %}{{ m['content'] + '<|eot_id|><|start_header_id|>' }}{% endgeneration %}",
            "reach past its end mark",
        ),
        ("{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|eot_id|>' }}", "no end mark is supervised"),
        ("{% generation %}{{ 'x' }}{% endgeneration %}{{ ' ' + m['content'] }}", "begin 'x', but"),
    ],
)
def test_labels_that_do_not_lie_on_the_answer_are_named(tmp_path, generation, message):
    template = LLAMA_HEADS + "{% if m['role'] == 'assistant' %}" + generation
    template += "{% else %}{{ m['content'] + '<|eot_id|>' }}{% endif %}{% endfor %}"
    assert message in only(preview(tmp_path, template))


def test_a_doubled_begin_token_is_named(tmp_path):
    template = (
        "{{ bos_token + bos_token }}" + LLAMA_HEADS + "{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + '<|eot_id|>' }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    assert "begins with '<s>' twice" in only(preview(tmp_path, template))
    assert preview(tmp_path, template.replace("bos_token + bos_token", "bos_token")).suspicions == ()
    missing = only(preview(tmp_path, template.replace("bos_token + bos_token", "''"), kind="metaspace"))
    assert "does not begin with '<s>'" in missing


def test_text_that_was_cut_is_named_with_how_much(tmp_path):
    whole = preview(tmp_path, answer="a red dog on a blue background")
    length = int(whole.counts.split()[0])
    cut = preview(tmp_path, answer="a red dog on a blue background", max_length=length - 6)
    assert "the last 6 tokens are cut off" in only(cut)
    assert cut.suspicions and whole.suspicions == ()


def test_a_row_whose_labels_are_all_cut_or_whose_image_is_cut_is_a_problem_in_red(tmp_path):
    assert "no supervised token" in preview(tmp_path, max_length=17).problem.problem
    assert "its last image ends at token" in preview(tmp_path, max_length=6).problem.problem
    noise().save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    broken = preview_of_file(tmp_path, "half.jpg")
    assert "cannot be read" in broken.problem.problem
    assert "Of 1 rows, 1 cannot be trained on." in to_terminal([broken]).plain


def preview_of_file(folder, name):
    turns = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    (folder / "data.json").write_text(json.dumps([{"id": "r", "image": name, "conversations": turns}]))
    return first_row(VlmDataset([Source(folder / "data.json", folder)], tiny_processor(), "chatml", 2048))


def test_an_empty_image_is_named_by_its_colour_and_the_grey_end_of_a_cut_one_too(tmp_path):
    assert "image 1 is one plain colour (#0a141e)" in only(
        preview(tmp_path, image=Image.new("RGB", (50, 50), "#0a141e"))
    )
    grey = noise(size=(60, 100))
    grey.paste((128, 128, 128), (0, 88, 60, 100))
    assert "lower end of image 1 is plain grey" in only(preview(tmp_path, image=grey))
    white = noise(size=(60, 100))
    white.paste((255, 255, 255), (0, 50, 60, 100))
    assert image_suspicion(white) is None and image_suspicion(noise()) is None


def test_an_empty_answer_is_named(tmp_path):
    assert "only its end is supervised" in only(preview(tmp_path, answer=" "))


def test_stretches_are_the_unbroken_runs_of_labels():
    labels = torch.tensor([-100, 5, 6, -100, -100, 7])
    assert list(labelled_stretches(labels)) == [[5, 6], [7]]
    assert list(labelled_stretches(torch.tensor([-100]))) == []


def test_what_looks_wrong_stands_first_and_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    template = LLAMA_HEADS + "{% if m['role'] == 'assistant' %}{% generation %}{{ 'x' }}{% endgeneration %}"
    template += "{{ ' ' + m['content'] }}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    bad, good = preview(tmp_path, template, answer=evil), preview(tmp_path)
    page = to_html([good, bad])
    tags, texts = [], []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append(tag)
    parser.handle_data = texts.append
    parser.feed(page)
    assert "script" not in tags and evil in "".join(texts)
    text = to_terminal([good, bad]).plain
    assert text.index("Of 2 rows, 1 look wrong (!).") < text.index("data.json, row 0")
    assert text.index("! the supervised tokens begin 'x'") > text.rindex("data.json, row 0")
    assert "look wrong" not in to_terminal([good]).plain and 'class="suspicion"' not in to_html([good])
