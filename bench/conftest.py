"""pytest-benchmark runs and saves; its report is reduced to rows, each complete in itself."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--budget", type=float, default=1.0, help="seconds a provider, shape and mode")


@pytest.fixture(scope="session")
def budget(request: pytest.FixtureRequest) -> float:
    return request.config.getoption("--budget")


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(output_json: dict) -> None:
    commit = output_json["commit_info"]
    rows = [
        {**row, "commit": commit["id"], "dirty": commit["dirty"], "date": output_json["datetime"]}
        for benchmark in output_json["benchmarks"]
        for row in benchmark["extra_info"]["rows"]
    ]
    output_json.clear()
    output_json["rows"] = rows
