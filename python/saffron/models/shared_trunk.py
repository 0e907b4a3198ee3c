"""One trunk, two readers: an MRM on the modules of the policy itself, and forward passes over the rows of both.

The MRM's model is a view of the policy's: the same modules, but for those above a changed one, which are copied without
their weights. Changed are the Linear layers that have LoRA factors, and the unembedding. The policy's own modules stay
as they are, so that it computes what it computed before, bit for bit, whatever MRMs stand on it.

A pass over both runs the view over the policy's rows and then the MRM's: weights are read once, every row has attention
over the cache of its own model, and the factors act on the MRM's rows alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saffron.errors import UnsupportedModelError
from saffron.models.attention import Call, TrieStep, evaluating
from saffron.models.fingerprint import adapter_class, fingerprint, is_ours, times_written
from saffron.models.inspection import inspect_model
from saffron.models.trie_model import TrieModel, instead

MERGED = "load the MRM merged (base= its checkpoint)"
# Of the pass that this thread runs: the first row of the MRM, and how many rows there are (0: all are the MRM's).
_mrm_rows: ContextVar[tuple[int, int]] = ContextVar("mrm_rows", default=(0, 0))


class LowRank(nn.Module):
    """A Linear layer of the policy, and LoRA factors for the MRM's rows: `base(x) + up(down(x))`."""

    def __init__(self, base: nn.Linear, down: nn.Linear, up: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, down, up

    def forward(self, x: Tensor) -> Tensor:
        first, rows = _mrm_rows.get()
        out = self.base(x)
        inputs, outputs = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        if rows and len(inputs) != rows:  # of an expert, say: which of them are whose?
            raise UnsupportedModelError(f"LoRA on a layer that sees {len(inputs)} of {rows} rows; {MERGED}")
        outputs[first:] += self.up(self.down(inputs[first:]))
        return out


@dataclass(frozen=True, slots=True)
class JointStep:
    """The steps of two models as one (see `TrieStep`): the rows of the first come before those of the second."""

    steps: tuple[TrieStep, TrieStep]

    def arguments(self) -> dict[str, Any]:
        positions = torch.cat([step.plan.positions for step in self.steps])
        return self.steps[0].arguments() | {"position_ids": positions[None], "trie_step": self}

    def attend(self, call: Call) -> Tensor:
        first, mask = len(self.steps[0].plan.positions), self.steps[0].mask
        parts = []
        for step, rows in zip(self.steps, (slice(first), slice(first, None)), strict=True):
            q, k, v = (x[:, :, rows] for x in (call.query, call.key, call.value))
            own = step.mask if call.mask is mask else call.mask
            parts.append(step.attend(replace(call, query=q, key=k, value=v, mask=own)))
        return torch.cat(parts, 1)


class SharedTrunk:
    """What an MRM has of its own, over the modules of a policy's model.

    Args:
        trunk: the policy's model.
        factors: by the name of a Linear layer its `down [rank, in]` and `up [out, rank]`, scaled.
        head: weight of the MRM's unembedding, None: the policy's.

    Raises:
        UnsupportedModelError: layers that are no Linear ones, or adapters on the policy itself.
    """

    def __init__(
        self, trunk: PreTrainedModel, factors: Mapping[str, tuple[Tensor, Tensor]], head: Tensor | None
    ) -> None:
        self.trunk = trunk
        self.factors = {name: (_linear(down), _linear(up)) for name, (down, up) in factors.items()}
        self.head = None if head is None else _linear(head)
        layers = [layer for pair in self.factors.values() for layer in pair]
        self.own = nn.ModuleList([*layers, *([] if self.head is None else [self.head])])
        self._vocab = trunk.get_output_embeddings().weight.shape[0]
        self._state, self._checked, self._tensors = 0, 0, list[Tensor]()
        self.model, _ = self.refresh()

    def refresh(self) -> tuple[PreTrainedModel, int]:
        """The MRM's model, made again if the policy's has changed, and the fingerprint of its weights."""
        state = hash((fingerprint(self.trunk), id(self.trunk.__dict__.get("forward"))))
        if state != self._state:
            self._tensors = [*self.own.to(self.trunk.device, self.trunk.dtype).parameters()]
            try:
                self.model = self._view()
            except AttributeError as error:
                raise UnsupportedModelError(
                    f"the policy has other modules than its checkpoint ({error}); {MERGED}"
                ) from error
            self._state = state
            with evaluating(self.trunk):
                inspect_model(self.model)  # which is remembered
        return self.model, hash((state, *map(times_written, self._tensors)))

    def _view(self) -> PreTrainedModel:
        """The MRM's model, over the modules that the policy's has now."""
        kind = adapter_class()
        if any(isinstance(module, kind) for module in self.trunk.modules()):
            raise UnsupportedModelError(f"the policy has adapters of its own, so that it is no MRM's base; {MERGED}")
        if (vocab := self.trunk.get_output_embeddings().weight.shape[0]) != self._vocab:
            raise UnsupportedModelError(
                f"the policy's vocabulary has {vocab} entries, and had {self._vocab} when the MRM was loaded; {MERGED}"
            )
        _check_hooks(self.trunk, "the policy")
        made: dict[str, Any] = {"": _without_weights(self.trunk)}

        def own(name: str) -> Any:
            if name not in made:
                above, _, child = name.rpartition(".")
                made[name] = own(above)._modules[child] = _without_weights(self.trunk.get_submodule(name))
            return made[name]

        for name, (down, up) in self.factors.items():
            above, _, child = name.rpartition(".")
            base = self.trunk.get_submodule(name)
            if type(base) is not nn.Linear:
                raise UnsupportedModelError(
                    f"{name}: LoRA on a {type(base).__name__} of the policy, expected a Linear layer; {MERGED}"
                )
            _check_hooks(base, name)
            own(above)._modules[child] = LowRank(base, down, up)
        if self.head is not None:
            replaced = self.trunk.get_output_embeddings()
            above, _, child = name_of(self.trunk, replaced).rpartition(".")
            self.head.bias = replaced.bias
            own(above)._modules[child] = self.head
        return made[""]

    def outputs(self, model: Any, tokens: Sequence[Tensor], step: JointStep, keep: Sequence[Tensor]) -> list[Tensor]:
        """Next-token logits of the policy's rows `keep[0]` and hidden states of the MRM's rows `keep[1]`.

        Args:
            model: a view. tokens: `[rows]` of each model.
        """
        first = len(tokens[0])
        outside = _mrm_rows.set((first, first + len(tokens[1])))
        try:
            hidden = model.base_model(input_ids=torch.cat([*tokens])[None], **step.arguments()).last_hidden_state[0]
        finally:
            _mrm_rows.reset(outside)
        return [self.trunk.get_output_embeddings()(hidden[:first][keep[0]]), hidden[first:][keep[1]]]

    def together(
        self, policy: TrieModel, mrm: TrieModel, policy_step: Callable[[], Any], mrm_step: Callable[[], Any]
    ) -> list[Any]:
        """Two steps, prefills or the like as one forward pass; returns what each returns.

        The policy plans its part, then the MRM; then both run, and an error on the way undoes both plans.
        """
        parts: list[Any] = []
        outputs: list[Any] = []

        def planned(*part: Any) -> Tensor:
            parts.append(part)
            hidden = mrm_step()
            outputs.append(hidden)
            return outputs[0]

        def run(*part: Any) -> Tensor:
            self.check(policy, mrm)
            tokens, steps, keep = zip(*parts, part, strict=True)
            with evaluating(self.trunk):
                logits, hidden = self.outputs(mrm.model, tokens, JointStep(steps), keep)
            for step in steps:
                step.finish()
            outputs.append(logits)
            return hidden

        outside = instead.set({policy: planned, mrm: run})
        try:
            return [policy_step(), outputs[1]]
        finally:
            instead.reset(outside)

    def check(self, policy: TrieModel, mrm: TrieModel) -> None:
        """Compares a pass over both models with one of each, over a few tokens, unless that was done with the policy's
        modules as they are now.

        Raises:
            UnsupportedModelError: layers with LoRA factors that do not run, logits that are more than the unembedding
                of the last hidden state, rows that depend on each other.
        """
        if self._checked == self._state:
            return
        before, self._checked = self._checked, self._state
        outside = instead.set(None)
        try:
            self._compare(policy, mrm)
        except BaseException:
            self._checked = before
            raise
        finally:
            instead.reset(outside)

    @torch.inference_mode()
    def _compare(self, policy: TrieModel, mrm: TrieModel) -> None:
        ran = set[nn.Module]()
        one, other = (lambda model=model: model.run_alone([[0, 1, 2]]) for model in (policy, mrm))
        alone = [one(), other()]
        hooks = [down.register_forward_hook(lambda layer, *_: ran.add(layer)) for down, _ in self.factors.values()]
        try:
            both = self.together(policy, mrm, one, other)
        finally:
            for hook in hooks:
                hook.remove()
        if idle := [name for name, (down, _) in self.factors.items() if down not in ran]:
            raise UnsupportedModelError(f"{idle[0]}: has LoRA factors and does not run; {MERGED}")
        for outputs in zip(both, alone, strict=True):
            found, expected = map(torch.nan_to_num, outputs)  # what is not finite ends the search that meets it
            tolerance = expected.abs().max() * (1e-4 if expected.dtype.itemsize > 2 else 0.05)
            if bool((found - expected).abs().max() > tolerance):
                raise UnsupportedModelError(
                    f"{self.trunk.config.model_type} model: in one pass the rows of policy and MRM have other outputs "
                    f"than in one each; {MERGED}"
                )


def name_of(model: nn.Module, wanted: nn.Module) -> str:
    """The name of a module in a model."""
    return next(name for name, module in model.named_modules() if module is wanted)


def _check_hooks(module: nn.Module, name: str) -> None:
    """Refuses what acts on the output of a module that a joint pass does not have, or has without the factors."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if "forward" in module.__dict__ or not all(map(is_ours, hooks)):
        raise UnsupportedModelError(f"{name}: has a forward hook, or a forward method that was replaced; {MERGED}")


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _without_weights(module: nn.Module) -> nn.Module:
    """A module over the same weights and children, to which other children can be given."""
    if "forward" in module.__dict__:
        raise UnsupportedModelError(
            f"a {type(module).__name__} of the policy has a forward method that was replaced, which a view of it would "
            f"not run; {MERGED}"
        )
    made = copy.copy(module)
    made.__dict__ |= {"_modules": dict(module._modules), "training": False}
    return made
