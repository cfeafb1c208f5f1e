"""What happened to the weights: how much each changed, in which directions, and what of that is new.

changes     per matrix: size, spectrum, effective rank, amplification; from the factors where there are factors
similarity  whether two adapters changed the same directions
intruders   new directions among the largest of a fine-tuned weight, and how to turn them down
result      a table, JSON
forgetting  the change in loss on general text and on other tasks
pictures    layer x kind, spectra, similarity, forgetting
"""

from lorax.analysis.changes import Change, analyze
from lorax.analysis.forgetting import Forgotten, forgetting
from lorax.analysis.intruders import Intruders, intruders, mitigate
from lorax.analysis.result import Analysis
from lorax.analysis.similarity import phi, similarity

__all__ = [
    "Analysis",
    "Change",
    "Forgotten",
    "Intruders",
    "analyze",
    "forgetting",
    "intruders",
    "mitigate",
    "phi",
    "similarity",
]
