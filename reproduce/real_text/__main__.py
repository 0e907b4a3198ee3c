"""`python -m reproduce.real_text`: all stages, then the page. Run it again after an interruption: it goes on."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from reproduce.real_text import page
from reproduce.real_text.noise import nucleus_noise
from reproduce.real_text.runs import SCALES, Progress, Scale, make_mrm, run_methods, safe_level
from saffron.cli.progress import progress
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.storage.folders import write_atomically

PAGE = "results-real.md"


def run(scale: Scale, name: str, policy: Path, out: Path, show: Progress, answer: bool = True) -> Path:
    """Runs what is not there yet and writes the page into `out`; returns it.

    Args:
        answer: otherwise the page is written from the answers that are there.
    """
    clock, began = out / "seconds.json", time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    before = json.loads(clock.read_text())["seconds"] if clock.exists() else 0.0

    def tick(title: str, done: int, total: int) -> None:
        write_atomically(clock, json.dumps({"seconds": before + time.monotonic() - began}).encode())
        show(title, done, total)

    summary = make_mrm(scale, str(policy), out, tick)
    models = Policy.from_pretrained(policy, device="cpu"), _mrm(out)
    cap = safe_level(models[1], out)
    records = run_methods(scale, *models, cap, out, tick, answer=answer)
    noise = nucleus_noise(records, *models)
    tick("answering", 1, 1)
    context = {
        "minutes": f"{json.loads(clock.read_text())['seconds'] / 60:.0f}",
        "torch": torch.__version__.split("+")[0],
        "policy": Path(models[0].model.config._name_or_path).name or "a model",
    }
    text = page.write(scale, name, summary, cap, noise, records, models[0].flops.per_token, context)
    write_atomically(out / PAGE, text.encode())
    return out / PAGE


def _mrm(out: Path) -> MultifurcationRewardModel:
    return MultifurcationRewardModel.from_pretrained(out / "mrm", device="cpu")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m reproduce.real_text", description=__doc__)
    parser.add_argument("--policy", type=Path, help="folder of the policy (--quick makes a tiny random one)")
    parser.add_argument("--output", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--docs", type=Path, help="also put results-real.md there")
    parser.add_argument("--scale", choices=sorted(SCALES), default="full", help="how much is run")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny random policy: whether it runs, not what comes out"
    )
    parser.add_argument("--page-only", action="store_true", help="write the page from the answers that are there")
    options = parser.parse_args(arguments)
    name = "quick" if options.quick else options.scale
    if options.policy is None and not options.quick:
        parser.error("--policy: needed without --quick")
    torch.set_num_threads(1)
    with progress("", kept=True) as show, tempfile.TemporaryDirectory() as folder:
        policy = options.policy or tiny_policy(Path(folder))
        written = run(
            SCALES[name], name, policy, options.output, lambda title, done, total: show(done, total, title=title)
        )
    if options.docs is not None:
        options.docs.mkdir(parents=True, exist_ok=True)
        (options.docs / PAGE).write_bytes(written.read_bytes())
    print(written)
    return 0


def tiny_policy(folder: Path) -> Path:
    """A random model of SmolLM2's shape, with a byte-level tokenizer and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from reproduce.real_text.prompts import OPENINGS, PROMPTS

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([*PROMPTS, *OPENINGS], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|im_start|>", eos_token="<|im_end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=36, intermediate_size=48, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    raise SystemExit(main())
