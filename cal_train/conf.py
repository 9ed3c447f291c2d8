"""Every option of a training recipe, with its default, its unit and where the default comes from.

A recipe (YAML) and the command line fill these dataclasses (`cal_train.cli.recipe`); they stop at the entry points:
everything below takes plain arguments.
"""

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
"""Every linear layer of the language model and nothing else (LLaVA's choice); the vision tower has ``q_proj`` too."""


@dataclass
class ModelArguments:
    """Which model is trained, and which of its parts."""

    model_name_or_path: str = field(metadata={"help": "A folder of `compose`, a checkpoint, or any llava-hf folder."})
    stage: Literal["pretrain", "finetune"] = field(
        default="finetune",
        metadata={
            "help": "pretrain: projector only. finetune: projector and language model (LLaVA-1.5, section 3), and "
            "LLaVA-NeXT's newline."
        },
    )
    tune_projector: bool | None = field(default=None, metadata={"help": "Overrides the stage's choice."})
    tune_language_model: bool | None = field(default=None, metadata={"help": "Overrides the stage's choice."})
    tune_vision_tower: bool | None = field(
        default=None,
        metadata={"help": "Overrides the stage's choice (frozen). Layers behind the selected one stay frozen."},
    )
    tune_image_newline: bool | None = field(
        default=None, metadata={"help": "Overrides the stage's choice (LLaVA-NeXT: trained in finetune only)."}
    )
    mm_projector_lr: float | None = field(default=None, metadata={"help": "Learning rate of the projector."})
    vision_tower_lr: float | None = field(default=None, metadata={"help": "Learning rate of the vision tower."})
    mm_vision_select_layer: int | None = field(
        default=None, metadata={"help": "Hidden state of the tower to read. Default: what the model folder says (-2)."}
    )
    image_aspect_ratio: Literal["square", "pad", "anyres"] | None = field(
        default=None,
        metadata={
            "help": "square: resize the short side and crop the centre (LLaVA stage 1). pad: pad to a square with the "
            "mean colour (stage 2 and evaluation). anyres: tiles, the only way of LLaVA-NeXT. Default: what the model "
            "folder says. Saved with the processor."
        },
    )
    image_grid: Literal[1, 2] | None = field(
        default=None,
        metadata={
            "help": "Only for MGM. 2: MGM-HD, whose images are 2 x 2 tiles and the whole at twice the resolution; no "
            "weight depends on it, so it starts from MGM's stage 1. Default: what the model folder says."
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager or flash_attention_2. Default: flash_attention_2 if installed."}
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto",
        metadata={
            "help": "dtype of the weights. auto: bfloat16 under DeepSpeed with bf16 (it keeps float32 masters), "
            "else float32 (bf16 then means autocast)."
        },
    )
    lora_enable: bool = field(default=False, metadata={"help": "Train LoRA adapters instead of the language model."})
    lora_r: int = field(default=128, metadata={"help": "LoRA rank (LLaVA: 128)."})
    lora_alpha: int = field(default=256, metadata={"help": "LoRA alpha (LLaVA: 256)."})
    lora_dropout: float = field(
        default=0.05,
        metadata={"help": "LoRA dropout (LLaVA: 0.05). With CAL, 0 saves a forward pass: scores are taken without it."},
    )
    lora_target_modules: str = field(default=LORA_TARGETS, metadata={"help": "Regular expression of module names."})
    use_dora: bool = field(default=False, metadata={"help": "DoRA: LoRA that learns the norms of the rows too."})
    quantization: Literal["nf4", "int8"] | None = field(
        default=None,
        metadata={
            "help": "QLoRA: the language model's linear layers are loaded in 4 or 8 bits, frozen under LoRA. Nothing "
            "else is quantised: not the towers, the projector, the embeddings or the head."
        },
    )
    bnb_4bit_compute_dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "dtype of products with nf4 weights. auto: bfloat16 with bf16, else float32."}
    )
    bnb_4bit_use_double_quant: bool = field(
        default=True, metadata={"help": "Quantise the scales of nf4 as well (QLoRA: yes); saves 0.37 bits per weight."}
    )


