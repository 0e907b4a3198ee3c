"""`python -m reproduce.real_text`: all stages, then the page. Run it again after an interruption: it goes on."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from reproduce.real_text import page, sweep
from reproduce.real_text.answers import Progress, answer, answered, main_tasks, sweep_tasks
from reproduce.real_text.noise import nucleus_noise
from reproduce.real_text.scales import SCALES, Scale
from reproduce.real_text.training import make_mrm, safe_levels
from saffron.cli.progress import progress
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.storage.folders import write_atomically
from saffron.workers import Workers

PAGE, ANSWERS, SWEPT, CLOCK = "results-real.md", "answers.jsonl", "validation.jsonl", "seconds.json"


class Clock:
    """Seconds that each stage took, over all runs into a folder."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seconds: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
        self._last = time.monotonic()

    def tick(self, stage: str) -> None:
        """Adds what has passed since the last call to a stage."""
        now = time.monotonic()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
        write_atomically(self.file, json.dumps(self.seconds).encode())


def run(scale: Scale, policy: str, out: Path, workers: Workers, show: Progress) -> None:
    """Runs what is not there yet."""
    out.mkdir(parents=True, exist_ok=True)
    clock = Clock(out / CLOCK)

    def tick(stage: str, done: int, total: int) -> None:
        clock.tick(stage)
        show(stage, done, total)

    make_mrm(scale, policy, out, tick)
    levels = _levels(scale, out)
    given = scale, policy, out, workers
    swept = answer(
        out / SWEPT, sweep_tasks(scale, scale.grid.methods(levels)), *given, lambda *done: tick("sweeping", *done)
    )
    tasks = main_tasks(scale, sweep.chosen(scale.grid, levels, swept))
    answer(out / ANSWERS, tasks, *given, lambda *done: tick("answering", *done))


def write_page(scale: Scale, name: str, policy: str, out: Path) -> Path:
    """Writes the page into `out` from the answers that are there, even while `run` adds to them; returns it."""
    summary = make_mrm(scale, policy, out, lambda *_: None)
    models, levels = (Policy.from_pretrained(policy, device="cpu"), _mrm(out)), _levels(scale, out)
    records, swept = answered(out / ANSWERS), answered(out / SWEPT)
    context = page.Context(
        scale, name, sweep.chosen(scale.grid, levels, swept), levels, models[0].flops.per_token,
        Clock(out / CLOCK).seconds, torch.__version__.split("+")[0],
        Path(models[0].model.config._name_or_path).name or "a model",
    )  # fmt: skip
    write_atomically(out / PAGE, page.write(context, summary, nucleus_noise(records, *models), swept, records).encode())
    return out / PAGE


def _mrm(out: Path) -> MultifurcationRewardModel:
    return MultifurcationRewardModel.from_pretrained(out / "mrm", device="cpu")


def _levels(scale: Scale, out: Path) -> dict[float, float]:
    return safe_levels(_mrm(out), out, sorted({*scale.grid.quantiles, sweep.CALIBRATED}))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m reproduce.real_text", description=__doc__)
    parser.add_argument("--policy", type=Path, help="folder of the policy (--quick makes a tiny random one)")
    parser.add_argument("--output", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--docs", type=Path, help="also put results-real.md there")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--scale", choices=sorted(SCALES), default="full", help="how much is run")
    size.add_argument("--quick", action="store_true", help="a tiny random policy: whether it runs, not what comes out")
    parser.add_argument(
        "--workers", type=int, default=1, help="processes that answer, 0: one; the answers are the same"
    )
    parser.add_argument(
        "--page-only", action="store_true", help="write the page from the answers that are there, even while they grow"
    )
    options = parser.parse_args(arguments)
    name = "quick" if options.quick else options.scale
    if options.policy is None and not options.quick:
        parser.error("--policy: needed without --quick")
    if options.page_only and not (options.output / "answers.jsonl").exists():
        parser.error(f"--page-only: {options.output} holds no answers")
    if options.workers < 0:
        parser.error(f"--workers: got {options.workers}, expected 0 or more")
    for folder in (options.output, options.docs):
        if folder is not None and folder.exists() and not folder.is_dir():
            parser.error(f"{folder}: is a file, expected a folder")
    torch.set_num_threads(1)
    with progress("", kept=True) as show, tempfile.TemporaryDirectory() as made:
        policy = str(options.policy or tiny_policy(Path(made)))
        if not options.page_only:
            workers = Workers(count=options.workers)
            run(SCALES[name], policy, options.output, workers, lambda stage, at, of: show(at, of, title=stage))
        written = write_page(SCALES[name], name, policy, options.output)
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
