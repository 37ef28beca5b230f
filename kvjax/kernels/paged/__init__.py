"""Attention of heads that read pages by a table: pools that heads share, and pages that a query chooses."""

from kvjax.kernels.paged.request import PagedRequest as PagedRequest
