import pytest

pytest.importorskip("triton")

import linear


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
