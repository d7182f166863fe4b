"""Evaluations and training runs as one self-contained HTML page: figures, curves, and every episode to be read.

The page loads nothing, runs no script but its own, and sets all foreign text as text: what a passage holds cannot run.
"""

from agentgym_ig.report.page import write_report
from agentgym_ig.report.runs import Found, find_runs

__all__ = ["Found", "find_runs", "write_report"]
