"""What a run did: the page and the pictures of `ofb report`, and the table a search ends with."""

from ofb.report.dense_training import dense_training, dense_training_note
from ofb.report.figures import comparison_table, figures, latencies_of
from ofb.report.write import write_report

__all__ = ["comparison_table", "dense_training", "dense_training_note", "figures", "latencies_of", "write_report"]
