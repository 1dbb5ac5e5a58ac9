"""Each pooling is declared once: declaration and class agree, sizes fit the base, and mistakes are explained."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from poolwise.errors import ModelError, StudyError
from poolwise.model.encoder import build
from poolwise.pooling import poolings
from poolwise.pooling.cost import head_cost, resolve_args
from poolwise.pooling.heads import attended, weighted_mean
from poolwise.pooling.laws import LAWS, check_pooling
from poolwise.pooling.poolings import MeanGain, module_class
from poolwise.runs.check import base_costs
from poolwise.study.catalogue import ALIASES, POOLINGS, PRESETS, REFERENCES, TEMPLATES, is_attention, spec_of
from poolwise.study.design import Design
from poolwise.study.pooling_spec import Arg, Cost, PoolingSpec, no_weights
from poolwise.study.recipe import Recipe
from poolwise.study.study import Study
from test_cost_page import load_script
from test_pooling import ALL, LAYERS, WIDTH, make, random_states
from tiny import tiny_config, tiny_folder


@pytest.mark.parametrize("name", ALL)
def test_declaration_and_class_agree(name):
    spec, config = POOLINGS[name], tiny_config("llama")
    assert spec.name == name
    assert spec.reads == module_class(name).reads
    args = resolve_args(name, {}, config)
    assert json.loads(json.dumps(args)) == args
    assert set(args) == set(spec.args)
    for key, arg in spec.args.items():
        assert type(args[key]) is arg.type
        assert arg.allowed is None or {args[key], arg.default} <= set(arg.allowed)
    pooling: Any = module_class(name)(config.hidden_size, config.num_hidden_layers, **args)
    parameters = inspect.signature(module_class(name)).parameters
    assert list(parameters)[:2] == ["hidden_size", "n_layers"]
    for key, parameter in list(parameters.items())[2:]:
        if parameter.kind != parameter.VAR_KEYWORD:
            assert parameter.default in (parameter.empty, None, spec.args[key].default)
    assert head_cost(name, args, config, 9).parameters == sum(p.numel() for p in pooling.parameters())
    states = random_states(2, 2, config.hidden_size)
    for twin in (copy.deepcopy(pooling), pickle.loads(pickle.dumps(pooling))):
        assert torch.equal(twin(states), pooling(states))


def test_only_an_unmasked_head_reads_padding():
    reads = {
        name for name, preset in PRESETS.items() if spec_of(preset["pooling"]).reads_padding(preset["pooling_args"])
    }
    assert reads == {"m4-paper"}


def test_the_law_catches_a_wrong_cost(monkeypatch):
    monkeypatch.setitem(POOLINGS, "attention", replace(POOLINGS["attention"], cost=no_weights))
    with pytest.raises(ModelError, match="cost: the class has 16 parameters, 0 are declared"):
        check_pooling(module_class("attention"))


@pytest.mark.parametrize(
    ("name", "args", "tokens", "last", "layers"),
    [
        ("first_token", {}, "first", False, 6),
        ("last_token", {}, "last", True, 6),
        ("last_tokens", {}, "all", False, 6),
        ("mean", {}, "all", False, 6),
        ("last_token_ffn", {}, "last", True, 6),
        ("mean_ffn", {}, "all", False, 6),
        ("cross_attention", {}, "all", False, 6),
        ("cross_attention", {"tokens": "last"}, "last", True, 6),
        ("layer_cross_attention", {}, "last", False, 6),
        ("layer_cross_attention", {"tokens": "mean"}, "mean", False, 6),
        ("single_layer", {"layer": 2}, "last", False, 2),
    ],
)
def test_what_a_pooling_reads(name, args, tokens, last, layers):
    spec = spec_of(name)
    assert (spec.tokens_read(args), spec.reads_last_token_alone(args), spec.layers_read(args, 6)) == (
        tokens,
        last,
        layers,
    )


# --- a new pooling: one entry and one class ---------------------------------------------------------------------------

POWER = Arg(int, 2, "the exponent p", minimum=1)
COST = lambda args, width, layers, tokens: Cost(width, 0)  # noqa: E731
ENTRY = PoolingSpec("power_mean", "g * (mean of abs(h_t)^p)^(1/p)", "1803.01400", {"power": POWER}, cost=COST)


class PowerMean(MeanGain):
    def __init__(self, hidden_size, n_layers, *, power=2):
        super().__init__(hidden_size, n_layers)
        self.power = power

    def forward(self, states, mask=None):
        mean = weighted_mean(states.float().abs() ** self.power, attended(states, mask))
        return self.gain.float() * mean ** (1 / self.power)


def test_a_new_pooling_takes_ten_lines(tmp_path, monkeypatch):
    """Validation, cost, documentation, laws and an encoder follow from the entry and the class above."""
    source = inspect.getsource(sys.modules[__name__])
    new = source[source.index("\nPOWER =") : source.index("\ndef test_a_new_pooling")]
    assert sum(bool(line.strip()) for line in new.splitlines()) <= 10
    monkeypatch.setitem(POOLINGS, "power_mean", ENTRY)
    monkeypatch.setattr(poolings, "PowerMean", PowerMean, raising=False)

    with pytest.raises(ValidationError, match=r"pooling_args\.pover is not an argument of power_mean; .* mean 'power'"):
        Design(attention="causal", pooling="power_mean", pooling_args={"pover": 3})
    with pytest.raises(ValidationError, match=r"pooling_args\.power = 0: must be at least 1"):
        Design(attention="causal", pooling="power_mean", pooling_args={"power": 0})
    design = {"attention": "causal", "pooling": "power_mean"}
    study = Study.parse({"name": "s", "baseline": "power_mean-causal", "designs": [design]})
    assert study.designs[0].factors()["power"] == 2

    (row,) = base_costs(study, tiny_config("llama"))
    assert (row["pooling_args"], row["head_parameters"], row["head_flops_128"]) == ({"power": 2}, 32, 0)
    script = load_script()
    assert "| `power_mean` | g * (mean of abs(h_t)^p)^(1/p) | 1803.01400 | 896 | 0 |" in list(script.poolings("tokens"))
    assert "| `power` | `2` | `power_mean` | the exponent p; 1 or more |" in list(script.arguments())
    assert check_pooling(PowerMean, power=3) == list(LAWS)

    encoder = build(Recipe(base_model=str(tiny_folder(tmp_path, "llama")), max_length=64), study.designs[0], 0)
    vectors = encoder.eval().encode(["a heron", "a fish"], convert_to_tensor=True)
    assert (vectors[0] - vectors[1]).abs().max() > 1e-3


# --- presets, and sizes that fit the base model -----------------------------------------------------------------------


def test_presets_are_complete():
    for name, design in PRESETS.items():
        config = tiny_config("mistral")
        args = resolve_args(design["pooling"], design["pooling_args"], config)
        assert {key: args[key] for key in design["pooling_args"]} == design["pooling_args"], name
        assert is_attention(design["attention"])
        assert design.get("template", "plain") in TEMPLATES
    assert set(REFERENCES) == {name for name in PRESETS if not name.startswith("m")}
    assert set(ALIASES.values()) == {"m1", "m2", "m3", "m4", "m5"}


def test_resolve_args_fills_in_sizes_from_the_base():
    config = tiny_config("llama", hidden_size=48, num_attention_heads=4, num_hidden_layers=5)
    args = resolve_args("layer_cross_attention", {"tokens": "mean"}, config)
    assert (args["heads"], args["head_dim"], args["layer_weights"], args["tokens"]) == (4, 12, 5, "mean")
    config = tiny_config("gemma", hidden_size=32, num_attention_heads=6)  # 6 does not divide 32, 4 does
    assert (resolve_args("mean_ffn", {}, config)["heads"], resolve_args("mean_ffn", {}, config)["head_dim"]) == (4, 8)
    for given_args, sizes in (
        ({"heads": 2}, (2, 16)),
        ({"head_dim": 4}, (8, 4)),
        ({"heads": 3, "head_dim": 5}, (3, 5)),
    ):
        args = resolve_args("cross_attention", {**given_args, "latents": 6}, config)
        assert (args["heads"], args["head_dim"], args["latents"]) == (*sizes, 6)


@pytest.mark.parametrize(
    ("pooling", "args", "message"),
    [
        ("crossattention", {}, "did you mean 'cross_attention'"),
        (
            "cross_attention",
            {"latent": 4, "head": 2},
            "(?s)latent is not an argument.*did you mean 'latents'.*head is not.*did you mean 'heads'",
        ),
        ("mean", {"latents": 4}, "latents is not an argument of mean; it takes none"),
        ("cross_attention", {"norm": "layernorm"}, "norm = 'layernorm': allowed: .*did you mean 'layer_norm'"),
        (
            "cross_attention",
            {"heads": 5},
            r"heads = 5: does not divide the hidden size 32; give head_dim too, or heads = 4",
        ),
        ("cross_attention", {"head_dim": 5}, r"head_dim = 5: does not divide .* give heads too, or head_dim = 4"),
        ("layer_cross_attention", {"layer_weights": 1}, "the base model has 2 layers"),
        ("single_layer", {"layer": 3}, "layer = 3: the base model has 2 layers"),
        ("last_layers", {"layers": 3}, "layers = 3: the base model has 2 layers"),
        ("attention", {"heads": 5}, "heads = 5: does not divide the hidden size 32; give heads = 4"),
    ],
)
def test_resolve_args_teaches(pooling, args, message):
    with pytest.raises(StudyError, match=message):
        resolve_args(pooling, args, tiny_config("llama"))


def test_layer_weights_can_be_left_out_and_must_suffice():
    states = random_states(2, LAYERS, WIDTH)
    without, zero = make("layer_cross_attention", layer_weights=0), make("layer_cross_attention")
    assert without.layer_weights is None
    torch.testing.assert_close(without(states), zero(states))  # W starts at zero
    with torch.no_grad():
        zero.layer_weights.add_(random_states(LAYERS, WIDTH, seed=5))
    assert (without(states) - zero(states)).abs().max() > 0.1


def test_heads_can_be_built_on_the_meta_device_and_filled_later():
    with torch.device("meta"):
        pooling: Any = module_class("layer_cross_attention")(WIDTH, LAYERS, latents=4, heads=2, head_dim=8)
    pooling.to_empty(device="cpu").reset_parameters(torch.Generator().manual_seed(0))
    wanted = make("layer_cross_attention").state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in pooling.state_dict().items())
