"""`hq-inductor quantize | inspect | bench`: packed checkpoints from the command line.

Tables and JSON go to standard output, progress and errors to standard error. Exit status 1: the command failed; 2: wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torchao.quantization import FqnToConfig

from .quantize import hyperquant_weight
from .tensor import HyperQuantTensor

REPORT_FILE = "hyperquant_report.json"
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".index.json")


class CommandError(RuntimeError):
    """A command that cannot be carried out; its text is all a user needs."""


def _progress(items, description: str):
    from tqdm import tqdm

    return tqdm(items, desc=description, file=sys.stderr)


def _table(rows: list[dict], columns: dict[str, str]) -> str:
    """Rows as text. `columns` maps keys to format specifications; missing values show as a dash."""

    def cell(value, spec: str) -> str:
        return "-" if value is None else format(value, spec)

    lines = [list(columns)] + [[cell(row.get(key), spec) for key, spec in columns.items()] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    left = [spec == "" for spec in columns.values()]
    return "\n".join(
        "  ".join(text.ljust(w) if to_left else text.rjust(w) for text, w, to_left in zip(line, widths, left, strict=True)).rstrip()
        for line in lines
    )


def _safetensors_files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.exists() for file in files):
        raise CommandError(f"{path} must be a safetensors file or a directory with some, found none")
    return files


def _counterpart(name: str, keys: Iterable[str]) -> str | None:
    """The key of the same weight in another checkpoint, which may carry a prefix more or less."""
    return next((key for key in keys if key == name or key.endswith("." + name) or name.endswith("." + key)), None)


def _describe(checkpoint, reference, stored_snr: dict[str, float]) -> dict:
    """Rows and totals of a packed checkpoint; SNRs against `reference` if there is one, otherwise as stored at quantization."""
    rows, signal, noise = [], 0.0, 0.0
    names = _progress(checkpoint.packed, "comparing") if reference else checkpoint.packed
    for name in names:
        weight = checkpoint.weight(name)
        snr = stored_snr.get(name)
        key = _counterpart(name, reference.plain) if reference else None
        if key is not None:
            original = reference.tensor(key).to(torch.float64)
            if original.shape != weight.shape:
                raise CommandError(f"{key}: shape must be {tuple(weight.shape)} as in the packed checkpoint, got {tuple(original.shape)}")
            s, n = original.square().sum().item(), (weight.dequantize(torch.float64) - original).square().sum().item()
            signal, noise = signal + s, noise + n
            snr = 10 * math.log10(s / n) if n > 0 else None
        row = {"name": name, "shape": list(weight.shape), "bps": weight.bps, "lattice": weight.lattice, "tile": weight.tile}
        rows.append({**row, "size_bytes": weight.size_bytes, "bits_per_weight": weight.bits_per_weight, "snr_db": snr})
    size, numel = sum(row["size_bytes"] for row in rows), sum(math.prod(row["shape"]) for row in rows)
    total = {
        "weights": len(rows),
        "numel": numel,
        "size_bytes": size,
        "bits_per_weight": 8 * size / numel if numel else None,
        "snr_db": 10 * math.log10(signal / noise) if noise > 0 else stored_snr.get(""),
        "other_tensors": len(checkpoint.plain),
        "other_bytes": sum(t.numel() * t.element_size() for t in map(checkpoint.tensor, checkpoint.plain)),
    }
    return {"weights": rows, "total": total}


def _print_description(report: dict) -> None:
    columns = {"name": "", "shape": ">", "stored as": "", "bytes": ",", "bits/weight": ".4f", "SNR dB": ".2f"}
    rows = [
        {
            "name": row["name"],
            "shape": "x".join(map(str, row["shape"])),
            "stored as": f"{row['lattice']} at {row['bps']:g} bps, tile {row['tile']}",
            "bytes": row["size_bytes"],
            "bits/weight": row["bits_per_weight"],
            "SNR dB": row["snr_db"],
        }
        for row in report["weights"]
    ]
    total = report["total"]
    print(_table(rows, columns))
    snr = "" if total["snr_db"] is None else f", SNR {total['snr_db']:.2f} dB"
    rate = "" if total["bits_per_weight"] is None else f" = {total['bits_per_weight']:.4f} bits/weight"
    print(f"{total['weights']} packed weights, {total['numel']:,} values, {total['size_bytes']:,} bytes{rate}{snr}")
    print(f"{total['other_tensors']} other tensors, {total['other_bytes']:,} bytes")
    if "calibration" in report:
        used = report["calibration"]
        snr = used["output_snr_db"]
        quality = "" if snr is None else f", SNR of the output on the next {used['held_out_tokens']}: {snr:.2f} dB"
        print(f"calibrated on {used['tokens']:,} tokens of {used['text']}{quality}")


def _quantize_calibrated(args: argparse.Namespace, source: Path, model_class, config) -> tuple:
    """The model, quantized with text, and what the report says of it: the output's SNR on the text that follows."""
    from transformers import AutoTokenizer

    from .balance import run_model
    from .integrations.transformers_calibration import calibration_batches, quantize_calibrated

    model = model_class.from_pretrained(source, dtype=args.dtype).to(args.device).eval()
    context = min(512, getattr(model.config.get_text_config(), "max_position_embeddings", None) or 512)
    tokens = args.calibrate_tokens + context
    *batches, held_out = calibration_batches(AutoTokenizer.from_pretrained(source), args.calibrate, tokens, context)
    held_out = {name: x.to(model.device) for name, x in held_out.items()}
    with torch.no_grad():
        expected, _ = run_model(model, held_out)
        quantize_calibrated(model, config, batches)
        found, _ = run_model(model, held_out)
    noise = (found.double() - expected.double()).square().sum().item()
    snr = 10 * math.log10(expected.double().square().sum().item() / noise) if noise > 0 else None
    used = {"text": Path(args.calibrate).name, "tokens": len(batches) * context, "held_out_tokens": context, "output_snr_db": snr}
    return model, used


