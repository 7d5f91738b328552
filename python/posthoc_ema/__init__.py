"""Averages of network weights of any length, chosen after training.

The method is post-hoc EMA (Karras et al. 2023, arXiv:2312.02696).

During training and after it:

    ema = PostHocEMA.from_model(model, "runs/ema")
    for batch in batches:
        ...                                                # one training step
        ema.update_(model)

    with ema.model(model, sigma_rel=0.15) as averaged:     # then training continues
        evaluate(averaged)

    with PostHocEMA.from_path("runs/ema").state_dict(sigma_rel=0.15) as state_dict:
        model.load_state_dict(state_dict)
"""

from . import visualization
from ._advise import Advice, advise
from ._average import Average, CheckpointWeight, ProductErrors, average
from ._import import Imported, import_run
from ._import_averages import import_averages
from ._native import __version__
from ._plans import Noise, Plan, Predicted, Retention, Weight, WorstGroup, plan
from ._profiles import Profile, Target
from ._trials import Best, Comparison, SweepLine, Swept, Trial
from .karras_ema import KarrasEMA
from .posthoc_ema import PostHocEMA

__all__ = [
    "Advice",
    "Average",
    "Best",
    "CheckpointWeight",
    "Comparison",
    "Imported",
    "KarrasEMA",
    "Noise",
    "Plan",
    "PostHocEMA",
    "Predicted",
    "ProductErrors",
    "Profile",
    "Retention",
    "SweepLine",
    "Swept",
    "Target",
    "Trial",
    "Weight",
    "WorstGroup",
    "__version__",
    "advise",
    "average",
    "import_averages",
    "import_run",
    "plan",
    "visualization",
]
