"""A question of lmms-eval and its images -> the prompt that the model folder was trained with.

A task gives a text and a list of images. Where the text has no image marks, the images stand before it, each on a line
of its own, as in LLaVA's data; where it has, every image stands at its mark.
"""

from dataclasses import dataclass
from typing import Any, Literal

from jinja2.exceptions import TemplateError
from transformers import ProcessorMixin

from cal_train.types import IMAGE_MARK

ContentForm = Literal["string", "parts"]
_PROBE = "probe"


@dataclass(frozen=True)
class Prompter:
    """Renders prompts with a processor's chat template.

    ``form`` is how the template takes the content of a message: ours take both, templates on the hub often only parts.
    """

    processor: Any
    form: ContentForm

    def prompt(self, question: str, num_images: int) -> str:
        """Return the rendered prompt, up to where the answer begins; one image mark per image."""
        return self._render([self._user(question, num_images)], add_generation_prompt=True)

    def prompt_and_answer(self, question: str, num_images: int, answer: str) -> tuple[str, str]:
        """Return the prompt, and the prompt with the answer behind it as the template writes it, its end mark left out.

        Raises:
            ValueError: If the answer is empty, or the template does not write an answer behind its prompt.
        """
        answer = answer.strip()  # tasks put a space before it, which is the template's business
        if not answer:
            raise ValueError("the answer to be scored is empty: the task's choices need text")
        messages = [self._user(question, num_images), {"role": "assistant", "content": self._content(answer)}]
        prompt, whole = self.prompt(question, num_images), self._render(messages, add_generation_prompt=False)
        start = whole.find(answer, len(prompt))
        if not whole.startswith(prompt) or start < 0 or whole[len(prompt) : start].strip():
            raise ValueError("the chat template does not write an answer right behind its generation prompt")
        return prompt, whole[: start + len(answer)]

    def adds_special_tokens(self, prompt: str) -> bool:
        """Return whether the tokenizer is to add its begin token: only where the template does not write one."""
        bos = self.processor.tokenizer.bos_token
        return bos is None or not prompt.startswith(bos)

    def _user(self, question: str, num_images: int) -> dict[str, Any]:
        num_marks = question.count(IMAGE_MARK)
        if num_marks and num_marks != num_images:
            raise ValueError(f"the text has {num_marks} image marks for {num_images} images")
        if self.form == "string":
            return {"role": "user", "content": question if num_marks else f"{IMAGE_MARK}\n" * num_images + question}
        texts = question.split(IMAGE_MARK) if num_marks else [*[""] * num_images, question]
        parts = []
        for i, text in enumerate(texts):
            parts += [{"type": "image"}] if i else []
            parts += [{"type": "text", "text": text}] if text else []
        return {"role": "user", "content": parts}

    def _content(self, text: str) -> str | list[dict[str, str]]:
        return text if self.form == "string" else [{"type": "text", "text": text}]

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)


def make_prompter(processor: ProcessorMixin) -> Prompter:
    """Return a prompter with the form of contents that the processor's template takes.

    Raises:
        ValueError: If the processor has no template, or its template takes neither form.
    """
    if not getattr(processor, "chat_template", None):
        raise ValueError("the model folder has no chat template: train with one, or save the processor with one")
    for form in ("string", "parts"):
        prompter = Prompter(processor, form)
        try:
            text = prompter.prompt(_PROBE, 1)
        except (TemplateError, TypeError):  # how a template fails that indexes into text, or adds a list to text
            continue
        if text.count(IMAGE_MARK) == 1 and text.count(_PROBE) == 1 and "'type'" not in text:
            return prompter
    raise ValueError(f"the folder's chat template writes no {IMAGE_MARK} for contents as text, nor as a list of parts")
