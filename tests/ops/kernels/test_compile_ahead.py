"""Kernels compile ahead of time for the GPUs people have, on a machine without one, and hold their registers where they are hot."""

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from hq_inductor.format.hadamard import hadamard_block  # noqa: E402
from hq_inductor.format.rates import weight_layout  # noqa: E402
from hq_inductor.ops.fused import stages_tiles  # noqa: E402
from hq_inductor.ops.fused_fp4 import BLOCK_K, BLOCK_M, BLOCK_N, NUM_WARPS  # noqa: E402
from hq_inductor.ops.kernels.activations import fp8_scale_kernel, rotate_kernel, rotate_quantize_kernel, row_statistics_kernel  # noqa: E402
from hq_inductor.ops.kernels.block_scaled_matmul import block_scaled_matmul_kernel  # noqa: E402
from hq_inductor.ops.kernels.decode import decode_kernel  # noqa: E402
from hq_inductor.ops.kernels.linear import linear_kernel  # noqa: E402
from hq_inductor.ops.kernels.linear_ring import ring_linear_kernel  # noqa: E402
from hq_inductor.ops.kernels.matmul import int8_matmul_kernel  # noqa: E402
from hq_inductor.ops.kernels.ring_matmul import MATMUL_COLUMNS, MATMUL_KB, MATMUL_STAGES, MATMUL_WARPS, ring_matmul_kernel  # noqa: E402
from hq_inductor.ops.kernels.ring_output import output_bytes  # noqa: E402
from hq_inductor.ops.kernels.rotate_row import rotate_row_kernel  # noqa: E402
from hq_inductor.ops.kernels.shared import row_bytes  # noqa: E402
from hq_inductor.ops.kernels.warpgroup import ring_shape  # noqa: E402
from hq_inductor.ops.launch import REGISTERS, TIGHT_REGISTERS, RingLaunch, fp8_launch, linear_launch, matmul_launch, ring_warps, row_launch  # noqa: E402
from hq_inductor.ops.prologue import LAYER_NORMS, NORMS, PROLOGUES  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_ahead(
    kernel, signature: dict, constants: dict, capability: int, num_warps: int, tmp_path, source_of=ASTSource, **options
) -> tuple[str, int, int]:
    """(SASS, registers, static shared memory in bytes)."""
    signature = {**signature, **dict.fromkeys(constants, "constexpr")}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = source_of(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps, "num_stages": 1, **options}
    )
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    sass = subprocess.run([TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    return sass, int(re.search(r"REG:(\d+)", usage)[1]), int(re.search(r"SHARED:(\d+)", usage)[1])


def loops_of(lines: list[str]) -> list[tuple[int, int]]:
    """First and last line of each loop."""
    labels = {line.rstrip(":"): i for i, line in enumerate(lines) if line.startswith(".L_")}
    branches = [(re.search(r"BRA.*`\((\.L_\w+)\)", line), end) for end, line in enumerate(lines)]
    return [(labels[target[1]], end) for target, end in branches if target and labels[target[1]] < end]


def loop_of(sass: str, instruction: str) -> str:
    """The outermost loop around all of an instruction's places."""
    lines = sass.splitlines()
    places = [i for i, line in enumerate(lines) if instruction in line]
    loops = ["\n".join(lines[begin:end]) for begin, end in loops_of(lines) if begin <= places[0] and places[-1] < end]
    return max(loops, key=len)


def spilled_in_loops(sass: str) -> int:
    """Instructions in loops that spill registers. Compilers that want room for one more warp put a value aside now and then, once."""
    lines = sass.splitlines()
    loops = loops_of(lines)
    return sum(any(begin <= i <= end for begin, end in loops) for i, line in enumerate(lines) if "LDL" in line or "STL" in line)


def layout_constants(lattice: str, bps: float, plain: bool = False) -> tuple[dict, int]:
    layout = weight_layout(4096, bps, lattice).tile
    constants = {
        "LATTICE": lattice,
        "K": layout.rice_parameter,
        "SHIFT": layout.shift if plain else layout.kernel_shift,
        "LENGTH_PLACE": layout.shift + 3 if plain else layout.kernel_length_place,
        "TILE": layout.tile,
        "WORDS": layout.words,
        "RAW": layout.raw_words,
        "WALL_UNIT": layout.wall_unit,
        "ALIGNED": layout.words % 4 == 0,
        "ROW_BYTES": row_bytes(layout.stream_words),
    }
    if not plain:
        constants["GAIN"] = layout.kernel_shift - layout.shift
    return constants, 8 if constants["ROW_BYTES"] == 64 else 4


RING = {
    "words_ptr": "*i32",
    "table_ptr": "*i32",
    "x_ptr": "*i8",
    "act_scale_ptr": "*fp32",
    "bias_ptr": "*bf16",
    "out_ptr": "*bf16",
    "partial_ptr": "*fp32",
    "counter_ptr": "*i32",
    **dict.fromkeys(("M", "M_PAD", "N", "tiles"), "i32"),
    "residual_ptr": "*bf16",
    "stride_residual": "i32",
    **dict.fromkeys(("words1_ptr", "words2_ptr", "words3_ptr"), "*i32"),
    **dict.fromkeys(("bias1_ptr", "bias2_ptr", "bias3_ptr"), "*bf16"),
    **dict.fromkeys(("N1", "N2", "N3"), "i32"),
}
LINEAR = {name: kind for name, kind in RING.items() if name not in ("partial_ptr", "counter_ptr")}
LINEAR |= dict.fromkeys(("dealt", "dealt1", "dealt2", "dealt3"), "i32")


@pytest.mark.parametrize(
    ("capability", "lattice", "bps", "columns", "registers", "siblings"),
    [
        (80, "e8", 4.0, 8, TIGHT_REGISTERS, 1),
        (90, "e8", 4.0, 8, TIGHT_REGISTERS, 3),
        (100, "e8", 4.0, 8, TIGHT_REGISTERS, 1),
        (90, "e8", 4.0, 8, REGISTERS[8], 1),
        (90, "e8", 4.0, 16, REGISTERS[16], 2),
        (90, "e8", 4.0, 32, REGISTERS[32], 4),
        (80, "e8", 4.0, 32, REGISTERS[32], 1),
        (90, "e8", 3.5, 8, REGISTERS[8], 1),
        (90, "d4", 3.0, 8, REGISTERS[8], 2),
        (90, "e8", 2.0, 8, REGISTERS[8], 1),
    ],
)
def test_linear(capability, lattice, bps, columns, registers, siblings, tmp_path):
    constants, num_warps = layout_constants(lattice, bps)
    constants |= {"COLUMNS": columns, "HAS_BIAS": True, "HAS_RESIDUAL": True}
    constants |= {"SIBLINGS": siblings, "NUM_WARPS": num_warps, "PDL": capability >= 90}
    options = {"maxnreg": registers} if registers else {}
    sass, used, shared = compile_ahead(linear_kernel, LINEAR, constants, capability, num_warps, tmp_path, **options)
    tiles_loop = loop_of(sass, "IMMA")
    assert tiles_loop.count("IMMA") >= columns // 8 * 4
    spills = tiles_loop.count("LDL") + tiles_loop.count("STL")
    # capped to let more blocks live on a multiprocessor, newer compilers spill now and then: never more than one instruction in fifty
    assert spills <= (tiles_loop.count(";") // 50 if registers else 0), f"{spills} spilled registers where it is hot"
    assert used <= (registers or 128) and shared <= 49152 + 1024


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_linear_of_small_layers(capability, tmp_path):
    """Blocks of fewer warps than others have, for layers of few tiles."""
    launch = linear_launch(1, 256, 1, 132, 64, capability == 90)
    assert launch.num_warps == 2
    constants, _ = layout_constants("e8", 4.0)
    constants |= {"COLUMNS": 8, "HAS_BIAS": False, "HAS_RESIDUAL": False, "SIBLINGS": 1, "NUM_WARPS": 2, "PDL": capability >= 90}
    sass, used, shared = compile_ahead(linear_kernel, LINEAR, constants, capability, 2, tmp_path, maxnreg=launch.registers)
    assert "LDL" not in sass and "STL" not in sass and used <= launch.registers and shared <= 49152 + 1024


@pytest.mark.parametrize(
    ("lattice", "bps", "columns", "rows", "fp8"),
    [
        ("e8", 4.0, 64, 28672, False),
        ("e8", 4.0, 64, 8192, False),
        ("e8", 4.0, 64, 6144, False),
        ("e8", 4.0, 128, 4096, False),
        ("e8", 5.0, 64, 28672, False),
        ("d4", 3.0, 96, 4096, False),
        ("e8", 4.0, 256, 4096, True),
        ("e8", 3.5, 256, 28672, True),
        ("a2", 4.0, 16, 6144, True),
    ],
)
def test_linear_with_a_ring(lattice, bps, columns, rows, fp8, tmp_path):
    constants, _ = layout_constants(lattice, bps)
    layout = weight_layout(4096, bps, lattice).tile
    stream = constants["ROW_BYTES"]
    launch = fp8_launch(columns, rows, 8, 132, stream) if fp8 else linear_launch(columns, rows, 8, 132, stream, True)
    assert isinstance(launch, RingLaunch) and launch.columns == columns
    blocks = ring_warps(launch.registers) // launch.num_warps
    shape = ring_shape(columns, launch.num_warps, blocks, layout.words, stream, stages_tiles(layout), fp8, launch.sharing)
    steps, stages, staged, kilobytes = shape
    parts = launch.splits if launch.cluster else 1
    constants |= {"COLUMNS": columns, "FP8": fp8, "LARGEST": layout.largest_value, "SPLIT": launch.splits > parts, "PARTS": parts}
    constants |= {"HAS_BIAS": True, "HAS_RESIDUAL": True, "VECTOR": True, "NUM_WARPS": launch.num_warps, "PDL": True}
    constants |= {"SIBLINGS": 2, "SHARING": launch.sharing, "STEPS": steps, "STAGES": stages, "STAGED": staged, "SHARED_KB": kilobytes}
    options = {"maxnreg": launch.registers} if launch.registers else {}
    if parts > 1:
        options["num_ctas"] = parts
    signature = RING | ({"x_ptr": "*fp8e4nv"} if fp8 else {})
    sass, used, shared = compile_ahead(ring_linear_kernel, signature, constants, 90, launch.num_warps, tmp_path, GluonASTSource, **options)
    assert f"{'Q' if fp8 else 'I'}GMMA.64x{columns}x32" in sass and "UBLKCP" in sass
    # blocks of a cluster wait for each other, and read each other's shared memory
    assert ("UCGABAR" in sass) == (parts > 1)
    spills = sass.count("LDL") + sass.count("STL")
    assert spills <= sass.count(";") // 50, f"{spills} spilled registers"
    # registers and shared memory of the blocks that are to live on a multiprocessor together
    assert used * 32 * launch.num_warps * blocks <= 65536 and blocks * (kilobytes + 1) <= 228 and shared <= 1024


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("out", ["blocks", "i8", "fp8e4nv", "bf16", "fp32"])
def test_decode(capability, out, tmp_path):
    blocked, out = out == "blocks", "i8" if out == "blocks" else out
    if capability < 89 and out == "fp8e4nv":
        pytest.skip("no fp8 tensor cores")
    constants, num_warps = layout_constants("e8", 4.0, plain=True)
    constants |= {"CODES": out == "i8", "BLOCKED": blocked, "ROW_SCALE": out == "fp8e4nv", "LARGEST": 64.0, "NUM_WARPS": num_warps}
    constants["PDL"] = capability >= 90
    signature = {"words_ptr": "*i32", "table_ptr": "*i32", "row_scale_ptr": "*fp32", "out_ptr": f"*{out}", "scale_ptr": "*fp32"}
    signature |= {"N": "i32", "tiles": "i32", "scale_rows": "i32"}
    sass, used, _ = compile_ahead(decode_kernel, signature, constants, capability, num_warps, tmp_path, maxnreg=128)
    assert used <= 128
    assert sass.count("LDL") + sass.count("STL") <= sass.count(";") // 100, "spilled registers"
    assert ("STG.E " if blocked else "STG.E.64" if out in ("i8", "fp8e4nv") else "STG.E.128") in sass


@pytest.mark.parametrize(("tile", "bias"), [(512, "bf16"), (384, "fp32")])
def test_ring_matmul(tile, bias, tmp_path):
    constants = {"TILE": tile, "COLUMNS": MATMUL_COLUMNS, "STAGES": MATMUL_STAGES, "VECTOR": True, "HAS_BIAS": True}
    constants |= {"NUM_WARPS": MATMUL_WARPS, "SHARED_KB": MATMUL_KB, "PDL": True}
    signature = {
        "codes_ptr": "*i8",
        "scale_ptr": "*fp32",
        "x_ptr": "*i8",
        "act_scale_ptr": "*fp32",
        "bias_ptr": f"*{bias}",
        "out_ptr": "*bf16",
    }
    signature |= dict.fromkeys(("M", "M_PAD", "N", "N_PAD", "tiles"), "i32")
    sass, used, _ = compile_ahead(ring_matmul_kernel, signature, constants, 90, MATMUL_WARPS, tmp_path, GluonASTSource)
    assert sass.count(f"IGMMA.64x{MATMUL_COLUMNS}x32") >= tile // 32 and "UBLKCP" in sass
    assert sass.count("LDL") + sass.count("STL") == 0 and used * 32 * MATMUL_WARPS <= 65536
    # sums go out through the ring
    assert output_bytes(MATMUL_COLUMNS, 128) <= 1024 * MATMUL_KB <= 1024 * 227


@pytest.mark.parametrize(
    ("capability", "scale", "instruction"),
    [(100, "u8", "UTCOMMA"), (100, "fp8e4nv", "UTCOMMA"), (120, "u8", "OMMA"), (120, "fp8e4nv", "OMMA")],
)
def test_block_scaled_matmul(capability, scale, instruction, tmp_path):
    """By the instructions for 4-bit floats, not by emulation."""
    constants = {"GROUP": 32 if scale == "u8" else 16, "FACTORS": scale != "u8", "HAS_BIAS": True}
    constants |= {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "GROUP_M": 8}
    signature = {"x_ptr": "*u8", "x_scale_ptr": f"*{scale}", "weight_ptr": "*u8", "weight_scale_ptr": f"*{scale}"}
    signature |= {"factor_x_ptr": "*fp32", "factor_w_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
    signature |= dict.fromkeys(("M", "N", "pieces"), "i32")
    sass, _, _ = compile_ahead(block_scaled_matmul_kernel, signature, constants, capability, NUM_WARPS, tmp_path, num_stages=3)
    assert instruction in sass and "HMMA" not in sass
    assert sass.count("LDL") + sass.count("STL") == 0, "spilled registers"


ACTIVATIONS = {"x_ptr": "*bf16", "gate_ptr": "*bf16", "norm_weight_ptr": "*bf16", "norm_bias_ptr": "*bf16"}


def prologue_constants(name: str) -> dict:
    form = {"ADD_ONE": name.endswith("_1p"), "NORM_ROWS": name == "layer_norm_1p"}
    return {"PROLOGUE": name.removesuffix("_1p"), "HAS_WEIGHT": name in NORMS, "HAS_BIAS": name in LAYER_NORMS, **form}


@pytest.mark.parametrize(("capability", "prologue"), [(80, "none"), (80, "layer_norm"), (100, "rms_norm"), *((90, p) for p in PROLOGUES)])
def test_rotate_quantize(capability, prologue, tmp_path):
    constants = {"TILE": 512, "BLOCK": 512, "PARTS": 1, "SEED": 0, "HAS_SCALE": True, "LATTICE": "e8", "ALIGNED": True, "RING": 0}
    pointers = {**ACTIVATIONS, "pre_scale_ptr": "*bf16", "q_ptr": "*i8", "act_scale_ptr": "*fp32", "counter_ptr": "*i32"}
    scalars = {
        **dict.fromkeys(("M", "M_PAD", "in_features", "stride_xm", "stride_gm", "stride_norm", "period", "counters"), "i32"),
        "eps": "fp32",
    }
    constants |= {"PDL": capability >= 90, "RING": 64 if capability == 90 else 0, **prologue_constants(prologue)}
    constants["BEFORE_DECODER"] = prologue == "rms_norm"
    sass, _, _ = compile_ahead(rotate_quantize_kernel, {**pointers, **scalars}, constants, capability, 1, tmp_path)
    assert spilled_in_loops(sass) == 0, "spilled registers"
    assert "LDG.E.U16" not in sass and "LDG.E.128" in sass


@pytest.mark.parametrize(
    ("capability", "prologue", "out"),
    [
        (80, "none", "bf16"),
        (80, "none", "i8"),
        (90, "layer_norm_1p", "bf16"),
        (90, "silu_mul", "i8"),
        (90, "rms_norm", "fp8e4nv"),
        (100, "none", "fp8e4nv"),
    ],
)
def test_rotate(capability, prologue, out, tmp_path):
    constants = {"TILE": 384, "BLOCK": 128, "PARTS": 4, "SEED": 7, "HAS_SCALE": False, "ALIGNED": True, **prologue_constants(prologue)}
    constants["PDL"] = capability >= 90
    pointers = {**ACTIVATIONS, "statistics_ptr": "*fp32", "pre_scale_ptr": "*bf16", "out_ptr": f"*{out}", "scale_ptr": "*fp32"}
    scalars = dict.fromkeys(("in_features", "stride_xm", "stride_gm", "stride_norm", "period", "tiles"), "i32")
    sass, _, _ = compile_ahead(rotate_kernel, {**pointers, **scalars}, {**constants, "LATTICE": "e8"}, capability, 1, tmp_path)
    assert spilled_in_loops(sass) == 0, "spilled registers"


@pytest.mark.parametrize("prologue", ["none", "rms_norm_cast", "silu_mul"])
def test_fp8_scale(prologue, tmp_path):
    constants = {"TILE": 384, "PADDED": 512, "HAS_SCALE": True, "ALIGNED": True, **prologue_constants(prologue)}
    pointers = {**ACTIVATIONS, "statistics_ptr": "*fp32", "pre_scale_ptr": "*bf16", "scale_ptr": "*fp32"}
    scalars = dict.fromkeys(("in_features", "stride_xm", "stride_gm", "stride_norm", "period", "tiles"), "i32")
    sass, _, _ = compile_ahead(fp8_scale_kernel, {**pointers, **scalars}, constants, 90, 4, tmp_path)
    assert spilled_in_loops(sass) == 0, "spilled registers"


@pytest.mark.parametrize(
    ("capability", "prologue", "tile", "tiles", "out", "ring"),
    [
        (90, "none", 512, 28, "fp8e4nv", None),
        (90, "layer_norm_1p", 512, 8, "fp8e4nv", None),
        (90, "gelu_mul", 1408, 8, "fp8e4nv", None),
        (100, "rms_norm", 384, 9, "fp8e4nv", None),
        (80, "rms_norm_cast", 512, 8, "bf16", None),
        (90, "layer_norm", 1536, 3, "i8", None),
        (100, "none", 512, 28, "i8", None),
        (80, "silu_mul", 512, 28, "i8", 0),
        (90, "none", 384, 9, "i8", 64),
        (90, "rms_norm", 512, 28, "i8", 64),
        (90, "none", 512, 8, "fp8e4nv", 64),
    ],
)
def test_rotate_row(capability, prologue, tile, tiles, out, ring, tmp_path):
    shape = {"BLOCK": hadamard_block(tile), "PARTS": triton.next_power_of_2(tile // hadamard_block(tile))}
    launch = row_launch(4096, tiles, *shape.values())
    constants = {"TILES": launch.tiles, "TILE": tile, **shape, "SEED": 7, "HAS_SCALE": True, "LATTICE": "a2", "ALIGNED": True}
    constants |= {"PDL": capability >= 90, "PLAIN": ring is None, "RING": ring or 0, "NUM_WARPS": launch.num_warps}
    constants["BEFORE_DECODER"] = ring is None
    pointers = {**ACTIVATIONS, "pre_scale_ptr": "*bf16", "out_ptr": f"*{out}", "scale_ptr": "*fp32", "counter_ptr": "*i32"}
    scalars = ("M", "M_PAD", "in_features", "stride_xm", "stride_gm", "stride_norm", "period", "tiles", "counters")
    signature = {**pointers, **dict.fromkeys(scalars, "i32"), "eps": "fp32"}
    constants |= prologue_constants(prologue)
    sass, _, _ = compile_ahead(rotate_row_kernel, signature, constants, capability, launch.num_warps, tmp_path, GluonASTSource)
    assert spilled_in_loops(sass) == 0, "spilled registers"
    assert "LDG.E.U16" not in sass and "LDG.E.128" in sass and "STG.E.128" in sass and "STG.E.U8" not in sass
    # threads meet for sums over the row, not for the transform
    assert sass.count("BAR.SYNC") <= 20


@pytest.mark.parametrize("prologue", ["rms_norm", "layer_norm"])
def test_row_statistics(prologue, tmp_path):
    signature = {"x_ptr": "*bf16", "statistics_ptr": "*fp32", "in_features": "i32", "stride_xm": "i32", "eps": "fp32"}
    sass, _, _ = compile_ahead(row_statistics_kernel, signature, {"PROLOGUE": prologue, "ALIGNED": True}, 90, 4, tmp_path)
    assert spilled_in_loops(sass) == 0, "spilled registers"


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("batch", [64, 4096])
def test_int8_matmul(capability, batch, tmp_path):
    launch = matmul_launch(batch, 4096, 8, 132, capability >= 90)
    constants = {
        "TILE": 512,
        "HAS_BIAS": True,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_K": launch.block_k,
        "GROUP_M": 8,
    }
    signature = {
        "x_ptr": "*i8",
        "act_scale_ptr": "*fp32",
        "codes_ptr": "*i8",
        "scale_ptr": "*fp32",
        "bias_ptr": "*bf16",
        "out_ptr": "*bf16",
    }
    scalars = dict.fromkeys(("M", "N", "tiles"), "i32")
    sass, _, _ = compile_ahead(
        int8_matmul_kernel, {**signature, **scalars}, constants, capability, launch.num_warps, tmp_path, num_stages=launch.stages
    )
    assert "IMMA" in sass or "IGMMA" in sass or "UTC" in sass
    assert sass.count("LDL") + sass.count("STL") <= sass.count(";") // 50
