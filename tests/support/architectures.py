"""Every causal model class of the installed transformers, tiny, with all parameters random."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

_HEADS = dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
                        "encoder_attention_heads", "num_encoder_attention_heads",
                        "num_decoder_attention_heads"), 6)  # fmt: skip
_WIDTHS = dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embedding_size", "embedding_dim"), 48)
_INNER = dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "dff", "dim_ff", "decoder_ffn_dim",
                        "encoder_ffn_dim", "ffn_hidden_size"), 40)  # fmt: skip
_LAYERS = dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"), 3)
_MOE_SIZES = dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
                            "expert_ffn_hidden_size"), 24)  # fmt: skip
_EXPERTS = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4)
SMALL: dict[str, Any] = {
    **_HEADS, **_WIDTHS, **_INNER, **_LAYERS, **_MOE_SIZES, **_EXPERTS,
    "vocab_size": 97, "num_key_value_heads": 2, "head_dim": 8, "v_head_dim": 8,
    "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128,
    "num_experts_per_tok": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "moe_k": 2, "moe_num_shared_experts": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8,
    "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1, "dropout": 0.0,
}  # fmt: skip

_MLA = {"num_key_value_heads": 6, "num_hidden_layers": 2, "head_dim": 4}  # head_dim: of the rotated part
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 12}
# What a configuration wants beyond SMALL; None leaves the default.
CHANGES: dict[str, dict[str, Any]] = {
    "AXK1Config": _MLA,
    "BambaConfig": _MAMBA,
    "CpmAntConfig": {"dim_head": 8},
    "DbrxConfig": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "DeepseekV2Config": _MLA,
    "DeepseekV3Config": _MLA,
    "Dots3NoteTextConfig": {"num_key_value_heads": 6},
    "Gemma3nTextConfig": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "Gemma4TextConfig": {"pad_token_id": 2},
    "Gemma4UnifiedTextConfig": {"pad_token_id": 2},
    "Glm4MoeLiteConfig": _MLA,
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_hidden_layers": 4},
    "GraniteMoeHybridConfig": _MAMBA,
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention", "conv"]},
    "LongcatFlashConfig": {**_MLA, "num_layers": 2},
    "Mamba2Config": {"num_heads": 12, "head_dim": 8},
    "MiniCPM3Config": _MLA,
    "MoshiConfig": {"audio_vocab_size": 40},
    "ModernBertDecoderConfig": {"pad_token_id": 2, "cls_token_id": 0, "sep_token_id": 1},
    "ProphetNetConfig": {"num_hidden_layers": None, "num_decoder_layers": 2, "num_encoder_layers": 2},
    "ReformerConfig": {"is_decoder": True, "axial_pos_embds_dim": [16, 32], "axial_pos_shape": [8, 16]},
    "RoCBertConfig": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "XLNetConfig": {"max_position_embeddings": None, "n_layer": 2},
    "XmodConfig": {"default_language": "en_XX"},
    "YoutuConfig": _MLA,
    "Zamba2Config": {"num_hidden_layers": None},
    "ZambaConfig": {"num_hidden_layers": None},
    "ZayaConfig": {"num_experts_per_tok": 1},
}
# Composite models whose parts for images or sound stay large or want other libraries, and assistants that read another
# model's cache. The models of their text are among the others.
NOT_BUILT = {
    "BltConfig", "CohereCompassTextConfig", "Dots3NoteConfig", "Emu3Config", "FuyuConfig", "Gemma3nConfig",
    "Gemma4AssistantConfig", "Gemma4UnifiedAssistantConfig", "GotOcr2Config",
    "MossTranscribeDiarizeConfig", "MusicgenConfig", "MusicgenMelodyConfig",
}  # fmt: skip


def classes() -> dict[str, tuple[type[PretrainedConfig], type[PreTrainedModel]]]:
    """Configuration and model class, by the name of the configuration."""
    found = {}
    for config_class in list(MODEL_FOR_CAUSAL_LM_MAPPING.keys()):
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
        found[config_class.__name__] = config_class, model_class[0] if isinstance(model_class, tuple) else model_class
    return found


def build(config_class: type[PretrainedConfig], **changes: Any) -> PretrainedConfig:
    """A configuration of a few ten thousand parameters."""
    own = CHANGES.get(config_class.__name__, {})
    fields = {*getattr(config_class, "__dataclass_fields__", {}), *getattr(config_class, "attribute_map", {})}
    chosen = {name: value for name, value in SMALL.items() if name in fields}
    chosen = {**chosen, **own, **{k: v for k, v in changes.items() if k in fields}}
    for name, sub in getattr(config_class, "sub_configs", {}).items():
        if name.endswith("_config") and name not in own and isinstance(sub, type) and sub is not PretrainedConfig:
            try:
                chosen[name] = build(sub, **changes).to_dict()
            except Exception:  # of an encoder that these tests never run
                continue
    return config_class(
        **{name: value for name, value in chosen.items() if value is not None or name == "pad_token_id"}
    )


def text_config(config: PretrainedConfig, model_class: type[PreTrainedModel]) -> PretrainedConfig:
    """What the model class is made from: a composite configuration, or the part of it that is about text."""
    wanted = getattr(model_class, "config_class", None)
    return config.get_text_config() if wanted is not None and isinstance(config.get_text_config(), wanted) else config


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Every parameter random: biases, norms, learned masks, sinks and scales too."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = "norm" in name.lower() and parameter.dim() == 1 and "bias" not in name
            parameter.copy_(noise * 0.15 if parameter.dim() > 1 else noise * 0.3 + float(scale))


def model(name: str, attention: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The model of a configuration; the same for every `attention`."""
    config_class, model_class = classes()[name]
    torch.manual_seed(seed)
    config = text_config(build(config_class, **changes), model_class)
    made = model_class._from_config(config, attn_implementation=attention).eval()
    randomize(made, seed + 1)
    return made
