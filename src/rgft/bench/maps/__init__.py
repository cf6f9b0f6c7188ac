"""What error maps of several runs have in common: over seeds, tasks, methods and a run's course."""

from rgft.bench.maps.agreement import comparable
from rgft.bench.maps.questions import all_tables
from rgft.bench.maps.run_maps import LEAST_COMPONENTS, RunMap, run_maps

__all__ = ["LEAST_COMPONENTS", "RunMap", "all_tables", "comparable", "run_maps"]
