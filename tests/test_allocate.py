import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization import quantize_

from hq_inductor import HyperQuantWeightConfig, allocate_rates, balance_columns, hyperquant_weight, quantization_report
from hq_inductor.allocate import measure_sensitivity, relative_error
from hq_inductor.format.rate_table import RATE_TABLE

from .test_balance import llama


def rates(config) -> dict[str, float]:
    return {name: layer.bps for name, layer in config.fqn_to_config.items()}


def three_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(512, 64), nn.Linear(512, 256), nn.Linear(512, 1024))


def test_optimal_by_enumeration(monkeypatch):
    """Against every combination of rates of three layers with known sensitivities."""
    model, sensitivity = three_layers(), {"0": 3.0, "1": 0.5, "2": 8.0}
    monkeypatch.setattr("hq_inductor.allocate.measure_sensitivity", lambda *args: sensitivity)
    found = rates(allocate_rates(model, 3.0, [None], min_bps=2.0, max_bps=4.5))
    sizes = {name: module.weight.numel() for name, module in model.named_children()}
    budget = 3 * sum(sizes.values())
    every = [e / 8 for e in range(16, 37)]
    damage = {bps: relative_error(bps) for bps in every}

    def cost(by_layer):
        return sum(s * damage[r] for s, r in zip(sensitivity.values(), by_layer, strict=True))

    fitting = (r for r in itertools.product(every, repeat=3) if sum(s * b for s, b in zip(sizes.values(), r, strict=True)) <= budget)
    assert sum(sizes[name] * found[name] for name in sizes) <= budget
    # the last step may not fit; one eighth of the largest layer is at most this much
    assert cost(found.values()) <= 1.03 * min(map(cost, fitting))


def test_budget_is_met_and_never_exceeded():
    model, x = nn.Sequential(nn.Linear(512, 128), nn.Linear(128, 512), nn.Linear(512, 300)), torch.randn(8, 512)
    weights = sum(layer.weight.numel() for layer in model)
    for bps in (2.0, 2.7, 3.0, 3.33, 4.0, 5.9):
        quantized = copy.deepcopy(model)
        config = allocate_rates(model, bps, [x])
        quantize_(quantized, config, filter_fn=None)
        report = quantization_report(quantized)
        assert len(report.quantized) == 3
        assert all(bps - 0.5 <= rate <= bps + 1.125 for rate in rates(config).values())
        # below the budget by less than an eighth of a bit (a quarter where tiles hold 128) in the largest layer
        assert 0 <= bps * weights / 8 - report.size_bytes <= 512 * 300 / 64


def test_rates_follow_sensitivities(monkeypatch):
    """With D falling by 6.02 dB a bit, a layer 16 times as sensitive per weight gets two bits more."""
    model = nn.Sequential(nn.Linear(512, 256), nn.Linear(512, 256))
    monkeypatch.setattr("hq_inductor.allocate.measure_sensitivity", lambda *args: {"0": 16.0, "1": 1.0})
    found = rates(allocate_rates(model, 4.0, [None], min_bps=2.0, max_bps=6.0))
    assert found["0"] + found["1"] == 8 and abs(found["0"] - found["1"] - 2) <= 0.5


def test_config_is_editable_and_passes_arguments_on():
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512), nn.Linear(512, 64))
    config = allocate_rates(model, 3.5, [torch.randn(4, 512)], lambda module, name: name != "1", lattice="d4", seed=3)
    assert set(config.fqn_to_config) == {"0", "2"}
    assert all(isinstance(c, HyperQuantWeightConfig) and (c.lattice, c.seed) == ("d4", 3) for c in config.fqn_to_config.values())
    config.fqn_to_config["0"] = hyperquant_weight(bps=6)
    quantize_(model, config, filter_fn=None)
    assert model[0].weight.bps == 6 and model[2].weight.lattice == "d4" and type(model[1]) is nn.Linear


