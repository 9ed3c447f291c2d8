"""Plain transformers on a run folder: it must see the prompt that was trained, and stop where answers end."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LogitsProcessor, LogitsProcessorList

from cal_train.cli.recipe import load_recipe
from cal_train.data.dataset import build_dataset
from cal_train.data.processor import load_processor

END_MARKS = {
    "vicuna_v1": "</s>", "chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>",
}  # fmt: skip
ROLES = {"human": "user", "gpt": "assistant"}


@pytest.fixture(scope="module", params=END_MARKS)
def run(request, tiny_run):
    """A template, and the folder of a step of training with it."""
    return request.param, tiny_run("--cal", "--max_steps", "1", "--template", request.param)


def trained_row(tiny_run, template, i):
    """Row ``i`` as training sees it, without anything of the run folder."""
    recipe = load_recipe(tiny_run.recipe, ("--template", template))
    dataset = build_dataset(recipe.data, load_processor(recipe.model.model_name_or_path, template))
    return dataset[i]


def first_labels(row):
    """The positions at which the row's answers start."""
    is_label = row["labels"] != -100
    return (is_label[1:] & ~is_label[:-1]).nonzero()[:, 0] + 1


def file_row(tiny_run, i):
    """The turns of row ``i`` in its file, up to the last question, and its image."""
    root = tiny_run.root / "data"
    row = json.loads((root / "data.json").read_text())[i]
    turns = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"][:-1]]
    return turns, Image.open(root / "images" / row["image"]) if "image" in row else None


def as_parts(turns, image):
    """The same turns with contents as lists of parts, the image inside its turn."""

    def parts(content):
        text = {"type": "text", "text": content.removeprefix("<image>\n")}
        return [{"type": "image", "image": image}, text] if content.startswith("<image>") else [text]

    return [{"role": turn["role"], "content": parts(turn["content"])} for turn in turns]


def prompt_of(processor, turns):
    return processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


@pytest.mark.parametrize("i", [0, 5], ids=["one turn", "two turns"])
def test_parts_with_an_image_become_the_prompt_that_was_trained(run, tiny_run, i):
    template, folder = run
    row, (turns, image) = trained_row(tiny_run, template, i), file_row(tiny_run, i)
    starts = first_labels(row)
    assert len(starts) == (len(turns) + 1) // 2
    prompt = prompt_of(AutoProcessor.from_pretrained(folder), as_parts(turns, image))
    assert prompt["input_ids"][0].tolist() == row["input_ids"][: starts[-1]].tolist()
    assert (prompt["input_ids"] == AutoProcessor.from_pretrained(folder).image_token_id).sum() == 4
    assert prompt["pixel_values"].shape == row["pixel_values"].shape


def test_pixels_of_the_pil_backend_are_those_that_were_trained(run, tiny_run):
    template, folder = run
    prompt = prompt_of(AutoProcessor.from_pretrained(folder, backend="pil"), as_parts(*file_row(tiny_run, 0)))
    assert torch.equal(prompt["pixel_values"], trained_row(tiny_run, template, 0)["pixel_values"])


def test_string_contents_become_the_prompt_that_was_trained(run, tiny_run):
    template, folder = run
    processor = AutoProcessor.from_pretrained(folder)
    row, (turns, image) = trained_row(tiny_run, template, 0), file_row(tiny_run, 0)
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids = processor(images=image, text=text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    assert ids.tolist() == row["input_ids"][: first_labels(row)[0]].tolist()

    row, (turns, image) = trained_row(tiny_run, template, 3), file_row(tiny_run, 3)
    assert image is None
    ids = prompt_of(processor, turns)["input_ids"][0]
    assert ids.tolist() == row["input_ids"][: first_labels(row)[0]].tolist()


class Dictate(LogitsProcessor):
    """Makes the model say given tokens."""

    def __init__(self, ids):
        self.ids = iter(ids)

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, next(self.ids)] = 0
        return forced


def test_generation_stops_at_the_end_mark_that_the_answers_were_trained_with(run, tiny_run):
    template, folder = run
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    end = processor.tokenizer.convert_tokens_to_ids(END_MARKS[template])
    row = trained_row(tiny_run, template, 0)
    assert row["labels"][row["labels"] != -100][-1] == end
    eos = model.generation_config.eos_token_id
    assert end in (eos if isinstance(eos, list) else [eos])

    prompt = prompt_of(processor, as_parts(*file_row(tiny_run, 0)))
    words = processor.tokenizer(" a dog", add_special_tokens=False)["input_ids"]
    dictated = Dictate([*words, end, *words, *words])
    output = model.generate(
        **prompt, max_new_tokens=len(words) + 3, do_sample=False, logits_processor=LogitsProcessorList([dictated])
    )
    answer = output[0, prompt["input_ids"].shape[1] :].tolist()
    assert answer == [*words, end]
    assert processor.decode(answer, skip_special_tokens=True) == " a dog"


@pytest.mark.slow
def test_a_fresh_process_computes_the_logits_of_the_model_that_was_trained(tiny_run, fresh_logits, trained_models):
    folder = tiny_run("--cal", "--template", "chatml")
    row = trained_row(tiny_run, "chatml", 0)
    batch = {"input_ids": row["input_ids"][None], "pixel_values": row["pixel_values"]}
    with torch.no_grad():
        expected = trained_models[-1].eval()(**batch).logits
        untrained = AutoModelForImageTextToText.from_pretrained(tiny_run.root / "vlm")(**batch).logits
    assert torch.equal(fresh_logits(folder, batch), expected)
    assert (expected - untrained).abs().max() > 1e-3
