"""The host's model: one network for each precision."""

from dataclasses import replace

import pytest

import qs_jax
from qs_jax.adaptive.costs import Costs
from qs_jax.model import Model
from qs_jax.models.base import CausalLM
from tests.tiny import quantised, tiny_model


@pytest.fixture
def model() -> Model:
    return quantised(tiny_model("gpt2"))


def test_a_precision_has_one_network(model: Model) -> None:
    assert model.network_at(None) is model.network
    assert model.network_at(4) is model.network_at(4)
    assert model.network_at(4) is not model.network_at(2)
    other = replace(model, network=tiny_model("gpt2").network)
    with pytest.raises(qs_jax.QsJaxError, match="no Matryoshka weights"):
        other.network_at(4)
    assert "_read_at" not in repr(model)


def test_costs_are_counted_once_for_all_calls(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[CausalLM] = []
    count = Costs._counted
    monkeypatch.setattr(Costs, "_counted", lambda network: counted.append(network) or count(network))
    for _ in range(2):
        qs_jax.generate(model, [[1, 2, 3]], max_new_tokens=1, bits=4)
    assert counted == [model.network_at(4)]
