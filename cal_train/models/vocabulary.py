"""The tokenizer of a new VLM: image token, padding token, chat template, and where generation stops."""

import logging
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cal_train.data.conversation import render, resolve_template
from cal_train.folders import from_folder
from cal_train.types import IMAGE_MARK, Message

logger = logging.getLogger(__name__)

PAD_TOKEN = "<pad>"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

# Language models' own templates take contents as strings only; evaluation harnesses also send lists of parts. Put in
# front, this turns parts into the string that `cal_train.data.conversation` defines for them.
_PARTS_TO_STRINGS = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- if message['content'] is string -%}
        {%- set flat.messages = flat.messages + [message] -%}
    {%- else -%}
        {%- set state = namespace(text='', leading=true) -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}
                {%- set state.text = state.text + '<image>' + ('\\n' if state.leading and not loop.last else '') -%}
            {%- elif part['type'] == 'text' -%}
                {%- set state.text = state.text + part['text'] -%}
                {%- set state.leading = false -%}
            {%- else -%}
                {{- raise_exception('content parts are of type text or image, not ' + part['type']) -}}
            {%- endif -%}
        {%- endfor -%}
        {%- set flat.messages = flat.messages + [{'role': message['role'], 'content': state.text}] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages %}"""


def load_tokenizer(folder: Path, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a language model.

    Raises:
        ValueError: If the folder has none, or it cannot report the characters of its tokens.
    """
    if gguf_file is None and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ValueError(f"language model {folder} has no tokenizer: copy its tokenizer files into the folder")
    tokenizer = from_folder(AutoTokenizer, folder, gguf_file=gguf_file)
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer of {folder} is a slow one, without character offsets: save it with a tokenizer.json"
        )
    tokenizer.padding_side = "left"
    return tokenizer


def choose_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> str:
    """Return the chat template of a new VLM, which takes contents as strings and as lists of parts.

    Args:
        tokenizer: Of the language model.
        name: A template of ours or ``chat``. Default: the tokenizer's own if it has one, else ``vicuna_v1``.

    Raises:
        ValueError: If the template is unknown or does not fit the tokenizer.
    """
    if name is None:
        name = "chat" if tokenizer.chat_template else "vicuna_v1"
    template = resolve_template(name, tokenizer)
    logger.info("chat template: %s", "the language model's own" if name == "chat" else name)
    return _PARTS_TO_STRINGS + template if name == "chat" else template


def add_image_and_pad_token(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Make ``<image>`` one special token, and choose a padding token that never occurs as content.

    An own padding token is kept unless it is also the begin, end or unknown token or a mark of the template: then
    padding could be taken for an end mark that is to be learnt. Otherwise ``<pad>`` is added.
    """
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_MARK]}, replace_extra_special_tokens=False)
    special = tokenizer.special_tokens_map
    pad, content = special.get("pad_token"), [special.get(f"{name}_token") for name in ("bos", "eos", "unk")]
    if not isinstance(pad, str) or pad in content or pad in template:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """Return the ids at which generation ends: the tokenizer's end token and the end mark of the template's answers."""
    answer = "answer"
    rendered = render(
        [Message("user", "question"), Message("assistant", answer)], template, tokenizer.special_tokens_map
    )
    behind = tokenizer.tokenize(rendered.text[rendered.text.rindex(answer) + len(answer) :])
    special = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = [*behind[:1], tokenizer.special_tokens_map.get("eos_token")]
    return sorted({special[end] for end in ends if end in special})
