"""Timing backends against each other, in one interleaved run: what `attnreg bench` does."""

from attnreg.bench.measuring import benchmark
from attnreg.bench.report import Report, Row
from attnreg.bench.workload import Workload

__all__ = ["Report", "Row", "Workload", "benchmark"]
