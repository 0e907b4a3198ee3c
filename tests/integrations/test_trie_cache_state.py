"""What a trie outlives: other weights and adapters, modes, autocast, copies; and what gradients say."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, MixtralConfig, PreTrainedModel

from saffron import Policy, Request, SaffronSearch, SearchConfig
from saffron.errors import ConfigError, UnsupportedModelError
from saffron.integrations.transformers import TrieCache
from saffron.models.attention import ATTENTION
from saffron.models.fingerprint import fingerprint
from saffron.models.trie_model import TrieModel

PROMPT = torch.tensor([[5, 6, 7, 8, 9]])
FORGOTTEN = "the weights of its model changed; .* cached tokens were forgotten"


def adapted(attention: str = ATTENTION) -> Any:
    """A PEFT model with adapters "default" and "b"."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "k_proj"], init_lora_weights=False)
    model = get_peft_model(tiny.model(attention=attention), config)
    model.add_adapter("b", config)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.manual_seed(sum(name.encode()))
            parameter.data.normal_(std=0.5)
    return model.eval()


def scaled(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)


def trained(model: Any) -> None:
    """A step of an optimizer that changes every parameter."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def loaded(model: Any) -> None:
    model.load_state_dict({name: 0.8 * value for name, value in model.state_dict().items()})


def hooked(model: Any) -> None:
    model.get_input_embeddings().register_forward_hook(lambda _, ids, output: 3 * output)


def replaced(model: Any) -> None:
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.forward = lambda x, forward=mlp.forward: -forward(x)


def rotary(model: Any) -> Any:
    return model.get_base_model().model.rotary_emb


CHANGES: dict[str, Callable[[Any], object]] = {
    "set_adapter": lambda model: model.set_adapter("b"),
    "disable": lambda model: model.base_model.disable_adapter_layers(),
    "merge": lambda model: (model.set_adapter("b"), model.merge_adapter()),
    "scale": scaled,
    "optimizer": trained,
    "load": loaded,
    "dtype": lambda model: model.to(torch.float64),
    "buffer": lambda model: rotary(model).inv_freq.mul_(0.5),
    "another buffer": lambda model: setattr(rotary(model), "inv_freq", rotary(model).inv_freq * 0.5),
    "attribute": lambda model: setattr(rotary(model), "attention_scaling", 0.5),
    "hook": hooked,
    "forward": replaced,
}


def generate(model: Any, cache: Any, ids: Tensor = PROMPT) -> Tensor:
    return model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=8, do_sample=False, eos_token_id=None)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_kept_trie_notices_other_weights(change: str, held: bool) -> None:
    model, theirs = adapted(), adapted("sdpa")
    trie = TrieModel(model.get_base_model())
    cache = TrieCache.from_trie(trie)
    before = generate(model, cache)
    if not held:
        del cache
    CHANGES[change](model), CHANGES[change](theirs)
    expected = generate(theirs, None)
    assert not torch.equal(expected, before) or change == "dtype"
    with pytest.warns(UserWarning, match=FORGOTTEN):
        answer = generate(model, TrieCache.from_trie(trie))
    assert torch.equal(answer, expected)
    with torch.no_grad():
        logits = [
            model(before, past_key_values=TrieCache.from_trie(trie)).logits, theirs(before).logits,
        ]  # fmt: skip
    assert (logits[0] - logits[1]).abs().max() <= 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, TrieCache.from_trie(trie))  # and then it is quiet


@torch.no_grad()
def test_rows_that_go_on_are_run_anew() -> None:
    """A cache in use, its fork and its cropped self: what follows is what the new weights say of the whole text."""
    model, theirs = adapted(), adapted("sdpa")
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 10]])
    cache = TrieCache(model)
    model(ids, past_key_values=cache)
    cropped, reordered, one = (copy.deepcopy(cache) for _ in range(3))
    model.set_adapter("b"), theirs.set_adapter("b")
    new = torch.tensor([[11], [12]])

    def check(cache: TrieCache, whole: Tensor, new: Tensor) -> None:
        expected = theirs(torch.cat([whole, new], 1)).logits[:, -1]
        assert (model(new, past_key_values=cache).logits[:, -1] - expected).abs().max() <= 1e-4
        assert cache.get_seq_length() == whole.shape[1] + 1

    with pytest.warns(UserWarning, match=FORGOTTEN):
        check(cache, ids, new)
    check(cache, torch.cat([ids, new], 1), new)
    cropped.crop(-2)
    check(cropped, ids[:, :2], new)
    reordered.reorder_cache(torch.tensor([1, 1, 0]))
    check(copy.deepcopy(reordered), ids[[1, 1, 0]], new[[0, 1, 1]])
    one.batch_select_indices(torch.tensor([1]))
    one.crop(-9)
    check(one, ids[:1, :0], new[:1])


def test_searches_in_progress_say_so() -> None:
    policy = Policy(tiny.model())
    rows, _ = policy.prefill([[5, 6, 7]])
    loaded(policy.model)
    with pytest.raises(ConfigError, match="weights of its model changed while 3 tokens .* are in use"):
        policy.step(rows, [0], [8])
    with pytest.raises(ConfigError, match="Policy: the weights"):
        policy.logits([[5, 6]])
    policy.release(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing was kept, so nothing is forgotten
        expected = tiny.model(attention="sdpa")
        loaded(expected)
        with torch.no_grad():
            difference = policy.logits([[5, 6]]) - expected(torch.tensor([[5, 6]])).logits[:, -1]
    assert difference.abs().max() <= 1e-4


@pytest.mark.parametrize("which", [0, 1], ids=["policy", "mrm"])
def test_a_search_goes_with_another_dtype(which: int) -> None:
    """What searches set aside is taken over by the cache of the new form."""
    models = tiny.pair()
    search = SaffronSearch(*models, SearchConfig(width=2, max_new_tokens=4))
    request = Request((0, 5, 6), (0, 5, 6))
    search.search([request])
    models[which].model.to(torch.float64)
    fresh = SaffronSearch(*copy.deepcopy(models), search.config).search([request])
    assert search.search([request])[0].token_ids == fresh[0].token_ids
    assert all(model.kv.reserved == model.kv.num_nodes == 0 for model in models)


def test_prompts_that_are_kept_are_forgotten_too() -> None:
    policy = Policy(tiny.model(), keep_prefixes=True)
    policy.release(policy.prefill([[5, 6, 7]])[0])
    loaded(policy.model)
    with pytest.warns(UserWarning, match="Policy: .* 3 cached tokens were forgotten"):
        policy.logits([[5, 6, 7, 8]])


def test_the_same_weights_have_the_same_fingerprint() -> None:
    model = adapted()
    first = fingerprint(model)
    generate(model, TrieCache(model))
    assert fingerprint(model) == first
    model.set_adapter("b")
    assert fingerprint(model) != first
    with torch.autocast("cpu", torch.bfloat16):
        assert fingerprint(model) != first
    model.set_adapter("default")
    model.train()
    model.eval()
    assert fingerprint(model) == first


# --- modes -----------------------------------------------------------------------------------------------------------


def test_the_mode_of_a_model_stays() -> None:
    model = tiny.model(attention_dropout=0.5).train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    policy = Policy(model)
    cache = TrieCache(model)
    expected = Policy(tiny.model()).logits([[5, 6, 7]])
    assert torch.equal(policy.logits([[5, 6, 7]]), expected)  # calls of a TrieModel run in evaluation mode
    assert [module.training for module in model.modules()] == before
    with torch.no_grad(), pytest.raises(ConfigError, match="attention dropout 0.5 .* model.eval()"):
        model(PROMPT, past_key_values=cache)
    assert policy.kv.num_nodes == cache.trie.kv.num_nodes + 3 == 3
    model.eval()
    assert torch.equal(generate(model, cache), generate(tiny.model(attention="sdpa"), None))


def test_dropout_in_training_mode_is_named() -> None:
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=97, n_embd=48, n_head=6, n_layer=2, attn_pdrop=0.0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).train()
    cache = TrieCache(model)
    with torch.no_grad(), pytest.raises(ConfigError, match="training mode and has dropout"):
        model(PROMPT, past_key_values=cache)
    assert cache.trie.kv.num_nodes == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("made_inside", [False, True])
def test_autocast_works_as_with_sdpa(dtype: torch.dtype, made_inside: bool) -> None:
    ours, theirs = tiny.model(), tiny.model(attention="sdpa")
    cache = None if made_inside else TrieCache(ours)
    outputs = []
    with torch.autocast("cpu", dtype), torch.no_grad():
        for model in (ours, theirs):
            past = (cache or TrieCache(ours)) if model is ours else DynamicCache(config=theirs.config)
            logits = [model(PROMPT, past_key_values=past).logits, model(PROMPT[:, :1], past_key_values=past).logits]
            outputs.append(torch.cat([x.float() for x in logits], 1))
            assert model.generate(PROMPT, max_new_tokens=4, past_key_values=TrieCache(ours) if model is ours else None,
                                  do_sample=False).shape == (1, 9)  # fmt: skip
    with torch.no_grad():
        exact = theirs(torch.cat([PROMPT, PROMPT[:, :1]], 1)).logits
    errors = [(output - exact).abs().max().item() for output in outputs]
    assert 0 < errors[0] <= 2 * errors[1]


def test_autocast_and_without_it_share_no_prefixes() -> None:
    trie = TrieModel(tiny.model())
    trie.logits([[5, 6, 7]])
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match=FORGOTTEN):
        trie.logits([[5, 6, 7]])


@pytest.mark.parametrize("layers", ["all", "adapters"])
def test_gradients_are_refused_by_name(layers: str) -> None:
    model: Any = adapted() if layers == "adapters" else tiny.model()
    cache = TrieCache(model)
    with pytest.raises(ConfigError, match="TrieCache: no gradients .* torch.no_grad.*DynamicCache"):
        model(PROMPT, past_key_values=cache)
    assert cache.trie.kv.num_nodes == 0 and cache.get_seq_length() == 0
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            model(PROMPT, past_key_values=TrieCache(model))
    model.requires_grad_(False)
    model(PROMPT, past_key_values=cache)


@pytest.mark.parametrize("contexts", [(torch.inference_mode, nullcontext), (nullcontext, torch.inference_mode)])
def test_caches_cross_inference_mode(contexts: Any) -> None:
    ours = tiny.model()
    with contexts[0](), torch.no_grad():
        cache = TrieCache(ours, capacity=2)
        ours(PROMPT, past_key_values=cache)
    with contexts[1](), torch.no_grad():
        logits = ours(PROMPT, past_key_values=cache).logits
    expected = tiny.model(attention="sdpa")(PROMPT.repeat(1, 2)).logits[:, 5:]
    assert (logits - expected).abs().max() <= 1e-4


def test_copies_and_pickles() -> None:
    policy = Policy(tiny.model(), tiny.tokenizer(), keep_prefixes=True, capacity=16, grow=False)
    rows, logits = policy.prefill([[5, 6, 7]])
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert type(other) is Policy and other.keep_prefixes and other.kv.capacity == 16 and not other.kv.grow
        assert other.model is not policy.model and other.kv.num_nodes == 0
        assert torch.equal(other.prefill([[5, 6, 7]])[1], logits)
        assert other.decode(other.encode("hello")) == "hello"
    policy.release(rows)
    mrm = copy.deepcopy(tiny.pair()[1])
    assert torch.equal(mrm.logits([[5, 6]]), tiny.pair()[1].logits([[5, 6]]))
    search = SaffronSearch(*tiny.pair(), SearchConfig(width=2, max_new_tokens=3), eos_token_id=[1, 4])
    request = Request((0, 5, 6), (0, 5, 6))
    for other in (copy.deepcopy(search), pickle.loads(pickle.dumps(search))):
        assert other.policy is not search.policy and other.eos_token_id == search.eos_token_id
        assert other.search([request])[0].token_ids == search.search([request])[0].token_ids
    with pytest.raises(TypeError, match="a TrieCache cannot be pickled"):
        pickle.dumps(TrieCache(policy.model))
    model = copy.deepcopy(policy.model)  # which brings hooks along
    assert torch.equal(generate(model, TrieCache(model)), generate(tiny.model(attention="sdpa"), None))


# --- options of generate that run the model next to the cache ------------------------------------------------------


@pytest.mark.parametrize("options", [{"guidance_scale": 1.7}, {"assistant_early_exit": 2}], ids=str)
def test_passes_beside_the_cache(options: dict[str, Any]) -> None:
    answers = []
    for attention in (ATTENTION, "sdpa"):
        model = tiny.model(attention=attention)
        cache = TrieCache(model) if attention == ATTENTION else None
        ids = PROMPT.repeat(1, 3)
        answers.append(model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False, **options))
    assert torch.equal(*answers)


def mixtral(attention: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = MixtralConfig(**{**tiny.SHAPE, "num_local_experts": 4, **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@torch.no_grad()
def test_router_logits_are_refused_by_name() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 9, 11]])
    model = mixtral(ATTENTION)
    cache = TrieCache(model)
    with pytest.raises(UnsupportedModelError, match="output_router_logits"):
        model(ids, past_key_values=cache, output_router_logits=True)
    assert cache.trie.kv.num_nodes == 0
    expected = mixtral("sdpa")(ids).logits
    assert (model(ids, past_key_values=cache).logits - expected).abs().max() <= 1e-4
    with pytest.raises(UnsupportedModelError, match="returns .*router_logits"):
        TrieCache(mixtral(ATTENTION, output_router_logits=True))
