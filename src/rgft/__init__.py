"""Residual-guided fine-tuning: spend compute where the error is.

Two lines in any PyTorch loop:

    import rgft
    guide = rgft.Guide(model, optimizer)
"""

from rgft.components import Component as Component
from rgft.components import ParameterSlice as ParameterSlice
from rgft.components import partition as partition
from rgft.config import Config as Config
from rgft.costs import CostModel as CostModel
from rgft.costs import FlopMeter as FlopMeter
from rgft.error_map import ErrorMap as ErrorMap
from rgft.errors import EngagementError as EngagementError
from rgft.errors import InputError as InputError
from rgft.execution.agreement import Agreement as Agreement
from rgft.execution.agreement import gradient_agreement as gradient_agreement
from rgft.execution.bypass import Bypass as Bypass
from rgft.execution.real_groups import split_groups as split_groups
from rgft.guide import Guide as Guide
from rgft.methods import METHODS as METHODS
from rgft.methods import Method as Method
from rgft.methods import find_method as find_method
from rgft.plan import Plan as Plan
from rgft.policies import POLICIES as POLICIES
from rgft.policies import Policy as Policy
from rgft.policies import Situation as Situation
from rgft.residuals import Ledger as Ledger
from rgft.scoring import Probe as Probe
from rgft.signals import SIGNALS as SIGNALS
from rgft.signals import Signal as Signal
from rgft.signals import Statistics as Statistics
from rgft.spending import Budget as Budget
from rgft.spending import Spending as Spending
from rgft.stages import Yardstick as Yardstick
from rgft.structure.dropout import turn_off_dropout as turn_off_dropout
from rgft.structure.residual_branches import ResidualBranches as ResidualBranches
from rgft.structure.residual_branches import residual_branches as residual_branches

__version__ = "0.1.0"
