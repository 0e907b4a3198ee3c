"""The scripts that make the shipped models: each part at tiny size, and the whole in seconds."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from saffron import world
from saffron.policy import Policy
from saffron.reward_models import MultifurcationRewardModel, ProcessRewardModel
from saffron.world import oracle
from training import mrm, train
from training.branches import Branches, GuardFormat, guard_hidden, rewards
from training.corpus import IGNORED, policy_batches, policy_prompt_ids, tokenizer_texts
from training.guard import guard_examples
from training.mrm import (
    MultifurcationHead,
    Rewarded,
    build_corpus,
    partial_loss,
    reward_corpus,
    supervised,
    train_mrm,
    unseen_mask,
)
from training.policy import llama, train_policy
from training.sampling import sample
from training.tokenizer import GUARD_TEMPLATE, POLICY_TEMPLATE, train_tokenizer

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


@pytest.fixture
def corpus(tokenizer, model):
    """Eight short conversations with made-up rewards."""
    found = build_corpus(model, tokenizer, 8, seed=1)
    generator = torch.Generator().manual_seed(2)
    for row in found:
        row.rewards = torch.randn(len(row.response), generator=generator).tolist()
    return found


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


def test_supervision_reads_each_token_from_the_state_before_it(tokenizer, corpus, model):
    ids, next_tokens, values, counted = supervised(tokenizer, corpus)
    for index, row in enumerate(corpus):
        assert next_tokens[index][counted[index]].tolist() == row.response
        torch.testing.assert_close(values[index][counted[index]], torch.tensor(row.rewards))
    head = MultifurcationHead(model)
    with torch.no_grad():
        head.bias.uniform_(-1, 1)
        causal = head.model.get_base_model()
        everything = causal.model(input_ids=ids).last_hidden_state @ causal.lm_head.weight.T + head.bias
        torch.testing.assert_close(
            head(ids, next_tokens), everything.gather(-1, next_tokens[..., None])[..., 0], atol=1e-5, rtol=1e-5
        )


def test_proposition_1_gradient_of_unseen_bias_is_exactly_zero(tokenizer, corpus, model):
    head = MultifurcationHead(model)
    unseen = unseen_mask(corpus, len(tokenizer))
    partial_loss(head, supervised(tokenizer, corpus)).backward()
    assert unseen.any() and not unseen.all()
    assert torch.all(head.bias.grad[unseen] == 0)
    assert torch.all(head.bias.grad[~unseen] != 0)


def test_proposition_1_training_leaves_unseen_bias_at_its_initial_value(tokenizer, corpus, model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    head = train_mrm(model, tokenizer, corpus * 4, epochs=3, seed=6)
    unseen = unseen_mask(corpus, len(tokenizer))
    assert torch.all(head.bias[unseen] == 0)
    assert torch.all(head.bias[~unseen] != 0)
    trained = {name for name, parameter in head.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name and ("q_proj" in name or "v_proj" in name) for name in trained - {"bias"})
    for name, value in head.model.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, before[name.replace(".base_layer", "")]), name


def test_training_lowers_the_loss(tokenizer, corpus, model, monkeypatch):
    monkeypatch.setattr(mrm, "BATCH", 8)
    monkeypatch.setattr(mrm, "LEARNING_RATE", 5e-2)  # so that a few steps are enough
    for row in corpus:
        row.rewards = [3.0] * len(row.response)
    batch = supervised(tokenizer, corpus)
    with torch.no_grad():
        before = partial_loss(MultifurcationHead(llama(tokenizer)), batch)
    head = train_mrm(model, tokenizer, corpus, epochs=25, seed=6)
    with torch.no_grad():
        assert partial_loss(head, batch) < 0.8 * before


def test_unseen_mask_names_what_no_response_holds():
    mask = unseen_mask([Rewarded([5], [1, 2], []), Rewarded([4], [2], [])], 6)
    assert mask.tolist() == [True, False, False, True, True, True]


def test_policy_training_is_deterministic(tokenizer):
    first, second = (train_policy(tokenizer, steps=2, seed=7).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rewards_are_the_guards(tokenizer, corpus, model):
    form = GuardFormat.from_tokenizer(tokenizer, GUARD_TEMPLATE)
    reward_corpus(model, form, corpus)
    row = corpus[0]
    with torch.no_grad():
        hidden, _ = guard_hidden(model, form, [Branches(form.head(row.prompt), row.response, [3])])
        wanted = rewards(model, form, hidden)
    assert row.rewards[2] == pytest.approx(wanted.item(), abs=1e-5)


def test_whole_training_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "TOKENIZER_TEXTS", 200)
    monkeypatch.setattr(train, "HELDOUT_CONVERSATIONS", 4)
    train.make_policy(tmp_path, steps=2, seed=1)
    train.make_guard(tmp_path, steps=2, seed=1)
    assert 0 <= train.make_mrm(tmp_path, conversations=32, epochs=1, seed=1) <= 1
    trained = MultifurcationRewardModel.from_pretrained(tmp_path / "mrm", device="cpu")
    policy = Policy.from_pretrained(tmp_path / "policy", device="cpu")
    assert trained.vocab_size == policy.vocab_size == len(trained.bias) == len(trained.unseen)
    assert (tmp_path / "policy" / "tokenizer.json").read_bytes() == (tmp_path / "guard" / "tokenizer.json").read_bytes()
    for file in (tmp_path / "mrm").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()
