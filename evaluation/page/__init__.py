"""The page on which outputs are read and compared: template, style, script, and what fills them."""
