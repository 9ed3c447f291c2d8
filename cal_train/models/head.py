"""The output head of a VLM: what it does to hidden states, and how to work inside its own forward.

ZeRO-3 gathers a parameter only while its module's forward runs, and FSDP2 only inside the root's forward. The head's
weight is therefore never touched from outside: `open_head` teaches ``lm_head`` to run a function on its weight inside
its forward, ``lm_head(hidden, inside=function)``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from cal_train.cal.loss import target_logits, weighted_linear_cross_entropy

Inside = Callable[[Tensor, Tensor, Tensor | None], object]


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits besides the linear layer: ``softcap * tanh(scale * (h W + b) / softcap)``.

    ``scale`` multiplies the logits (Cohere's ``logit_scale``, the inverse of Granite's ``logits_scaling``).
    """

    softcap: float | None = None
    scale: float = 1.0

    def scaled(self, hidden_ND: Tensor, bias_V: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return hidden states and bias that already carry the scale."""
        if self.scale == 1.0:
            return hidden_ND, bias_V
        return hidden_ND * self.scale, None if bias_V is None else bias_V * self.scale

    def target_logits(self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor) -> Tensor:
        """Return the final logit of each row's target, (N,) float32."""
        hidden_ND, bias_V = self.scaled(hidden_ND, bias_V)
        return target_logits(hidden_ND, weight_VD, labels_N, bias_V, self.softcap)

    def loss_sum(
        self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor, token_weights_N: Tensor
    ) -> Tensor:
        """Return the weighted sum of cross-entropies, a scalar with exact gradients."""
        hidden_ND, bias_V = self.scaled(hidden_ND, bias_V)
        return weighted_linear_cross_entropy(hidden_ND, weight_VD, labels_N, token_weights_N, bias_V, self.softcap)


def open_head(model: PreTrainedModel) -> None:
    """Teach the model's ``lm_head`` the call ``lm_head(hidden, inside=function)``; idempotent.

    ``function(hidden, weight, bias)`` runs inside the head's forward, where the weight is whole under every engine.

    Raises:
        ValueError: As `output_head`.
    """
    lm_head = output_head(model)
    if "forward" in vars(lm_head):
        return
    plain_forward = lm_head.forward

    def forward(input: Tensor, inside: Inside | None = None) -> Any:
        return plain_forward(input) if inside is None else inside(input, lm_head.weight, lm_head.bias)

    lm_head.forward = forward


def output_head(model: PreTrainedModel) -> nn.Linear:
    """Return the model's ``lm_head``.

    Raises:
        ValueError: If it is not a plain linear layer (a quantised or replaced head).
    """
    lm_head = model.get_output_embeddings()
    if not isinstance(lm_head, nn.Linear) or type(lm_head).forward is not nn.Linear.forward:
        raise ValueError(
            f"the output head of {type(model).__name__} is a {type(lm_head).__name__}, not a plain nn.Linear: its loss "
            "cannot be computed in chunks. Load the model without a quantised or adapted lm_head"
        )
    return lm_head


@torch.no_grad()
def find_head(model: PreTrainedModel) -> Head:
    """Return what the model's own forward does to logits after ``lm_head``.

    A configuration may announce a soft cap or a scale that the composed class does not apply (transformers' LLaVA
    drops Gemma-2's cap). So nothing is believed: known values are put in the place of the head's output and what comes
    out of the model is compared with each known form.

    Raises:
        ValueError: If no known form agrees, or as `output_head`.
    """
    text_config = model.config.get_text_config()
    softcap = getattr(text_config, "final_logit_softcapping", None)
    scale = getattr(text_config, "logit_scale", None)
    if scale is None and getattr(text_config, "logits_scaling", None):
        scale = 1.0 / text_config.logits_scaling
    candidates = [Head(softcap=cap, scale=factor) for cap in {None, softcap} for factor in {1.0, scale or 1.0}]

    known_V = torch.linspace(-50.0, 50.0, output_head(model).out_features, device=model.device)
    logits_V = _logits_for(model, known_V)
    known_V, logits_V = known_V.to(logits_V.dtype).double(), logits_V.double()
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.5
    for head in candidates:
        scaled_V = known_V * head.scale
        ours_V = scaled_V if head.softcap is None else head.softcap * torch.tanh(scaled_V / head.softcap)
        if (ours_V - logits_V).abs().max() <= tolerance:
            return head
    raise ValueError(
        f"{type(model).__name__} changes its logits after lm_head in a way that is not known here (neither a soft cap "
        "nor a scale of its configuration): token weights would be wrong, so training is refused"
    )


def _logits_for(model: PreTrainedModel, head_output_V: Tensor) -> Tensor:
    """Return what the root's forward makes of a given head output, without running body or head.

    No parameter is touched, so that it works before an engine has gathered anything.
    """
    body, lm_head = getattr(model, model.base_model_prefix), output_head(model)
    hidden = torch.zeros(1, 1, lm_head.in_features, dtype=model.dtype, device=model.device)
    stand_ins: dict[nn.Module, Callable[..., Any]] = {
        body: lambda *args, **kwargs: _Blank(last_hidden_state=hidden),
        lm_head: lambda hidden: head_output_V.to(hidden.dtype).expand(*hidden.shape[:-1], -1),
    }
    kept = {module: vars(module).get("forward") for module in stand_ins}
    for module, stand_in in stand_ins.items():
        module.forward = stand_in
    try:
        ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1]
    finally:
        for module, forward in kept.items():
            del module.forward
            if forward is not None:
                module.forward = forward


class _Blank(BaseModelOutputWithPast):
    """The output of a body that did not run: every field that is asked for is None."""

    def __getattr__(self, name: str) -> None:
        return None
