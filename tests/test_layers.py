"""Per-layer vectors taken by hooks: equal to the kept hidden states, in every way a model is run."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModel, AutoModelForCausalLM, MixtralConfig, T5Config
from transformers.modeling_layers import GradientCheckpointingLayer

from poolwise.errors import ModelError
from poolwise.model import hooks as layers
from poolwise.model.attention import position_ids, set_attention
from poolwise.model.hooks import LayerCollector, decoder_layers, last_index
from poolwise.pooling.heads import last_token, weighted_mean
from tiny import FAMILIES, tiny_model

IDS = torch.arange(5, 5 + 24).view(4, 6)
# right-padded, left-padded, padded on both sides, full
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
LAST = [3, 5, 4, 5]


def run(model, **arguments):
    return model(input_ids=IDS, attention_mask=MASK, position_ids=position_ids(MASK), **arguments)


def collected(model, collector, pooling_mask=None):
    with collector.collect(MASK, pooling_mask):
        output = run(model)
    return collector.vectors(output.last_hidden_state)


def kept(model, reduce, mask=MASK):
    """The reference: all hidden states kept, each reduced row by row in a plain loop."""
    rows = []
    for states in run(model, output_hidden_states=True).hidden_states[1:]:
        chosen = [states[b, [t for t in range(6) if mask[b, t]]] for b in range(4)]
        rows.append(torch.stack([x[-1].float() if reduce == "last" else x.float().mean(0) for x in chosen]))
    return torch.stack(rows, 1)


@pytest.mark.parametrize("reduce", ["last", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_equal_kept_hidden_states(family, reduce):
    model = tiny_model(family, num_hidden_layers=3, **({"layer_types": None} if family == "gemma3" else {}))
    set_attention(model, "bidirectional" if reduce == "mean" else "causal")
    with torch.no_grad():
        vectors = collected(model, LayerCollector(model, reduce))
        expected = kept(model, reduce)
        states = run(model, output_hidden_states=True).hidden_states[1:]
    assert vectors.shape == (4, 3, 32)
    reference = last_token if reduce == "last" else weighted_mean
    assert torch.equal(vectors, torch.stack([reference(h, MASK) for h in states], 1))
    if reduce == "last":
        assert torch.equal(vectors, expected)
    else:
        torch.testing.assert_close(vectors, expected, atol=2e-6, rtol=1e-6)
    assert (vectors[:, 1] - vectors[:, 2]).abs().max() > 0.1


def test_the_last_entry_is_after_the_final_norm():
    model = tiny_model("llama")
    raw = []
    decoder_layers(model)[-1].register_forward_hook(lambda module, inputs, output: raw.append(output))
    collector = LayerCollector(model)
    with torch.no_grad(), collector.collect(MASK):
        output = run(model)
    vectors = collector.vectors(output.last_hidden_state)
    assert torch.equal(vectors[:, -1], output.last_hidden_state[range(4), LAST])
    assert not torch.allclose(vectors[:, -1], raw[0][range(4), LAST], atol=0.1)


def test_reductions_by_hand():
    assert last_index(MASK).tolist() == LAST
    states = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [0, 0, 1]])
    assert last_token(states, mask).tolist() == [[2, 3], [10, 11]]
    assert weighted_mean(states, mask).tolist() == [[1, 2], [10, 11]]
    empty = torch.zeros(2, 3)
    assert last_token(states, empty).tolist() == weighted_mean(states, empty).tolist() == [[0, 0], [0, 0]]
    # what stands in the padding is not read, even where attention left NaN there
    states[0, 2] = states[1, :2] = torch.nan
    assert weighted_mean(states, mask).tolist() == [[1, 2], [10, 11]]
    # bf16 would count 256 + 1 = 256
    assert weighted_mean(torch.ones(1, 600, 1).bfloat16(), torch.ones(1, 600)).item() == 1
    assert last_token(states.bfloat16(), mask).dtype == torch.float32


@pytest.mark.parametrize("reduce", ["last", "mean"])
def test_pooling_mask_excludes_the_prompt(reduce):
    model = tiny_model("llama")
    prompt = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]])
    content = MASK * (1 - prompt)
    with torch.no_grad():
        collector = LayerCollector(model, reduce)
        # 1 in the padding of the pooling mask is no token
        vectors = collected(model, collector, pooling_mask=1 - prompt)
        torch.testing.assert_close(vectors, kept(model, reduce, content), atol=2e-6, rtol=1e-6)
        assert not torch.equal(vectors[:3], collected(model, collector)[:3])


class Case:
    """A small training set-up: LoRA or all weights, bf16 or fp32, with or without gradient checkpointing."""

    def __init__(self, family, lora, dtype, checkpointing=None):
        model = tiny_model(family, num_hidden_layers=3, **({"layer_types": None} if family == "gemma3" else {}))
        model = model.to(dtype)
        if lora:
            config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                model = get_peft_model(model, config)
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            if lora:
                model.enable_input_require_grads()
        self.model = model.train()
        self.collector = LayerCollector(self.model, "mean")

    def gradients(self, vectors):
        torch.manual_seed(2)
        (vectors * torch.randn(vectors.shape)).sum().backward()
        return {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
def test_gradients_equal_with_and_without_checkpointing(family, lora, dtype):
    plain = Case(family, lora, dtype)
    vectors = collected(plain.model, plain.collector)
    expected = plain.gradients(vectors)
    assert vectors.dtype == torch.float32
    assert len(expected) > 10
    # against kept hidden states, through autograd
    reference = Case(family, lora, dtype)
    states = run(reference.model, output_hidden_states=True).hidden_states[1:]
    kept_vectors = torch.stack([weighted_mean(h, MASK) for h in states], 1)
    assert torch.equal(vectors, kept_vectors)
    # (in bf16 the two graphs add gradients in different orders)
    compare(reference.gradients(kept_vectors), expected, atol=0.1 if dtype == torch.bfloat16 else 1e-6)
    for reentrant in (True, False):
        case = Case(family, lora, dtype, checkpointing=reentrant)
        again = collected(case.model, case.collector)
        assert torch.equal(again, vectors)
        compare(case.gradients(again), expected, atol=1e-6)


def compare(found, expected, atol):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        size = float(gradient.float().abs().max())
        apart = float((found[name].float() - gradient.float()).abs().max())
        assert 0 < size < float("inf"), name
        assert apart <= atol * size, f"{name}: {apart / size:.1e} of its size"


def test_gradcache_double_forward():
    """CachedMultipleNegativesRankingLoss: no-grad forwards of all mini-batches, then each again with gradients."""
    case = Case("llama", True, torch.float32, checkpointing=False)
    expected = case.gradients(collected(case.model, case.collector))
    case.model.zero_grad()
    halves = [slice(0, 2), slice(2, 4)]

    def forward(rows):
        with case.collector.collect(MASK[rows]):
            mask = MASK[rows]
            output = case.model(input_ids=IDS[rows], attention_mask=mask, position_ids=position_ids(mask))
        return case.collector.vectors(output.last_hidden_state)

    with torch.no_grad():
        first = [forward(rows) for rows in halves]
    leaves = [x.clone().requires_grad_() for x in first]
    torch.manual_seed(2)
    whole = torch.cat(leaves)
    (whole * torch.randn(whole.shape)).sum().backward()
    for rows, leaf, cached in zip(halves, leaves, first, strict=True):
        again = forward(rows)
        assert torch.equal(again, cached)
        (again * leaf.grad).sum().backward()
    compare({n: p.grad for n, p in case.model.named_parameters() if p.grad is not None}, expected, atol=1e-5)


def test_a_layer_that_returns_more_than_its_states():
    """Some families return a tuple; the states come first."""
    model = tiny_model("llama")
    collector, states = LayerCollector(model, reduce="mean"), torch.randn(4, 6, 32)
    with collector.collect(MASK):
        output = run(model)
        collector._collect_output(0, collector.layers[0], (), (states, torch.zeros(1)))
    found = collector.vectors(output.last_hidden_state)
    assert torch.allclose(found[:, 0], weighted_mean(states, MASK.bool()))


def test_hooks_do_nothing_outside_collect():
    model = tiny_model("llama")
    collector = LayerCollector(model)
    plain = run(tiny_model("llama")).last_hidden_state
    assert torch.equal(run(model).last_hidden_state, plain)
    with pytest.raises(ModelError, match="nothing collected"):
        collector.vectors(plain)
    collected(model, collector)
    with pytest.raises(ModelError, match="nothing collected"):  # handed out once
        collector.vectors(plain)
    with pytest.raises(ZeroDivisionError), collector.collect(MASK):
        run(model, position_ids=1 / 0)
    with pytest.raises(ModelError, match="nothing collected"):
        collector.vectors(plain)
    # the vectors may also be taken inside the block
    with collector.collect(MASK):
        inside = collector.vectors(run(model).last_hidden_state)
    assert torch.equal(inside, collected(model, collector))
    collector.remove()
    with pytest.raises(ModelError, match=r"layers \[0\] of 2 gave no output"):
        collected(model, collector)


def test_shapes_that_do_not_fit_are_named():
    model = tiny_model("llama")
    collector = LayerCollector(model)
    message = r"\(1, 24, 32\) do not fit a mask of \(4, 6\).*unpad_inputs=False"
    with pytest.raises(ModelError, match=message), collector.collect(MASK):
        model(input_ids=IDS.view(1, -1))
    with pytest.raises(ModelError, match=r"'men'.*did you mean 'mean'"):
        LayerCollector(model, "men")


class Holder(nn.Module):
    """As an encoder holds them: a backbone and its collector side by side."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.collector = LayerCollector(model, "mean")


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_have_their_own_hooks(copier):
    original = Holder(tiny_model("qwen2", num_hidden_layers=3))
    with original.collector.collect(MASK):
        run(original.model)  # half-finished: collected, with a graph, and not taken
    twin = copier(original)
    assert twin.collector.layers is decoder_layers(twin.model)
    expected = collected(original.model, original.collector)
    assert torch.equal(collected(twin.model, twin.collector), expected)
    with torch.no_grad():
        for parameter in twin.model.parameters():
            parameter.mul_(2)
    assert not torch.allclose(collected(twin.model, twin.collector), expected, atol=1e-2)
    with original.collector.collect(MASK):
        run(twin.model)  # the copy's hooks must not write into the original
        assert original.collector._call.vectors == {}
    twin.collector.remove()
    assert torch.equal(collected(original.model, original.collector), expected)