def _rates(default, overrides: list[str], options: dict):
    """The torchao config: one rate, or rates by layer."""
    config = hyperquant_weight(bps=default, **options)
    if not overrides:
        return config
    by_layer = {}
    for override in overrides:
        pattern, _, rate = override.rpartition("=")
        try:
            by_layer[f"re:{pattern}"] = hyperquant_weight(bps=float(rate), **options)
        except ValueError as error:
            raise CommandError(f"--rate must be PATTERN=BPS, got {override!r}: {error}") from error
    with warnings.catch_warnings():
        # torchao deprecates `_default` but has nothing else that means all other linear layers
        warnings.simplefilter("ignore")
        return FqnToConfig({**by_layer, "_default": config})


def quantize(args: argparse.Namespace) -> None:
    """Quantize a model directory while reading it, write the packed one beside its tokenizer, and report."""
    import transformers
    from transformers import AutoConfig, AutoModel

    from .integrations.safetensors import PackedCheckpoint
    from .integrations.transformers import HyperQuantConfig

    source, target = Path(args.source), Path(args.target)
    if not (source / "config.json").is_file():
        raise CommandError(f"IN must be a directory saved by transformers (with a config.json), got {source}")
    if target.exists() and any(target.iterdir()):
        raise CommandError(f"OUT must not exist or be empty, got {target}")
    names = ("lattice", "tile", "seed", "balance_columns", "effort")
    options = {name: getattr(args, name) for name in names}
    config = HyperQuantConfig(quant_type=_rates(args.bps, args.rate, options), modules_to_not_convert=args.keep)
    architecture = (AutoConfig.from_pretrained(source).architectures or [""])[0]
    model_class = getattr(transformers, architecture, AutoModel)
    calibration = None
    if args.calibrate:
        model, calibration = _quantize_calibrated(args, source, model_class, config)
    else:
        model = model_class.from_pretrained(source, quantization_config=config, dtype=args.dtype, device_map=args.device)
    model.save_pretrained(target, max_shard_size=args.max_shard_size)
    # tokenizers, processors, chat templates: everything that is neither weights nor written above
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHT_FILES) and not (target / file.name).exists():
            shutil.copy2(file, target / file.name)
    checkpoint = PackedCheckpoint(_safetensors_files(target))
    if not checkpoint.packed:
        raise CommandError(f"no layer of {source} was quantized")
    originals = sorted(source.glob("*.safetensors"))
    # balanced columns differ from the original ones by more than noise
    reference = PackedCheckpoint(originals) if originals and not args.no_snr and calibration is None else None
    report = _describe(checkpoint, reference, {})
    if calibration is not None:
        report["calibration"] = calibration
    (target / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report)) if args.json else _print_description(report)


