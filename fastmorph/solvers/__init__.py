"""One file an algorithm; each solver is a frozen object of settings."""

from fastmorph.solvers.auto import Auto
from fastmorph.solvers.base import Solver
from fastmorph.solvers.direct import Direct
from fastmorph.solvers.general import General
from fastmorph.solvers.practical import Practical

__all__ = ["Auto", "Direct", "General", "Practical", "Solver"]
