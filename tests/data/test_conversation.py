import json

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from cal_train.data.conversation import TURN_MARKS, load_template, render, resolve_template
from cal_train.testing import SPECIAL_TOKENS, tiny_processor, tiny_tokenizer
from cal_train.types import Message

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TWO_TURNS = (
    Message("user", "<image>\nq1"),
    Message("assistant", "a1"),
    Message("user", "q2"),
    Message("assistant", "a2"),
)
# What each family's published format makes of TWO_TURNS (of the first turn, for plain), written out by hand.
EXPECTED = {
    "plain": "<s><image>a1\n",
    "vicuna_v1": f"<s>{SYSTEM} USER: <image>\nq1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>",
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\n<image>\nq1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\na1<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nq2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\na2<|eot_id|>"
    ),
    "chatml": (
        "<|im_start|>user\n<image>\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
        "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\na2<|im_end|>\n"
    ),
    "gemma": (
        "<s><start_of_turn>user\n<image>\nq1<end_of_turn>\n<start_of_turn>model\na1<end_of_turn>\n"
        "<start_of_turn>user\nq2<end_of_turn>\n<start_of_turn>model\na2<end_of_turn>\n"
    ),
    "mistral": "<s>[INST] <image>\nq1 [/INST] a1 </s>[INST] q2 [/INST] a2 </s>",
    "chatml_direct": (
        "<|im_start|>system\nAnswer the questions.<|im_end|>"
        "<|im_start|>user\n<image>\nq1<|im_end|><|im_start|>assistant\na1<|im_end|>"
        "<|im_start|>user\nq2<|im_end|><|im_start|>assistant\na2<|im_end|>"
    ),
    "qwen_1_5": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
        "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\na2<|im_end|>\n"
    ),
    "llava_llama_3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. "
        "You are able to understand the visual content that the user provides, and assist the user with a variety of "
        "tasks using natural language.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nq1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\na1<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nq2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\na2<|eot_id|>"
    ),
    "mgm_gemma": (
        "<s><start_of_turn>user\n<image>\nq1<end_of_turn>\n<start_of_turn>model\na1<end_of_turn>\n</s>"
        "<start_of_turn>user\nq2<end_of_turn>\n<start_of_turn>model\na2<end_of_turn>\n</s>"
    ),
}
CHATML, LLAMA3 = ("chatml", "chatml_direct", "qwen_1_5"), ("llama3", "llava_llama_3")
# As on the Hub for llava-1.5: parts only, images first, no end token, no generation marks.
PARTS_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ':' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ ' <image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ ' ' + part['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML_WITHOUT_MARKS = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def turns(name: str) -> tuple[Message, ...]:
    return TWO_TURNS[:2] if name == "plain" else TWO_TURNS


