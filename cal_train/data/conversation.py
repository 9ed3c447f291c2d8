r"""Messages to text: chat templates, and which characters of the text are supervised.

The templates are Jinja files beside this module. They work in plain transformers, take message contents as a
string or as a list of parts, and carry ``{% generation %}`` marks around exactly the assistant's text and its end mark,
so the one that trained can be saved with the processor. The rendered text contains every special token, the begin
token included: tokenize it with ``add_special_tokens=False``.

Rule for parts: an image part becomes ``<image>``; while no text part has come before it, and unless it is the last
part, a newline follows. ``[image, text "q"]`` therefore renders exactly like the string ``"<image>\nq"``.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from cal_train.types import IMAGE_MARK, Message

logger = logging.getLogger(__name__)

TURN_MARKS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "vicuna_v1": (),  # its end mark is whatever end token the tokenizer has; checked in `missing_marks`
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "mistral": (),  # as vicuna_v1
    "chatml_direct": ("<|im_start|>", "<|im_end|>"),
    "mgm_gemma": ("<start_of_turn>", "<end_of_turn>"),
    "qwen_1_5": ("<|im_start|>", "<|im_end|>"),
    "llava_llama_3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
"""Our templates, and the tokens that each needs as single special tokens of the tokenizer."""

_WITH_SYSTEM = {
    "qwen_1_5": ("chatml", "You are a helpful assistant."),
    "llava_llama_3": (
        "llama3",
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
        "provides, and assist the user with a variety of tasks using natural language.",
    ),
}
"""Templates of LLaVA-NeXT's language models that are another one with a default system message."""

_ENDS_WITH_EOS = ("vicuna_v1", "mistral", "mgm_gemma")

# A template is a small program: these are its mistakes, a loop that the sandbox refuses, and a macro that calls itself.
_TEMPLATE_ERRORS = (
    *(TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError),
    *(RecursionError, MemoryError),
)

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_IMAGE_PART = re.compile(f"({re.escape(IMAGE_MARK)})")


@dataclass(frozen=True)
class RenderedConversation:
    """The text of one conversation, and the half-open character ranges in it that are supervised, in order."""

    text: str
    supervised: tuple[tuple[int, int], ...]


def load_template(name: str) -> str:
    """Return the Jinja source of one of our templates.

    Raises:
        ValueError: If there is no template of that name.
    """
    if name not in TURN_MARKS:
        raise ValueError(f"unknown template {name!r}: choose one of {', '.join(TURN_MARKS)}, or chat")
    folder = files("cal_train.data") / "templates"
    base, system = _WITH_SYSTEM.get(name, (name, None))
    # a saved chat template is one text, so the macro that all of them share is put in front
    shared, own = (folder.joinpath(f"{file}.jinja").read_text(encoding="utf-8") for file in ("_text_of", base))
    return shared + ("" if system is None else f"{{%- set default_system = {system!r} -%}}\n") + own


