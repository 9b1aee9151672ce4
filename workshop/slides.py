"""Make slides of the notebook: one file that needs no network.

    npm pack reveal.js@4 && tar xzf reveal.js-4*.tgz
    python -m workshop.slides package tutorial.slides.html

It runs the notebook first. `package` is the folder that was unpacked. The live frames
work in the notebook only.
"""

import re
import sys
from pathlib import Path

import nbformat
from nbconvert import SlidesExporter
from nbconvert.preprocessors import ExecutePreprocessor

HERE = Path(__file__).parent.parent
START = """
Reveal.initialize({ history: true, width: 960, height: 700, plugins: [RevealNotes] });
Reveal.on("slidechanged", ({ currentSlide: slide }) => {
  if (slide.scrollHeight < 680) return;
  slide.style = "height: 95vh; overflow-y: scroll; margin-top: 20px; display: block";
});
"""


def build(reveal: Path, notebook=None) -> str:
    """Return a page with the slides of a notebook, and reveal.js in it."""
    if notebook is None:
        notebook = nbformat.read(HERE / "tutorial.ipynb", as_version=4)
        runner = ExecutePreprocessor(timeout=60, kernel_name="python3")
        notebook, _ = runner.preprocess(notebook, {"metadata": {"path": str(HERE)}})
    page, _ = SlidesExporter(reveal_url_prefix="reveal.js").from_notebook_node(notebook)

    def script(name: str) -> str:
        return f"<script>{(reveal / name).read_text('utf-8')}</script>"

    def style(match) -> str:
        css = (reveal / match[1]).read_text("utf-8")
        return "<style>" + re.sub("@import url.*", "", css) + "</style>"  # fonts

    # The page that nbconvert makes loads five scripts from the Internet.
    page = re.sub(r"<script[^>]*https?://[^>]*>\s*</script>", "", page)
    page = re.sub(r"<script type=\"module\">.*?</script>", "", page, flags=re.DOTALL)
    page = re.sub(r'<link[^>]* href="reveal.js/(.*?)"[^>]*>', style, page)
    start = script("dist/reveal.js") + script("plugin/notes/notes.js")
    start += f"<script>{START}</script>"
    last = re.compile(r"<script>\s*require\(.*</script>", re.DOTALL)
    return last.sub(lambda match: start, page)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(build(Path(sys.argv[1])), "utf-8")
