"""Names of weights: in the original checkpoints, in the model in memory, and on disk in Hugging Face layout.

A rule is a pair of prefixes, ``{i}`` and ``{j}`` standing for numbers, and reads in both directions. The name in memory
(`cal_train.models.layout.PARTS_OF`) is the middle: original <-> memory <-> disk.

Sources: the module trees of haotian-liu/LLaVA and dvlab-research/MGM; timm's ConvNeXt, which MGM takes through
open_clip; the names that llava-hf checkpoints have and vLLM reads.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from torch import Tensor

Rule = tuple[str, str]

TOWER = "model.vision_tower."
AUX_TOWER = "model.vision_tower_aux."
PROJECTOR = "model.multi_modal_projector."
NEWLINE = "model.image_newline"
EMBEDDING = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"

_LANGUAGE_MODEL: tuple[Rule, ...] = (
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.layers.", "model.language_model.layers."),
    ("model.norm.", "model.language_model.norm."),
    ("lm_head.", "lm_head."),
)
_VISION_TOWER: tuple[Rule, ...] = (("model.vision_tower.vision_tower.vision_model.", TOWER),)
_NEWLINE: tuple[Rule, ...] = (("model.image_newline", NEWLINE),)
_BLOCK = {
    "conv_dw.": "dwconv.",
    "norm.": "layernorm.",
    "mlp.fc1.": "pwconv1.",
    "mlp.fc2.": "pwconv2.",
    "gamma": "layer_scale_parameter",
}
CONVNEXT: tuple[Rule, ...] = (
    ("stem.0.", "embeddings.patch_embeddings."),
    ("stem.1.", "embeddings.layernorm."),
    ("stages.{i}.downsample.{j}.", "encoder.stages.{i}.downsampling_layer.{j}."),
    *((f"stages.{{i}}.blocks.{{j}}.{a}", f"encoder.stages.{{i}}.layers.{{j}}.{b}") for a, b in _BLOCK.items()),
)
"""timm's ConvNeXt to transformers' ConvNextModel."""

_MINING: tuple[Rule, ...] = tuple(
    (f"model.vlm_uni_{theirs}_projector.{index}.", f"model.patch_info_mining.{ours}_{layer}.")
    for theirs, ours in (("query", "query"), ("aux", "key"), ("val", "value"))
    for index, layer in (("0", "norm"), ("1", "proj"))
)
_AUX: tuple[Rule, ...] = tuple((f"{AUX_TOWER}vision_{theirs}", f"{AUX_TOWER}{ours}") for theirs, ours in CONVNEXT)

PROJECTORS: dict[str, tuple[Rule, ...]] = {
    "mlp2x_gelu": (
        ("model.mm_projector.0.", f"{PROJECTOR}linear_1."),
        ("model.mm_projector.2.", f"{PROJECTOR}linear_2."),
    ),
    "linear": (("model.mm_projector.", f"{PROJECTOR}linear_1."),),
    "identity": (),
}
"""Rules by ``mm_projector_type``; `cal_train.models.convert.projector` supplies what the last two lack."""

_FAMILY: dict[str, tuple[Rule, ...]] = {
    "llava": (*_LANGUAGE_MODEL, *_VISION_TOWER),
    "llava_next": (*_LANGUAGE_MODEL, *_VISION_TOWER, *_NEWLINE),
    "mgm": (*_LANGUAGE_MODEL, *_VISION_TOWER, *_AUX, *_MINING),
}

DROPPED: tuple[tuple[str, str], ...] = (
    (r"(?:.*\.)?rotary_emb\.inv_freq", "computed from the configuration"),
    (r"(?:.*\.)?embeddings\.position_ids", "computed from the configuration"),
)
"""Regular expressions of whole names that no model needs, and why."""
UNUSED_NEWLINE = (r"model\.image_newline", "mm_patch_merge_type is not spatial_unpad: the vector is never used")


def original_rules(family: str, projector_type: str) -> tuple[Rule, ...]:
    """Return the rules original -> memory of a family with that projector."""
    return (*_FAMILY[family], *PROJECTORS[projector_type])


def disk_rules(family: str, tower_type: str) -> tuple[Rule, ...]:
    """Return the rules memory -> disk: the names that llava-hf checkpoints have.

    Args:
        family: ``llava``, ``llava_next`` or ``mgm``, whose names on disk are those in memory.
        tower_type: ``model_type`` of the vision tower; CLIP's and SigLIP's names have a level ``vision_model``.
    """
    if family == "mgm":
        return (("", ""),)
    level = "vision_model." if tower_type in ("clip_vision_model", "siglip_vision_model") else ""
    return (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        (TOWER, f"vision_tower.{level}"),
        (PROJECTOR, "multi_modal_projector."),
        (NEWLINE, "image_newline"),
    )


_ANY_DISK: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(?:model\.|language_model\.)*lm_head\."), "lm_head."),
    (re.compile(r"(?:model\.)*language_model\.(?:model\.|language_model\.)*"), "model.language_model."),
    (re.compile(r"(?:model\.)*vision_tower_aux\."), AUX_TOWER),
    (re.compile(r"(?:model\.)*vision_tower\.(?:vision_tower\.|vision_model\.)*"), TOWER),
    (re.compile(r"(?:model\.)*multi_modal_projector\."), PROJECTOR),
    (re.compile(r"(?:model\.)*patch_info_mining\."), "model.patch_info_mining."),
    (re.compile(r"(?:model\.)*image_newline$"), NEWLINE),
)
"""Every spelling of a prefix that transformers has written, doubled ones included, to the name in memory."""


@dataclass
class Renamed:
    """Tensors by their new names, and how they got there.

    ``moved`` counts (prefix before, prefix after), ``dropped`` (name, reason); ``origins`` has each new name's old one.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    moved: Counter[tuple[str, str]] = field(default_factory=Counter)
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)


