"""The suites of the equation: solvers against numpy's dense ones, and against themselves at other sizes."""
