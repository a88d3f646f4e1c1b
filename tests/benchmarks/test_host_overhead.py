import contextlib
import json
import sys

import host_overhead
import pytest
import torch

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", host_overhead.KINDS)
def test_layers_compute_what_their_kind_says(kind):
    """Full kernels give the product, empty ones touch nothing; all kinds hold the same weights."""
    torch.manual_seed(0)
    model = host_overhead.make_model(kind, 2, 128, CPU, torch.float32)
    torch.manual_seed(0)
    plain = host_overhead.make_model("linear", 2, 128, CPU, torch.float32)
    assert model[0].weight.data_ptr() != model[1].weight.data_ptr() or kind.startswith(("ours", "subclass"))
    # of another size for each kind, lest memory left by another test pass for the product
    x = torch.randn(3, 128) * 2 ** host_overhead.KINDS.index(kind)
    expected = plain(x)
    context = host_overhead.empty_kernels() if kind in ("ours, empty", "subclass, empty") else contextlib.nullcontext()
    with context:
        y = model(x)
    assert y.shape == expected.shape and y.dtype == expected.dtype
    error = (y - expected).norm() / expected.norm()
    if kind == "linear":
        assert error == 0
    elif kind == "ours":
        assert 0 < error < 0.2
    else:
        assert not error < 0.2
    if kind.startswith(("ours", "subclass")):
        # the real kernel is back
        assert (model(x) - expected).norm() / expected.norm() < 0.2


def test_command(tmp_path, monkeypatch, capsys):
    file = tmp_path / "figures.json"
    arguments = "--device cpu --layers 3 --features 128 --steps 2 --modes eager --json".split()
    monkeypatch.setattr(sys, "argv", ["host_overhead.py", *arguments, str(file)])
    threads = torch.get_num_threads()
    try:
        host_overhead.main()
    finally:
        torch.set_num_threads(threads)
    results = json.loads(file.read_text())["results"]
    assert [r["kind"] for r in results] == [kind for kind in host_overhead.KINDS if kind != "ours"]
    assert all(r["step_ms"] > 0 for r in results)
    assert "| ours, empty | eager |" in capsys.readouterr().out


def test_ratios():
    results = [
        host_overhead.Result("linear, empty", "default", 2.0, 5.0),
        host_overhead.Result("ours, empty", "default", 3.0, 10.0),
        host_overhead.Result("ours, empty", "eager", 3.0, 0.0),
    ]
    *_, base, ours, other = host_overhead.table(results, layers=10).splitlines()
    assert base == "| linear, empty | default | 2.000 | 200.00 | - | 5.0 | - |"
    assert ours == "| ours, empty | default | 3.000 | 300.00 | 1.50 | 10.0 | 2.00 |"
    assert other == "| ours, empty | eager | 3.000 | 300.00 | - | - | - |"
