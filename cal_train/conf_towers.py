"""Every option of a tower recipe, with its default, its unit and where the default comes from.

A recipe (YAML) and the command line fill these dataclasses (`cal_train.cli.tower_recipe`); they stop at the entry
points: everything below takes plain arguments. What belongs to one objective (scale, bias, widths, weights of its
terms) is documented at its class and goes into ``objective_options``.
"""

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from cal_train.conf import refuse_other_values


@dataclass
class TowerArguments:
    """Which towers are trained, by which objective."""

    objective: str = field(metadata={"help": "clip, siglip, coca, sycoca, sparc, llip or filip."})
    objective_options: dict = field(
        default_factory=dict,
        metadata={"help": "Mapping of the objective's own options (`cal_train/objectives/NAME.py`)."},
    )
    vision_tower: dict | str | None = field(
        default=None,
        metadata={
            "help": "Folder of a CLIP, SigLIP or DINOv2 tower (or of a dual encoder), or the mapping of a Hugging Face "
            "configuration with model_type, to start from random weights."
        },
    )
    text_tower: dict | str | None = field(
        default=None, metadata={"help": "Folder of a text encoder, or a configuration with model_type."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder of a tokenizer. Default: the folder of text_tower."}
    )
    text_pooling: str | None = field(
        default=None,
        metadata={
            "help": "eos, last, mean, first or cls_appended. Default: cls_appended for coca and sycoca, which need it, "
            "else eos (CLIP)."
        },
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the images in pixels. Default: the vision tower's own."}
    )
    context_length: int | None = field(
        default=None, metadata={"help": "Tokens per caption, special ones included. Default: the text tower's own."}
    )
    num_mixture_tokens: int = field(
        default=0, metadata={"help": "Llip's learned tokens, which replace the class token (paper: 32 for B/16)."}
    )
    patch_dropout: float = field(
        default=0.0, metadata={"help": "Share of patches left out in training, [0, 1). FLIP (arXiv:2212.00794): 0.5."}
    )
    lock: Literal["image", "text"] | None = field(
        default=None, metadata={"help": "Tower that stays as it is (LiT, arXiv:2111.07991: image)."}
    )
    vision_tower_lr: float | None = field(default=None, metadata={"help": "Learning rate of the vision tower."})
    text_tower_lr: float | None = field(default=None, metadata={"help": "Learning rate of the text tower."})
    pretrained_weight_decay: float | None = field(
        default=None,
        metadata={
            "help": "Weight decay of towers that come from a folder. SigLIP (arXiv:2303.15343): 0. "
            "Default: weight_decay."
        },
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Pairs that are contrasted with each other, over all ranks; sets per_device_train_batch_size. The "
            "number of ranks must divide it."
        },
    )
    grad_cache_chunk: int | None = field(
        default=None,
        metadata={
            "help": "Pairs per device whose activations are held at a time (GradCache, arXiv:2101.06983). Off: null. "
            "Costs one more forward pass; the gradient is that of the whole batch."
        },
    )


@dataclass
class TowerEvalArguments:
    """What is measured during training, every ``eval_steps`` (with ``eval_strategy: steps``)."""

    eval_data_path: str | None = field(
        default=None, metadata={"help": "Pairs for retrieval in both directions: R@1, R@5, R@10."}
    )
    eval_image_folder: str | None = field(
        default=None, metadata={"help": "Image root of eval_data_path. Default: the file's folder."}
    )
    zero_shot_data_path: str | None = field(
        default=None,
        metadata={"help": "Images whose caption is the name of their class: zero-shot accuracy."},
    )
    zero_shot_image_folder: str | None = field(
        default=None, metadata={"help": "Image root of zero_shot_data_path. Default: the file's folder."}
    )
    zero_shot_templates: list[str] | None = field(
        default=None, metadata={"help": "Prompts with {} for the class name. Default: four neutral ones."}
    )


FIXED_TOWER_ARGUMENTS: dict[str, tuple[object, str]] = {
    "remove_unused_columns": (False, "the data set makes the batch"),
    "logging_nan_inf_filter": (False, "a loss that is not finite is never hidden, see max_nonfinite_steps"),
    "enable_jit_checkpoint": (False, "SIGTERM and SIGINT always save and stop the run"),
    "dataloader_drop_last": (True, "a contrastive batch must be equally large on all ranks"),
    "dataloader_persistent_workers": (False, "a run reads one stream, whose workers live as long as it does"),
    "auto_find_batch_size": (False, "the stream deals out batches of one size, see grad_cache_chunk"),
    "dataloader_prefetch_factor": (None, "the stream keeps its own batches ready"),
    "train_sampling_strategy": ("random", "the stream is shuffled by seed and epoch, see shuffle_pool"),
}
"""Arguments of Hugging Face that only one value fits, and why: any other would be ignored or break the run."""


@dataclass
class TowerTrainingArguments(TrainingArguments):
    """Hugging Face's arguments with the defaults that this trainer needs.

    Raises:
        ValueError: If one of `FIXED_TOWER_ARGUMENTS` is given another value.
    """

    report_to: None | str | list[str] = field(  # noqa: RUF036 (the order that HfArgumentParser reads)
        default="tensorboard", metadata={"help": "tensorboard, wandb, trackio, none, or a list."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps between two log lines."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Fixed, see FIXED_TOWER_ARGUMENTS."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Fixed, see FIXED_TOWER_ARGUMENTS."})
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
    max_nonfinite_steps: int = field(
        default=0,
        metadata={
            "help": "Steps with a loss or gradient that is not finite that are skipped and counted, over the whole "
            "run, before it stops with an error. Not under DeepSpeed, which stops at the first."
        },
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule (CLIP, section 2.5: cosine)."})
    weight_decay: float = field(
        default=0.2, metadata={"help": "Of everything with two dimensions or more (CLIP, appendix F: 0.2)."}
    )
    adam_beta2: float = field(
        default=0.98, metadata={"help": "CLIP, appendix F: 0.98 for ViTs; SigLIP and Llip: 0.95."}
    )
    adam_epsilon: float = field(default=1e-6, metadata={"help": "CLIP, appendix F: 1e-6 for ViTs."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Not needed: every trainable parameter gets a gradient in every step."}
    )
    dataloader_num_workers: int = field(default=2, metadata={"help": "Processes that decode images and tokenize."})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Fixed, see FIXED_TOWER_ARGUMENTS."})

    def __post_init__(self) -> None:
        """Check the fixed arguments, then let Hugging Face check the rest."""
        refuse_other_values(self, FIXED_TOWER_ARGUMENTS)
        super().__post_init__()
