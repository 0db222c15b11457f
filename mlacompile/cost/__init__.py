"""What each form of latent attention costs, as formulas: FLOPs, bytes, time, and where one form becomes the cheaper.

``forms`` holds the formulas, ``hardware`` the rates, ``predict`` puts them together, ``border`` solves for the
number of
queries at which the forms cost the same, ``chains`` orders products, ``plot`` draws. Everything is in elements,
bytes,
FLOPs (a multiplication and an addition are two) and seconds.
"""

from mlacompile.cost.border import border
from mlacompile.cost.hardware import Hardware, find_hardware
from mlacompile.cost.predict import Prediction, cheapest, predict

__all__ = ["Hardware", "Prediction", "border", "cheapest", "find_hardware", "predict"]
