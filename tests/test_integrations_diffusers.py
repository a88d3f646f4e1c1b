"""A diffusion transformer of diffusers: modulated norms, self attention, cross attention."""

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

diffusers = pytest.importorskip("diffusers")

from diffusers import PixArtTransformer2DModel, TorchAoConfig  # noqa: E402

from hq_inductor import HyperQuantLinear, HyperQuantTensor, hyperquant_weight, quantization_report  # noqa: E402


def denoiser():
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=1,
        out_channels=1,
        num_layers=1,
        cross_attention_dim=128,
        sample_size=8,
        patch_size=2,
        caption_channels=128,
        use_additional_conditions=False,
    ).eval()


def run(model):
    generator = torch.Generator().manual_seed(1)
    x, caption = torch.randn(2, 1, 8, 8, generator=generator), torch.randn(2, 3, 128, generator=generator)
    unused = {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        return model(x, encoder_hidden_states=caption, timestep=torch.tensor([100.0, 700.0]), added_cond_kwargs=unused, return_dict=False)[
            0
        ]


def test_every_linear_layer_of_a_block():
    model = denoiser()
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    expected = run(model)
    quantize_(model, hyperquant_weight(bps=5))
    packed = {name for name, module in model.named_modules() if isinstance(module, HyperQuantLinear)}
    assert packed == linears and {"adaln_single.linear", "transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn2.to_k"} <= packed
    assert quantization_report(model).bits_per_weight == 5
    error = (run(model) - expected).norm() / expected.norm()
    assert 0 < error < 0.15
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(model), rtol=1e-4, atol=1e-5)


def test_from_pretrained(tmp_path):
    """diffusers' own TorchAoConfig quantizes while loading."""
    model = denoiser()
    model.save_pretrained(tmp_path)
    config = TorchAoConfig(hyperquant_weight(bps=4), modules_to_not_convert=["proj_out"])
    loaded = PixArtTransformer2DModel.from_pretrained(tmp_path, quantization_config=config, torch_dtype=torch.float32)
    assert type(loaded.proj_out) is nn.Linear
    weight = loaded.transformer_blocks[0].attn2.to_v.weight
    assert isinstance(weight, HyperQuantTensor)
    assert torch.equal(weight.qdata, HyperQuantTensor.from_hp(model.transformer_blocks[0].attn2.to_v.weight, bps=4).qdata)
    again = denoiser()
    quantize_(again, hyperquant_weight(bps=4), filter_fn=lambda module, name: isinstance(module, nn.Linear) and name != "proj_out")
    torch.testing.assert_close(run(loaded), run(again))


def test_file_round_trip(tmp_path):
    from hq_inductor.integrations.safetensors import load_file, save_file

    model = denoiser()
    quantize_(model, hyperquant_weight(bps=4))
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    again = denoiser()
    again.load_state_dict(load_file(tmp_path / "m.safetensors"), assign=True)
    torch.testing.assert_close(run(again), run(model))
