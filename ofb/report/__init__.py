"""What a run did: the page and the pictures of `ofb report`, and the table a search ends with."""

from ofb.report.figures import comparison_table, cpu_latency, figures
from ofb.report.write import write_report

__all__ = ["comparison_table", "cpu_latency", "figures", "write_report"]
