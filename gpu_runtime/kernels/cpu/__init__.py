"""The fast CPU backend: numba kernels over explicit vectors, one compiled call for all layers of a step.

Every result here is a pure function of its own row: each output element is summed by one thread in one fixed order, so
a token's numbers do not depend on the rest of the batch, on the number of threads, or on how a prompt was chunked.
"""
