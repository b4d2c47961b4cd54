"""What many processes do together: a program that tests start.

Each module has its ``SCENARIOS``, functions of a folder, the process's number and how many there
are. What they share with one process, the trainings, tests call for themselves.
"""

from . import checkpoints, faults, refusals, trainings

__all__ = ["SCENARIOS", "checkpoints", "faults", "trainings"]

SCENARIOS = trainings.SCENARIOS | checkpoints.SCENARIOS | faults.SCENARIOS | refusals.SCENARIOS
