"""What records can support: intervals, corrected tests, profiles over tasks, quality over cost."""

from rgft.bench.statistics.costs import area_under, cost_to_target
from rgft.bench.statistics.paired import holm, interval, paired_p
from rgft.bench.statistics.profiles import performance_profile

__all__ = ["area_under", "cost_to_target", "holm", "interval", "paired_p", "performance_profile"]