def without_tokens(*removed: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with some of its special tokens turned into ordinary words of the vocabulary."""
    core = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    core["added_tokens"] = [token for token in core["added_tokens"] if token["content"] not in removed]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(core)), bos_token="<s>", unk_token="<unk>", pad_token="<pad>"
    )


@pytest.mark.parametrize("name", TURN_MARKS)
def test_template_renders_the_published_format(name):
    rendered = render(turns(name), load_template(name), tiny_tokenizer().special_tokens_map)
    assert rendered.text == EXPECTED[name]


@pytest.mark.parametrize("name", TURN_MARKS)
def test_contents_as_parts_render_like_contents_as_string(name):
    processor = tiny_processor()
    image, text = {"type": "image"}, lambda t: {"type": "text", "text": t}
    cases = [
        ([image, text("q")], "<image>\nq"),
        ([image, image, text("q")], "<image>\n<image>\nq"),
        ([text("left "), image, text(" or right?")], "left <image> or right?"),
        ([text("q"), image], "q<image>"),
        ([image], "<image>"),
        ([text("q")], "q"),
    ]
    for parts, string in cases:
        as_parts, as_string = (
            processor.apply_chat_template(
                [{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
                chat_template=load_template(name),
            )
            for content, answer in ((parts, [text("a")]), (string, "a"))
        )
        assert as_parts == as_string


@pytest.mark.parametrize("name", TURN_MARKS)
def test_generation_prompt_is_the_text_before_the_supervised_text(name):
    special = tiny_tokenizer().special_tokens_map
    whole = render(turns(name), load_template(name), special)
    for k, (start, _) in enumerate(whole.supervised):
        prompt = render(turns(name)[: 2 * k + 1], load_template(name), special, add_generation_prompt=True)
        assert prompt.text == whole.text[:start]
        assert len(prompt.supervised) == k


def test_system_message_overrides_the_default_one():
    messages = (Message("system", "Be brief."), *TWO_TURNS[:2])
    special = tiny_tokenizer().special_tokens_map
    assert render(messages, load_template("vicuna_v1"), special).text == (
        "<s>Be brief. USER: <image>\nq1 ASSISTANT: a1</s>"
    )
    assert render(messages, load_template("chatml"), special).text.startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    )
    assert render(messages, load_template("gemma"), special).text.startswith(
        "<s><start_of_turn>user\nBe brief.\n\n<image>\nq1<end_of_turn>\n"
    )
    assert render(messages, load_template("mistral"), special).text == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nq1 [/INST] a1 </s>"
    )
    assert render(messages, load_template("chatml_direct"), special).text == (
        "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\n<image>\nq1<|im_end|>"
        "<|im_start|>assistant\na1<|im_end|>"
    )
    assert render(messages, load_template("mgm_gemma"), special).text == (
        "<s><start_of_turn>user\nBe brief.\n\n<image>\nq1<end_of_turn>\n<start_of_turn>model\na1<end_of_turn>\n</s>"
    )


def test_begin_token_is_left_out_where_the_family_has_none():
    special = {"eos_token": "</s>"}
    assert render(TWO_TURNS, load_template("vicuna_v1"), special).text.startswith("A chat")
    assert render(TWO_TURNS[:2], load_template("plain"), special).text == "<image>a1\n"


def test_plain_throws_the_question_away_but_keeps_every_image():
    messages = (Message("user", "look: <image> and <image>, what?"), Message("assistant", "two dogs"))
    rendered = render(messages, load_template("plain"), {"bos_token": "<s>"})
    assert rendered.text == "<s><image><image>two dogs\n"


@pytest.mark.parametrize("messages", [TWO_TURNS, (Message("system", "s"), *TWO_TURNS[:2])])
def test_plain_refuses_anything_but_one_question_and_one_answer(messages):
    with pytest.raises(ValueError, match="exactly one user turn and one assistant turn"):
        render(messages, load_template("plain"), {})


@pytest.mark.parametrize(
    ("name", "missing", "fitting"),
    [
        ("llama3", "<|eot_id|>", {*CHATML, "gemma"}),
        ("chatml", "<|im_end|>", {*LLAMA3, "gemma"}),
        ("gemma", "<start_of_turn>", {*LLAMA3, *CHATML}),
        ("vicuna_v1", "</s>", {*LLAMA3, *CHATML, "gemma"}),
        ("mistral", "</s>", {*LLAMA3, *CHATML, "gemma"}),
        ("mgm_gemma", "</s>", {*LLAMA3, *CHATML, "gemma"}),
    ],
)
def test_template_that_does_not_fit_the_tokenizer_is_refused_and_those_that_do_are_named(name, missing, fitting):
    """The tokenizers made here have no end token, which the three last ones need."""
    with pytest.raises(ValueError) as error:
        resolve_template(name, without_tokens(missing))
    assert ("eos_token" if missing == "</s>" else missing) in str(error.value)
    assert set(str(error.value).split("Templates that fit: ")[1].split(", ")) == fitting


def test_every_template_fits_a_tokenizer_that_has_all_special_tokens():
    assert "<|eot_id|>" in SPECIAL_TOKENS
    assert {resolve_template(name, tiny_processor()) for name in TURN_MARKS} == {load_template(n) for n in TURN_MARKS}


def test_chat_is_the_processors_own_template():
    processor = tiny_processor()
    processor.chat_template = load_template("chatml")
    assert resolve_template("chat", processor) == load_template("chatml")


def test_chat_without_a_template_is_refused():
    with pytest.raises(ValueError, match=r"no chat template of its own.*vicuna_v1"):
        resolve_template("chat", tiny_processor())


def test_unknown_template_is_refused_by_name():
    with pytest.raises(ValueError, match="'minstrel'"):
        resolve_template("minstrel", tiny_processor())


def test_spans_without_generation_marks_equal_those_with_marks():
    special = tiny_tokenizer().special_tokens_map
    messages = (*TWO_TURNS[:3], Message("assistant", ""))
    with_marks = render(messages, load_template("chatml"), special)
    assert render(messages, CHATML_WITHOUT_MARKS, special) == with_marks


def test_template_that_takes_only_parts_gets_parts():
    rendered = render(TWO_TURNS, PARTS_TEMPLATE, {})
    assert rendered.text == "USER: <image>\n q1 ASSISTANT: a1 USER: q2 ASSISTANT: a2 "
    assert [rendered.text[a:b] for a, b in rendered.supervised] == [" a1", " a2"]


def test_chat_template_without_an_end_mark_is_warned_about(caplog):
    processor = tiny_processor()
    processor.chat_template = PARTS_TEMPLATE
    resolve_template("chat", processor)
    assert "not learn to stop" in caplog.text


def test_template_that_rewrites_earlier_turns_is_refused():
    template = "{{ messages | length }}" + CHATML_WITHOUT_MARKS
    with pytest.raises(ValueError, match="rewrites turn"):
        render(TWO_TURNS, template, {})