def inspect(args: argparse.Namespace) -> None:
    """Check every byte of a packed checkpoint, then list rate, SNR and bytes of each weight."""
    from .integrations.safetensors import PackedCheckpoint

    path = Path(args.path)
    checkpoint = PackedCheckpoint(_safetensors_files(path))
    checkpoint.check()
    reference = PackedCheckpoint(_safetensors_files(Path(args.reference))) if args.reference else None
    stored: dict[str, float] = {}
    report_file = (path if path.is_dir() else path.parent) / REPORT_FILE
    saved = json.loads(report_file.read_text()) if report_file.is_file() else {}
    if reference is not None and "calibration" in saved:
        raise CommandError(f"--reference must not be given for {path}: calibration scaled the columns that it would be compared with")
    if reference is None and saved:
        stored = {row["name"]: row["snr_db"] for row in saved["weights"]} | {"": saved["total"]["snr_db"]}
    report = _describe(checkpoint, reference, stored)
    if "calibration" in saved:
        report["calibration"] = saved["calibration"]
    print(json.dumps(report)) if args.json else _print_description(report)


def _median_us(function, seconds: float) -> float:
    from torch.utils.benchmark import Timer

    return 1e6 * Timer("function()", globals={"function": function}).blocked_autorange(min_run_time=seconds).median


