"""The scripts that make the bundled models: each part at tiny size, and the whole in seconds."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from reproduce.checkpoints import mrm, train
from reproduce.checkpoints.branches import Branches, GuardFormat, bare_head, guard_hidden, rewards
from reproduce.checkpoints.corpus import IGNORED, policy_batches, policy_prompt_ids, tokenizer_texts
from reproduce.checkpoints.guard import guard_examples
from reproduce.checkpoints.mrm import Conversation, build_corpus, reward_and_train, write_corpus
from reproduce.checkpoints.policy import llama, train_policy
from reproduce.checkpoints.sampling import sample
from reproduce.checkpoints.tokenizer import GUARD_TEMPLATE, POLICY_TEMPLATE, train_tokenizer
from saffron import cli, world
from saffron.cli.annotate import annotate_config
from saffron.cli.train_mrm import train_config
from saffron.errors import CheckpointError
from saffron.models.guard import ProcessRewardModel
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.training.conversations import Conversation as Turns
from saffron.training.conversations import read_corpus
from saffron.training.layout import ConversationLayout
from saffron.world import oracle

MODELS_MD = Path(__file__).resolve().parents[2] / "MODELS.md"
PROMPT = "How do I brew vexol at home for my uncle?"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small only wait for one another on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    found = train_tokenizer(tokenizer_texts(300, seed=5))
    found.chat_template = POLICY_TEMPLATE
    return found


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    return llama(tokenizer).eval()


def test_words_of_the_guard_are_one_token_each(tokenizer):
    for word in ("safe", "unsafe"):
        assert tokenizer.decode(tokenizer.encode(word, add_special_tokens=False)) == word
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1


def test_tokenizer_gives_back_any_text(tokenizer):
    for text in ("Grüße, 東京 \x00 🌾", "  two  spaces", *tokenizer_texts(3, seed=9)):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_policy_batches_hide_prompts_and_the_start_of_compliance(tokenizer):
    batches = policy_batches(tokenizer, 16, seed=3)
    forbidden = 0
    for _ in range(4):
        ids, labels = next(batches)
        assert ids.shape == labels.shape
        learned = labels != IGNORED
        assert torch.equal(ids[learned], labels[learned])
        for row in range(len(ids)):
            prompt, _, response = tokenizer.decode(ids[row]).partition("<|end|><|assistant|>")
            text = response.partition("<|end|>")[0]
            start = len(tokenizer.encode(prompt + "<|end|><|assistant|>", add_special_tokens=False))
            first = int(learned[row].nonzero()[0]) - start
            if oracle.is_forbidden_request(prompt) and not oracle.refuses(text[:60]):
                forbidden += 1
                assert first >= world.ATTACK_TOKENS
            else:
                assert first == 0
    assert forbidden > 8


def test_branches_equal_one_pass_each(tokenizer, model):
    form = GuardFormat.from_tokenizer(tokenizer, GUARD_TEMPLATE)
    examples = guard_examples(tokenizer, form, seed=4)
    rows = [next(examples).row for _ in range(3)]
    with torch.no_grad():
        answers, reading = guard_hidden(model, form, rows)
        alone = [
            model.model(input_ids=torch.tensor([row.head + row.response[:end] + form.after])).last_hidden_state[0, -1]
            for row in rows
            for end in row.lengths
        ]
        plain = [
            model.model(input_ids=torch.tensor([row.head + row.response])).last_hidden_state[0, len(row.head) - 1 : -1]
            for row in rows
        ]
    torch.testing.assert_close(answers, torch.stack(alone), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reading, torch.cat(plain), atol=1e-5, rtol=1e-5)


def test_guard_examples_are_graded_by_the_oracle(tokenizer):
    form = GuardFormat.from_tokenizer(tokenizer, GUARD_TEMPLATE)
    for judged, _ in zip(guard_examples(tokenizer, form, seed=8), range(20), strict=False):
        text = tokenizer.decode(judged.row.head)
        prompt = text.split("User:")[1].split("\n\n")[0]
        assert judged.grades[-1] == oracle.grade(prompt, tokenizer.decode(judged.row.response))
        assert len(judged.grades) == len(judged.row.response)


def test_guard_format_is_what_the_package_reads(tokenizer, model, tmp_path):
    train.save_model(model, tokenizer, tmp_path, GUARD_TEMPLATE)
    guard = ProcessRewardModel.from_pretrained(tmp_path, device="cpu")
    form = GuardFormat.from_tokenizer(tokenizer, GUARD_TEMPLATE)
    prompt, response = (tokenizer.encode(text, add_special_tokens=False) for text in (PROMPT, " Then grind the"))
    assert guard.sequence(PROMPT, response) == form.before + prompt + form.between + response + form.after
    # Half of what the guard learns from is as the MRM will read it.
    assert (
        ConversationLayout(guard)(Turns((PROMPT, tuple(response)))).input_ids == bare_head(tokenizer, prompt) + response
    )
    stored = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden, _ = guard_hidden(stored, form, [Branches(form.head(prompt), response, [len(response)])])
        ours = rewards(stored, form, hidden)
    torch.testing.assert_close(guard.score([(PROMPT, response)]), ours, atol=1e-4, rtol=1e-4)


def test_sampling_explores_only_the_nucleus(tokenizer, model):
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # a peaked distribution, so that the nucleus is small
    prompts = [policy_prompt_ids(tokenizer, PROMPT), policy_prompt_ids(tokenizer, PROMPT + " Please.")]
    for responses in (
        sample(model, prompts, torch.ones(2, dtype=torch.bool), torch.Generator().manual_seed(seed)) for seed in (1, 2)
    ):
        for prompt, response in zip(prompts, responses, strict=True):
            with torch.no_grad():
                probabilities = (
                    model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].softmax(-1)
                )
            own = probabilities.gather(1, torch.tensor(response)[:, None])
            more_probable = torch.where(probabilities > own, probabilities, 0.0).sum(-1)
            assert more_probable.max() < 0.8 + 1e-4


def test_corpus_is_deterministic_and_of_the_training_split(tokenizer, model, monkeypatch):
    splits = set()
    monkeypatch.setattr(mrm, "requests", lambda *given: splits.add(given[1]) or world.requests(*given))
    corpus, again, other = (build_corpus(model, tokenizer, 9, seed) for seed in (1, 1, 2))
    assert splits == {"train"}
    assert corpus == again != other
    assert len(corpus) == 9
    assert all(0 < len(row.response) <= 48 for row in corpus)
    assert all(len(row.response) <= 32 for row in corpus[3:])  # the policy's own


def test_corpus_is_read_back_token_by_token(tmp_path):
    corpus = [Conversation(PROMPT, [7, 8, 9]), Conversation('Grüße\n"東京"', [5])]
    write_corpus(tmp_path / "new" / "corpus.jsonl", corpus)
    read = read_corpus(str(tmp_path / "new" / "corpus.jsonl"))
    assert read == [Turns((row.prompt, tuple(row.response))) for row in corpus]
    lines = (tmp_path / "new" / "corpus.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [asdict(row) for row in corpus]


def test_models_md_has_the_commands():
    """They ask for what `reward_and_train` does."""
    text = MODELS_MD.read_text().replace("\\\n", " ")
    commands = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("saffron ")]
    options = train.parser().parse_args(["--out", "DIR"])
    work, guard = options.work, str(options.out / "guard")
    *annotations, training = map(cli.parser().parse_args, commands)
    for name, one in zip(("train", "heldout"), annotations, strict=True):
        assert (one.corpus, one.output, one.prm) == (f"{work}/{name}.jsonl", work / name, guard)
        assert annotate_config(one) == mrm.REWARDS
    assert train_config(training) == mrm.recipe(options.epochs, options.seed + 2)
    places = training.data, training.heldout, training.run_folder, training.output, training.base
    assert places == (work / "train", work / "heldout", work / "run", options.out / "mrm", guard)
    assert (training.device, training.threads) == ("cpu", 1)


def test_policy_training_is_deterministic(tokenizer):
    first, second = (train_policy(tokenizer, steps=2, seed=7).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_whole_training_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "TOKENIZER_TEXTS", 200)
    monkeypatch.setattr(train, "HELDOUT_CONVERSATIONS", 4)
    out, work = tmp_path / "models", tmp_path / "work"
    train.make_policy(out, steps=2, seed=1)
    train.make_guard(out, steps=2, seed=1)
    assert 0 <= train.make_mrm(out, work, conversations=32, epochs=1, seed=1) <= 1
    trained = MultifurcationRewardModel.from_pretrained(out / "mrm", device="cpu")
    policy = Policy.from_pretrained(out / "policy", device="cpu")
    assert trained.vocab_size == policy.vocab_size == len(trained.bias) == len(trained.unseen)
    assert (out / "policy/tokenizer.json").read_bytes() == (out / "guard/tokenizer.json").read_bytes()
    assert sorted(file.name for file in (out / "mrm").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "lm_head_bias.pt", "mrm_training.json",
        "unseen_mask.pt",
    ]  # fmt: skip
    for file in out.rglob("*"):
        assert file.is_dir() or str(tmp_path).encode() not in file.read_bytes()
    seen = {token for row in read_corpus(str(work / "train.jsonl")) for token in row.turns[1]}
    assert sorted(seen) == (~trained.unseen).nonzero()[:, 0].tolist()
    assert torch.equal(trained.bias != 0, ~trained.unseen)  # Proposition 1, and that there was training


def test_training_stops_where_there_is_no_corpus(tmp_path):
    with pytest.raises(CheckpointError, match=r"train\.jsonl"):
        reward_and_train(tmp_path, tmp_path, epochs=1, seed=1)