@dataclass
class DataArguments:
    """Which rows are trained on, and how they become tokens."""

    data_path: str | None = field(
        default=None,
        metadata={
            "help": "A JSON, JSONL or Parquet file. With streaming also several of them, or webdataset shards: a "
            "folder, or name-{0000..0099}.tar."
        },
    )
    image_folder: str | None = field(
        default=None, metadata={"help": "Image root of data_path. Default: the folder of the data file."}
    )
    data: list[dict] | None = field(
        default=None,
        metadata={
            "help": "Several sources instead of data_path: [{path, image_root, weight}, ...]. weight 0.5: half "
            "of the rows, drawn anew each epoch; 2: every row twice. scores: as cal_scores, of one source."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the rows in passing, where they are too many to be indexed, or lie in shards. Order and "
            "position are as exact as without; rows are mixed within shuffle_pool."
        },
    )
    shuffle_pool: int = field(
        default=1024,
        metadata={"help": "Only with streaming: rows, with the images that they carry, that a worker holds and mixes."},
    )
    eval_data_path: str | None = field(default=None, metadata={"help": "Rows for the evaluation loss."})
    template: str = field(
        default="chat",
        metadata={
            "help": "plain, vicuna_v1, llama3, chatml, gemma, mistral, chatml_direct, mgm_gemma, or chat (the model "
            "folder's own chat template)."
        },
    )
    model_max_length: int = field(default=2048, metadata={"help": "Tokens per row, image tokens included."})
    image_position: Literal["keep", "front"] = field(
        default="keep",
        metadata={"help": "front: move the image mark of a turn to its beginning, as LLaVA's preprocess_multimodal."},
    )
    group_by_modality_length: bool = field(
        default=False, metadata={"help": "Batches hold rows of one kind (image or text) and of similar length."}
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Lay the samples of a micro-batch into as few rows as they fit: the same steps with less padding. "
            "Attention stays within each sample."
        },
    )
    pack_tokens: int | None = field(
        default=None,
        metadata={"help": "Most tokens of a packed row; a longer sample has its own. Default: model_max_length."},
    )
    max_bad_samples: int = field(
        default=0, metadata={"help": "Bad rows that are dropped and counted before the run stops with an error."}
    )
    max_image_pixels: int = field(
        default=100_000_000, metadata={"help": "Images with more pixels are refused from their header, undecoded."}
    )
    min_image_side: int = field(default=2, metadata={"help": "Images with a shorter side (pixels) count as broken."})
    vision_feature_cache: str | None = field(
        default=None,
        metadata={"help": "Folder in which the features of a frozen tower are kept across epochs and runs."},
    )


@dataclass
class CalArguments:
    """Contrastive alignment. Unset options follow the strategy's preset (`cal_train.cal.strategies`)."""

    cal: bool = field(default=False, metadata={"help": "Weight label tokens by how much they depend on the image."})
    cal_strategy: str = field(
        default="cal", metadata={"help": "cal (paper), cal_reference (reference code), uniform, random (control)."}
    )
    cal_low: float = field(default=1.0, metadata={"help": "Lower clamp of delta, in logits (paper: 1)."})
    cal_high: float = field(default=5.0, metadata={"help": "Upper clamp of delta, in logits (paper: 5)."})
    cal_window: int = field(default=3, metadata={"help": "Smoothing window in tokens, odd; 1 = off (paper: 3)."})
    cal_ablation: Literal["remove", "mask"] | None = field(
        default=None, metadata={"help": "How the image is taken away: image tokens removed, or masked as keys."}
    )
    cal_scope: Literal["labels", "flat"] | None = field(
        default=None, metadata={"help": "Smoothing over a sample's label tokens, or over the flattened batch."}
    )
    loss_normalizer: Literal["sample", "micro_batch"] | None = field(
        default=None,
        metadata={
            "help": "sample: mean weight 1 in each sample, then the token mean of the whole optimizer step. "
            "micro_batch: sum(w CE) / sum(w) of each micro-batch on each rank (reference code)."
        },
    )
    cal_scores: str | None = field(
        default=None,
        metadata={
            "help": "A file that `cal-train score` wrote of data_path: weights follow from its deltas, and no second "
            "pass runs. The deltas then are those of the model that scored, in every step. With several sources, name "
            "them as scores: FILE in data. Read only with cal: true."
        },
    )


