from __future__ import annotations

import sys


def pytest_addoption(parser):
    parser.addoption(
        "--compile-all",
        action="store_true",
        help="compile a full pass and a decoding step in every cell of the matrix; by default each scheme on two "
        "families",
    )


def pytest_terminal_summary(terminalreporter):
    matrix = sys.modules.get("tests.matrix")
    if matrix is None or not matrix.OUTCOMES:
        return
    terminalreporter.section("matrix")
    for line in matrix.plain():
        terminalreporter.write_line(line)
    terminalreporter.write_line(matrix.legend(terminalreporter.config.getoption("--compile-all")))
