"""HyperQuant for torch.compile: entropy-coded lattice weights at an exact rate, as torchao tensors."""

from . import compile as _compile  # noqa: F401  (the first traced layer installs the passes)
from . import ops, passes
from .allocate import allocate_rates
from .balance import BalancedGroup, balance_columns
from .cache import KVConfig, PagedKV, PageTable, QuantizedKV
from .module import HyperQuantLinear
from .moments import measure_moments
from .quantize import HyperQuantWeightConfig, hyperquant_weight
from .report import QuantizationReport, quantization_report
from .tensor import HyperQuantTensor

__version__ = "0.1.0"

__all__ = [
    "BalancedGroup",
    "HyperQuantLinear",
    "HyperQuantTensor",
    "HyperQuantWeightConfig",
    "KVConfig",
    "PageTable",
    "PagedKV",
    "QuantizationReport",
    "QuantizedKV",
    "allocate_rates",
    "balance_columns",
    "hyperquant_weight",
    "measure_moments",
    "ops",
    "passes",
    "quantization_report",
]
