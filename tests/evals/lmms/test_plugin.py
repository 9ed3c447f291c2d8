import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from cal_train.data.dataset import VlmDataset
from cal_train.data.processor import load_processor
from cal_train.data.sources import Source
from cal_train.evals.lmms.prompts import make_prompter
from cal_train.models.contrast import ImageContrast
from cal_train.testing import tiny_processor, tiny_tokenizer, write_tiny_vlm

pytest.importorskip("lmms_eval", reason="the extra `eval` is not installed: lmms-eval is NOT tested")
# lmms-eval's dependencies warn at import; what is ours is tested elsewhere with warnings as errors.
pytestmark = pytest.mark.filterwarnings("ignore")

FAMILIES = ("llava", "llava_next", "mgm")
QUESTIONS = ("what is in the image?", "a dog?", "is there a red square on a blue background, yes or no?", "cat")
CHOICES = ("a red square", "dog", "no", "a green circle on a blue background")
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: write_tiny_vlm(root / family, family=family) for family in FAMILIES}


def picture(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 90, 2)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def documents(num_images):
    """One document per entry, with that many pictures."""
    return [
        {"question": QUESTIONS[n % len(QUESTIONS)], "images": [picture(10 * n + i) for i in range(count)]}
        for n, count in enumerate(num_images)
    ]


def images_of(doc):
    return doc["images"]


def requests_of(docs, kind="generate_until", choices=CHOICES):
    from lmms_eval.api.instance import Instance

    requests = []
    for n, doc in enumerate(docs):
        options = {"max_new_tokens": NEW_TOKENS, "temperature": 0.0, "until": ["\n\n"]}
        for second in [options] if kind == "generate_until" else choices:
            arguments = (doc["question"], second, images_of, n, "toy", "test")
            metadata = {"task": "toy", "doc_id": n, "repeats": 1}
            requests.append(Instance(request_type=kind, arguments=arguments, idx=0, metadata=metadata))
    return requests


def ours(folder, docs, batch_size=1, **options):
    from cal_train.evals.lmms.plugin import CalTrain

    model = CalTrain(str(folder), device="cpu", dtype="float32", batch_size=batch_size, **options)
    model.task_dict = {"toy": {"test": docs}}
    return model


def by_hand(folder, doc, contrast=None):
    """The prompt in plain words and what transformers' own generate makes of it, one document at a time."""
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    text = (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: "
        + "<image>\n" * len(doc["images"]) + doc["question"] + " ASSISTANT:"
    )  # fmt: skip
    inputs = processor(images=doc["images"] or None, text=text, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        extra = {} if contrast is None else {"logits_processor": [ImageContrast(model, inputs, *contrast)]}
        ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **extra)
    return processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_plain_generate_whatever_the_batch_size(folders, family):
    docs = documents([1, 2, 1, 0, 1, 3, 1, 1, 1])
    expected = [by_hand(folders[family], doc) for doc in docs]
    assert len(set(expected)) >= 5, "the answers are too alike to tell anything"
    for batch_size in (1, 4, 8):
        model = ours(folders[family], docs, batch_size)
        assert model.generate_until(requests_of(docs)) == expected, batch_size


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_answers_equal_those_of_llava_hf(folders, family):
    from lmms_eval.models.simple.llava_hf import LlavaHf

    docs = documents([1] * 6)
    theirs = LlavaHf(str(folders[family]), device="cpu", device_map="cpu", dtype="float32")
    # It resizes with torchvision where that is installed, training and our model with PIL: made equal here.
    theirs._image_processor.image_processor = load_processor(folders[family]).image_processor
    theirs.task_dict = {"toy": {"test": docs}}
    expected = theirs.generate_until(requests_of(docs))
    assert len(set(expected)) >= 3
    for batch_size in (1, 8):
        assert ours(folders[family], docs, batch_size).generate_until(requests_of(docs)) == expected, batch_size


def test_contrastive_answers_are_those_of_one_document_at_a_time(folders):
    docs = documents([1, 2, 1, 0, 1, 1])
    expected = [by_hand(folders["llava"], doc, (2.0, 0.05)) for doc in docs]
    assert sum(a != by_hand(folders["llava"], doc) for a, doc in zip(expected, docs, strict=True)) >= 3
    for batch_size in (1, 4):
        model = ours(folders["llava"], docs, batch_size, vcd_alpha=2.0, vcd_beta=0.05)
        assert model.generate_until(requests_of(docs)) == expected, batch_size


