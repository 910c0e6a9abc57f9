"""REPORTS of an evaluation for people: `report.html`, one self-contained file, and `report.md`, from `results.json`.

Numbers are made elsewhere; here they are put into words, tables and pictures, and no word says more than its numbers.
"""

from specontext.evaluation.report.files import ReportError, write_report

__all__ = ["ReportError", "write_report"]
