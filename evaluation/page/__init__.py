"""All saved answers side by side, as a page and as a table."""
