"""Makes the bundled models: tokenizer, policy, guard, MRM, in this order, from seeds.

    python -m reproduce.checkpoints.train --out python/saffron/checkpoints

`--only mrm` and the like repeat one stage on top of what DIR holds. MODELS.md says how long it takes.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from reproduce.checkpoints.corpus import tokenizer_texts
from reproduce.checkpoints.guard import train_guard
from reproduce.checkpoints.mrm import build_corpus, reward_and_train, write_corpus
from reproduce.checkpoints.policy import save_model, train_policy
from reproduce.checkpoints.tokenizer import GUARD_TEMPLATE, POLICY_TEMPLATE, train_tokenizer

STAGES = ("policy", "guard", "mrm")
TOKENIZER_TEXTS = 8000
HELDOUT_CONVERSATIONS = 200  # from another seed, to say how well the MRM does


def make_policy(out: Path, steps: int, seed: int) -> None:
    tokenizer = train_tokenizer(tokenizer_texts(TOKENIZER_TEXTS, seed))
    save_model(train_policy(tokenizer, steps, seed), tokenizer, out / "policy", POLICY_TEMPLATE)


def make_guard(out: Path, steps: int, seed: int) -> None:
    tokenizer = _tokenizer(out)
    save_model(train_guard(tokenizer, steps, seed + 1), tokenizer, out / "guard", GUARD_TEMPLATE)


def make_mrm(out: Path, work: Path, conversations: int, epochs: int, seed: int) -> float:
    """Returns the share of next tokens whose reward is within 1 of the guard's, on conversations not trained on."""
    tokenizer, policy = _tokenizer(out), _model(out / "policy")
    write_corpus(work / "train.jsonl", build_corpus(policy, tokenizer, conversations, seed + 2))
    write_corpus(work / "heldout.jsonl", build_corpus(policy, tokenizer, HELDOUT_CONVERSATIONS, seed + 3))
    return reward_and_train(out, work, epochs, seed + 2)


def _tokenizer(out: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(out / "policy")


def _model(directory: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for policy/, guard/ and mrm/")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/mrm"),
        help="folder for the MRM's corpus, its rewards, the log and pictures of its training (default: %(default)s)",
    )
    parser.add_argument("--only", choices=STAGES, nargs="+", default=STAGES, help="stages to run (default: all)")
    parser.add_argument("--policy-steps", type=int, default=700)
    parser.add_argument("--guard-steps", type=int, default=300)
    parser.add_argument("--conversations", type=int, default=3000, help="size of the MRM's corpus")
    parser.add_argument("--epochs", type=int, default=4, help="of the MRM")
    parser.add_argument("--seed", type=int, default=1)
    return parser


def main() -> None:
    options = parser().parse_args()
    # Sums are then taken in the same order everywhere, and other work on the machine does not stall the training.
    torch.set_num_threads(1)
    if "policy" in options.only:
        make_policy(options.out, options.policy_steps, options.seed)
    if "guard" in options.only:
        make_guard(options.out, options.guard_steps, options.seed)
    if "mrm" in options.only:
        share = make_mrm(options.out, options.work, options.conversations, options.epochs, options.seed)
        print(f"MRM within 1 of the guard: {share:.3f}")


if __name__ == "__main__":
    main()
