import json
import math
import sys

import diffusion_block
import pytest
import torch

from ..passes import graphs

SHAPE = diffusion_block.TINY["tiny"]
CPU = torch.device("cpu")


@pytest.fixture
def without_codegen(monkeypatch):
    """Graphs are rewritten, and run without generating code: that takes most of the time."""

    def compile_step(call, mode, device):
        compiled = torch.compile(call, fullgraph=True, dynamic=False, backend=graphs.without_codegen)
        with torch.compiler.config.patch(force_disable_caches=True):
            compiled()
        return compiled, 0.0

    monkeypatch.setattr(diffusion_block, "compile_step", compile_step)


@torch.no_grad()
def test_block_is_the_one_that_passes_are_tested_with():
    torch.manual_seed(0)
    block, tested = diffusion_block.DiTBlock(SHAPE), graphs.DiTBlock()
    tested.load_state_dict(block.state_dict())
    for norm in (tested.norm1, tested.norm2, tested.norm3):
        norm.eps = 1e-6
    inputs = torch.randn(2, 6, 128), torch.randn(2, 4, 128), torch.randn(2, 128)
    torch.testing.assert_close(block(*inputs), tested(*inputs))


@torch.no_grad()
def test_what_blocks_add():
    torch.manual_seed(0)
    state = diffusion_block.Forward(diffusion_block.make_blocks(SHAPE, 2, CPU), SHAPE, images=3)
    state.step()
    assert state.out.shape == (3, 16, 128) and 0.1 < state.added().std() < 2
    torch.testing.assert_close(state.added() + state.x.float(), state.out.float())


def test_snr():
    expected = torch.tensor([3.0, -4.0])
    assert diffusion_block.snr_db(expected + torch.tensor([0.3, 0.4]), expected) == pytest.approx(20)
    assert diffusion_block.snr_db(expected, expected) == math.inf


def test_table_and_check():
    bf16 = diffusion_block.Result("dit-xl-2", 1, 4, "bf16", None, 3.0, 82)
    off = diffusion_block.Result("dit-xl-2", 1, 4, "4.0", "off", 2.0, 96, 0, {"switched off": 12})
    on = diffusion_block.Result("dit-xl-2", 1, 4, "4.0", "on", 1.5, 84, 12, {}, 34.56)
    header, _, *rows = diffusion_block.table([bf16, off, on]).splitlines()
    assert "ms per forward of 4 layers" in header
    assert rows == [
        "| dit-xl-2 | 1 | bf16 | 3.000 | 1.00x | 20.5 | - | - | - |",
        "| dit-xl-2 | 1 | ours 4 bits, fuse_norm off | 2.000 | 1.50x | 24 | 0 | 12: switched off | - |",
        "| dit-xl-2 | 1 | ours 4 bits, fuse_norm on | 1.500 | 2.00x | 21 | 12 | - | 34.6 |",
    ]
    diffusion_block.check([bf16, off, on])
    for wrong in (7.0, math.nan):
        with pytest.raises(SystemExit, match="dit-xl-2 with 1 images, fuse_norm on"):
            diffusion_block.check([diffusion_block.Result("dit-xl-2", 1, 4, "4.0", "on", 1.5, snr_db=wrong)])


def test_command(tmp_path, monkeypatch, capsys, without_codegen):
    """All norms move, and the forward stays what it is."""
    file = tmp_path / "figures.json"
    arguments = "--device cpu --tiny --layers 1 --images 2 --steps 1 --fuse-norm auto on off --json".split()
    monkeypatch.setattr(sys, "argv", ["diffusion_block.py", *arguments, str(file)])
    diffusion_block.main()
    bf16, off, on, auto = json.loads(file.read_text())["results"]
    assert [r["fuse_norm"] for r in (bf16, off, on, auto)] == [None, "off", "on", "auto"]
    assert all(r["forward_ms"] > 0 and r["images"] == 2 for r in (bf16, off, on, auto))
    assert [r["made"] for r in (bf16, off, on, auto)] == [0, 0, 3, 0]
    assert off["left"] == {"switched off": 3} and on["left"] == bf16["left"] == {} and auto["left"] == {"does not pay on cpu": 3}
    assert 30 < on["snr_db"] < 60
    out = capsys.readouterr().out
    assert out.count("| ours 4 bits, fuse_norm ") == 3 and out.count("| same |") == 1
