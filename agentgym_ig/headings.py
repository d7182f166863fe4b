"""The figures of an evaluation, in the order of a table's columns, and how they are headed."""

HEADINGS = {
    "em": "EM", "f1": "F1", "cover_em": "cover", "em_igpo": "EM (IGPO)", "f1_igpo": "F1 (IGPO)", "judge": "judge",
    "recall": "recall", "searches": "queries", "turns": "turns", "tokens": "tokens", "format_valid": "well-formed",
    "answered": "answered", "truncated": "cut off", "failed": "failed", "info_gain": "nats a turn",
}  # fmt: skip
PLAIN = ("searches", "turns", "tokens", "info_gain")
"""Figures that are no shares, and are not shown in percent."""
