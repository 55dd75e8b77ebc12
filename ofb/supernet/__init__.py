"""The method, as a library: a timm model with bi-masks on it. Knows nothing of files, data sets or processes."""

from ofb.supernet.latency import LatencyTable, measure_latency
from ofb.supernet.losses import Losses, adaptive_one_hot_loss
from ofb.supernet.search_space import SearchSpace
from ofb.supernet.supernet import Supernet

__all__ = ["LatencyTable", "Losses", "SearchSpace", "Supernet", "adaptive_one_hot_loss", "measure_latency"]