FIXED_ARGUMENTS: dict[str, tuple[object, str]] = {
    "remove_unused_columns": (False, "the collator makes the batch"),
    "logging_nan_inf_filter": (False, "a loss that is not finite is never hidden, see max_nonfinite_steps"),
    "enable_jit_checkpoint": (False, "SIGTERM and SIGINT always save and stop the run"),
    "label_smoothing_factor": (0.0, "token weights need the plain cross-entropy"),
    "average_tokens_across_devices": (True, "the loss is the mean over the label tokens of all ranks"),
    "train_sampling_strategy": ("random", "rows are grouped with group_by_modality_length: true"),
    "dataloader_persistent_workers": (False, "workers start anew each epoch, with the rows drawn for it"),
    "auto_find_batch_size": (False, "after an error for lack of memory the rows of a step would not be the same"),
}
"""Arguments of Hugging Face that only one value fits, and why: any other would be ignored or break the run."""


def refuse_other_values(args: TrainingArguments, fixed: dict[str, tuple[object, str]]) -> None:
    """Raise a ValueError that says why, if a fixed argument has another value than its own."""
    for name, (value, reason) in fixed.items():
        if getattr(args, name) != value:
            raise ValueError(f"{name}={getattr(args, name)} is not possible: {reason}. Leave it out")


@dataclass
class VlmTrainingArguments(TrainingArguments):
    """Hugging Face's arguments with the defaults that this trainer needs.

    Raises:
        ValueError: If one of `FIXED_ARGUMENTS` is given another value.
    """

    report_to: None | str | list[str] = field(  # noqa: RUF036 (the order that HfArgumentParser reads)
        default="tensorboard", metadata={"help": "tensorboard, wandb, trackio, none, or a list."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps between two log lines."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Fixed, see FIXED_ARGUMENTS."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Fixed, see FIXED_ARGUMENTS."})
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Start anew in a folder that holds an earlier run: its checkpoints are removed."},
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints that are kept."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "A checkpoint folder; latest: the newest complete one of output_dir; auto: the same, or the "
            "beginning if there is none."
        },
    )
    resume_changes: list[str] | None = field(
        default=None,
        metadata={
            "help": "Options that may differ from those of the checkpoint, as max_steps or data_path. Without it, a "
            "run that resumes with another schedule, batch, data or model is refused."
        },
    )
    device_peak_tflops: float | None = field(
        default=None,
        metadata={
            "help": "Dense 16-bit TFLOP/s of a device, which the logged mfu is a share of. Default: by the GPU's name; "
            "no mfu where that is not known. Work counts once and without CAL's extra pass: tflops_per_second of a "
            "device, of forward and backward, vision tower included, padding and recomputation left out."
        },
    )
    max_nonfinite_steps: int = field(
        default=0,
        metadata={
            "help": "Steps with a loss or gradient that is not finite that are skipped and counted, over the whole "
            "run, before it stops with an error. Not under DeepSpeed, which stops at the first."
        },
    )
    eval_suite: str | None = field(
        default=None,
        metadata={
            "help": "A suite of benchmarks (eval/suites/NAME.yaml), run by lmms-eval on each checkpoint after it is "
            "saved, on the main process's device while training waits; logged as suite/TASK/METRIC, kept in "
            "output_dir/eval. One that fails is reported and counted. For long suites, better `cal-train eval --run "
            "OUTPUT_DIR --suite FILE --watch` beside the training, on another device."
        },
    )
    eval_suite_limit: int | None = field(
        default=None, metadata={"help": "Documents of each task of eval_suite. Default: the suite's limit."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule (LLaVA: cosine)."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Not needed: every trainable parameter gets a gradient in every step."}
    )
    dataloader_num_workers: int = field(default=2, metadata={"help": "Processes that load and tokenize."})

    def __post_init__(self) -> None:
        """Check the fixed arguments, then let Hugging Face check the rest."""
        refuse_other_values(self, FIXED_ARGUMENTS)
        super().__post_init__()


@dataclass(frozen=True)
class Recipe:
    """All options of one run."""

    model: ModelArguments
    data: DataArguments
    cal: CalArguments
    training: VlmTrainingArguments
