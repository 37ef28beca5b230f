"""One paper, one small file: each names the paper, composes shared parts and gives the paper's defaults."""
