"""Losses as their authors' released code computes them: the same sequence of tensor operations, one file per op.

``published(**kwargs)`` takes the arguments of the op and returns what the op returns; autograd makes the gradients.
"""
