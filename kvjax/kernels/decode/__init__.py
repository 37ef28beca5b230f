"""Attention of a few new tokens over a stored cache."""

from kvjax.kernels.decode.request import Request as Request, Tail as Tail
