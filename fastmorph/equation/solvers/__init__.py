"""One file an algorithm; each solver is a frozen object of settings."""

from fastmorph.equation.solvers.auto import Auto
from fastmorph.equation.solvers.base import Choice, Equation, Solution, Solver
from fastmorph.equation.solvers.direct import Direct
from fastmorph.equation.solvers.general import General
from fastmorph.equation.solvers.practical import Practical

__all__ = ["Auto", "Choice", "Direct", "Equation", "General", "Practical", "Solution", "Solver"]
