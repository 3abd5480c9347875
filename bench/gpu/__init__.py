"""The suite for a GPU: `python -m bench.gpu [check] [time] [tune] [tests]`, each part within eight minutes.

It needs no installation: `PYTHONPATH=.:kernels python3 -m bench.gpu` from the root of the repository. Without a GPU,
`--rehearse` runs the same code at tiny sizes through Triton's interpreter; its figures mean nothing and are not recorded.
"""
