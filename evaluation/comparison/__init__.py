"""Parts of compare.py: its runs, what is measured of them, the report and its page."""
