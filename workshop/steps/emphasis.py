"""A filter for a template."""

import re

from markupsafe import Markup, escape


def emphasis(text):
    html = str(escape(text))
    return Markup(re.sub(r"\*(\S[^*]*)\*", r"<em>\1</em>", html))