def test_sensitivity_is_exact_for_a_linear_model():
    """One layer without logits: the mean squared output error for white noise is sum of squares of x times the noise's variance."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(256, 32, bias=False)), torch.randn(500, 256) * torch.logspace(-1, 1, 256)
    found = measure_sensitivity(model, [x], ["0"], draws=64)["0"]
    weight = model[0].weight.detach()
    expected = (weight.square().mean(1).mean() * x.square().sum(1).mean()).item()
    assert found == pytest.approx(expected, rel=0.1)
    # and the error that quantization makes is what it says
    packed = copy.deepcopy(model)
    quantize_(packed, hyperquant_weight(bps=4))
    measured = (packed(x) - model(x)).square().mean().item()
    assert measured == pytest.approx(expected * relative_error(4.0), rel=0.15)


@pytest.fixture(scope="module")
def language_model():
    model = llama(0.03)
    # a spread of probabilities as in a trained model
    model.lm_head.weight.data *= 3
    return model, [torch.randint(300, (4, 64), generator=torch.Generator().manual_seed(i)) for i in range(4)]


def kl(model, other, batches) -> float:
    total = 0.0
    with torch.no_grad():
        for batch in batches:
            p, q = (F.log_softmax(m(batch).logits.flatten(0, 1), -1) for m in (model, other))
            total += F.kl_div(q, p, log_target=True, reduction="batchmean").item()
    return total / len(batches)


@pytest.mark.parametrize("balanced", [False, True])
def test_predicted_divergence_is_the_measured_one(language_model, balanced):
    model, batches = copy.deepcopy(language_model[0]), language_model[1]
    original = copy.deepcopy(model)
    if balanced:
        balance_columns(model, batches)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    sensitivity = measure_sensitivity(model, batches, names)
    for suffix in ("down_proj", "q_proj", "proj"):
        chosen = [name for name in names if name.endswith(suffix)]
        quantized = copy.deepcopy(model)
        quantize_(quantized, hyperquant_weight(bps=5), filter_fn=lambda module, name, chosen=chosen: name in chosen)
        predicted = sum(sensitivity[name] for name in chosen) * relative_error(5.0)
        assert kl(original, quantized, batches) == pytest.approx(predicted, rel=0.35)


def test_measuring_leaves_the_model_as_it_was(language_model):
    model, batches = language_model
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    measure_sensitivity(model, batches[:1], ["lm_head"], draws=1)
    for name, parameter in model.named_parameters():
        assert parameter.equal(before[name][0]) and parameter.requires_grad == before[name][1] and parameter.grad is None


def test_data_lowers_the_divergence_at_the_same_bytes(language_model):
    model, batches = language_model
    results = {}
    for name, config in {"uniform": hyperquant_weight(bps=3), "measured": allocate_rates(model, 3.0, batches)}.items():
        quantized = copy.deepcopy(model)
        quantize_(quantized, config, filter_fn=None if name == "measured" else lambda module, name: isinstance(module, nn.Linear))
        assert quantization_report(quantized).bits_per_weight <= 3
        results[name] = kl(model, quantized, batches)
    assert results["measured"] < 0.9 * results["uniform"]


def test_table_gives_the_error():
    assert relative_error(4.0) == pytest.approx(10 ** (-RATE_TABLE["e8"][32].snr_db / 10))


def test_wrong_arguments():
    model, x = nn.Sequential(nn.Linear(512, 64)), torch.randn(2, 512)
    with pytest.raises(ValueError, match=r"bps must be at least 3.0000 for these layers and min_bps=3.0, got 2.5"):
        allocate_rates(model, 2.5, [x], min_bps=3.0)
    with pytest.raises(ValueError, match="model must have a linear layer to allocate a rate to, got none"):
        allocate_rates(nn.ReLU(), 4.0, [x])
    with pytest.raises(ValueError, match="batches must hold at least one input, got none"):
        allocate_rates(model, 4.0, [])
    for arguments in ({"max_bps": 7}, {"min_bps": 1}):
        with pytest.raises(ValueError, match="bps must be a multiple of 1/8"):
            allocate_rates(model, 4.0, [x], **arguments)