def bench(args: argparse.Namespace) -> None:
    """Time `F.linear` with packed and with dense weights, after checking that the packed one is right."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    shapes = args.shape or ([(4096, 4096), (14336, 4096), (4096, 14336)] if on_gpu else [(1024, 1024)])
    batches = args.batch or ([1, 16, 256] if on_gpu else [1, 16])
    dtype = getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32"))
    cases = [(shape, bps, batch) for shape in shapes for bps in args.bps for batch in batches]
    rows = []
    for (n, k), bps, m in _progress(cases, "timing"):
        generator = torch.Generator().manual_seed(0)
        dense = (torch.randn(n, k, generator=generator) / k**0.5).to(device, dtype)
        x = torch.randn(m, k, generator=generator).to(device, dtype)
        weight = HyperQuantTensor.from_hp(dense, bps=bps, lattice=args.lattice)
        with torch.inference_mode():
            exact = x.double() @ weight.dequantize(torch.float64).t()
            error = ((F.linear(x, weight).double() - exact).norm() / exact.norm()).item()
            # fp32 accumulation of k products, then one rounding to the output dtype
            if not error < 2 * torch.finfo(dtype).eps + k**0.5 * torch.finfo(torch.float32).eps:
                raise CommandError(f"F.linear of {n}x{k} at {bps:g} bps is wrong: relative error {error:.3g}; not timed")
            ours = _median_us(lambda x=x, weight=weight: F.linear(x, weight), args.seconds)
            other = _median_us(lambda x=x, dense=dense: F.linear(x, dense), args.seconds)
        row = {"N": n, "K": k, "M": m, "bps": bps, "hyperquant_us": ours, "dense_us": other, "speedup": other / ours}
        rows.append({**row, "packed_GB/s": weight.size_bytes / ours / 1e3, "relative_error": error})
    name = torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine()
    report = {
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(dtype),
        "lattice": args.lattice,
    }
    if args.json:
        print(json.dumps({**report, "rows": rows}))
        return
    print(", ".join(f"{key} {value}" for key, value in report.items()))
    columns = {"N": "d", "K": "d", "M": "d", "bps": "g", "hyperquant_us": ".1f", "dense_us": ".1f", "speedup": ".3f", "packed_GB/s": ".2f"}
    print(_table(rows, columns))
    print("median of the call as Python makes it, caches warm; dense: F.linear with the unquantized weight")


def _shape(text: str) -> tuple[int, int]:
    n, separator, k = text.partition("x")
    if not separator or not n.isdigit() or not k.isdigit():
        raise argparse.ArgumentTypeError(f"must be NxK, got {text!r}")
    return int(n), int(k)


def parser() -> argparse.ArgumentParser:
    main_parser = argparse.ArgumentParser(prog="hq-inductor", description="HyperQuant weights from the command line.")
    commands = main_parser.add_subparsers(dest="command", required=True)

    p = commands.add_parser("quantize", help="quantize a model directory of transformers")
    p.add_argument("source", metavar="IN", help="directory saved by transformers")
    p.add_argument("target", metavar="OUT", help="directory to write; must not exist or be empty")
    p.add_argument("--bps", type=float, default=4.0, help="bits per weight, a multiple of 1/8 (default 4)")
    p.add_argument("--rate", action="append", default=[], metavar="PATTERN=BPS", help="another rate for layers whose name matches fully")
    p.add_argument("--keep", action="append", metavar="NAME", help="layers to keep (default: tied weights and the output head)")
    p.add_argument("--lattice", default="e8", help="e8, d4, a2 or z (default e8)")
    p.add_argument("--tile", type=int, help="coefficients that share a scale (default: chosen by layer)")
    p.add_argument("--seed", type=int, default=0, help="signs of the Hadamard transform (default 0)")
    p.add_argument("--balance-columns", action="store_true", help="scale columns before the rotation (16 more bits per column)")
    p.add_argument("--calibrate", metavar="FILE", help='text, or .jsonl with "text", for column scales and error feedback (default: none)')
    p.add_argument("--calibrate-tokens", type=int, default=4096, metavar="N", help="how much of it (default 4096)")
    p.add_argument("--effort", type=int, default=1, help="0 to 2, how hard the encoder tries (default 1)")
    p.add_argument("--dtype", default="auto", help="dtype of what is not quantized (default: the checkpoint's)")
    p.add_argument("--device", default="cpu", help="where to quantize (default cpu)")
    p.add_argument("--max-shard-size", default="5GB", help="largest file to write (default 5GB)")
    p.add_argument("--no-snr", action="store_true", help="do not compare with the original weights")
    p.set_defaults(run=quantize)

    p = commands.add_parser("inspect", help="check a packed checkpoint and list what it holds")
    p.add_argument("path", metavar="PATH", help="directory or safetensors file")
    p.add_argument("--reference", metavar="DIR", help="the original checkpoint, for the SNR")
    p.set_defaults(run=inspect)

    p = commands.add_parser("bench", help="time linear layers on this device")
    p.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    p.add_argument("--shape", type=_shape, action="append", metavar="NxK", help="weight shape; may be given more than once")
    p.add_argument("--batch", type=int, action="append", metavar="M", help="rows of the activation; may be given more than once")
    p.add_argument("--bps", type=float, nargs="+", default=[4.0], help="rates (default 4)")
    p.add_argument("--lattice", default="e8", help="e8, d4, a2 or z (default e8)")
    p.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on a GPU, float32 on a CPU")
    p.add_argument("--seconds", type=float, default=0.5, help="time to measure each case (default 0.5)")
    p.set_defaults(run=bench)

    for p in commands.choices.values():
        p.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return main_parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = parser().parse_args(arguments)
    try:
        args.run(args)
    except ModuleNotFoundError as error:
        print(f'hq-inductor: error: {error}; pip install "hq-inductor[cli]"', file=sys.stderr)
        return 1
    except (CommandError, ValueError, TypeError, OSError) as error:
        print(f"hq-inductor: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
