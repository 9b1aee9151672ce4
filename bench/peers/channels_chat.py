"""Django Channels' tutorial: a consumer, and a group in the channel layer.

The tutorial's layer is Redis. This one is in memory, which is faster for one process.
Served as the tutorial says, by daphne.
"""

import json

import django
from django.conf import settings

settings.configure(
    SECRET_KEY="for the benchmark",
    ALLOWED_HOSTS=["127.0.0.1"],
    INSTALLED_APPS=[
        "daphne",
        "django.contrib.auth",
        "django.contrib.contenttypes",
        "django.contrib.sessions",
    ],
    CHANNEL_LAYERS={"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}},
)
django.setup()

from channels.auth import AuthMiddlewareStack  # noqa: E402
from channels.generic.websocket import AsyncWebsocketConsumer  # noqa: E402
from channels.routing import ProtocolTypeRouter, URLRouter  # noqa: E402
from channels.security.websocket import AllowedHostsOriginValidator  # noqa: E402
from django.core.asgi import get_asgi_application  # noqa: E402
from django.urls import re_path  # noqa: E402


class Chat(AsyncWebsocketConsumer):
    async def connect(self):
        await self.channel_layer.group_add("chat_room", self.channel_name)
        await self.accept()

    async def disconnect(self, code):
        await self.channel_layer.group_discard("chat_room", self.channel_name)

    async def receive(self, text_data):
        event = {"type": "chat.message", "message": json.loads(text_data)}
        await self.channel_layer.group_send("chat_room", event)

    async def chat_message(self, event):
        await self.send(text_data=json.dumps(event["message"]))


routes = URLRouter([re_path(r"^ws$", Chat.as_asgi())])
application = ProtocolTypeRouter(
    {
        "http": get_asgi_application(),
        "websocket": AllowedHostsOriginValidator(AuthMiddlewareStack(routes)),
    }
)
