"""What a training step costs: FLOPs of forward, input gradients and weight gradients.

A model is traced once per batch shape on the meta device: every tensor operation becomes a node of
a graph. The cost of any plan follows from that graph by asking, as autograd does, which values
require a gradient. One multiply-add counts as two FLOPs; element-wise work and the optimizer count
as nothing, the convention of `torch.utils.flop_counter`.
"""

from rgft.costs.by_component import ComponentCosts as ComponentCosts
from rgft.costs.by_component import component_costs as component_costs
from rgft.costs.conditions import Condition as Condition
from rgft.costs.graph import Graph as Graph
from rgft.costs.graph import StepCost as StepCost
from rgft.costs.latest import LatestCosts as LatestCosts
from rgft.costs.meter import Counts as Counts
from rgft.costs.meter import FlopMeter as FlopMeter
from rgft.costs.model import Action as Action
from rgft.costs.model import CostModel as CostModel
from rgft.costs.seconds import StepSeconds as StepSeconds
from rgft.costs.seconds import calibrate as calibrate
from rgft.costs.seconds import fit_seconds as fit_seconds