def blind_by_hand(folder, doc, answer=""):
    """The ids of greedy decoding, or of ``answer``, and their log-probability, by whole passes with hidden images."""
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    turns = [{"role": "user", "content": "<image>\n" * len(doc["images"]) + doc["question"]}]
    text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    inputs = dict(processor(images=doc["images"] or None, text=text, add_special_tokens=False, return_tensors="pt"))
    given, ids, total = processor.tokenizer(answer, add_special_tokens=False)["input_ids"], [], 0.0
    for n in range(len(given) or NEW_TOKENS):
        whole = torch.cat([inputs["input_ids"], torch.tensor([ids], dtype=torch.long)], dim=1)
        is_seen = (whole != model.config.image_token_id).long()
        positions = torch.arange(whole.shape[1])[None]
        with torch.no_grad():
            step = {**inputs, "input_ids": whole, "attention_mask": is_seen, "position_ids": positions}
            log_probs = model(**step).logits[0, -1].log_softmax(-1)
        ids.append(given[n] if given else int(log_probs.argmax()))
        total += log_probs[ids[-1]].item()
        if not given and ids[-1] == processor.tokenizer.eos_token_id:
            break
    return processor.tokenizer.decode(ids, skip_special_tokens=True), total


@pytest.mark.parametrize("family", FAMILIES)
def test_without_its_images_a_document_is_answered_as_with_hidden_images(folders, family):
    docs = documents([1, 2, 1, 0])
    expected = [blind_by_hand(folders[family], doc)[0] for doc in docs]
    assert sum(a != by_hand(folders[family], doc) for a, doc in zip(expected, docs, strict=True)) >= 2
    for batch_size in (1, 4):
        model = ours(folders[family], docs, batch_size, without_image=True)
        assert model.generate_until(requests_of(docs)) == expected
        results = model.loglikelihood(requests_of(docs, "loglikelihood", [" dog"]))
        wanted = [-blind_by_hand(folders[family], doc, " dog")[1] for doc in docs]
        np.testing.assert_allclose([r.text[0] for r in results], wanted, rtol=1e-4, atol=1e-4)


def test_a_folder_that_turns_its_cache_off_is_answered_the_same_without_images(folders):
    docs = documents([1, 2])
    expected = [blind_by_hand(folders["llava"], doc)[0] for doc in docs]
    model = ours(folders["llava"], docs, without_image=True)
    model.model.generation_config.use_cache = False
    assert model.generate_until(requests_of(docs)) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vcd_alpha": -1.0}, "vcd_alpha -1"),
        ({"vcd_alpha": 1.0, "vcd_beta": 2.0}, "vcd_beta 2"),
        ({"vcd_alpha": 1.0, "without_image": True}, "with and without the image"),
        ({"without_image": "yes"}, "neither True nor False"),
    ],
)
def test_ways_to_ask_that_make_no_sense_are_refused(folders, options, message):
    with pytest.raises(ValueError, match=message):
        ours(folders["llava"], [], **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_likelihood_is_that_of_a_forward_pass_over_prompt_and_answer(folders, family):
    docs = documents([1, 2, 1])
    processor = AutoProcessor.from_pretrained(folders[family], backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(folders[family], dtype=torch.float32).eval()
    expected = []
    for doc in docs:
        for choice in CHOICES:
            turns = [{"role": "user", "content": "<image>\n" * len(doc["images"]) + doc["question"]}]
            text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) + " " + choice
            inputs = processor(images=doc["images"], text=text, add_special_tokens=False, return_tensors="pt")
            ids = processor.tokenizer(" " + choice, add_special_tokens=False)["input_ids"]
            assert inputs["input_ids"][0, -len(ids) :].tolist() == ids
            with torch.no_grad():
                log_probs = model(**inputs).logits[0].log_softmax(-1)
            expected.append(-sum(log_probs[n - len(ids) - 1, id].item() for n, id in enumerate(ids)))
    assert np.ptp(expected) > 1
    for batch_size in (1, 5):
        # tasks put the delimiter " " before each choice
        requests = requests_of(docs, "loglikelihood", [" " + choice for choice in CHOICES])
        found = [result.text for result in ours(folders[family], docs, batch_size).loglikelihood(requests)]
        # float32, sums of up to 20 log-probabilities in another order
        np.testing.assert_allclose([loss for loss, _ in found], expected, rtol=1e-4, atol=1e-4)


def test_the_greedy_answer_is_known_as_such(folders):
    docs = documents([1, 1])
    greedy = ours(folders["llava"], docs).generate_until(requests_of(docs))
    requests = requests_of(docs[:1], "loglikelihood", [greedy[0], "a dog"])
    found = [result.text[1] for result in ours(folders["llava"], docs).loglikelihood(requests)]
    tokenizer = tiny_tokenizer()
    if len(tokenizer(" " + greedy[0].strip())["input_ids"]) == NEW_TOKENS:
        assert found == [True, False]
    else:  # the text of the tokens is tokenized differently, so it is not what was generated
        assert found[1] is False


def test_the_prompt_is_the_trained_one(folders, tmp_path):
    picture(0).save(tmp_path / "0.png")
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a dog"}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": "0", "image": "0.png", "conversations": turns}]))
    processor = load_processor(folders["llava"])
    row = VlmDataset([Source(tmp_path / "data.json", None)], processor, "chat", 2048)[0]
    first = int((row["labels"] != -100).nonzero()[0])
    prompter = make_prompter(processor)
    prompt = prompter.prompt("what is it?", 1)
    assert not prompter.adds_special_tokens(prompt)
    ids = processor(images=picture(0), text=prompt, add_special_tokens=False)["input_ids"][0]
    assert list(ids) == row["input_ids"][:first].tolist()