def rename(
    state: Mapping[str, Tensor],
    rules: Sequence[Rule],
    where: str,
    dropped: Iterable[tuple[str, str]] = (),
    origins: Mapping[str, str] | None = None,
) -> Renamed:
    """Return the tensors under the names that the rules give them.

    Args:
        state: Tensors by name.
        rules: Pairs of prefixes, of which the first that fits is taken.
        where: The checkpoint, for messages.
        dropped: Pairs (regular expression of the name, reason) of what is left out.
        origins: What the names were before, if this is the second of two steps: for the counts.

    Raises:
        ValueError: If a name fits no rule, or two get the same one.
    """
    result, unknown = Renamed(), []
    for name, tensor in state.items():
        if reason := next((reason for pattern, reason in dropped if re.fullmatch(pattern, name)), None):
            result.dropped[_starred(name), reason] += 1
            continue
        rule, rest = _apply(name, rules)
        if rule is None:
            unknown.append(name)
        else:
            first = _starred(origins[name].removesuffix(rest)) if origins else rule[0]
            _put(result, _filled(rule, name) + rest, tensor, name, where)
            result.moved[first, rule[1]] += 1
    if unknown:
        raise ValueError(f"{where}: the model has no place for {_list(unknown)}. Nothing was written")
    return result


def rename_disk(state: Mapping[str, Tensor], where: str) -> Renamed:
    """Return the tensors of a Hugging Face folder under their names in memory, whatever the spelling of the prefixes.

    Raises:
        ValueError: If a name belongs to no part, or two are one weight.
    """
    result, unknown = Renamed(), []
    for name, tensor in state.items():
        match, new = next(((m, new) for pattern, new in _ANY_DISK if (m := pattern.match(name))), (None, ""))
        if match is None:
            unknown.append(name)
        else:
            _put(result, new + name[match.end() :], tensor, name, where)
    if unknown:
        raise ValueError(f"{where}: the model has no place for {_list(unknown)}. Nothing was written")
    return result


def turned(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """Return the rules for the other direction."""
    return tuple((new, old) for old, new in rules)


def check_state(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str, rules: Sequence[Rule] = ()
) -> None:
    """Refuse tensors that are not exactly those of the model.

    Args:
        tensors: By name in memory.
        expected: The model's own state dict, on any device.
        where: The checkpoint, for messages.
        rules: That gave the tensors their names; messages then also tell what the checkpoint calls them.

    Raises:
        ValueError: If a weight is missing, is none of the model's, or has another shape.
    """
    if missing := [name for name in expected if name not in tensors]:
        names = [_with_origin(name, rules) for name in missing]
        raise ValueError(f"{where}: the checkpoint lacks {_list(names)}. Nothing was written")
    if extra := [name for name in tensors if name not in expected]:
        raise ValueError(f"{where}: the model that config.json describes has no place for {_list(extra)}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{where}: {_with_origin(name, rules)} has shape {tuple(tensor.shape)}, the configuration says "
                f"{tuple(expected[name].shape)}: is config.json that of this checkpoint?"
            )


def _with_origin(name: str, rules: Sequence[Rule]) -> str:
    """Return a name in memory behind what the checkpoint calls it, if it has another name there."""
    rule, rest = _apply(name, turned(rules))
    original = _filled(rule, name) + rest if rule is not None else name
    return name if original == name else f"{original} (here {name})"


@cache
def _pattern(prefix: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(prefix)))


def _apply(name: str, rules: Sequence[Rule]) -> tuple[Rule | None, str]:
    """Return the rule that fits a name, and what stands behind its prefix there."""
    for old, new in rules:
        match = _pattern(old).match(name)
        if match and (old == "" or old.endswith(".") or match.end() == len(name)):
            return (old, new), name[match.end() :]
    return None, ""


def _filled(rule: Rule, name: str) -> str:
    match = _pattern(rule[0]).match(name)
    return rule[1].format(**match.groupdict()) if match else rule[1]


def _put(result: Renamed, new: str, tensor: Tensor, old: str, where: str) -> None:
    if new in result.tensors:
        raise ValueError(f"{where}: {old} is a second weight for {new}: remove one of the two")
    result.tensors[new] = tensor
    result.origins[new] = old


def _starred(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def _list(names: Sequence[str]) -> str:
    """Return how many names there are, and the first few."""
    shown = ", ".join(sorted(names)[:5])
    return f"{len(names)} weight{'s' if len(names) > 1 else ''} ({shown}{', ...' if len(names) > 5 else ''})"