def alive_while_running(collect):
    """Largest number of earlier layers' outputs still in memory when a layer ends, in a no-grad forward of 6 layers."""
    model = tiny_model("llama", num_hidden_layers=6)
    collector = LayerCollector(model, "last")
    storages, alive = [], []

    def watch(module, inputs, output):
        alive.append(sum(not storage.expired() for storage in storages))
        storages.append(StorageWeakRef(output.untyped_storage()))

    for layer in decoder_layers(model):
        layer.register_forward_hook(watch)
    with torch.no_grad():
        if collect:
            collected(model, collector)
        else:
            run(model, output_hidden_states=True)
    assert len(alive) == 6
    return max(alive)


def test_other_layers_are_freed_while_the_forward_runs(monkeypatch):
    assert alive_while_running(collect=True) <= 1  # the running layer's input
    assert alive_while_running(collect=False) == 5
    # control: a slice without a copy is a view, and keeps every layer
    monkeypatch.setitem(layers.REDUCTIONS, "last", lambda states, mask: states[:, -1])
    assert alive_while_running(collect=True) == 5


def test_decoder_layers_are_found_through_wrappers():
    for family in FAMILIES:
        assert len(decoder_layers(tiny_model(family))) == 2
    model = tiny_model("llama")
    found = decoder_layers(model)
    assert found is model.layers
    assert decoder_layers(get_peft_model(model, LoraConfig(target_modules="all-linear"))) is found
    lm = AutoModelForCausalLM.from_config(tiny_model("gpt2").config)
    assert decoder_layers(lm) is lm.transformer.h


