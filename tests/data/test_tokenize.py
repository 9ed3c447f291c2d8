import json
from itertools import groupby

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cal_train.data.conversation import TURN_MARKS, load_template, render
from cal_train.data.tokenize import tokenize_conversation
from cal_train.testing import SPECIAL_TOKENS, tiny_processor, tiny_tokenizer
from cal_train.types import IGNORE_INDEX, BadSampleError, Message, Sample

KINDS = ("bytelevel", "metaspace", "bytelevel joining newlines", "metaspace joining newlines")
ANSWERS = {
    "one turn": ["a red square."],
    "many turns": ["a dog", "no", "it is green. yes"],
    "empty answer": ["", "a cat", ""],
    "unicode": ["h\u00e9llo \U0001f98a\u4e16\u754c e\u0301 \U0001f469\u200d\U0001f680"],
    "spaces around": ["  two in front, one behind ", " x"],
    "newlines around": ["\nfirst", "\n\n- a\n- b\n\n", "\n"],
    "words like marks": ["USER: not a turn ASSISTANT: neither"],
}
QUESTIONS = {
    "text only": "what is in the image?",
    "one image": "<image>\nwhat is in the image?",
    "several images": "<image>\n<image>\nwhich is red?",
    "image mid-turn": "is this <image> a dog?",
    "image at the end": "a dog? <image>",
}
END_MARKS = {
    "plain": "\n",
    "vicuna_v1": "</s>",
    "llama3": "<|eot_id|>",
    "chatml": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "mistral": " </s>",
    "chatml_direct": "<|im_end|>",
    "mgm_gemma": "<end_of_turn>\n</s>",
    "qwen_1_5": "<|im_end|>",
    "llava_llama_3": "<|eot_id|>",
}


def joining_newlines_bytelevel() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["x\n\nx\n\n\n"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def joining_newlines_metaspace() -> PreTrainedTokenizerFast:
    core = json.loads(tiny_tokenizer("metaspace").backend_tokenizer.to_str())
    vocab = core["model"]["vocab"]
    for piece in ("\n", "\n\n", "\n\n\n"):
        vocab[piece] = len(vocab)
    core["model"]["merges"] = [["\n", "\n"], ["\n\n", "\n"]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(core)), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="module")
def tokenizers_by_kind() -> dict[str, PreTrainedTokenizerFast]:
    return {
        "bytelevel": tiny_tokenizer("bytelevel"),
        "metaspace": tiny_tokenizer("metaspace"),
        "bytelevel joining newlines": joining_newlines_bytelevel(),
        "metaspace joining newlines": joining_newlines_metaspace(),
    }


def conversation(question: str, answers: list[str]) -> tuple[Message, ...]:
    messages = []
    for i, answer in enumerate(answers):
        messages += [Message("user", question if i == 0 else "and then?"), Message("assistant", answer)]
    return tuple(messages)


def tokenize(messages, tokenizer, template, num_image_tokens=None, max_length=4000):
    rendered = render(messages, load_template(template), tokenizer.special_tokens_map)
    num_images = sum(message.content.count("<image>") for message in messages)
    return tokenize_conversation(
        Sample("s", "data.json", 7, messages),
        rendered,
        tokenizer,
        tokenizer.convert_tokens_to_ids("<image>"),
        num_image_tokens if num_image_tokens is not None else [4] * num_images,
        max_length,
    )


def supervised_texts(example, tokenizer) -> list[str]:
    """The text of each run of supervised tokens, without the decoder's habit of dropping the first space."""
    lead = tokenizer.encode("a", add_special_tokens=False)
    lead_text = tokenizer.decode(lead)
    runs = groupby(zip(example.labels.tolist(), strict=True), key=lambda label: label[0] != IGNORE_INDEX)
    return [
        tokenizer.decode([*lead, *(label for (label,) in run)], skip_special_tokens=False)[len(lead_text) :]
        for is_supervised, run in runs
        if is_supervised
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TURN_MARKS)
@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("case", ANSWERS)
def test_supervised_text_is_the_assistants_text_and_its_end_mark(tokenizers_by_kind, kind, template, question, case):
    tokenizer = tokenizers_by_kind[kind]
    answers = ANSWERS[case][:1] if template == "plain" else ANSWERS[case]
    example = tokenize(conversation(QUESTIONS[question], answers), tokenizer, template)
    # The separator, a space behind "ASSISTANT:" or "[/INST]", is part of the answer's first token and trained with it.
    space = {"vicuna_v1": " ", "mistral": " "}.get(template, "")
    expected = [(space if answer else "") + answer + END_MARKS[template] for answer in answers]
    if kind.startswith("metaspace"):  # such tokenizers put a space before any text behind a special token
        expected[0] = (" " if template == "plain" else "") + expected[0]
        expected = [text.replace("<end_of_turn>\n", "<end_of_turn> \n") for text in expected]
    assert supervised_texts(example, tokenizer) == expected
    is_supervised = example.labels != IGNORE_INDEX
    assert torch.equal(example.labels[is_supervised], example.input_ids[is_supervised])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TURN_MARKS)
