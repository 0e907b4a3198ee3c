"""The MRM as it is trained: the guard with LoRA factors and a bias of the unembedding."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from saffron.errors import CheckpointError, ConfigError, outside
from saffron.storage.folders import write_atomically
from saffron.storage.paths import check_checkpoint


class TrainableMrm(nn.Module):
    """Reward of every next token: `W h + b`, with the guard's unembedding W, frozen, and a bias b that starts at zero.

    Args:
        guard: the PRM; LoRA layers are put into it, all its own parameters are frozen.
        rank, alpha, dropout, target_modules: of the LoRA factors.
        train_bias: otherwise the bias stays zero.
    """

    def __init__(
        self,
        guard: PreTrainedModel,
        rank: int = 4,
        alpha: int = 4,
        dropout: float = 0.0,
        target_modules: tuple[str, ...] = ("q_proj", "v_proj"),
        train_bias: bool = True,
    ) -> None:
        super().__init__()
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=list(target_modules),
            task_type="CAUSAL_LM",
        )
        try:
            self.model: PeftModel = get_peft_model(guard, config)
        except ValueError as error:
            raise ConfigError(f"target_modules: {', '.join(target_modules)} are not in the guard") from error
        vocab = guard.get_output_embeddings().weight.shape[0]
        self.bias = nn.Parameter(torch.zeros(vocab, device=guard.device), requires_grad=train_bias)

    def forward(self, ids: Tensor, next_tokens: Tensor) -> Tensor:
        """M(ids[:, : i + 1]) at next_tokens[:, i], fp32 `[rows, length]`: `(hidden @ W.T + b).gather(-1, next_tokens)`.

        Rows are filled up on the right, where nothing that counts sees it.
        """
        causal: Any = self.model.get_base_model()
        hidden = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state
        head = causal.get_output_embeddings()
        rewards = (hidden.float() * head.weight[next_tokens].float()).sum(-1) + self.bias[next_tokens]
        return rewards if head.bias is None else rewards + head.bias[next_tokens]

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


def load_guard(base: str, dtype: str | None) -> PreTrainedModel:
    """The guard in a form that has gradients (`TrieModel` has none).

    Raises:
        CheckpointError: nothing loadable there.
    """
    check_checkpoint("base", base)
    with outside(f"{base}: cannot be loaded as a causal language model", CheckpointError):
        return AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype or "float32"))


def save_mrm(model: TrainableMrm, unseen: Tensor, base: str, out: Path) -> None:
    """Writes the published format: PEFT adapter, `lm_head_bias.pt`, `unseen_mask.pt`. Each file is whole or absent.

    Args:
        base: the guard; a folder is named by its path from `out`.
    """
    with outside(f"{out}: cannot be made"):
        out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.model.save_pretrained(name)
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = os.path.relpath(base, out) if Path(base).is_dir() else base
        config["target_modules"].sort()  # a set in memory
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        torch.save(model.bias.detach().cpu().clone(), folder / "lm_head_bias.pt")
        torch.save(unseen, folder / "unseen_mask.pt")
        # Not PEFT's README.md: a model card without content that would name this machine's paths.
        for file in ("adapter_config.json", "adapter_model.safetensors", "lm_head_bias.pt", "unseen_mask.pt"):
            write_atomically(out / file, (folder / file).read_bytes())
