"""The policy: the language model that is defended."""

from __future__ import annotations

from collections.abc import Sequence

from saffron.errors import ConfigError
from saffron.models.trie_model import TrieModel

# What Llama-3-Instruct was trained on, for checkpoints that come without their chat template.
LLAMA3_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


class Policy(TrieModel):
    """A chat model. Its output is next-token logits `[sequences, vocab]`."""

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The token ids that end a response (`eos_token_id` of the generation configuration)."""
        config, generation = self.model.config.get_text_config(), self.model.generation_config
        ids = getattr(generation, "eos_token_id", None)
        if ids is None:
            ids = getattr(config, "eos_token_id", None)
        if ids is None and self.tokenizer is not None:
            ids = self.tokenizer.eos_token_id
        if ids is None:
            raise ConfigError("policy: its configuration names no eos_token_id, so no response could end")
        return tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)

    def chat(self, prompt: str, prefill: str | Sequence[int] = "") -> list[int]:
        """Token ids of one user turn and the opening of the answer, in the model's chat template.

        Args:
            prompt: what the user says.
            prefill: how the answer is forced to begin, text or token ids.
        """
        tokenizer = self.require_tokenizer()
        template = tokenizer.chat_template
        if template is None:
            if "<|start_header_id|>" not in tokenizer.get_vocab():
                raise ConfigError("policy: its tokenizer holds no chat template; set tokenizer.chat_template")
            template = LLAMA3_CHAT_TEMPLATE
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], chat_template=template, add_generation_prompt=True, tokenize=False
        )
        return self.encode(str(text)) + self.prefill_tokens(prefill)

    def prefill_tokens(self, prefill: str | Sequence[int]) -> list[int]:
        """Token ids of a prefill given as text or as ids."""
        return self.encode(prefill) if isinstance(prefill, str) else list(prefill)
