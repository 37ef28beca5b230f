"""Commands of `kvjax` that are too long for `cli.py`, and what all of them share."""
