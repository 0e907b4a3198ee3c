"""MRM folders: every kind of adapter equals the unmerged PEFT model or is refused, and what is damaged is named."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from saffron.errors import CheckpointError, ConfigError
from saffron.models.adapter import merge_adapter
from saffron.models.guard import ProcessRewardModel
from saffron.models.loading import check_place
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel

BOTH = ["q_proj", "v_proj"]
IDS = torch.tensor([[0, 5, 6, 7, 8, 9]])
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "lm_head": {"target_modules": [*BOTH, "lm_head"]},
    "embed_tokens": {"target_modules": [*BOTH, "embed_tokens"]},
    "lm_head and embed_tokens": {"target_modules": [*BOTH, "embed_tokens", "lm_head"]},
    "lm_head by pattern": {"target_modules": r".*(q_proj|lm_head)"},
    "DoRA on lm_head": {"target_modules": [*BOTH, "lm_head"], "use_dora": True},
    "DoRA on embed_tokens": {"target_modules": [*BOTH, "embed_tokens"], "use_dora": True},
    "tied adapters": {"target_modules": [*BOTH, "embed_tokens"], "ensure_weight_tying": True},
    "saved lm_head": {"modules_to_save": ["lm_head"]},
    "saved embed_tokens": {"modules_to_save": ["embed_tokens"]},
    "saved and tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "saved norm": {"modules_to_save": ["norm"]},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "tokens": {"trainable_token_indices": [3, 5, 8]},
    "tokens of embed_tokens": {"trainable_token_indices": {"embed_tokens": [3, 5, 8]}},
    "ranks by pattern": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 9}},
    "one layer": {"layers_to_transform": [1]},
    "all linear layers": {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    "PiSSA": {"init_lora_weights": "pissa"},
    "parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
}


def write(folder: Path, tied: bool = False, architecture: str = "llama", **options: Any) -> tuple[Path, Path]:
    """A base model and an adapter with random weights."""
    from peft import LoraConfig, get_peft_model

    base, made = folder / "base", folder / "adapter"
    tiny.model(architecture, attention="eager", tie_word_embeddings=tied).save_pretrained(base)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, "target_modules": BOTH, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(load(base), config)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        wrapped.save_pretrained(made)
    torch.save(torch.randn(97) * 0.1, made / "lm_head_bias.pt")
    torch.save(torch.arange(97) % 3 == 0, made / "unseen_mask.pt")
    return base, made


def load(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base)


def unmerged(base: Path, made: Path) -> torch.Tensor:
    from peft import PeftModel

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(load(base), str(made)).eval()(IDS).logits[0]


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("name", list(ADAPTERS))
def test_the_merged_model_equals_the_unmerged_one(name: str, tied: bool, tmp_path: Path) -> None:
    base, made = write(tmp_path, tied, **ADAPTERS[name])
    expected = unmerged(base, made)
    scale = float(expected.abs().max())
    with torch.no_grad():
        assert (load(base)(IDS).logits[0] - expected).abs().max() > 0.1 * scale  # the adapter does something
        merged = merge_adapter(load(base), made).eval()
        assert (merged(IDS).logits[0] - expected).abs().max() <= 2e-5 * scale
    mrm = MultifurcationRewardModel.from_pretrained(made, base=base)
    assert mrm.bias is not None
    rewards = mrm.logits([IDS[0, : n + 1].tolist() for n in range(IDS.shape[1])])
    assert (rewards - (expected + mrm.bias)).abs().max() <= 2e-5 * scale


def test_biases_of_lora_need_a_base_that_has_some(tmp_path: Path) -> None:
    base, made = write(tmp_path, architecture="qwen2", lora_bias=True)
    merged = merge_adapter(load(base), made).eval()
    assert (merged(IDS).logits[0] - unmerged(base, made)).abs().max() <= 1e-3
    base, made = write(tmp_path / "llama", lora_bias=True)
    with pytest.raises(CheckpointError, match="its adapter cannot be merged .*no bias"):
        merge_adapter(load(base), made)


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    base, made = write(tmp_path, layer_replication=[[0, 2], [1, 3]])
    with pytest.raises(CheckpointError, match="layer_replication is not supported"):
        MultifurcationRewardModel.from_pretrained(made, base=base)
    mixed = {"target_modules": [*BOTH, "lm_head"], "trainable_token_indices": {"embed_tokens": [3, 5]}}
    base, made = write(tmp_path / "mixed", tied=True, **mixed)
    with pytest.raises(CheckpointError, match="PEFT leaves its own modules at .*lm_head"):
        MultifurcationRewardModel.from_pretrained(made, base=base)


def test_weights_without_a_place_and_places_without_weights_are_named(tmp_path: Path) -> None:
    base, made = write(tmp_path)
    file = made / "adapter_model.safetensors"
    weights = load_file(file)
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert first in weights
    renamed = {name.replace("q_proj", "query"): weight for name, weight in weights.items()}
    save_file(renamed, file)
    with pytest.raises(CheckpointError) as error:
        MultifurcationRewardModel.from_pretrained(made, base=base)
    assert "no module for: base_model.model.model.layers.0.self_attn.query.lora_A.weight" in str(error.value)
    assert f"weights are missing: {first}" in str(error.value) and "and 2 more" in str(error.value)
    save_file({name: weight for name, weight in weights.items() if ".1." not in name}, file)
    with pytest.raises(CheckpointError, match="weights are missing: base_model.model.model.layers.1.self_attn.q_proj"):
        MultifurcationRewardModel.from_pretrained(made, base=base)
    save_file({**weights, "stray": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match="no module for: .*stray"):
        MultifurcationRewardModel.from_pretrained(made, base=base)
    save_file({**weights, first: torch.full_like(weights[first], torch.nan)}, file)
    with pytest.raises(CheckpointError, match=f"the adapter's weight {first} holds NaN or infinity"):
        MultifurcationRewardModel.from_pretrained(made, base=base)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "a list"), ("null", "a NoneType"), ("{", "not an adapter configuration"), ('{"peft_type": "IA3"}', "IA3"),
     ('{"peft_type": "LORA"}', "cannot be applied"), ("[" * 20_000, "not an adapter configuration")],
)  # fmt: skip
def test_broken_configurations(text: str, message: str, tmp_path: Path) -> None:
    base, made = write(tmp_path)
    (made / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        MultifurcationRewardModel.from_pretrained(made, base=base)
    if text != '{"peft_type": "LORA"}':
        return
    with pytest.raises(CheckpointError, match="names no base model; say which with base="):
        MultifurcationRewardModel.from_pretrained(made)


def test_bias_and_mask_are_checked(tmp_path: Path) -> None:
    base, made = write(tmp_path)
    good = torch.zeros(97)
    cases: list[tuple[str, object, str]] = [
        ("lm_head_bias.pt", good.index_fill(0, torch.tensor([3]), torch.nan), "lm_head_bias: holds NaN or infinity"),
        ("lm_head_bias.pt", good.index_fill(0, torch.tensor([3]), -torch.inf), "lm_head_bias: holds NaN or infinity"),
        ("lm_head_bias.pt", good.to(torch.complex64), "lm_head_bias: got torch.complex64"),
        ("lm_head_bias.pt", good.long(), "lm_head_bias: got torch.int64"),
        ("lm_head_bias.pt", good.double() + 1e300, r"lm_head_bias: holds 1e\+300"),
        ("lm_head_bias.pt", good[:5], r"lm_head_bias: got shape \[5\]"),
        ("lm_head_bias.pt", good[None], "expected one vector"),
        ("lm_head_bias.pt", good.to_sparse(), "expected one vector"),
        ("lm_head_bias.pt", {"bias": good}, "expected one vector"),
        ("unseen_mask.pt", good, "unseen_mask: got torch.float32"),
        ("unseen_mask.pt", (good > 0)[:5], r"unseen_mask: got shape \[5\]"),
    ]
    for file, value, message in cases:
        kept = (made / file).read_bytes()
        torch.save(value, made / file)
        with pytest.raises(CheckpointError, match=message):
            MultifurcationRewardModel.from_pretrained(made, base=base)
        (made / file).write_bytes(kept)
    for content in (b"", b"damaged", b"PK\x03\x04" + bytes(40)):
        (made / "lm_head_bias.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match="lm_head_bias.pt: cannot be loaded") as error:
            MultifurcationRewardModel.from_pretrained(made, base=base)
        assert "weights_only" not in str(error.value)
    (made / "lm_head_bias.pt").unlink()
    with pytest.raises(CheckpointError, match="lm_head_bias.pt: no such file"):
        MultifurcationRewardModel.from_pretrained(made, base=base)
    with pytest.warns(UserWarning, match="unseen_mask: marks every token"):
        MultifurcationRewardModel(tiny.model(), unseen=torch.ones(97, dtype=torch.bool))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    def model() -> PreTrainedModel:
        made = tiny.model()
        made.model.layers[1].self_attn.k_proj.weight.data[3, 4] = value
        return made

    named = r"the weight model.layers.1.self_attn.k_proj.weight \(of a Linear\) holds NaN or infinity"
    with pytest.raises(CheckpointError, match=f"policy: {named}"):
        Policy(model())
    with pytest.raises(CheckpointError, match=f"mrm: {named}"):
        MultifurcationRewardModel(model())
    tokenizer = tiny.tokenizer()
    words = {"safe": tokenizer.decode([40]), "unsafe": tokenizer.decode([50])}
    with pytest.raises(CheckpointError, match=f"guard: {named}"):
        ProcessRewardModel(model(), tokenizer, **words)
    assert Policy(model(), check_weights=False).kv.num_nodes == 0
    model().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"policy \\({tmp_path}\\): {named}"):
        Policy.from_pretrained(tmp_path)
    assert Policy.from_pretrained(tmp_path, check_weights=False).vocab_size == 97


@pytest.mark.parametrize("tied", [False, True])
def test_save_pretrained_comes_back_to_the_bit(tied: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, made = write(tmp_path, tied, target_modules=[*BOTH, "lm_head"])
    tiny.tokenizer().save_pretrained(base)
    plain = MultifurcationRewardModel(tiny.model())
    capfd.readouterr()
    mrm = MultifurcationRewardModel.from_pretrained(made, base=base, prefix="\n\nHuman:")
    mrm.save_pretrained(tmp_path / "saved")
    again = MultifurcationRewardModel.from_pretrained(tmp_path / "saved")
    assert (again.prefix, again.infix) == ("\n\nHuman:", "\n\nAgent:")
    assert again.tokenizer is not None and again.context_tokens("hello") == mrm.context_tokens("hello")
    assert torch.equal(again.logits([[0, 5, 6]]), mrm.logits([[0, 5, 6]]))
    assert again.unseen is not None and mrm.unseen is not None and torch.equal(again.unseen, mrm.unseen)
    plain.save_pretrained(tmp_path / "saved")  # into the same folder: no bias of the MRM before stays
    again = MultifurcationRewardModel.from_pretrained(tmp_path / "saved", capacity=32)
    assert again.bias is None and again.unseen is None and torch.equal(again.logits([[0, 5]]), plain.logits([[0, 5]]))
    with pytest.raises(CheckpointError, match="holds a whole model and no adapter"):
        MultifurcationRewardModel.from_pretrained(tmp_path / "saved", base=base)
    for text, message in (
        ("{", r"mrm_config.json: not JSON \("),
        ("[" * 100_000, r"mrm_config.json: not JSON \(nested too deeply\)"),
        ("[]", "mrm_config.json: expected a JSON object"),
        ('{"prefix": "a", "infx": "b", "sufix": "c"}', "mrm_config.json: got infx, sufix, expected prefix and infix"),
        ('{"prefix": 5}', "mrm_config.json: prefix: got 5, expected a text"),
        ('{"infix": null}', "mrm_config.json: infix: got None, expected a text"),
        ('{"infix": "\\ud800"}', r"mrm_config.json: not JSON \(.*surrogates not allowed\)"),
    ):
        (tmp_path / "saved" / "mrm_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            MultifurcationRewardModel.from_pretrained(tmp_path / "saved")
    assert capfd.readouterr() == ("", "")


def test_nothing_is_printed_and_nothing_stays_switched_off(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    base, made = write(tmp_path)
    tiny.tokenizer().save_pretrained(base)
    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.enable_progress_bar()
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MultifurcationRewardModel.from_pretrained(made, base=base)
        Policy.from_pretrained(base)
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled() and logging.get_verbosity() == before[1]


def test_paths_that_look_local_are_never_asked_of_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*args: object, **options: object) -> None:
        raise AssertionError("a hub was asked")

    monkeypatch.setattr("saffron.models.loading.AutoConfig.from_pretrained", asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "file").write_text("x")
    for path in ("./nowhere", "../nowhere", "a/b/c", "/nowhere", "~/nowhere", "models/nowhere", "no where", "", "x/",
                 tmp_path / "nowhere", Path("nowhere")):  # fmt: skip
        with pytest.raises(CheckpointError, match="no such folder|no config.json in this folder"):
            Policy.from_pretrained(path)
    with pytest.raises(CheckpointError, match="a file, expected a folder"):
        Policy.from_pretrained("file")
    with pytest.raises(CheckpointError, match=r"models: .*no config.json in this folder"):
        Policy.from_pretrained("models")
    with pytest.raises(CheckpointError, match="./nowhere: no Hugging Face checkpoint there"):
        MultifurcationRewardModel.from_pretrained("./nowhere")
    with pytest.raises(ConfigError, match="path: got a value of type int"):
        Policy.from_pretrained(3)  # type: ignore[arg-type]
    assert check_place("meta-llama/Llama-3-8B") == "meta-llama/Llama-3-8B" and check_place("gpt2") == "gpt2"


def test_messages_hold_no_advice_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **options: object) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files. Check your connection.")

    monkeypatch.setattr("saffron.models.loading.AutoConfig.from_pretrained", offline)
    with pytest.raises(CheckpointError) as error:
        Policy.from_pretrained("somebody/something")
    assert str(error.value) == (
        "somebody/something: no Hugging Face checkpoint there (neither a folder here nor a repository that the hub "
        "shows us)"
    )


@pytest.mark.parametrize("device", ["foo", "meta", "cuda:99", "mps", "", 3.5])
def test_devices_that_are_not_there(device: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device: got"):
        Policy.from_pretrained(tmp_path, device=device)


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 0}, {"num_attention_heads": 5}, {"vocab_size": "x"}, {"model_type": "nothing"}]
)
def test_broken_model_configurations(change: dict[str, Any], tmp_path: Path) -> None:
    tiny.model(attention="eager").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for text in (json.dumps({**config, **change}), "null", "[]", "{"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=str(tmp_path)):
            Policy.from_pretrained(tmp_path)


def test_an_mrm_may_lie_on_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, made = write(tmp_path)
    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name: asked.append(name) or str(made))
    mrm = MultifurcationRewardModel.from_pretrained("somebody/mrm", base=base)
    assert asked == ["somebody/mrm"] and mrm.bias is not None

    def offline(name: str) -> str:
        raise OSError("We couldn't connect to 'https://huggingface.co'. Check your internet connection.")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"somebody/mrm: cannot be downloaded \(neither a folder here nor"):
        MultifurcationRewardModel.from_pretrained("somebody/mrm", base=base)


@pytest.mark.parametrize("text", ["{", "[]", "null", "\x00"])
def test_a_broken_generation_configuration_is_not_ignored(text: str, tmp_path: Path) -> None:
    tiny.model(attention="eager").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="generation_config.json: "):
        Policy.from_pretrained(tmp_path)


@pytest.mark.parametrize("eos", [97, -1, [1, 97], [], True, "1", 1.5])
def test_tokens_that_end_answers_are_in_the_vocabulary(eos: Any) -> None:
    policy = Policy(tiny.model())
    policy.model.generation_config.eos_token_id = eos
    with pytest.raises(ConfigError, match="policy: .*eos_token_id"):
        _ = policy.eos_token_id
