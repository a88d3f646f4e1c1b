"""Quantize and compile a diffusion transformer and compare its pictures with those of the float model.

    python examples/diffusion.py

A small PixArt transformer of diffusers (adaptive layer norm, self attention, cross attention to a caption) is trained here by flow matching
on pictures of squares and discs. From the same noise and captions, float and packed models draw the same pictures; reported is the peak
signal-to-noise ratio (PSNR) between them, as for a video model's frames. The first rate runs compiled, the others eagerly.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel
from torch import nn
from torchao.quantization import quantize_
from tqdm import tqdm

from hq_inductor import HyperQuantLinear, hyperquant_weight, quantization_report

SIZE, CAPTION, TOKENS = 16, 128, 4


def pictures(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures `[count, 1, 16, 16]` in [-1, 1] and their captions `[count, 4, 128]`: shape, column, row and size, a token each."""
    kind = torch.randint(2, (count,), generator=generator)
    center, radius = 4 + 8 * torch.rand(count, 2, generator=generator), 2 + 3 * torch.rand(count, generator=generator)
    axis = torch.arange(SIZE) + 0.5
    dx, dy = (axis - center[:, 0, None])[:, None, :].abs(), (axis - center[:, 1, None])[:, :, None].abs()
    distance = torch.where(
        kind[:, None, None] == 0, torch.maximum(dx.expand(-1, SIZE, -1), dy.expand(-1, -1, SIZE)), (dx**2 + dy**2).sqrt()
    )
    image = 2 * torch.sigmoid(3 * (radius[:, None, None] - distance)) - 1
    values = torch.stack([2.0 * kind - 1, center[:, 0] / 4 - 2, center[:, 1] / 4 - 2, radius - 3.5], dim=-1)
    waves = torch.arange(1, CAPTION // 2 + 1) / 8
    angles = values[..., None] * waves
    return image[:, None], torch.cat([angles.sin(), angles.cos()], dim=-1)


def denoiser() -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=2,
        cross_attention_dim=128,
        sample_size=SIZE,
        patch_size=4,
        caption_channels=CAPTION,
        use_additional_conditions=False,
    )


def velocity(model: nn.Module, x: torch.Tensor, caption: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    unused = {"resolution": None, "aspect_ratio": None}
    return model(x, encoder_hidden_states=caption, timestep=1000 * time, added_cond_kwargs=unused, return_dict=False)[0]


def train(model: nn.Module, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    progress = tqdm(range(steps), desc="training")
    for _ in progress:
        image, caption = pictures(64, generator)
        noise, time = torch.randn(image.shape, generator=generator), torch.rand(len(image), generator=generator)
        x = torch.lerp(image, noise, time[:, None, None, None])
        loss = F.mse_loss(velocity(model, x, caption, time), noise - image)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")


@torch.inference_mode()
def draw(model: nn.Module, noise: torch.Tensor, caption: torch.Tensor, steps: int = 12) -> torch.Tensor:
    """Euler steps from noise to pictures."""
    x = noise
    for step in range(steps, 0, -1):
        x = x - velocity(model, x, caption, torch.full((len(x),), step / steps)) / steps
    return x


def psnr_db(reference: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    """PSNR of each picture; the range of values is 2."""
    return 10 * torch.log10(4 / (picture - reference).square().mean((1, 2, 3)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--bps", type=float, nargs="+", default=[4.0, 3.0, 2.0], help="rates to compare (default 4 3 2)")
    parser.add_argument("--steps", type=int, default=600, help="training steps (default 600)")
    parser.add_argument("--no-compile", action="store_true", help="run eagerly")
    args = parser.parse_args()
    try:
        configs = [hyperquant_weight(bps=bps) for bps in args.bps]
    except ValueError as error:
        parser.error(str(error))
    model = denoiser()
    train(model, args.steps)
    model.eval()
    generator = torch.Generator().manual_seed(1)
    image, caption = pictures(16, generator)
    noise = torch.randn(image.shape, generator=generator)
    reference = draw(model, noise, caption)
    print(f"\nfloat model: PSNR {psnr_db(image, reference).mean():.2f} dB to what the captions describe")
    for config in configs:
        packed = copy.deepcopy(model)
        quantize_(packed, config)
        report = quantization_report(packed)
        modulation = packed.adaln_single.linear
        cross = packed.transformer_blocks[0].attn2.to_k
        assert isinstance(modulation, HyperQuantLinear) and isinstance(cross, HyperQuantLinear)
        compiled = config is configs[0] and not args.no_compile
        drawn = draw(torch.compile(packed, fullgraph=True) if compiled else packed, noise, caption)
        ratio = psnr_db(reference, drawn)
        print(
            f"{report.bits_per_weight:.3f} bits per weight, {len(report.quantized)} layers{', compiled' if compiled else ''}: "
            f"PSNR {ratio.mean():.2f} dB to the float model's pictures (worst {ratio.min():.2f}), "
            f"{psnr_db(image, drawn).mean():.2f} dB to what the captions describe"
        )


if __name__ == "__main__":
    main()