PARTS_ONLY = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] | selectattr('type', 'equalto', 'image') %}"
    "<image>\n{% endfor %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}"
    "{% endfor %} {% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
TEXT_ONLY = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}assistant: "


@pytest.mark.parametrize(("template", "form"), [(PARTS_ONLY, "parts"), (TEXT_ONLY, "string")])
def test_templates_that_take_one_form_of_contents_get_it(template, form):
    processor = tiny_processor()
    processor.chat_template = template
    prompter = make_prompter(processor)
    assert prompter.form == form
    assert prompter.prompt("q", 2) == "user: <image>\n<image>\nq assistant: "
    assert prompter.adds_special_tokens(prompter.prompt("q", 2))  # the template writes no begin token


def test_a_template_without_images_is_refused():
    processor = tiny_processor()
    processor.chat_template = "no place for anything"
    with pytest.raises(ValueError, match="writes no <image>"):
        make_prompter(processor)


def test_images_stand_at_their_marks_and_must_match_them():
    processor = tiny_processor()
    processor.chat_template = TEXT_ONLY
    prompter = make_prompter(processor)
    assert "left <image> right <image>?" in prompter.prompt("left <image> right <image>?", 2)
    with pytest.raises(ValueError, match="1 image marks for 2 images"):
        prompter.prompt("<image> twice", 2)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"question": "q", "images": ["film.mp4"]}, "document 1 shows a str"),
        ({"question": "<image> <image>", "images": [picture(0)]}, "2 image marks for 1 images"),
    ],
)
def test_an_error_names_task_and_document(folders, broken, message):
    docs = [*documents([1]), broken]
    with pytest.raises(ValueError, match=rf"task toy, document 1: ValueError: .*{message}"):
        ours(folders["llava"], docs).generate_until(requests_of(docs))


def test_an_error_of_the_model_is_not_an_empty_answer(folders, monkeypatch):
    docs = documents([1])
    model = ours(folders["llava"], docs)

    def fail(**inputs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.model, "generate", fail)
    with pytest.raises(RuntimeError, match="task toy, document 0: RuntimeError: out of memory"):
        model.generate_until(requests_of(docs))


def test_folders_of_another_kind_are_refused(tmp_path):
    from cal_train.evals.lmms.plugin import check_model_folder

    with pytest.raises(ValueError, match="does not exist or has no config"):
        check_model_folder(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"type 'bert'.*llava, llava_next, mgm"):
        check_model_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="cal-train merge"):
        check_model_folder(tmp_path)


def test_lmms_eval_finds_the_model_by_its_entry_point():
    from importlib.metadata import entry_points

    (point,) = {p.value: p for p in entry_points(group="lmms_eval.models") if p.name == "cal_train"}.values()
    (manifest,) = point.load()()
    assert manifest.model_id == "cal_train"
    module, _, name = manifest.simple_class_path.rpartition(".")
    assert module == "cal_train.evals.lmms.plugin" and name == "CalTrain"