def missing_marks(name: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the marks of template ``name`` that are not single special tokens of the tokenizer."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    missing = [mark for mark in TURN_MARKS[name] if mark not in special]
    if name in _ENDS_WITH_EOS and tokenizer.eos_token not in special:
        missing.append(f"an end token (eos_token is {tokenizer.eos_token!r})")
    return missing


def resolve_template(name: str, processor: ProcessorMixin | PreTrainedTokenizerBase) -> str:
    """Return the Jinja source of template ``name`` after checking that it fits the tokenizer.

    ``chat`` is the processor's own chat template, or else its tokenizer's.

    Raises:
        ValueError: If a mark of the template is not a single special token of the tokenizer (then it would be cut into
            pieces that the model has never seen as a mark), or if ``chat`` is asked for and there is none.
    """
    tokenizer = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
    if name == "chat":
        return _own_template(processor, tokenizer)
    template = load_template(name)
    if missing := missing_marks(name, tokenizer):
        fitting = [other for other in TURN_MARKS if other != "plain" and not missing_marks(other, tokenizer)]
        raise ValueError(
            f"template {name!r} does not fit the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r}: "
            f"it lacks {', '.join(missing)} as single special tokens. "
            f"Templates that fit: {', '.join(fitting) or 'none'}"
        )
    return template


def render(
    messages: Sequence[Message], template: str, special_tokens: Mapping[str, str], add_generation_prompt: bool = False
) -> RenderedConversation:
    """Render a conversation and find its supervised characters.

    With ``{% generation %}`` marks in the template these are what the marks enclose. Without, an assistant turn's range
    is what it adds to the prompt that `generate` would see, up to and including the end mark and without white space
    behind it.

    Args:
        messages: The turns, with ``IMAGE_MARK`` in place of images.
        template: Jinja source, see `resolve_template`.
        special_tokens: ``tokenizer.special_tokens_map``; templates read ``bos_token`` and ``eos_token`` from it.
        add_generation_prompt: End with the head of the next assistant turn.

    Raises:
        ValueError: If the template refuses the messages, or if it has no generation marks and rewrites earlier turns.
    """
    special = tuple(sorted((key, value) for key, value in special_tokens.items() if isinstance(value, str)))
    if _GENERATION_MARK.search(template):
        text, spans = _render_text(messages, template, special, add_generation_prompt)
        return RenderedConversation(text, tuple(spans))
    text, _ = _render_text(messages, template, special, add_generation_prompt)
    return RenderedConversation(text, _spans_from_prefixes(messages, template, special, text))


def _own_template(processor: ProcessorMixin | PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase) -> str:
    template = processor.chat_template or tokenizer.chat_template
    if isinstance(template, dict):  # several named templates in one tokenizer
        template = template.get("default")
    if not template:
        fitting = [name for name in TURN_MARKS if name != "plain" and not missing_marks(name, tokenizer)]
        raise ValueError(
            f"template 'chat': {tokenizer.name_or_path or 'the model folder'} has no chat template of its own. "
            f"Templates that fit its tokenizer: {', '.join(fitting) or 'none'}"
        )
    probe = (Message("user", "question"), Message("assistant", "answer"))
    rendered = render(probe, template, tokenizer.special_tokens_map)
    if not rendered.supervised:
        raise ValueError("template 'chat': the model folder's chat template renders no assistant text")
    start, end = rendered.supervised[-1]
    if rendered.text[start:end].endswith("answer"):
        logger.warning(
            "The model folder's chat template puts no end mark behind the assistant's text, so the model will not "
            "learn to stop. Choose a named template, for example vicuna_v1."
        )
    return template


def _render_text(
    messages: Sequence[Message], template: str, special: tuple[tuple[str, str], ...], add_generation_prompt: bool
) -> tuple[str, list[tuple[int, int]]]:
    as_string = _takes_strings(template, special)
    chat = [{"role": m.role, "content": m.content if as_string else _parts(m.content)} for m in messages]
    return _apply(chat, template, special, add_generation_prompt)


def _apply(
    chat: list[dict], template: str, special: tuple[tuple[str, str], ...], add_generation_prompt: bool
) -> tuple[str, list[tuple[int, int]]]:
    has_marks = _GENERATION_MARK.search(template) is not None
    variables: dict[str, Any] = dict(special)
    try:
        texts, spans = render_jinja_template(
            [chat],
            chat_template=template,
            return_assistant_tokens_mask=has_marks,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
    except _TEMPLATE_ERRORS as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"the chat template refuses the conversation: {reason}") from error
    return texts[0], list(spans[0]) if has_marks else []  # pyright: ignore[reportReturnType]


@lru_cache(maxsize=32)
def _takes_strings(template: str, special: tuple[tuple[str, str], ...]) -> bool:
    """Return whether the template takes contents as strings; those of some vision-language models need parts."""
    string = f"{IMAGE_MARK}\nquestion"
    for content in (string, _parts(string)):
        try:
            text, _ = _apply([{"role": "user", "content": content}], template, special, False)
        except ValueError:
            continue  # the other form may do; if neither does, the error below says so
        if IMAGE_MARK in text or "question" in text:
            return content == string
    raise ValueError("the chat template renders a user turn neither from a string nor from a list of parts")


def _parts(content: str) -> list[dict[str, str]]:
    """Cut a content string at its image marks, undoing the newline that the parts rule adds behind a leading image."""
    parts: list[dict[str, str]] = []
    has_text = False
    for piece in _IMAGE_PART.split(content):
        if piece == IMAGE_MARK:
            parts.append({"type": "image"})
            continue
        if parts and not has_text:
            piece = piece.removeprefix("\n")
        if piece:
            has_text = True
            parts.append({"type": "text", "text": piece})
    return parts or [{"type": "text", "text": ""}]


def _spans_from_prefixes(
    messages: Sequence[Message], template: str, special: tuple[tuple[str, str], ...], text: str
) -> tuple[tuple[int, int], ...]:
    spans = []
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt, _ = _render_text(messages[:i], template, special, True)
        turn, _ = _render_text(messages[: i + 1], template, special, False)
        body = turn[len(prompt) :]
        # Templates may trim contents; the end mark is whatever follows them, up to white space.
        answer = message.content if message.content in body else message.content.strip()
        if not (turn.startswith(prompt) and text.startswith(turn) and answer in body):
            raise ValueError(
                f"the chat template has no generation marks and rewrites turn {i} when later turns are added, so the "
                "supervised text cannot be found. Choose a named template, or add {% generation %} marks to it"
            )
        answer_end = body.index(answer) + len(answer)
        end_mark = body[answer_end:].rstrip()
        spans.append((len(prompt), len(prompt) + answer_end + len(end_mark)))
    return tuple(spans)
