"""An MRM on the policy's own modules: the rewards of the merged one, and a policy that is not touched."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from switching import in_threads
from test_adapters import ADAPTERS, BOTH, IDS, load, unmerged, write
from torch import nn

from saffron.cli import main
from saffron.errors import CheckpointError, ConfigError, UnsupportedModelError
from saffron.models.attention import ATTENTION
from saffron.models.files import ModelFiles
from saffron.models.loading import load_model
from saffron.models.policy import Policy
from saffron.models.provenance import write_origin
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.models.shared_trunk import LowRank, SharedTrunk
from saffron.search import SaffronSearch
from saffron.search.config import Request, SearchConfig
from saffron.serving.checkpoints import load_models

SEQUENCES = [IDS[0, : n + 1].tolist() for n in range(IDS.shape[1])]
UNMERGED = {"plain", "rank-stabilised", "lm_head", "lm_head by pattern", "saved lm_head", "ranks by pattern",
            "one layer", "all linear layers", "bias all", "bias lora_only"}  # fmt: skip


def policy_of(base: Path, dtype: torch.dtype = torch.float64, **options: Any) -> Policy:
    return Policy(load_model(base, dtype), **options)


def frozen(folder: Path, base: Path, dtype: torch.dtype = torch.float64) -> Path:
    """A whole MRM on a frozen trunk, as `train-mrm --trunk frozen` writes it."""
    model: Any = load_model(base, dtype)
    head = nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False, dtype=dtype)
    model.set_output_embeddings(head)
    model.config.tie_word_embeddings = False
    bias = torch.linspace(-1, 1, model.config.vocab_size)
    MultifurcationRewardModel(model, bias=bias).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_equals_the_merged_one_or_is_refused(name: str, tied: bool, tmp_path: Path) -> None:
    base, made = write(tmp_path, tied, **ADAPTERS[name])
    policy = policy_of(base, torch.float32)
    before = policy.logits(SEQUENCES)
    if name not in UNMERGED:
        with pytest.raises(UnsupportedModelError, match="adapter's .* is more than LoRA|changes the base's weights"):
            MultifurcationRewardModel.from_pretrained(made, base=policy)
    else:
        mrm = MultifurcationRewardModel.from_pretrained(made, base=policy)
        expected = unmerged(base, made)
        assert mrm.bias is not None
        assert (mrm.logits(SEQUENCES) - expected - mrm.bias).abs().max() <= 2e-5 * float(expected.abs().max())
        assert mrm.shared is not None
        assert {*mrm.model.parameters()} - {*policy.model.parameters()} == {*mrm.shared.own.parameters()}
    assert torch.equal(policy.logits(SEQUENCES), before)
    assert not any(isinstance(module, LowRank) for module in policy.model.modules())


def test_biases_that_were_trained_are_refused(tmp_path: Path) -> None:
    """A Llama, above, has none; a Qwen has."""
    base, made = write(tmp_path, architecture="qwen2", bias="all")
    with pytest.raises(UnsupportedModelError, match=r"adapter's model.layers.0.self_attn.*bias is more than LoRA"):
        MultifurcationRewardModel.from_pretrained(made, base=policy_of(base))


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_rewards_are_those_of_the_merged_mrm(architecture: str, tmp_path: Path) -> None:
    targets = ["qkv_proj", "down_proj"] if architecture == "phi3" else [*BOTH, "down_proj"]
    base, made = write(tmp_path, architecture=architecture, target_modules=targets)
    policy = policy_of(base)
    for folder in (made, frozen(tmp_path / "frozen", base)):
        mrm = MultifurcationRewardModel.from_pretrained(folder, base=policy)
        merged = MultifurcationRewardModel.from_pretrained(
            folder,
            base=load(base).double() if folder == made else None,
            dtype=torch.float64 if folder != made else None,
        )
        # Norms of most architectures work in fp32 whatever the weights are.
        torch.testing.assert_close(mrm.logits(SEQUENCES), merged.logits(SEQUENCES), rtol=1e-6, atol=1e-6)
        assert torch.equal(mrm.head_weight, merged.head_weight)


def test_a_frozen_trunk_is_told_by_its_weights(tmp_path: Path) -> None:
    base, _ = write(tmp_path)
    folder = frozen(tmp_path / "frozen", base)
    policy = policy_of(base)
    mrm = MultifurcationRewardModel.from_pretrained(folder, base=policy)
    assert mrm.model.base_model is policy.model.base_model
    assert mrm.model.get_output_embeddings() is not policy.model.get_output_embeddings()
    other = policy_of(base)
    with torch.no_grad():
        other.model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 4] += 1e-3
    with pytest.raises(CheckpointError, match=r"weight model.layers.1.mlp.up_proj.weight is not the policy's"):
        MultifurcationRewardModel.from_pretrained(folder, base=other)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(CheckpointError, match="its rms_norm_eps is 0.001, the policy's 1e-06"):
        MultifurcationRewardModel.from_pretrained(folder, base=policy)


def test_an_adapter_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    base, made = write(tmp_path)
    (tmp_path / "other").mkdir()
    other, _ = write(tmp_path / "other")
    tiny.model(seed=7, attention="eager").save_pretrained(other)
    with pytest.raises(CheckpointError, match="was trained on .*base, and the policy is .*other"):
        MultifurcationRewardModel.from_pretrained(made, base=policy_of(other))
    with pytest.raises(CheckpointError, match="the policy is a model without a folder"):
        MultifurcationRewardModel.from_pretrained(made, base=Policy(tiny.model()))
    shutil.copytree(base, tmp_path / "copy")  # the same bytes elsewhere
    assert MultifurcationRewardModel.from_pretrained(made, base=policy_of(tmp_path / "copy")).shared is not None
    with pytest.raises(ConfigError, match="dtype and device: are those of the policy"):
        MultifurcationRewardModel.from_pretrained(made, base=policy_of(base), dtype=torch.float32)


def test_files_share_by_themselves_what_says_that_it_can_be(tmp_path: Path) -> None:
    base = tiny.save_checkpoint(tmp_path / "base")
    made = tiny.save_mrm(tmp_path / "made", base)
    files = ModelFiles(str(base), str(made), device="cpu")
    policy = files.load_policy()
    shared = files.load_mrm(policy).shared
    assert shared is not None and shared.trunk is policy.model
    assert files.load_mrm().shared is None
    for models in (files.load(), load_models(files)):
        assert models.mrm.trunk is models.policy.model
    assert ModelFiles(str(base), str(made), str(base), device="cpu").load_mrm(policy).shared is None
    folder = frozen(tmp_path / "frozen", base, torch.float32)
    files = ModelFiles(str(base), str(folder), device="cpu")
    assert files.load_mrm(policy).shared is None  # it does not say what it was trained on
    write_origin(folder, base, {}, None)
    assert files.load_mrm(policy).shared is not None
    other = tiny.save_checkpoint(tmp_path / "other", seed=5)
    assert files.load_mrm(ModelFiles(str(other), device="cpu").load_policy()).shared is None


def test_generate_shares_unless_a_base_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.save_checkpoint(tmp_path / "base")
    made = tiny.save_mrm(tmp_path / "made", base)
    together, calls, texts = SharedTrunk.together, list[int](), list[str]()

    def counted(*args: Any) -> Any:
        calls.append(len(texts))
        return together(*args)

    monkeypatch.setattr(SharedTrunk, "together", counted)
    for options in ([], ["--base", str(base)]):
        given = ["--policy", str(base), "--mrm", str(made), "--device", "cpu", "--max-new-tokens", "5", *options]
        assert main(["generate", "--prompt", "hello there", "--min-new-tokens", "5", "--json", *given]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] and calls == [0] * 6  # loading, the prompt with the first step, four steps


def test_what_files_cannot_share_is_merged(tmp_path: Path) -> None:
    base, made = write(tmp_path, use_dora=True)
    files = ModelFiles(str(base), str(made), device="cpu")
    assert files.load_mrm(policy_of(base)).shared is None


def test_two_mrms_on_one_policy(tmp_path: Path) -> None:
    """From two threads at once: each has the rewards that it has alone, and the policy its logits."""
    base, made = write(tmp_path)
    second = frozen(tmp_path / "frozen", base)
    policy = policy_of(base)
    models = [policy, *(MultifurcationRewardModel.from_pretrained(f, base=policy) for f in (made, second, made))]
    expected = [model.logits(SEQUENCES) for model in models]
    assert not torch.equal(expected[1], expected[2])

    found: list[list[torch.Tensor]] = [[] for _ in models]

    def read(number: int) -> None:
        for _ in range(20):
            found[number].append(models[number].logits(SEQUENCES))

    in_threads(len(models), read)
    for outputs, alone in zip(found, expected, strict=True):
        assert len(outputs) == 20 and all(torch.equal(output, alone) for output in outputs)


def test_weights_of_the_policy_that_change_are_noticed(tmp_path: Path) -> None:
    base, made = write(tmp_path)
    policy = policy_of(base)
    mrm = MultifurcationRewardModel.from_pretrained(made, base=policy, keep_prefixes=True)
    before = mrm.logits(SEQUENCES)
    with torch.no_grad():
        policy.model.get_parameter("model.layers.0.self_attn.v_proj.weight").mul_(1.5)
    with pytest.warns(UserWarning, match="cached tokens were forgotten"):
        after = mrm.logits(SEQUENCES)
    assert not torch.allclose(after, before)
    policy.model.model.layers[0].mlp = copy.deepcopy(policy.model.model.layers[1].mlp)  # other modules
    with pytest.warns(UserWarning, match="cached tokens were forgotten"):
        assert not torch.allclose(mrm.logits(SEQUENCES), after)
    assert mrm.shared is not None
    with torch.no_grad():
        mrm.shared.own[1].weight.mul_(2)
    with pytest.warns(UserWarning, match="cached tokens were forgotten"):
        mrm.logits(SEQUENCES)
    policy.model.float()
    with pytest.warns(UserWarning, match="cached tokens were forgotten"):
        mrm.logits(SEQUENCES)
    assert mrm.kv.k.dtype == mrm.head_weight.dtype == torch.float32


def test_adapters_on_the_policy_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base, made = write(tmp_path)
    policy = policy_of(base)
    mrm = MultifurcationRewardModel.from_pretrained(made, base=policy)
    get_peft_model(policy.model, LoraConfig(target_modules=["o_proj"]))
    for use in (lambda: mrm.logits(SEQUENCES), lambda: MultifurcationRewardModel.from_pretrained(made, base=policy)):
        with pytest.raises(UnsupportedModelError, match="the policy has adapters of its own"):
            use()


def test_what_the_view_would_not_run_is_refused(tmp_path: Path) -> None:
    base, made = write(tmp_path)
    policy = policy_of(base)
    layer = policy.model.model.layers[0]
    layer.forward = layer.forward
    with pytest.raises(UnsupportedModelError, match="LlamaDecoderLayer of the policy has a forward method"):
        MultifurcationRewardModel.from_pretrained(made, base=policy)
    del layer.forward
    attention = layer.self_attn

    class Elsewhere(type(attention)):  # type: ignore[misc]
        def forward(self, *args: Any, **others: Any) -> Any:
            return attention(*args, **others)

    layer.self_attn = copy.copy(attention)
    layer.self_attn.__class__ = Elsewhere
    with pytest.raises(UnsupportedModelError, match=r"layers.0.self_attn.q_proj: has LoRA factors and does not run"):
        MultifurcationRewardModel.from_pretrained(made, base=policy)


def test_logits_that_are_more_than_an_unembedding_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, made = write(tmp_path)
    policy = policy_of(base)
    plain = type(policy.model).forward

    def scaled(self: Any, *args: Any, **options: Any) -> Any:
        output = plain(self, *args, **options)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(type(policy.model), "forward", scaled)
    with pytest.raises(UnsupportedModelError, match="in one pass the rows of policy and MRM have other outputs"):
        MultifurcationRewardModel.from_pretrained(made, base=policy)


@pytest.mark.parametrize("change", ["forward", "hook", "activation"])
def test_a_policy_that_changes_after_loading_is_compared_again(change: str, tmp_path: Path) -> None:
    base, made = write(tmp_path)
    policy = policy_of(base)
    mrm = MultifurcationRewardModel.from_pretrained(made, base=policy)
    assert mrm.shared is not None
    search = SaffronSearch(policy, mrm, SearchConfig(width=2, max_new_tokens=4, min_new_tokens=4))
    request = Request((3, 4, 5), (3, 4, 5))
    before = search.search([request])[0].score
    model, plain = policy.model, policy.model.forward

    def doubled(*args: Any, **options: Any) -> Any:
        output = plain(*args, **options)
        output.logits = output.logits * 2
        return output

    if change == "activation":  # of both: the comparison finds nothing, and the new module runs
        for layer in model.model.layers:
            layer.mlp.act_fn = nn.Tanh()
        assert search.search([request])[0].score != before
        return
    if change == "forward":
        model.forward = doubled
    else:
        model.register_forward_hook(lambda module, _, output: setattr(output, "logits", output.logits * 2))
    said = "the policy: has a forward hook, or a forward method that was replaced"
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=said):
            search.search([request])
    if change == "forward":
        del model.forward
        assert search.search([request])[0].score == before


def test_changes_that_it_cannot_follow_are_refused_by_name(tmp_path: Path) -> None:
    base, made = write(tmp_path)

    def refused(change: Any, said: str, **options: Any) -> None:
        policy = policy_of(base, **options)
        mrm = MultifurcationRewardModel.from_pretrained(made, base=policy, **options)
        change(policy.model)
        with pytest.raises(UnsupportedModelError, match=said):
            mrm.logits(SEQUENCES)

    def conditional(module: Any, arguments: Any, output: Any) -> None:
        pass  # whatever it does to texts other than those that are compared

    def of_q(model: Any) -> Any:
        return model.model.layers[0].self_attn.q_proj

    def wrap(model: Any) -> None:
        model.model.layers[0].self_attn = nn.Sequential(model.model.layers[0].self_attn)

    refused(lambda model: model.register_forward_hook(conditional), "the policy: has a forward hook")
    refused(lambda model: of_q(model).register_forward_hook(conditional), "self_attn.q_proj: has a forward hook")
    refused(lambda model: setattr(of_q(model), "forward", of_q(model).forward), "forward method that was replaced")
    refused(lambda model: model.resize_token_embeddings(model.config.vocab_size + 8), "the policy's vocabulary has")
    refused(wrap, "the policy has other modules than its checkpoint")
    refused(wrap, "the policy has other modules than its checkpoint", share_prefixes=False)


def test_without_a_cache_changes_are_noticed_too(tmp_path: Path) -> None:
    base, made = write(tmp_path)
    policy = policy_of(base, share_prefixes=False)
    mrm = MultifurcationRewardModel.from_pretrained(made, base=policy, share_prefixes=False)
    before = mrm.logits(SEQUENCES)
    policy.model.model.norm = nn.Identity()
    merged = MultifurcationRewardModel.from_pretrained(made, base=copy.deepcopy(policy.model)).logits(SEQUENCES)
    assert not torch.allclose(before, merged)
    torch.testing.assert_close(mrm.logits(SEQUENCES), merged)


def test_a_policy_in_training_mode(tmp_path: Path) -> None:
    base, made = write(tmp_path)
    model = load_model(base, torch.float64)
    model.model.layers[1].mlp.act_fn = nn.Sequential(model.model.layers[1].mlp.act_fn, nn.Dropout(0.5)).eval()
    policy = Policy(model)
    expected = MultifurcationRewardModel.from_pretrained(made, base=policy).logits(SEQUENCES)
    model.train()
    mrm = MultifurcationRewardModel.from_pretrained(made, base=policy)
    assert torch.equal(mrm.logits(SEQUENCES), expected)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies(duplicate: Any, tmp_path: Path) -> None:
    base, made = write(tmp_path)
    policy = policy_of(base)
    mrm = MultifurcationRewardModel.from_pretrained(made, base=policy)
    expected = mrm.logits(SEQUENCES)
    alone = duplicate(mrm)
    assert torch.equal(alone.logits(SEQUENCES), expected)
    theirs, ours = (duplicate(one) for one in (mrm, policy)) if duplicate is copy.copy else duplicate((mrm, policy))
    assert theirs.shared.trunk is ours.model  # they stay together
    assert torch.equal(theirs.logits(SEQUENCES), expected)


def test_it_is_not_saved(tmp_path: Path) -> None:
    base, made = write(tmp_path)
    mrm = MultifurcationRewardModel.from_pretrained(made, base=policy_of(base))
    with pytest.raises(ConfigError, match="save_pretrained: the MRM shares a policy's weights"):
        mrm.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_attention_of_the_view_is_the_policys(tmp_path: Path) -> None:
    base, made = write(tmp_path)
    mrm = MultifurcationRewardModel.from_pretrained(made, base=policy_of(base))
    assert mrm.model.config._attn_implementation == ATTENTION


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    base, made = write(tmp_path)
    tiny.tokenizer().save_pretrained(base)
    other = tiny.tokenizer()
    other.add_tokens(["entirely-new"])
    with pytest.raises(CheckpointError, match="was trained with another tokenizer than the policy's"):
        MultifurcationRewardModel.from_pretrained(made, base=policy_of(base, tokenizer=other))
    assert MultifurcationRewardModel.from_pretrained(made, base=policy_of(base, tokenizer=tiny.tokenizer())).shared
    write_origin(made, base, {}, None)
    other.save_pretrained(base)
    with pytest.raises(CheckpointError, match="was trained with another tokenizer than that of"):
        MultifurcationRewardModel.from_pretrained(made, base=policy_of(base))
