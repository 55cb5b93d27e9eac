"""Sphinx configuration."""

project = "Lightning AutoLR"
author = "the Lightning AutoLR developers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx.ext.doctest"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
autodoc_typehints = "description"
autodoc_member_order = "bysource"
html_theme = "furo"
exclude_patterns = ["_build"]
nitpicky = False  # types of torch and Lightning are not linked
myst_heading_anchors = 3
linkcheck_anchors_ignore_for_url = [r"https://github\.com/.*"]  # made by scripts