def test_expert_lists_are_not_layers():
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    model = tiny_model("llama")
    model.layers[0].mlp = Expert()
    assert decoder_layers(model) is model.layers
    mixtral = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_local_experts=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    moe = AutoModel.from_config(mixtral)
    assert decoder_layers(moe) is moe.layers


def test_ambiguous_or_missing_layers_are_refused():
    t5 = AutoModel.from_config(T5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2))
    with pytest.raises(ModelError, match=r"T5Model: expected one list of 2.*found 2 \(encoder.block, decoder.block\)"):
        decoder_layers(t5)
    model = tiny_model("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(ModelError, match=r"list of 5 .*found 0 \(none\)"):
        LayerCollector(model)


def test_hooks_inside_a_checkpoint_are_refused():
    """transformers before 5.23 checkpoints `__call__`, so that reentrant checkpoints would cut the hooks' gradients."""

    class OldLayer(nn.Linear):
        gradient_checkpointing = True

        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    assert GradientCheckpointingLayer.__call__ is nn.Module.__call__
    model = tiny_model("llama")
    model.layers = nn.ModuleList([OldLayer(2, 2), OldLayer(2, 2)])
    collector = LayerCollector(model.train())
    with pytest.raises(ModelError, match=r"OldLayer: this version of transformers.*>= 5\.23"), collector.collect(MASK):
        pass
    with torch.no_grad(), collector.collect(MASK):
        pass
    model.eval()
    with collector.collect(MASK):
        pass


def test_single_layer_model():
    model = tiny_model("llama", num_hidden_layers=1)
    vectors = collected(model, LayerCollector(model))
    assert vectors.shape == (4, 1, 32)
    assert vectors.isfinite().all()
