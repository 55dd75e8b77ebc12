"""The method, as a library: a timm model with bi-masks on it. Knows nothing of files, data sets or processes."""

from ofb.supernet.losses import adaptive_one_hot_loss
from ofb.supernet.search_space import SearchSpace
from ofb.supernet.supernet import Losses, Supernet

__all__ = ["Losses", "SearchSpace", "Supernet", "adaptive_one_hot_loss"]
