"""One script, and no other."""

import base64
import hashlib

from aiohttp import web

SCRIPT = "document.querySelector('h1').textContent = 'Open until six'"


class Notice(web.View):
    async def get(self):
        text = self.request.query.get("text", "")
        html = "<meta name=color-scheme content='light dark'><h1>Notice</h1>"
        html += f"<p>{text}</p><script>{SCRIPT}</script>"
        return web.Response(text=html, content_type="text/html")


async def allow_script(request, response):
    if request.path == "/notice":
        digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
        script = f"; script-src 'self' 'sha256-{digest}'"
        response.headers["Content-Security-Policy"] += script
