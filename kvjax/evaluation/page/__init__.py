"""A run as one page: `make_page` of `read_run`, and its figures as files."""

from kvjax.evaluation.page.data import page_data as page_data
from kvjax.evaluation.page.folder import Job as Job, Run as Run, read_run as read_run
from kvjax.evaluation.page.html import make_page as make_page
