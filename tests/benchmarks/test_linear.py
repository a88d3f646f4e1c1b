import pytest

pytest.importorskip("triton")

import linear
import torch

from hq_inductor.ops.launch import LinearLaunch, linear_launch
from hq_inductor.ops.launch_table import Shape, read_table


def test_table_and_floor():
    results = [
        {"N": 1000, "K": 4000, "M": 1, "time_us": {"ours int8": 5.0, "cuBLAS bf16": 4.0}},
        {"N": 1000, "K": 8000, "M": 1, "time_us": {"ours int8": 2.5, "ours auto": 2.0, "cuBLAS bf16": 5.0, "int4 tinygemm": 4.0}},
    ]
    assert linear.read_rate(results) == 16e6 / 5  # bytes per microsecond
    header, _, first, second = ([cell.strip() for cell in line.strip("|").split("|")] for line in linear.table(results, 4.0).splitlines())
    rows = [dict(zip(header, row, strict=True)) for row in (first, second)]
    assert [row["best ours / bf16"] for row in rows] == ["0.80", "2.50"]
    assert rows[0]["int4 tinygemm"] == "-" and rows[1]["floor"] == "1.2"  # 4 MB at 3.2 MB/us
    assert rows[1]["GB/s"] == "2000" and rows[1]["G weights/s"] == "4000"


def test_tune_saves_what_beats_the_rules(monkeypatch, tmp_path, capsys):
    """With times that are made up: one launch is faster at all batches, one at batch 8 alone, one by 1 % everywhere."""
    faster = LinearLaunch(8, 50, 8, 128)

    def tune(rows, columns, batches, bps):
        shape, times = Shape(0, rows, columns // 512, 64), {}
        for batch in batches:
            tried = linear.launches_to_try(shape, batch, 132, True)
            assert tried[0] == linear_launch(batch, *shape[1:3], 132, 64, True) and len(set(tried)) == len(tried)
            times[batch] = {launch: 100.0 + index for index, launch in enumerate(tried)}
            times[batch][tried[1]] = 50.0 if batch == 8 else 101.0
            times[batch][tried[2]] = 99.0
            if batch <= 8 and rows == 6144:
                times[batch][faster] = 80.0
        return shape, times

    monkeypatch.setattr(linear, "tune", tune)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    path = tmp_path / "launches.json"
    linear.tune_all([(6144, 4096), (4096, 4096)], linear.TUNED_BATCHES + linear.TUNED_RING_BATCHES, 4.0, str(path))
    assert read_table(path, True) == {Shape(8, 6144, 8, 64): faster}
    assert '"gain": 1.25}' in path.read_text() and '"device": "NVIDIA H200"' in path.read_text()
    printed = capsys.readouterr().out
    assert "6144 x 4096, batch 8; by rule 100.0 us:\n    50.0 us LinearLaunch" in printed and "1 launches written" in printed