@pytest.mark.parametrize("answer", ["a dog", "", "\nfirst", "\n\n", " x", "\U0001f98a"])
def test_tokens_before_the_first_label_are_the_prompt_that_generate_sees(tokenizers_by_kind, kind, template, answer):
    tokenizer = tokenizers_by_kind[kind]
    messages = conversation("<image>\nwhat?", [answer])
    example = tokenize(messages, tokenizer, template, num_image_tokens=[1])
    prompt = render(messages[:1], load_template(template), tokenizer.special_tokens_map, add_generation_prompt=True)
    first_label = int((example.labels != IGNORE_INDEX).nonzero()[0])
    assert example.input_ids[:first_label].tolist() == tokenizer(prompt.text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("template", TURN_MARKS)
def test_ids_equal_those_of_the_processor_for_the_same_text_and_images(template):
    processor = tiny_processor()
    messages = conversation("<image>\n<image>\nwhich?", ["the red one"])
    rendered = render(messages, load_template(template), processor.tokenizer.special_tokens_map)
    images = [Image.fromarray(np.zeros((30, 40, 3), np.uint8))] * 2
    oracle = processor(text=rendered.text, images=images, add_special_tokens=False)["input_ids"]
    example = tokenize(messages, processor.tokenizer, template)
    assert [example.input_ids.tolist()] == np.asarray(oracle).tolist()


@pytest.mark.parametrize("template", [name for name in TURN_MARKS if name != "plain"])
def test_labels_equal_the_assistant_mask_of_transformers(template):
    processor = tiny_processor()
    messages = conversation("what?", ["a dog", "", "green \U0001f98a"])
    oracle = processor.tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in messages],
        chat_template=load_template(template),
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    example = tokenize(messages, processor.tokenizer, template)
    assert example.input_ids.tolist() == oracle["input_ids"]
    assert (example.labels != IGNORE_INDEX).int().tolist() == oracle["assistant_masks"]


def test_image_spans_cover_exactly_the_placeholders_and_carry_no_label():
    tokenizer = tiny_tokenizer()
    example = tokenize(conversation("<image>\nor <image>?", ["left"]), tokenizer, "vicuna_v1", [3, 5])
    is_image = example.input_ids == tokenizer.convert_tokens_to_ids("<image>")
    assert [end - start for start, end in example.image_spans] == [3, 5]
    assert is_image.sum() == 8 and all(is_image[start:end].all() for start, end in example.image_spans)
    assert (example.labels[is_image] == IGNORE_INDEX).all()
    assert not is_image[example.image_spans[0][1]]  # the newline between the two


def test_no_begin_token_is_doubled():
    tokenizer = tiny_tokenizer("metaspace")  # its post-processor adds one when asked to add special tokens
    example = tokenize(conversation("q", ["a"]), tokenizer, "vicuna_v1")
    assert (example.input_ids == tokenizer.bos_token_id).sum() == 1


def test_truncation_cuts_text_at_the_end_only_and_is_counted():
    tokenizer = tiny_tokenizer()
    messages = conversation("<image>\nwhat is it?", ["a red square on a blue background."])
    whole = tokenize(messages, tokenizer, "chatml")
    cut = tokenize(messages, tokenizer, "chatml", max_length=len(whole.input_ids) - 3)
    assert whole.num_cut == 0 and cut.num_cut == 3
    assert torch.equal(cut.input_ids, whole.input_ids[:-3]) and torch.equal(cut.labels, whole.labels[:-3])
    assert cut.image_spans == whole.image_spans


def test_image_that_does_not_fit_makes_the_row_bad():
    tokenizer = tiny_tokenizer()
    messages = conversation("what? <image>", ["a dog"])
    end = tokenize(messages, tokenizer, "chatml").image_spans[-1][1]
    with pytest.raises(BadSampleError, match=r"data.json, row 7 .*longer than the limit.*Raise model_max_length"):
        tokenize(messages, tokenizer, "chatml", max_length=end - 1)


def test_row_without_a_label_left_is_bad():
    tokenizer = tiny_tokenizer()
    messages = conversation("<image>\nwhat?", ["a dog"])
    whole = tokenize(messages, tokenizer, "chatml")
    first_label = int((whole.labels != IGNORE_INDEX).nonzero()[0])
    assert tokenize(messages, tokenizer, "chatml", max_length=first_label + 1).num_cut > 0
    with pytest.raises(BadSampleError, match="no supervised token within the first"):
        tokenize(messages, tokenizer, "chatml", max_length=first_label)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("role", "text"),
    [("assistant", "x</s>y"), ("assistant", "<image>"), ("user", "<|im_end|>"), ("assistant", "<pad>")],
)
def test_special_tokens_inside_texts_make_the_row_bad(tokenizers_by_kind, kind, role, text):
    messages = (
        Message("user", text if role == "user" else "q"),
        Message("assistant", text if role == "assistant" else "a"),
    )
    with pytest.raises(BadSampleError, match="special token") as error:
        tokenize(messages, tokenizers_by_kind[kind], "chatml", num_image_tokens=[])
    assert error.value.problem.row == 7


def test_template_that_loses_an_image_makes_the_row_bad():
    messages = conversation("<image>\nq", ["a"])
    with pytest.raises(BadSampleError, match="1 image tokens in the rendered text, but 2 images"):
        tokenize(messages, tiny_tokenizer(), "chatml", num_image_tokens=[4, 4])


def test_slow_tokenizer_is_refused():
    class Slow(PreTrainedTokenizerFast):
        is_fast = False

    slow = Slow(tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="</s>")
    with pytest.raises(ValueError, match="slow"):
        tokenize(conversation("q", ["a"]), slow, "vicuna_v1")
