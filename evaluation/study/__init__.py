"""The study: its plan, its runs, and the tables and figures of its report."""
