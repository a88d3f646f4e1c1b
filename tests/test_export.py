"""`torch.export` and AOTInductor: a quantized model as a file that another process runs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

import hq_inductor.compile
from hq_inductor import hyperquant_weight, passes


class GatedMlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(128)
        self.gate, self.up, self.down = nn.Linear(128, 256), nn.Linear(128, 256, bias=False), nn.Linear(256, 128)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GatedMlp().eval()
    quantize_(model, hyperquant_weight(4, effort=0))
    return model


def exported(model):
    with torch.no_grad():
        return torch.export.export(model, (torch.randn(3, 128),), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))


RUN = """
import sys
import torch
import hq_inductor  # the ops are in it

package, expected = sys.argv[1:]
run = torch._inductor.aoti_load_package(package)
for x, y in torch.load(expected):
    torch.testing.assert_close(run(x), y, rtol=1e-5, atol=1e-5)
"""


def test_aot_inductor(model, tmp_path):
    """With all rewrites made; for batches other than the one that was exported; in a process that never saw the model."""
    passes.reset_report()
    hq_inductor.compile.install()
    with passes.configured(fuse_norm=True, fuse_gate=True, fuse_residual=True), torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(exported(model), package_path=str(tmp_path / "model.pt2"))
    assert passes.report().made == {"merge_siblings": 1, "fuse_norm": 1, "fuse_gate": 1, "fuse_residual": 1}
    with torch.no_grad():
        torch.save([(x, model(x)) for x in (torch.randn(n, 128) for n in (1, 2, 17))], tmp_path / "expected")
    program = [sys.executable, "-W", "ignore", "-c", RUN, package, tmp_path / "expected"]
    subprocess.run(program, cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True)


def test_exported_program_saves_and_loads(model, tmp_path):
    torch.export.save(exported(model), tmp_path / "model.pt2")
    program, x = torch.export.load(tmp_path / "model.pt2").module(), torch.randn(5, 128)
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x), rtol=1e-5, atol=1e-5)
    words = {name for name, value in program.state_dict().items() if value.dtype == torch.int32}
    assert words == {"gate.qdata", "up.qdata", "down.qdata"}


def test_export_of_a_subclass_parameter():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, x = nn.Sequential(Scaled(128, 16)).eval(), torch.randn(3, 128)
    quantize_(model, hyperquant_weight(4, effort=0))
    with torch.no_grad():
        program = torch.export.export(model, (x,)).run_decompositions()
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)
