"""Tiny models and tokenizers with random weights, for tests of the decoding layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from saffron.models.attention import ATTENTION
from saffron.models.bundled import Models
from saffron.models.guard import ProcessRewardModel
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}

ARCHITECTURES: dict[str, Callable[..., PretrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": lambda **k: Qwen3Config(head_dim=8, **k),
    "mistral": lambda **k: MistralConfig(sliding_window=None, **k),
    "phi3": Phi3Config,
}


def model(architecture: str = "llama", seed: int = 0, attention: str = ATTENTION, **changes: object) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = ARCHITECTURES[architecture](**{**SHAPE, **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@contextmanager
def count_tokens(model: PreTrainedModel) -> Iterator[list[int]]:
    """How many tokens each forward pass of the model runs over."""
    counts: list[int] = []
    embeddings = model.get_input_embeddings()
    kind = type(embeddings)

    class Counting(kind):  # type: ignore[misc, valid-type]  # a hook would be a change of the model
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            counts.append(ids.numel())
            return super().forward(ids)

    embeddings.__class__ = Counting
    yield counts
    embeddings.__class__ = kind


def pair(seed: int = 0, **options: object) -> tuple[Policy, MultifurcationRewardModel]:
    """A policy and an MRM half as wide, over token ids."""
    policy = Policy(model(seed=seed), **options)  # type: ignore[arg-type]
    small = model(seed=seed + 1, hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
    vocab = SHAPE["vocab_size"]
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(vocab, generator=generator) * 0.5  # type: ignore[call-overload]
    unseen = torch.rand(vocab, generator=generator) < 0.2  # type: ignore[call-overload]
    return policy, MultifurcationRewardModel(small, bias=bias, unseen=unseen, **options)  # type: ignore[arg-type]


SENTENCES = [
    "hello there, how are you today?",
    "the quick brown fox jumps over the lazy dog",
    "a kind gardener waters the small green plants",
    "please tell me how to bake good bread at home",
] * 4


def tokenizer(size: int = 300, sentences: list[str] | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a chat template; `<s>` and `</s>` are ids 0 and 1."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator(sentences or SENTENCES, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    made.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    return made


def save_checkpoint(folder: Path, seed: int = 0, **changes: object) -> Path:
    """A Llama with its tokenizer, as `from_pretrained` reads it."""
    made = tokenizer()
    model(seed=seed, attention="eager", vocab_size=len(made), **changes).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def save_mrm(folder: Path, base: Path, seed: int = 0) -> Path:
    """A random adapter on `base`, in the published format."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    wrapped = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    wrapped.save_pretrained(folder)
    vocab = wrapped.get_output_embeddings().weight.shape[0]
    torch.save(torch.randn(vocab) * 0.1, folder / "lm_head_bias.pt")
    torch.save(torch.rand(vocab) < 0.3, folder / "unseen_mask.pt")
    return folder


def common_prefix(a: list[int], b: list[int]) -> int:
    """LCP in Proposition 2: how many tokens two sequences begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


GUARD_TEMPLATE = (
    "{{ bos_token }}task:{% for m in messages %} [{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} hello assessment:{% endif %}"
)


def trio(seed: int = 0, guard_tokenizer: PreTrainedTokenizerFast | None = None, **options: object) -> Models:
    """A policy, an MRM and a guard over one tokenizer, with random weights: what `parse_method` wants.

    Args:
        guard_tokenizer: another one for guard and MRM.
        options: of the models.
    """
    made, other = tokenizer(), guard_tokenizer or tokenizer()
    other.chat_template = GUARD_TEMPLATE
    policy = Policy(model(seed=seed, vocab_size=len(made)), made, **options)  # type: ignore[arg-type]
    small = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": len(other)}
    generator = torch.Generator().manual_seed(seed)
    mrm = MultifurcationRewardModel(
        model(seed=seed + 1, **small),
        other,
        bias=torch.randn(len(other), generator=generator) * 0.5,
        unseen=torch.rand(len(other), generator=generator) < 0.2,
        **options,  # type: ignore[arg-type]
    )
    guard = ProcessRewardModel(
        model(seed=seed + 2, **small),
        other,
        safe=other.decode([40]),
        unsafe=other.decode([50]),
        **options,  # type: ignore[arg-type]
    )
    return Models(policy, mrm, guard)
