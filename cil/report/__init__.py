"""One self-contained page about a run, or about several beside each other, from their run folders alone."""

from cil.report.pages import find_runs, write_comparison, write_report, write_tables

__all__ = ["find_runs", "write_comparison", "write_report", "write_tables"]
