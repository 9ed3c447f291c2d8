"""The demo's language model: a small Llama with its own vocabulary, trained on text about scenes.

It plays the part that Vicuna plays in LLaVA: before it ever gets an image it knows the words and writes the answers'
sentences. All concepts occur in its text, the held-out ones too; which drawing belongs to which word it cannot tell.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from cal_train.data.conversation import load_template, render
from cal_train.demo.concepts import CONCEPTS
from cal_train.demo.scenes import Turn, ask, caption, sample_scene
from cal_train.types import IMAGE_MARK, Message

TEMPLATE = "chatml"
VOCAB_SIZE = 1024
SPECIAL_TOKENS = ("<pad>", IMAGE_MARK, "<|im_start|>", "<|im_end|>")
CAPTION_SHARE = 0.25
"""Share of the texts that are captions; the others are conversations."""


def conversation(turns: Sequence[Turn]) -> tuple[Message, ...]:
    """Return the turns as messages, the first question behind an image mark and a newline."""
    messages = []
    for i, turn in enumerate(turns):
        messages.append(Message("user", turn.question if i else f"{IMAGE_MARK}\n{turn.question}"))
        messages.append(Message("assistant", turn.answer))
    return tuple(messages)


def documents(seed: int) -> Iterator[str]:
    """Yield endless training texts: captions and conversations as both stages render them, with no image in them."""
    rng = np.random.default_rng(seed)
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    while True:
        scene = sample_scene(rng, "text", CONCEPTS, CONCEPTS)
        if rng.random() < CAPTION_SHARE:
            messages, template = (Message("user", IMAGE_MARK), Message("assistant", caption(scene))), "plain"
        else:
            messages, template = conversation(ask(scene, rng)), TEMPLATE
        yield render(messages, load_template(template), special).text.replace(IMAGE_MARK, "")


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
    long = [c.word for c in CONCEPTS if len(tokenizer(f" {c.word}").input_ids) != 1]
    if long:
        raise ValueError(f"words of more than one token: {', '.join(long)}; train the tokenizer on more text")
    return tokenizer


def train_language_model(
    folder: Path, num_documents: int, learning_rate: float, batch_size: int, seed: int = 0
) -> Path:
    """Train tokenizer and model from nothing and save both in one Hugging Face folder.

    Args:
        folder: Where to save.
        num_documents: Texts, each seen once.
        learning_rate: Peak of a cosine schedule.
        batch_size: Texts per step. Small batches learn far more per token here: steps count, not their noise.
        seed: Of text, weights and order.
    """
    set_seed(seed)
    texts = list(islice(documents(seed), num_documents))
    tokenizer = train_tokenizer(texts)
    model = LlamaForCausalLM(_config(tokenizer))
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        num_train_epochs=1,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        adam_beta2=0.99,
        logging_steps=50,
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        seed=seed,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in tokenizer(texts)["input_ids"]]),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
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
