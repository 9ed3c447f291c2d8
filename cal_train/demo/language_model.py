"""The demo's language model: a small Llama with its own vocabulary, trained on text about scenes.

It plays the part that Vicuna plays in LLaVA: before it ever gets an image it knows the words, writes the answers'
sentences, and can look something up in what stands before the question. Where the VLM gets an image, its texts have the
picture in words, one word for each patch; so what stage 1 has to teach the projector is to write drawings as words.
Some texts have no picture, so that the model can also guess, as any language model can. All concepts occur in the
texts, the held-out ones too; which drawing belongs to which word no text tells.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from cal_train.data.conversation import RenderedConversation, load_template, render
from cal_train.data.tokenize import tokenize_conversation
from cal_train.demo.concepts import CONCEPTS
from cal_train.demo.scenes import NOTHING, Turn, ask_for_training, caption, picture_in_words, sample_scene
from cal_train.types import IMAGE_MARK, Message, Sample, TokenizedExample

TEMPLATE = "chatml"
VOCAB_SIZE = 1024
SPECIAL_TOKENS = ("<pad>", IMAGE_MARK, "<|im_start|>", "<|im_end|>")
CAPTION_SHARE = 0.25
"""Share of the texts that are captions; the others are conversations."""
GUESS_SHARE = 0.15
"""Share of the texts without a picture."""


@dataclass(frozen=True)
class Document:
    """A row as a stage of the VLM would render it, image mark included, and the picture as words; () for none."""

    messages: tuple[Message, ...]
    rendered: RenderedConversation
    picture: tuple[str, ...]


def conversation(turns: Sequence[Turn]) -> tuple[Message, ...]:
    """Return the turns as messages, the first question behind an image mark and a newline."""
    messages = []
    for i, turn in enumerate(turns):
        messages.append(Message("user", turn.question if i else f"{IMAGE_MARK}\n{turn.question}"))
        messages.append(Message("assistant", turn.answer))
    return tuple(messages)


def documents(seed: int) -> Iterator[Document]:
    """Yield endless training texts: captions and conversations as both stages render them."""
    rng = np.random.default_rng(seed)
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    while True:
        scene = sample_scene(rng, "text", CONCEPTS, CONCEPTS)
        if rng.random() < CAPTION_SHARE:
            messages, template = (Message("user", IMAGE_MARK), Message("assistant", caption(scene))), "plain"
        else:
            messages, template = conversation(ask_for_training(scene, rng, 1)), TEMPLATE
        rendered = render(messages, load_template(template), special)
        has_picture = rng.random() >= GUESS_SHARE
        yield Document(messages, rendered, tuple(picture_in_words(scene)) if has_picture else ())


def encode(document: Document, tokenizer: PreTrainedTokenizerFast) -> TokenizedExample:
    """Return the ids and labels that the VLM would train on, the picture's words where image features would be."""
    sample = Sample("text", "the language model's texts", 0, document.messages)
    image_token_id = tokenizer.get_vocab()[IMAGE_MARK]
    example = tokenize_conversation(
        sample, document.rendered, tokenizer, image_token_id, [len(document.picture)], tokenizer.model_max_length
    )
    ((start, end),) = example.image_spans
    picture = [tokenizer(f" {word}").input_ids[0] for word in document.picture]
    example.input_ids[start:end] = torch.tensor(picture, dtype=torch.int64)
    return example


def in_words(document: Document) -> str:
    """Return the text with the picture's words in place of the image mark."""
    return document.rendered.text.replace(IMAGE_MARK, "".join(f" {word}" for word in document.picture))


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer whose vocabulary was learnt from the texts.

    Raises:
        ValueError: If a concept's word did not become one token; questions of one kind would then differ in length.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": IMAGE_MARK},
        model_max_length=2048,
    )
    tokenizer.chat_template = load_template(TEMPLATE)
    words = [NOTHING, *(concept.word for concept in CONCEPTS)]
    long = [word for word in words if len(tokenizer(f" {word}").input_ids) != 1]
    if long:
        raise ValueError(f"words of more than one token: {', '.join(long)}; train the tokenizer on more text")
    return tokenizer


def train_language_model(
    folder: Path, num_documents: int, learning_rate: float, batch_size: int, seed: int = 0
) -> Path:
    """Train tokenizer and model from nothing and save both in one Hugging Face folder.

    Args:
        folder: Where to save.
        num_documents: Texts, each seen once; as in the VLM's stages, only answers and captions are supervised.
        learning_rate: Peak of a cosine schedule.
        batch_size: Texts per step. Small batches learn far more per token here: steps count, not their noise.
        seed: Of text, weights and order.
    """
    set_seed(seed)
    texts = list(islice(documents(seed), num_documents))
    tokenizer = train_tokenizer([in_words(text) for text in texts])
    examples = [encode(text, tokenizer) for text in texts]
    model = LlamaForCausalLM(_config(tokenizer))
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        num_train_epochs=1,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        adam_beta2=0.95,
        logging_steps=50,
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        seed=seed,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(
            [{"input_ids": e.input_ids.tolist(), "labels": e.labels.tolist()} for e in examples]
        ),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Return a Llama of about 5 million parameters, 4.7 of them outside the embeddings."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),  # the trainer of the tokenizer numbers them first
        bos_token_id=SPECIAL_TOKENS.index("<|im_start|>"),
        eos_token_id=SPECIAL_TOKENS.index("<|im_end|>"),
    )
