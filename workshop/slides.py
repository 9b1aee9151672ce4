"""Make slides of the notebook: one file that needs no network.

    npm pack reveal.js@4.6.1
    tar xzf reveal.js-4.6.1.tgz
    python -m workshop.slides package slides.html

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
STYLE = """<style>
.reveal h1 { font-size: 44px } .reveal pre { font-size: 17px }
.reveal :is(.jp-InputPrompt, .jp-OutputPrompt, .anchor-link) { display: none }
.reveal .slides section { overflow: hidden auto }
</style>"""
START = """
const look = { width: 1100, height: 700, margin: 0.02, center: false };
const moves = { history: true, transition: "none", plugins: [RevealNotes] };
Reveal.initialize({ ...look, ...moves });
function fit({ currentSlide: slide }) {  // a tall slide shrinks first, then scrolls
  slide.style.zoom = 1;
  slide.style.zoom = Math.max(0.65, Math.min(1, 690 / slide.scrollHeight));
  slide.style.maxHeight = `${700 / slide.style.zoom}px`;
}
Reveal.on("ready", fit);
Reveal.on("slidechanged", fit);
"""
LIVE = "<p><em>In the notebook, the chat is here, in a live frame.</em></p>"


def build(reveal: Path, notebook=None) -> str:
    """Return a page with the slides of a notebook, and reveal.js in it."""
    if notebook is None:
        notebook = nbformat.read(HERE / "tutorial.ipynb", as_version=4)
        runner = ExecutePreprocessor(timeout=60, kernel_name="python3")
        notebook, _ = runner.preprocess(notebook, {"metadata": {"path": str(HERE)}})
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "<iframe" in output.get("data", {}).get("text/html", ""):
                output.data["text/html"] = LIVE
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
    start += f"{STYLE}<script>{START}</script>"
    last = re.compile(r"<script>\s*require\(.*</script>", re.DOTALL)
    return last.sub(lambda match: start, page)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(build(Path(sys.argv[1])), "utf-8")
