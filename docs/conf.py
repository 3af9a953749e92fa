"""The documentation as a site: `make docs` builds it into build/docs, without a network.

Pages are the Markdown files that GitHub shows too. Added when the site is built: lists of error messages, the gallery
of recipes, the reference of the API, and what notebooks show (`DOCS_EXECUTE=1`, as `make docs` has it, runs them).
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import vlm_mech  # noqa: E402

project = "vlm_mech"
author = "The vlm_mech authors"
copyright = "the vlm_mech authors, Apache-2.0"
release = version = vlm_mech.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "site_pages"]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb", ".rst": "restructuredtext"}

# Furo: light, without requests to anywhere, good on small screens, follows the system's dark mode.
html_theme = "furo"
html_title = f"vlm_mech {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["llms.txt"]
html_copy_source = False

myst_heading_anchors = 4
suppress_warnings = ["myst.header", "myst.xref_ambiguous"]

nb_execution_mode = "force" if os.environ.get("DOCS_EXECUTE") == "1" else "off"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_merge_streams = True
nb_ipywidgets_js = {}
os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
add_module_names = False
