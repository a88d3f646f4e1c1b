import pytest

pytest.importorskip("triton")

import attention


def test_table():
    results = [
        {
            "batch": 1,
            "context": 1024,
            "bytes": {2.0: 1_000_000, 4.0: 2_000_000},
            "bytes_bf16": 8_000_000,
            "time_us": {"flash rows": 8.0, "flash gqa": 10.0, "ours 2": 4.0, "ours 4": 16.0},
        }
    ]
    header, _, first, second = ([cell.strip() for cell in line.strip("|").split("|")] for line in attention.table(results).splitlines())
    rows = [dict(zip(header, row, strict=True)) for row in (first, second)]
    assert [row["ours is"] for row in rows] == ["2.00x", "0.50x"]
    assert rows[0]["by"] == "flash rows" and rows[0]["fp8 bound, us"] == "4.0"
    assert rows[1]["cache, MB"] == "2.0" and rows[1]["GB/s"] == "125"
    results[0]["time_us"] |= {"ours 2 paged": 5.0, "ours 4 paged": 17.0}
    last = [line.strip("|").split("|")[-1].strip() for line in attention.table(results).splitlines()]
    assert last == ["paged, us", "---", "5.0", "17.0"] and "| flash rows | 2.00x |" in attention.table(results)
